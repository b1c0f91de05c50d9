"""A tiny CLIP with random weights, as a folder of transformers."""

import json

import jax
import jax.numpy as jnp
import reference
import text_model

from ldm_jax import schema
from ldm_jax.convert import table, text_tables
from ldm_jax.convert.formats import safetensors_file
from ldm_jax.models import clip

TEXT = schema.CLIPTextConfig(
    vocab_size=600, max_length=12, width=32, num_layers=2, num_heads=4, mlp_width=48
)
VISION = schema.CLIPVisionConfig(
    image_size=12, patch_size=4, width=32, num_layers=2, num_heads=4, mlp_width=48,
    projection_dim=32,
)  # fmt: skip


def config(end_id=2):
    """config.json."""
    both = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    both |= {"intermediate_size": 48, "hidden_act": "quick_gelu"}
    text = {**both, "vocab_size": 600, "max_position_embeddings": 12, "eos_token_id": end_id}
    return {
        "model_type": "clip",
        "projection_dim": 32,
        "text_config": text,
        "vision_config": {**both, "image_size": 12, "patch_size": 4},
    }


def save(folder, seed=0):
    """Writes config.json, model.safetensors and a tokenizer; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    key, ids = jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    text, vision = clip.text_from_config(TEXT), clip.vision_from_config(VISION)
    shapes = {
        "text": {
            **jax.eval_shape(text.init, key, ids)["params"],
            "text_projection": {"kernel": jax.ShapeDtypeStruct((32, 32), jnp.float32)},
        },
        "vision": jax.eval_shape(vision.init, key, jnp.zeros((1, 12, 12, 3)))["params"],
    }
    params = reference.filled(shapes, seed)
    tensors = table.to_torch(text_tables.clip(TEXT, VISION), params)
    safetensors_file.write(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config()))
    text_model.clip_tokenizer(folder, max_length=12)
    return folder
