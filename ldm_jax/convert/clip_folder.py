"""CLIP in a folder of transformers: config.json, weights of both encoders, and a tokenizer."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ldm_jax import schema
from ldm_jax.convert import table, text_tables
from ldm_jax.convert.diffusers import components, part_configs
from ldm_jax.convert.diffusers.components import read_json
from ldm_jax.convert.formats import files
from ldm_jax.data import tokens
from ldm_jax.models import clip
from ldm_jax.runtime import checkpoint

END = 49407  # transformers' default of `eos_token_id`
VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
}
VISION_FIXED = {
    "hidden_act": ("quick_gelu", "gelu"),
    "layer_norm_eps": (1e-5,),
    "num_channels": (3,),
}
# Of images in [0, 1], with our default.
NORMALIZATION = {"image_mean": clip.IMAGE_MEAN, "image_std": clip.IMAGE_STD}


class CLIP(NamedTuple):
    """Both encoders, which map texts and images into one space."""

    text: clip.CLIPText
    vision: clip.CLIPVision
    params: dict
    """{"text", "vision"}; "text" holds `text_projection` too."""
    end_id: int
    """As of `clip.embed_text`."""
    mean: tuple[float, ...]
    """Mean of red, green and blue, subtracted from images in [0, 1]."""
    std: tuple[float, ...]
    """Divisor after the subtraction."""
    tokenizer: Any
    """`data.tokens` tokenizer, or None."""

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return self.vision.projection_dim


def load(
    folder: epath.PathLike,
    *,
    variant: str | None = None,
    tokenizer: epath.PathLike | None = None,
    dtype: Any = jnp.float32,
    place: table.Place | None = None,
) -> CLIP:
    """The model in a folder of transformers' CLIPModel.

    variant: see `diffusers.load`. tokenizer: another folder with a tokenizer.
    dtype: compute type; float32 is exact, whatever the device.
    place: see `table.from_torch`; default: onto the default device.
    Raises ValueError or FileNotFoundError that name the file and its fault.
    """
    folder = checkpoint.absolute(folder)
    path = folder / "config.json"
    options = read_json(path)
    text, vision, end_id = _config(options, str(path))
    exact = {"dtype": dtype, "precision": "highest"}
    modules = clip.text_from_config(text, **exact), clip.vision_from_config(vision, **exact)
    shapes = _shapes(*modules)
    place = table.placer(shapes, None) if place is None else place
    params = _params(folder, variant, text_tables.clip(text, vision), shapes, place)
    mean, std = _normalization(folder / "preprocessor_config.json")
    return CLIP(*modules, params, end_id, mean, std, _tokenizer(folder, tokenizer, text))


def _config(
    options: Mapping[str, Any], where: str
) -> tuple[schema.CLIPTextConfig, schema.CLIPVisionConfig, int]:
    """(Text encoder, image encoder, token that ends a text)."""
    kind = options.get("model_type")
    if kind != "clip":
        raise ValueError(
            f"{where}: model_type={kind!r:.100}; give the folder of a CLIPModel of transformers,"
            " which has both encoders"
        )
    text, vision = (_part(options, name, where) for name in ("text", "vision"))
    config = part_configs.text_config({**text, "model_type": "clip_text_model"}, where)
    values = part_configs.read(vision, where, VISION_DEFAULTS, VISION_FIXED, ignored=tuple(vision))
    end_id, dim = text.get("eos_token_id", END), options.get("projection_dim", 512)
    for name, value in (("eos_token_id", end_id), ("projection_dim", dim)):
        if type(value) is not int or not 0 < value < 2**24:
            raise ValueError(f"{where}: {name}={value!r:.100} is no such number")
    return (
        config,
        schema.CLIPVisionConfig(
            image_size=values["image_size"],
            patch_size=values["patch_size"],
            width=values["hidden_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"],
            mlp_width=values["intermediate_size"],
            projection_dim=dim,
            activation=values["hidden_act"],
        ),
        end_id,
    )


def _part(options: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """The config of an encoder; of two, transformers takes the older `_config_dict`."""
    old, new = options.get(f"{name}_config_dict"), options.get(f"{name}_config")
    chosen = new if old is None else old
    chosen = {} if chosen is None else chosen
    if not isinstance(chosen, Mapping):
        raise ValueError(f"{where}: {name}_config is no object")
    return chosen


def _shapes(text: clip.CLIPText, vision: clip.CLIPVision) -> dict:
    side, key = vision.image_size, jax.random.key(0)
    ids, pixels = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, side, side, 3))
    kernel = jax.ShapeDtypeStruct((text.width, vision.projection_dim), np.float32)
    of_text, of_vision = (
        jax.eval_shape(module.init, key, x)["params"]
        for module, x in ((text, ids), (vision, pixels))
    )
    return {"text": {**of_text, "text_projection": {"kernel": kernel}}, "vision": of_vision}


def _params(
    folder: epath.Path, variant: str | None, entries: list, shapes: dict, place: table.Place
) -> dict:
    path = components.weights(folder, variant)
    tensors, info = files.open_state_dict(path)
    if info.format == "msgpack":
        raise ValueError(f"{path}: weights of Flax; give the folder with model.safetensors")
    computes_nothing = ("logit_scale", ".position_ids")
    tensors = {name: x for name, x in tensors.items() if not name.endswith(computes_nothing)}
    return table.from_torch(entries, tensors, shapes, place=place, where=str(path))


def _normalization(path: epath.Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of an image processor's file, or CLIP's own."""
    options = read_json(path) if path.exists() else {}
    mean_and_std = []
    for name, default in NORMALIZATION.items():
        values = options.get(name, default)
        numbers = isinstance(values, list | tuple) and len(values) == 3
        if not numbers or any(type(x) not in (int, float) for x in values):
            raise ValueError(f"{path}: {name}={values!r:.100} is not three numbers")
        mean_and_std.append(tuple(map(float, values)))
    if min(mean_and_std[1]) <= 0:
        raise ValueError(f"{path}: image_std={mean_and_std[1]} divides by what is not positive")
    return tuple(mean_and_std)


def _tokenizer(
    folder: epath.Path, given: epath.PathLike | None, text: schema.CLIPTextConfig
) -> tokens.Tokenizer | None:
    if given is None and not any(
        all((folder / name).exists() for name in names) for names in tokens.SETS
    ):
        return None
    where = folder if given is None else given
    tokenizer = tokens.load_tokenizer(where, text.max_length)
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(
            f"{where}: has {tokenizer.vocab_size} tokens, but the text encoder of {folder} knows"
            f" {text.vocab_size}: it is another model's tokenizer"
        )
    return tokenizer
