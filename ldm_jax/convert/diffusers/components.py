"""Components of a diffusers folder: the names of their parameters, and their files."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from ldm_jax import schema
from ldm_jax.convert import table, text_tables
from ldm_jax.convert.diffusers import tables
from ldm_jax.convert.formats import files
from ldm_jax.models import autoencoder, bert, clip, unet
from ldm_jax.runtime import reading
from ldm_jax.runtime.log import LOG

MOST_JSON = 2**24  # bytes; a config.json has a few kB
TextConfig = schema.CLIPTextConfig | schema.BERTTextConfig

# Names of weight files before variant and suffix, by suffix, the preferred first.
STEMS = {
    "safetensors": ("diffusion_pytorch_model", "model"),
    "bin": ("diffusion_pytorch_model", "pytorch_model"),
    "msgpack": ("diffusion_flax_model", "flax_model"),
}
# Tensors of a text encoder that its output does not depend on.
UNUSED = ("embeddings.position_ids", "text_model.embeddings.position_ids", "text_projection.weight")


class Part(NamedTuple):
    """Shapes of a part's parameters, and its table for a file with the given names."""

    shapes: dict
    entries: Callable[[Iterable[str] | None], list[table.Entry]]
    """entries(names of the file); None: for the names that we write."""


def model_parts(config: schema.LatentDiffusionConfig) -> dict[str, Part]:
    """{our name: part} of all parts that have parameters."""
    text = schema.text_of(config.cond)
    parts = {
        "unet": unet_part(config.unet),
        "first_stage": first_stage_part(config.first_stage),
        "cond_stage": None if text is None else text_part(text.encoder),
    }
    return {kind: Part({}, lambda names: []) if x is None else x for kind, x in parts.items()}


def unet_part(config: schema.UNetConfig) -> Part:
    """Part of a `UNet2DConditionModel` or `UNet2DModel`."""
    module = unet.from_config(config)
    return _plain_part(_shapes(module, *unet.example_inputs(module)))


def first_stage_part(config: schema.FirstStageModelConfig) -> Part:
    """Part of an `AutoencoderKL` or `VQModel`; without parameters for the identity."""
    module = autoencoder.from_config(config)
    return _plain_part(_shapes(module, *autoencoder.example_inputs(module)))


def _plain_part(shapes: dict) -> Part:
    return Part(shapes, lambda names: tables.entries(shapes, tables.has_old_names(names or ())))


def text_part(config: TextConfig) -> Part:
    """Part of transformers' CLIPTextModel or diffusers' LDMBertModel."""
    ids = jnp.zeros((1, 1), jnp.int32)
    if isinstance(config, schema.BERTTextConfig):
        shapes = _shapes(bert.from_config(config), ids)
        return Part(shapes, lambda names: text_tables.ldm_bert(config))
    shapes = _shapes(clip.text_from_config(config), ids)

    def entries(names: Iterable[str] | None) -> list[table.Entry]:
        """Entries with or without `text_model.`, which transformers 5 no longer writes."""
        entries = text_tables.clip_text(config)
        if names is None or any(name.startswith("text_model.") for name in names):
            return entries
        return [entry._replace(torch=entry.torch.removeprefix("text_model.")) for entry in entries]

    return Part(shapes, entries)


def _shapes(module: Any, *inputs: Any) -> dict:
    return jax.eval_shape(module.init, jax.random.key(0), *inputs).get("params", {})


def params(
    folder: epath.Path,
    part: Part,
    variant: str | None,
    dtype: Any,
    place: table.Place | None = None,
    shapes_only: bool = False,
) -> dict:
    """The parameters in a component's folder: PyTorch's or Flax's, in one file or several.

    place: as in `table.from_torch`; shapes_only: as in `diffusers.load`.
    Raises ValueError that names the file and the tensors that do not fit.
    """
    path = weights(folder, variant)
    tensors, info = files.open_state_dict(path)
    if info.format == "msgpack":
        tensors = {name.removeprefix("params/"): x for name, x in tensors.items()}
        entries = tables.flax_entries(part.shapes)
    else:
        unused = [name for name in UNUSED if name in tensors]
        if unused:
            LOG.info(f"{path}: left out, as it computes nothing: {', '.join(unused)}")
        tensors = {name: x for name, x in tensors.items() if name not in unused}
        entries = part.entries(tensors)
    if shapes_only:
        tensors = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tensors.items()}
    where = str(path)
    return table.from_torch(entries, tensors, part.shapes, dtype=dtype, place=place, where=where)


# --- files ---------------------------------------------------------------------------------------


def weights(folder: epath.Path, variant: str | None = None) -> epath.Path:
    """The file or index with the weights of a component; the plain one if it lacks the variant.

    FileNotFoundError names the files that are there instead.
    """
    for name in [*(names(variant) if variant else []), *names(None)]:
        if (folder / name).exists():
            return folder / name
    if variant is None and (others := variants(folder)):
        raise FileNotFoundError(
            f"{folder}: has weights of the variant {' and '.join(others)} alone (variant=None was"
            f" asked for): give --variant {others[0]}, in Python variant={others[0]!r}"
        )
    held = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
    raise FileNotFoundError(
        f"{folder}: has no weights of variant={variant}, of {', '.join(held) or 'no files'};"
        " variant is what stands before or after the suffix, fp16 in model.fp16.safetensors"
    )


def variants(folder: epath.Path) -> list[str]:
    """Variants that a component has weights of, as in NAME.fp16.safetensors."""
    if not folder.is_dir():
        return []
    parts = (re.sub(r"-\d+-of-\d+", "", file.name).split(".") for file in folder.iterdir())
    stems = {stem for stems in STEMS.values() for stem in stems}
    plain = {*STEMS, "index", "json"}
    kinds = (set(rest) - plain for stem, *rest in parts if stem in stems and plain & set(rest))
    return sorted(set().union(*kinds))


def check_variant(folders: list[epath.Path], variant: str | None) -> None:
    """ValueError if `variant` cannot be part of a name, FileNotFoundError if no component has
    it."""
    if variant is None:
        return
    if not variant.isprintable() or set(variant) & set("/\\:."):
        raise ValueError(f"variant={variant!r} is no part of a file's name")
    if not any((folder / name).exists() for folder in folders for name in names(variant)):
        raise FileNotFoundError(
            f"{folders[0].parent}: has no weights of variant={variant} in"
            f" {', '.join(folder.name for folder in folders)}"
        )


def names(variant: str | None) -> list[str]:
    """File names of a variant, as the versions of diffusers and transformers write them."""
    dot = f".{variant}" if variant else ""
    candidates = [
        name
        for suffix, stems in STEMS.items()
        for stem in stems
        for name in (
            f"{stem}{dot}.{suffix}",
            f"{stem}.{suffix}.index{dot}.json",
            f"{stem}{dot}.{suffix}.index.json",
        )
    ]
    return list(dict.fromkeys(candidates))


def read_json(path: epath.Path) -> dict[str, Any]:
    """Read a JSON object. ValueError if the file holds none, FileNotFoundError if it is missing."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: does not exist")
    if path.stat().length > MOST_JSON:
        raise ValueError(f"{path}: is larger than any such file ({MOST_JSON} bytes)")
    return reading.read_object(path)
