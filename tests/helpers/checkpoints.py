"""Whole checkpoints of CompVis at tiny size, with all that real files hold beside the model.

Names come from the golden files and from lists written out here, not from our tables.
"""

import json
import re

import numpy as np
from reference import GOLDEN, weight

BUFFERS = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"),
    *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"),
    *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
    *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
)
LOSSES = {
    "loss.logvar": (),
    "loss.perceptual_loss.scaling_layer.shift": (1, 3, 1, 1),
    "loss.perceptual_loss.net.slice1.0.weight": (4, 3, 3, 3),
    "loss.perceptual_loss.lin0.model.1.weight": (1, 4, 1, 1),
    "loss.discriminator.main.0.weight": (4, 3, 4, 4),
    "loss.discriminator.main.3.running_mean": (4,),
    "loss.discriminator.main.3.num_batches_tracked": (),
}
UNET, FIRST_STAGE, COND_STAGE = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


def golden(name):
    """(description, {parameter: shape}) of a golden model."""
    about = json.loads((GOLDEN / f"{name}.json").read_text())
    return about, {key: tuple(shape) for key, shape in about["parameters"].items()}


def filled(shapes, prefix="", salt=""):
    """Numbers by name, so that no two tensors are equal."""
    return {prefix + n: weight(salt + prefix + n, shape) for n, shape in shapes.items()}


def buffers():
    return {name: np.linspace(0, 1, 1000, dtype=np.float32) for name in BUFFERS}


def averages(unet):
    """`model_ema.*` of a UNet with its prefix: the dots are deleted."""
    copies = {
        "model_ema." + n.removeprefix("model.").replace(".", ""): weight("ema" + n, x.shape)
        for n, x in unet.items()
    }
    return copies | {"model_ema.decay": np.float32(0.9999), "model_ema.num_updates": np.int32(1000)}


def kl():
    """(params of first_stage_config, shapes) of a KL first stage with 4 channels."""
    about, shapes = golden("ae_kl_f8_attn")
    shapes |= {"quant_conv.weight": (8, 8, 1, 1), "quant_conv.bias": (8,)}
    shapes |= {"post_quant_conv.weight": (4, 4, 1, 1)}
    return {"embed_dim": 4, "ddconfig": about["ddconfig"]}, shapes


def vq():
    about, shapes = golden("ae_vq_f4")
    return {"embed_dim": 3, "n_embed": about["n_embed"], "ddconfig": about["ddconfig"]}, shapes


def section(unet, first_stage, cond_stage, **params):
    """The `model` section of a YAML."""
    return {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            **params,
            "image_size": 8,
            "unet_config": {"target": "openaimodel.UNetModel", "params": unet},
            "first_stage_config": {"target": "autoencoder.Model", "params": first_stage},
            "cond_stage_config": cond_stage,
        },
    }


def churches():
    """(model section, tensors): a scale of its own, averaged weights, no condition."""
    about, shapes = golden("unet_churches")
    first_stage, first_shapes = kl()
    unet = filled(shapes, UNET)
    tensors = buffers() | {"scale_factor": np.float32(0.22)} | unet | averages(unet)
    tensors |= filled(first_shapes, FIRST_STAGE)
    options = {"scale_by_std": True, "linear_start": 0.0015, "linear_end": 0.0155}
    options |= {"loss_type": "l1", "concat_mode": False}
    return section(about["config"], first_stage, "__is_unconditional__", **options), tensors


def inpainting_big():
    """(model section, tensors): the first stage stands twice."""
    about, shapes = golden("unet_celeba")
    shapes["input_blocks.0.0.weight"] = (32, 7, 3, 3)
    first_stage, first_shapes = vq()
    tensors = buffers() | filled(shapes, UNET) | filled(first_shapes, FIRST_STAGE)
    tensors |= {
        name.replace(FIRST_STAGE, COND_STAGE): x
        for name, x in tensors.items()
        if name.startswith(FIRST_STAGE)
    }
    options = {"concat_mode": True, "cond_stage_key": "masked_image"}
    unet = about["config"] | {"in_channels": 7}
    return section(unet, first_stage, "__is_first_stage__", **options), tensors


def standalone_first_stage():
    """(model section, tensors): no prefix, and the losses it was trained with."""
    params, shapes = vq()
    model = {"target": "ldm.models.autoencoder.VQModel", "params": params}
    return model, filled(shapes) | filled(LOSSES)


def stable_diffusion():
    """(YAML's model section, tensors) of version 1 with averaged weights."""
    about, shapes = golden("unet_txt2img")
    wide = re.compile(r"attn2\.to_[kv]\.weight$")
    shapes = {n: (s[0], 64) if wide.search(n) else s for n, s in shapes.items()}
    first_stage, first_shapes = kl()
    unet = filled(shapes, UNET)
    tensors = buffers() | unet | averages(unet) | filled(first_shapes, FIRST_STAGE)
    tensors |= filled(clip_text(64, 2, 50, 9), COND_STAGE)
    ids = f"{COND_STAGE}transformer.text_model.embeddings.position_ids"
    tensors[ids] = np.arange(9, dtype=np.int64)[None]
    cond = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    options = {"conditioning_key": "crossattn", "scale_factor": 0.18215}
    options |= {"linear_start": 0.00085, "linear_end": 0.012, "cond_stage_key": "txt"}
    return section(about["config"] | {"context_dim": 64}, first_stage, cond, **options), tensors


def clip_text(width, layers, vocab, length):
    """{parameter: shape} of FrozenCLIPEmbedder."""
    shapes = {
        "embeddings.token_embedding.weight": (vocab, width),
        "embeddings.position_embedding.weight": (length, width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    for i in range(layers):
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"encoder.layers.{i}.self_attn.{part}.weight"] = (width, width)
            shapes[f"encoder.layers.{i}.self_attn.{part}.bias"] = (width,)
        for part, shape in (("fc1", (4 * width, width)), ("fc2", (width, 4 * width))):
            shapes[f"encoder.layers.{i}.mlp.{part}.weight"] = shape
            shapes[f"encoder.layers.{i}.mlp.{part}.bias"] = shape[:1]
        for part in ("layer_norm1", "layer_norm2"):
            for leaf in ("weight", "bias"):
                shapes[f"encoder.layers.{i}.{part}.{leaf}"] = (width,)
    return {f"transformer.text_model.{name}": shape for name, shape in shapes.items()}


def lightning(tensors):
    """What `torch.save` of a training run holds around the state dict."""
    import torch

    state_dict = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
    state = {"step": 7, "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    return {
        "epoch": 3,
        "global_step": 1000,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {"ModelCheckpoint": {"best_model_path": "x", "best_k_models": {}}},
        "optimizer_states": [{"state": {0: state}, "param_groups": [{"lr": 1e-4, "params": [0]}]}],
        "lr_schedulers": [{"last_epoch": 1000}],
        "state_dict": state_dict,
    }
