"""Tiny pipelines of torch diffusers with random weights, saved as folders."""

import text_model

SD_SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


def clip_tokenizer(folder):
    """CLIPTokenizer; its files are in `folder` then."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(text_model.clip_tokenizer(folder))


def autoencoder(levels=2, quiet=False):
    """AutoencoderKL; with `quiet` its posterior has next to no variance."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(32, 64, 32, 32)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        sample_size=8 * 2 ** (levels - 1),
    )
    if quiet:
        with torch.no_grad():
            vae.quant_conv.weight[4:] = 0
            vae.quant_conv.bias[4:] = -30
    return vae.eval()


def unet(in_channels=4, width=32, **options):
    """UNet2DConditionModel of two levels."""
    from diffusers import UNet2DConditionModel

    options = {"attention_head_dim": 4, **options}
    return UNet2DConditionModel(
        sample_size=8, in_channels=in_channels, out_channels=4, block_out_channels=(32, 64),
        layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=width, **options,
    ).eval()  # fmt: skip


def clip_text(tokenizer, **options):
    """CLIPTextModel that knows the tokenizer's ids."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **options,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def stable_diffusion(folder, kind="v1"):
    """StableDiffusionPipeline ("v1", "v") or StableDiffusionInpaintPipeline ("inpaint")."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline, StableDiffusionPipeline

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder.parent / f"{folder.name}_tokenizer")
    scheduler, options, text = dict(SD_SCHEDULER), {}, {"hidden_act": "quick_gelu"}
    if kind == "v":
        scheduler |= {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
        options = {"use_linear_projection": True, "attention_head_dim": (2, 4)}
        text = {"hidden_act": "gelu"}
    cls = StableDiffusionInpaintPipeline if kind == "inpaint" else StableDiffusionPipeline
    made = cls(
        vae=autoencoder(quiet=kind == "inpaint"), text_encoder=clip_text(tokenizer, **text),
        tokenizer=tokenizer, unet=unet(in_channels=9 if kind == "inpaint" else 4, **options),
        scheduler=DDIMScheduler(**scheduler), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    return made


def latent_diffusion(folder):
    """LDMTextToImagePipeline, with the scheduler's defaults for what SD sets otherwise."""
    import torch
    from diffusers import DDIMScheduler, LDMTextToImagePipeline
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
        LDMBertConfig,
        LDMBertModel,
    )
    from transformers import BertTokenizer

    torch.manual_seed(0)
    words = text_model.bert_tokenizer(folder.parent / f"{folder.name}_tokenizer")
    tokenizer = BertTokenizer.from_pretrained(words)
    bert = LDMBertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=77, encoder_layers=2,
        encoder_ffn_dim=128, encoder_attention_heads=2, head_dim=8, d_model=32,
    )  # fmt: skip
    scheduler = {k: v for k, v in SD_SCHEDULER.items() if not k.startswith(("set_", "steps_"))}
    made = LDMTextToImagePipeline(
        vqvae=autoencoder(levels=4), bert=LDMBertModel(bert).eval(), tokenizer=tokenizer,
        unet=unet(), scheduler=DDIMScheduler(**scheduler),
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    return made
