"""Options of UNets as YAML files of CompVis and Stability AI write them."""

UNET = {
    **{"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32},
    **{"attention_resolutions": [2, 1], "num_res_blocks": 1, "channel_mult": [1, 2]},
    **{"num_heads": 8, "use_spatial_transformer": True, "context_dim": 16},
}
SD2 = {
    **{"use_checkpoint": True, "use_fp16": True, "image_size": 32, "legacy": False},
    **{"in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": 2},
    **{"attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4]},
    **{"num_head_channels": 64, "use_spatial_transformer": True, "context_dim": 1024},
    **{"use_linear_in_transformer": True, "transformer_depth": 1},
}
UPSCALER = {name: x for name, x in SD2.items() if name not in ("use_fp16", "num_head_channels")} | {
    **{"num_classes": 1000, "image_size": 128, "in_channels": 7, "num_heads": 8},
    **{"model_channels": 256, "attention_resolutions": [2, 4, 8], "channel_mult": [1, 2, 2, 4]},
    "disable_middle_self_attn": False,
    "disable_self_attentions": [True, True, True, False],
}
