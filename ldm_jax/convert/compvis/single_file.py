"""Recognise the model of a bare checkpoint by the names and shapes of its tensors.

They determine everything except the number of attention heads, the schedule and the prediction
type; those follow from the family of models, or are guesses where the family leaves them open.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm_jax import schema

UNET = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."
COND_STAGE = "cond_stage_model."
LATENT_SIDE = {" upscaler": 128}  # of a training image; 64 in the others but 2-v
VARIANTS = {"v2": "eps", "v2-v": "v", "eps": "eps", "v": "v"}
"""{variant: prediction of the UNet} of models with the same names and shapes. The first two are
version 2 (base and 768-v), the others also version 1 fine-tuned to predict v."""
SECOND_SIDE = {"eps": 64, "v": 96}
"""{prediction: side of a training image's latent} of version 2."""


class Recognized(NamedTuple):
    """Result of `recognize`."""

    config: schema.LatentDiffusionConfig
    scale: float
    """The latent scale."""
    family: str
    guesses: tuple[str, ...]
    """One sentence per value that the file does not show."""


def recognize(
    tensors: Mapping[str, Any], variant: str | None = None, prediction: str | None = None
) -> Recognized:
    """The model of a Stable Diffusion single file.

    tensors: name -> anything with `.shape`, EMA names replaced by the raw ones.
    variant: one of `VARIANTS` for a file that could be either.
    prediction: "eps" or "v", where the file has a marker that says it.
    Raises ValueError for a file that is none of versions 1 and 2, their inpainting models, the
    depth model, the x4 upscaler, and txt2img-1p4B.
    """
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    parts = {p: _part(shapes, p) for p in (UNET, FIRST_STAGE, COND_STAGE)}
    missing = [p for p, names in parts.items() if not names]
    if missing:
        raise ValueError(f"it has no tensors named {', '.join(f'{p}*' for p in missing)}")
    first_stage = first_stage_config(parts[FIRST_STAGE])
    text = _text(parts[COND_STAGE], parts[UNET])
    bert = isinstance(text.encoder, schema.BERTTextConfig)
    second = not bert and text.encoder.activation == "gelu"
    upscales = "label_emb.weight" in parts[UNET]
    heads = {"num_head_channels": 64} if second and not upscales else {"num_heads": 8}
    unet = unet_config(parts[UNET], **heads, upcast_attention=second)
    extra = unet.in_channels - first_stage.embed_dim
    concat, what, diffusion = _concat(extra, upscales, first_stage)
    name = "latent diffusion text2img" if bert else f"Stable Diffusion {2 if second else 1}{what}"
    guesses = ["its number of attention heads is that model's"]
    if second:
        blocks, layer = text.encoder.num_layers, text.encoder.layer
        guesses.append(f"its text is what the {layer} of the text encoder's {blocks} blocks gives")
    side = 32 if bert else LATENT_SIDE.get(what, 64)
    if bert or upscales:
        if variant is not None:
            raise ValueError(f"variant={variant!r}: its tensors tell that it is {name}")
    else:
        predicted, guess = _prediction(name, second and concat is None, variant, prediction)
        diffusion = dataclasses.replace(diffusion, prediction=predicted)
        guesses += guess
        side = SECOND_SIDE[predicted] if second and concat is None else side
    size = side * first_stage.downsample
    guesses.append(f"it was trained on images of {size} pixels")
    cond = text if concat is None else schema.HybridCondConfig(text, concat)
    config = schema.LatentDiffusionConfig(first_stage, unet, cond, diffusion, size)
    return Recognized(config, 0.08333 if upscales else 0.18215, name, tuple(guesses))


def _prediction(
    name: str, second: bool, variant: str | None, marked: str | None
) -> tuple[Any, list[str]]:
    """(prediction of the UNet, guesses): as asked, as the file says, else as most of its family.

    second: version 2 without an image beside the text, of which both kinds are published.
    """
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is not one of {', '.join(VARIANTS)}")
    if variant is not None:
        if variant.startswith("v2") and not second:
            raise ValueError(f"variant={variant!r}: its tensors tell that it is {name}")
        return VARIANTS[variant], []
    if marked is not None:
        return marked, []
    if second:
        return "v", ["it predicts v (--variant v2 is the base model, which predicts eps)"]
    return "eps", ["it predicts eps (--variant v is for a model that was trained to predict v)"]


def _concat(extra: int, upscales: bool, first_stage: schema.FirstStageModelConfig):
    """(concat conditioning, name of the family, diffusion) by the channels beside the latent."""
    sd = schema.DiffusionConfig()
    if upscales and extra == 3:
        v = schema.DiffusionConfig(beta_start=1e-4, beta_end=0.02, prediction="v")
        return schema.UpscaleCondConfig(factor=first_stage.downsample), " upscaler", v
    if extra == 0 and not upscales:
        return None, "", sd
    if extra == 1 and not upscales:
        return schema.DepthCondConfig(), " depth", sd
    if extra == first_stage.embed_dim + 1 and not upscales:
        cond = schema.InpaintCondConfig("mask_image", (0.0, 1.0), 0.0)
        return cond, " inpainting", sd
    labels = " and has class labels" if upscales else ""
    raise ValueError(f"its UNet takes {extra} channels beside the latent{labels}: no known model")


def _text(shapes: Mapping[str, tuple], unet: Mapping[str, tuple]) -> schema.TextCondConfig:
    """The text encoder; where a file holds two, the one whose width the UNet takes."""
    width = unet.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight", (0, 0))[1]
    second = shapes.get("model.ln_final.weight")
    first = shapes.get("transformer.text_model.final_layer_norm.weight")
    if second is not None and (first is None or first[0] != width or second[0] == width):
        return schema.TextCondConfig(open_clip_text_config(shapes), trainable=False)
    if first is not None:
        return schema.TextCondConfig(clip_text_config(shapes), trainable=False)
    if "transformer.token_emb.weight" in shapes:
        return schema.TextCondConfig(bert_config(shapes), trainable=True)
    raise ValueError(
        f"names like {COND_STAGE}{min(shapes)} belong to no known text encoder (CLIP, OpenCLIP,"
        " BERT)"
    )


def unet_config(
    shapes: Mapping[str, tuple],
    *,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    upcast_attention: bool = False,
) -> schema.UNetConfig:
    """Config of a UNet with cross-attention and plain down- and upsampling.

    shapes: name without prefix -> shape. The heads cannot be seen: give one of the two numbers.
    """
    width = shapes["input_blocks.0.0.weight"][0]
    levels: list[list[int]] = [[]]  # indices in input_blocks of each level's layers
    for n in range(1, 1 + _count(shapes, "input_blocks.{}.") - 1):
        if f"input_blocks.{n}.0.op.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append(n)
    mults = [shapes[f"input_blocks.{i[-1]}.0.out_layers.3.weight"][0] // width for i in levels]
    attends = [f"input_blocks.{i[0]}.1.proj_in.weight" in shapes for i in levels]
    cross = [_only_cross(shapes, i[0]) if a else None for i, a in zip(levels, attends)]
    for level in reversed(range(len(cross) - 1)):  # no attention: as at the next level
        cross[level] = cross[level + 1] if cross[level] is None else cross[level]
    middle = "middle_block.1.transformer_blocks"
    return schema.UNetConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        model_channels=width,
        channel_mult=tuple(mults),
        num_res_blocks=len(levels[0]),
        attention_downsample=tuple(2**i for i in reversed(range(len(levels))) if attends[i]),
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        transformer_depth=_count(shapes, middle + ".{}."),
        context_dim=shapes[f"{middle}.0.attn2.to_k.weight"][1],
        only_cross_attention=tuple(map(bool, cross)) if any(cross) else (),
        linear_projection=len(shapes["middle_block.1.proj_in.weight"]) == 2,
        upcast_attention=upcast_attention,
        num_classes=shapes.get("label_emb.weight", (None,))[0],
    )


def _only_cross(shapes: Mapping[str, tuple], block: int) -> bool:
    """True if the first attention reads the context, by the width of its keys."""
    attn = f"input_blocks.{block}.1.transformer_blocks.0.attn1"
    return shapes[f"{attn}.to_k.weight"][1] != shapes[f"{attn}.to_q.weight"][1]


def first_stage_config(
    shapes: Mapping[str, tuple],
) -> schema.AutoencoderKLConfig | schema.AutoencoderVQConfig:
    """Config of a first stage; names without prefix. With a codebook it is vector-quantized."""
    levels = range(_count(shapes, "encoder.down.{}."))
    width, image = shapes["encoder.conv_in.weight"][:2]
    blocks = _count(shapes, "encoder.down.0.block.{}.")
    mults = [shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] // width for i in levels]
    z, embed = shapes["post_quant_conv.weight"][:2]
    fields = {
        "in_channels": image,
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "channels": width,
        "channel_mult": tuple(mults),
        "num_res_blocks": blocks,
        "attention_downsample": tuple(
            2**i for i in levels if f"encoder.down.{i}.attn.0.norm.weight" in shapes
        ),
        "mid_attention": "encoder.mid.attn_1.norm.weight" in shapes,
        "z_channels": z,
        "embed_dim": embed,
    }
    if "quantize.embedding.weight" in shapes:
        codes = shapes["quantize.embedding.weight"][0]
        return schema.AutoencoderVQConfig(**fields, num_codes=codes)
    return schema.AutoencoderKLConfig(**fields)


def clip_text_config(shapes: Mapping[str, tuple]) -> schema.CLIPTextConfig:
    """Config of FrozenCLIPEmbedder; names after `cond_stage_model.`; heads are 64 wide, as in any
    CLIP."""
    model = "transformer.text_model"
    vocab, width = shapes[f"{model}.embeddings.token_embedding.weight"]
    return schema.CLIPTextConfig(
        vocab_size=vocab,
        max_length=shapes[f"{model}.embeddings.position_embedding.weight"][0],
        width=width,
        num_layers=_count(shapes, model + ".encoder.layers.{}."),
        num_heads=max(1, width // 64),
        mlp_width=shapes[f"{model}.encoder.layers.0.mlp.fc1.weight"][0],
    )


def open_clip_text_config(
    shapes: Mapping[str, tuple], layer: str = "penultimate"
) -> schema.CLIPTextConfig:
    """Config of FrozenOpenCLIPEmbedder; names after `cond_stage_model.`.

    layer: the one that a YAML asks of the whole encoder. OpenCLIP's have 12, 24 or 32 blocks: a
        file with an odd number was written without the last one, which `penultimate` never reads
        (diffusers' converters write 23 of 24), and the output of its last block is taken.
    """
    vocab, width = shapes["model.token_embedding.weight"]
    blocks = _count(shapes, "model.transformer.resblocks.{}.")
    return schema.CLIPTextConfig(
        vocab_size=vocab,
        max_length=shapes["model.positional_embedding"][0],
        width=width,
        num_layers=blocks,
        num_heads=max(1, width // 64),
        mlp_width=shapes["model.transformer.resblocks.0.mlp.c_fc.weight"][0],
        activation="gelu",
        layer="last" if blocks % 2 else layer,
    )


def bert_config(shapes: Mapping[str, tuple]) -> schema.BERTTextConfig:
    """Config of BERTEmbedder; names after `cond_stage_model.`; heads are 64 wide."""
    vocab, width = shapes["transformer.token_emb.weight"]
    inner = shapes["transformer.attn_layers.layers.0.1.to_q.weight"][0]
    return schema.BERTTextConfig(
        vocab_size=vocab,
        max_length=shapes["transformer.pos_emb.emb.weight"][0],
        width=width,
        num_layers=_count(shapes, "transformer.attn_layers.layers.{}.") // 2,
        num_heads=inner // 64,
    )


def _part(shapes: Mapping[str, tuple], prefix: str) -> dict[str, tuple]:
    return {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}


def _count(shapes: Mapping[str, Any], pattern: str) -> int:
    """Count of numbers from 0 on with which the filled `pattern` begins some name."""
    before, after = (re.escape(part) for part in pattern.split("{}"))
    shaped = re.compile(rf"{before}(0|[1-9][0-9]{{0,6}}){after}")
    there = {int(match[1]) for name in shapes if (match := shaped.match(name))}
    return next(n for n in range(len(there) + 1) if n not in there)
