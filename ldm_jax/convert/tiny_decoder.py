"""Weights of TAESD's decoder: its own file, or diffusers' AutoencoderTiny."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from ldm_jax.convert import table
from ldm_jax.convert.formats import files
from ldm_jax.convert.table import CONV, Entry
from ldm_jax.models.tiny_decoder import TinyDecoder

NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def load(path: epath.PathLike) -> tuple[TinyDecoder, dict[str, Any]]:
    """(module, float32 host parameters) of a file, or of a folder of diffusers.

    ValueError names the file that holds no such decoder.
    """
    where = epath.Path(path)
    if where.is_dir():
        where = next((where / name for name in NAMES if (where / name).exists()), where / NAMES[0])
    tensors, _ = files.open_state_dict(where)
    named = {_diffusers_name(name): x for name, x in tensors.items()}
    tensors = {name: x for name, x in named.items() if name.startswith("layers.")}
    first = tensors.get("layers.0.weight")
    if first is None or len(first.shape) != 4:
        raise ValueError(
            f"{where}: is no decoder of TAESD: wanted is taesd_decoder.safetensors (or .pth), or a"
            " folder of diffusers' AutoencoderTiny"
        )
    width, channels, *_ = first.shape
    net = TinyDecoder(width)
    latent = jnp.zeros((1, 1, 1, channels))
    shapes = jax.eval_shape(net.init, jax.random.key(0), latent)["params"]
    return net, table.from_torch(entries(shapes), tensors, shapes, where=str(where))


def _diffusers_name(name: str) -> str:
    """`decoder.layers.2.conv.0.weight`, or TAESD's own `3.conv.0.weight`, as `layers.2...`."""
    own = re.fullmatch(r"(\d+)\.(.+)", name)
    if own:  # whose number 0 is the clamp
        return f"layers.{int(own[1]) - 1}.{own[2]}"
    return name.removeprefix("decoder.")  # the encoder's keep their prefix


def entries(shapes: dict) -> list[Entry]:
    """The table of parameters that have `shapes`."""
    found: list[Entry] = []

    def walk(branch: dict, where: tuple[str, ...]) -> None:
        for name, inner in branch.items():
            if not isinstance(inner, dict):
                theirs = ".".join(part.replace("_", ".") for part in where)
                kind, layout = ("weight", CONV) if name == "kernel" else ("bias", table.VECTOR)
                found.append(Entry(f"{theirs}.{kind}", (f"{'/'.join(where)}/{name}",), layout))
            else:
                walk(inner, (*where, name))

    walk(shapes, ())
    return found
