"""Tables of the text and image encoders and of the other learned conditioning stages."""

import dataclasses

from ldm_jax import schema
from ldm_jax.convert.table import (
    CONV,
    DENSE,
    EMBEDDING,
    VECTOR,
    Entries,
    Entry,
    Layout,
    layer,
    norm,
    prefixed,
)

STACK = (("s", 3),)  # OpenCLIP stores queries, keys and values in one tensor
STACKED_DENSE = Layout("(s o) i", "s i o", STACK)
STACKED_VECTOR = Layout("(s o)", "s o", STACK)


def cond_stage(config: schema.CondConfig) -> list[Entry]:
    """Entries of a CompVis checkpoint's conditioning stage, names without `cond_stage_model.`.

    A CLIP text encoder has OpenCLIP's names if its activation is `gelu`, as in Stable Diffusion 2,
    else those of transformers, as in version 1. Empty if nothing of the stage is learned.
    """
    match config:
        case schema.ClassCondConfig(via="context"):
            return [Entry("embedding.weight", ("embedding/embedding",), EMBEDDING)]
        case schema.SemanticCondConfig() if config.out_channels is not None:
            return list(layer("channel_mapper", "channel_mapper", CONV, bias=False))
        case schema.HybridCondConfig():
            return cond_stage(config.text)
        case schema.TextCondConfig(encoder=schema.CLIPTextConfig(activation="gelu")):
            return prefixed(open_clip_text(config.encoder), "model.", "")
        case schema.TextCondConfig(encoder=schema.CLIPTextConfig()):
            return prefixed(clip_text(config.encoder), "transformer.", "")
        case schema.TextCondConfig() | schema.LayoutCondConfig():
            return prefixed(bert(config.encoder), "transformer.", "")
    return []


def without_unread_layer(
    config: schema.LatentDiffusionConfig, params: dict
) -> tuple[schema.LatentDiffusionConfig, dict]:
    """The model (config, parameters) with the text encoder cut off after the layer that it takes.

    params: arrays or shapes, as in `LatentDiffusion.params`.
    """
    text = schema.text_of(config.cond)
    if getattr(getattr(text, "encoder", None), "layer", "last") == "last":
        return config, params
    return without_last_layers(config, params, 1)


def without_last_layers(
    config: schema.LatentDiffusionConfig, params: dict, count: int
) -> tuple[schema.LatentDiffusionConfig, dict]:
    """The model (config, parameters) whose CLIP text encoder ends `count` layers earlier.

    What remains is read as the last layer, with the same final norm.
    """
    encoder = schema.text_of(config.cond).encoder
    kept = encoder.num_layers - count
    short = dataclasses.replace(encoder, num_layers=kept, layer="last")
    model = params["cond_stage"]["text_model"]
    layers = {name: x for name, x in model["encoder"]["layers"].items() if int(name) < kept}
    model = {**model, "encoder": {"layers": layers}}
    return (
        dataclasses.replace(config, cond=schema.with_text(config.cond, encoder=short)),
        {**params, "cond_stage": {"text_model": model}},
    )


# --- CLIP as transformers names it ---------------------------------------------------------------


def clip_text(config: schema.CLIPTextConfig) -> list[Entry]:
    """CLIP text encoder, names as in a diffusers `text_encoder/` or after
    `cond_stage_model.transformer.` of Stable Diffusion 1: `text_model.embeddings...`."""
    return list(_clip_text(config))


def _clip_text(config: schema.CLIPTextConfig) -> Entries:
    for part in ("token", "position"):
        yield _table(
            f"text_model.embeddings.{part}_embedding.weight",
            f"text_model/embeddings/{part}_embedding",
        )
    yield from _clip_layers("text_model", config.num_layers)
    yield from norm("text_model.final_layer_norm", "text_model/final_layer_norm")


def clip_vision(config: schema.CLIPVisionConfig) -> list[Entry]:
    """CLIP image encoder with projection, names as transformers' CLIPVisionModelWithProjection."""
    return list(_clip_vision(config))


def _clip_vision(config: schema.CLIPVisionConfig) -> Entries:
    torch, ours = "vision_model.embeddings", "vision_model/embeddings"
    yield Entry(f"{torch}.class_embedding", (f"{ours}/class_embedding",), VECTOR)
    yield from layer(f"{torch}.patch_embedding", f"{ours}/patch_embedding", CONV, bias=False)
    yield _table(f"{torch}.position_embedding.weight", f"{ours}/position_embedding")
    yield from norm("vision_model.pre_layrnorm", "vision_model/pre_layrnorm")
    yield from _clip_layers("vision_model", config.num_layers)
    yield from norm("vision_model.post_layernorm", "vision_model/post_layernorm")
    yield from layer("visual_projection", "visual_projection", DENSE, bias=False)


def clip(text: schema.CLIPTextConfig, vision: schema.CLIPVisionConfig) -> list[Entry]:
    """Both encoders with their projections, names as in transformers' CLIPModel, which also has a
    `logit_scale`; ours begin with `text/` and `vision/`."""
    projection = layer("text_projection", "text_projection", DENSE, bias=False)
    return [
        *prefixed([*_clip_text(text), *projection], "", "text/"),
        *prefixed(clip_vision(vision), "", "vision/"),
    ]


def _clip_layers(model: str, count: int) -> Entries:
    for i in range(count):
        torch, ours = f"{model}.encoder.layers.{i}", f"{model}/encoder/layers/{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from layer(f"{torch}.self_attn.{part}", f"{ours}/self_attn/{part}", DENSE)
        for part in ("fc1", "fc2"):
            yield from layer(f"{torch}.mlp.{part}", f"{ours}/mlp/{part}", DENSE)
        for part in ("layer_norm1", "layer_norm2"):
            yield from norm(f"{torch}.{part}", f"{ours}/{part}")


# --- CLIP as OpenAI and OpenCLIP name it ---------------------------------------------------------


def open_clip_text(config: schema.CLIPTextConfig) -> list[Entry]:
    """CLIP text encoder, names as in OpenCLIP's own files or after `cond_stage_model.model.` of
    Stable Diffusion 2, which hold `text_projection` and `logit_scale` besides."""
    return list(_open_clip_text(config))


def _open_clip_text(config: schema.CLIPTextConfig) -> Entries:
    ours = "text_model/embeddings"
    yield _table("token_embedding.weight", f"{ours}/token_embedding")
    yield _table("positional_embedding", f"{ours}/position_embedding")
    yield from _open_clip_layers(config.num_layers)
    yield from norm("ln_final", "text_model/final_layer_norm")


def _open_clip_layers(count: int) -> Entries:
    for i in range(count):
        torch, ours = f"transformer.resblocks.{i}", f"text_model/encoder/layers/{i}"
        for name, leaf, layout in (
            ("in_proj_weight", "kernel", STACKED_DENSE),
            ("in_proj_bias", "bias", STACKED_VECTOR),
        ):
            paths = tuple(f"{ours}/self_attn/{part}_proj/{leaf}" for part in "qkv")
            yield Entry(f"{torch}.attn.{name}", paths, layout)
        yield from layer(f"{torch}.attn.out_proj", f"{ours}/self_attn/out_proj", DENSE)
        yield from layer(f"{torch}.mlp.c_fc", f"{ours}/mlp/fc1", DENSE)
        yield from layer(f"{torch}.mlp.c_proj", f"{ours}/mlp/fc2", DENSE)
        for j in (1, 2):
            yield from norm(f"{torch}.ln_{j}", f"{ours}/layer_norm{j}")


# --- BERT-style transformer ----------------------------------------------------------------------


def bert(config: schema.BERTTextConfig) -> list[Entry]:
    """BERTEmbedder, names after `cond_stage_model.transformer.`: `attn_layers.layers.0...`."""
    return list(_bert(config))


def _bert(config: schema.BERTTextConfig) -> Entries:
    yield _table("token_emb.weight", "model/embed_tokens")
    yield _table("pos_emb.emb.weight", "model/embed_positions")
    for i in range(config.num_layers):
        # attention and feed-forward alternate, each a pair of norm and module
        attention, feed_forward = (f"attn_layers.layers.{2 * i + j}" for j in (0, 1))
        ours = f"model/layers_{i}"
        yield from norm(f"{attention}.0", f"{ours}/self_attn_layer_norm")
        for part in "qkv":
            to, proj = f"{attention}.1.to_{part}", f"{ours}/self_attn/{part}_proj"
            yield from layer(to, proj, DENSE, bias=False)
        yield from layer(f"{attention}.1.to_out", f"{ours}/self_attn/out_proj", DENSE)
        yield from norm(f"{feed_forward}.0", f"{ours}/final_layer_norm")
        yield from layer(f"{feed_forward}.1.net.0.0", f"{ours}/fc1", DENSE)
        yield from layer(f"{feed_forward}.1.net.2", f"{ours}/fc2", DENSE)
    yield from norm("norm", "model/layer_norm")
    yield from layer("to_logits", "to_logits", DENSE)


def ldm_bert(config: schema.BERTTextConfig) -> list[Entry]:
    """The same encoder, names as in diffusers' LDMBertModel."""
    return list(_ldm_bert(config))


def _ldm_bert(config: schema.BERTTextConfig) -> Entries:
    for part in ("embed_tokens", "embed_positions"):
        yield _table(f"model.{part}.weight", f"model/{part}")
    for i in range(config.num_layers):
        torch, ours = f"model.layers.{i}", f"model/layers_{i}"
        for part in ("q_proj", "k_proj", "v_proj"):
            name = f"{torch}.self_attn.{part}"
            yield from layer(name, f"{ours}/self_attn/{part}", DENSE, bias=False)
        yield from layer(f"{torch}.self_attn.out_proj", f"{ours}/self_attn/out_proj", DENSE)
        for part in ("self_attn_layer_norm", "final_layer_norm"):
            yield from norm(f"{torch}.{part}", f"{ours}/{part}")
        for part in ("fc1", "fc2"):
            yield from layer(f"{torch}.{part}", f"{ours}/{part}", DENSE)
    yield from norm("model.layer_norm", "model/layer_norm")
    yield from layer("to_logits", "to_logits", DENSE)


def _table(torch: str, ours: str) -> Entry:
    return Entry(torch, (f"{ours}/embedding",), EMBEDDING)
