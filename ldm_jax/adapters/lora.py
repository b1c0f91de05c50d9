"""LoRA: low-rank updates of a model's kernels, as functions on trees of parameters.

    y = x (W + scale B A),  scale = multiplier alpha / rank        (Hu et al. 2021, section 4.1)

`read` takes the files of PEFT, diffusers, kohya and LyCORIS; `merged` adds any number of them to
the parameters of a model; `write` gives PEFT's or kohya's file, which diffusers and
stable-diffusion-webui read.
"""

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import struct, traverse_util

from ldm_jax import bundle
from ldm_jax.adapters import deltas, lora_parts
from ldm_jax.adapters.deltas import LowRank, Update
from ldm_jax.convert.adapters import lora_files
from ldm_jax.convert.formats import safetensors_file
from ldm_jax.runtime.log import LOG

PARTS = ("unet", "cond_stage")
Targets = Literal["attention", "transformer", "all"]
Initial = Literal["gaussian", "kaiming"]
Format = Literal["peft", "kohya"]
Scale = float | tuple[float, float]
"""Multiplier of a LoRA, or those of its UNet's and its text encoder's half."""


@struct.dataclass
class LoRA:
    """{part of the model: {path of an array: Update}}; a pytree of what trains."""

    unet: dict[str, Update]
    cond_stage: dict[str, Update]

    def __repr__(self) -> str:
        said = []
        for part in PARTS:
            updates = getattr(self, part)
            if updates:
                ranks = sorted({u.delta.rank for u in updates.values() if u.delta.rank})
                said.append(f"{part}: {len(updates)} arrays, rank {', '.join(map(str, ranks))}")
        return f"LoRA({'; '.join(said)})"


def read(
    path: epath.PathLike, model: bundle.LatentDiffusion, *, ignore_unknown: bool = False
) -> LoRA:
    """The LoRA in a file, or in a folder of diffusers, for a model; arrays are NumPy float32.

    Reads PEFT's and diffusers' names of every age, kohya's, and LoCon, LoHa, LoKr, DoRA and full
    differences of LyCORIS, in .safetensors or PyTorch files (no code of the file runs).
    ValueError names the file for another base model (before any tensor is read), for tensors that
    belong to no module of the model unless `ignore_unknown`, and for values that are not finite.
    """
    path = lora_files.file_of(path)
    shapes = _shapes(model)
    modules = {part: {p.rpartition("/")[0] for p in own} for part, own in shapes.items()}
    content = lora_files.read(path, modules)
    _say_unknown(path, content.unknown, ignore_unknown)
    for token in content.embeddings:
        LOG.warning(f'{path}: also holds the word {token}; --embedding "{path}={token}" adds it')
    lora_parts.check(path, content, shapes)
    made: dict[str, dict[str, Update]] = {part: {} for part in PARTS}
    for part, own in content.parts.items():
        for module, tensors in own.items():
            where = f"{path}: {lora_files.dotted(part, module)}"
            alpha = content.alphas.get((part, module))
            made[part] |= lora_parts.updates(
                module, tensors, shapes[part], where, alpha, content.rank_stabilized
            )
    return LoRA(**made)


def merged(params: bundle.Params, loras: Sequence[tuple[LoRA, Scale]]) -> bundle.Params:
    """`params` with the sum of all LoRAs added, each with its scale; pure, so it runs under jit.

    The kernels that change are float32, whatever they were: a small update added to bfloat16 is
    mostly rounded away (one of 1 % comes back 17 % wrong). Others are not copied.
    ValueError for an update of an array that the parameters lack.
    """
    changed = {}
    for part, name in enumerate(PARTS):
        flat = traverse_util.flatten_dict(params[name], sep="/")
        ours = [(getattr(x, name), s[part] if isinstance(s, tuple) else s) for x, s in loras]
        for path in sorted({path for updates, _ in ours for path in updates}):
            if path not in flat:
                raise ValueError(f"the LoRA changes {name}/{path}, which the model does not have")
            weight = jnp.asarray(flat[path], jnp.float32)
            terms = [s * updates[path].added(weight) for updates, s in ours if path in updates]
            flat[path] = weight + sum(terms[1:], terms[0])
        changed[name] = traverse_util.unflatten_dict(flat, sep="/")
    return {**params, **changed}


def init(
    params: bundle.Params,
    rank: int,
    targets: Targets = "attention",
    key: jax.Array | None = None,
    *,
    alpha: float | None = None,
    text_encoder: bool = False,
    initial: Initial = "gaussian",
) -> LoRA:
    """A LoRA that changes nothing yet: `up` is zero, `down` random.

    targets: "attention", the projections of every attention (diffusers' default); "transformer",
        every dense layer and 1x1 convolution of the transformers (kohya's); "all", those and every
        convolution and dense layer of the residual blocks and resamplers.
    alpha: the scale is alpha / rank; default: the rank.
    initial: "gaussian", N(0, 1 / rank^2), as the scripts of diffusers; "kaiming", uniform within
        1 / sqrt(fan in), as kohya and PEFT.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: give at least 1")
    key = jax.random.key(0) if key is None else key
    parts: dict[str, dict[str, Update]] = {part: {} for part in PARTS}
    for part in PARTS if text_encoder else PARTS[:1]:
        flat = traverse_util.flatten_dict(params[part], sep="/")
        for path in sorted(p for p in flat if lora_parts.is_target(part, p, targets)):
            key, own = jax.random.split(key)
            *kernel, fan_in, out = flat[path].shape
            shape = (*kernel, fan_in, rank)
            down = _initial(own, shape, initial)
            delta = LowRank(down, jnp.zeros((rank, out)))
            parts[part][path] = Update(delta, (rank if alpha is None else alpha) / rank)
    return LoRA(**parts)


def _initial(key: jax.Array, shape: tuple[int, ...], initial: Initial) -> jax.Array:
    if initial == "gaussian":
        return jax.random.normal(key, shape) / shape[-1]
    bound = float(np.prod(shape[:-1])) ** -0.5  # kaiming_uniform(a=sqrt(5)) of torch
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def write(
    path: epath.PathLike,
    lora: LoRA,
    to: Format,
    *,
    base: Literal["v1", "v2-512", "v2-768-v"] = "v1",
    dtype: Any = np.float32,
) -> None:
    """A .safetensors file that diffusers ("peft") or stable-diffusion-webui ("kohya") reads.

    base: the Stable Diffusion that it was trained on, for kohya's metadata. ValueError for updates
    that the format has no names for: anything but plain low rank.
    """
    arrays, settings = {}, {part: {} for part in PARTS}
    for part, path_, update in _updates(lora):
        module, leaf = path_.rpartition("/")[::2]
        if (
            not isinstance(update.delta, LowRank)
            or update.magnitude is not None
            or leaf != "kernel"
        ):
            raise ValueError(f"{part}/{path_}: {to} files hold LoRA alone; merge it into the model")
        down, up = lora_parts.to_torch(update.delta)
        name = lora_files.dotted(part, module)
        settings[part][name] = (update.delta.rank, update.alpha)
        if to == "peft":
            name = lora_files.PREFIXES[part][-1] + name
            named = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        else:
            name = lora_files.kohya_name(part, module)
            named = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            named[f"{name}.alpha"] = np.float32(update.alpha)
        arrays |= {key: np.asarray(x, dtype) for key, x in named.items()}
    if to == "peft":
        safetensors_file.write(path, arrays, lora_files.peft_metadata(settings))
        return
    every = [setting for own in settings.values() for setting in own.values()]
    trained, spec = lora_files.kohya_metadata((r for r, _ in every), (a for _, a in every), base)
    safetensors_file.write(path, arrays, trained)  # what kohya takes the hashes of
    safetensors_file.write(path, arrays, trained | spec | _kohya_hashes(path))


def to_tree(lora: LoRA) -> dict:
    """{part: {module: ... {"down", "up"}}} of plain low-rank updates: what a run trains and keeps.

    ValueError for an update of another kind.
    """
    tree: dict[str, dict] = {}
    for part, path, update in _updates(lora):
        if not isinstance(update.delta, LowRank) or update.magnitude is not None:
            raise ValueError(f"{part}/{path}: is no plain low-rank update")
        module = path.removesuffix("/kernel")
        flat = {f"{module}/down": update.delta.down, f"{module}/up": update.delta.up}
        tree.setdefault(part, {}).update(flat)
    return {part: traverse_util.unflatten_dict(flat, sep="/") for part, flat in tree.items()}


def from_tree(tree: dict, alpha: float | None = None) -> LoRA:
    """Inverse of `to_tree`, of updates scaled by alpha / rank; None: by 1."""
    parts: dict[str, dict[str, Update]] = {part: {} for part in PARTS}
    for part, nested in tree.items():
        flat = traverse_util.flatten_dict(nested, sep="/")
        for path in sorted(flat):
            module, leaf = path.rpartition("/")[::2]
            if leaf == "up":
                delta = LowRank(flat[f"{module}/down"], flat[path])
                scale = 1.0 if alpha is None else alpha / delta.rank
                parts[part][f"{module}/kernel"] = Update(delta, scale)
    return LoRA(**parts)


def dropped(lora: LoRA, rate: float, key: jax.Array) -> LoRA:
    """The LoRA with a share of the inputs of every update left out, and the others scaled up.

    One draw for a whole batch, where PEFT draws for every token: an update that is added to a
    kernel sees no tokens.
    """

    def one(path: str, update: Update) -> Update:
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        down = update.delta.down
        kept = jax.random.bernoulli(own, 1 - rate, (down.shape[-2], 1)) / (1 - rate)
        return update.replace(delta=update.delta.replace(down=down * kept))

    parts: dict[str, dict[str, Update]] = {part: {} for part in PARTS}
    for part, path, update in _updates(lora):
        parts[part][path] = one(f"{part}/{path}", update)
    return LoRA(**parts)


def _kohya_hashes(path: epath.PathLike) -> dict[str, str]:
    content = epath.Path(path).read_bytes()
    # sd-scripts: one hash of all that follows the header, and an older one of 64 KiB from 1 MiB on
    begin = 8 + int.from_bytes(content[:8], "little")
    legacy = content[0x100000 : 0x100000 + 0x10000]
    return {
        "sshs_model_hash": hashlib.sha256(content[begin:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(legacy).hexdigest()[:8],
    }


def _updates(lora: LoRA) -> Iterator[tuple[str, str, Update]]:
    for part in PARTS:
        for path, update in getattr(lora, part).items():
            yield part, path, update


def _shapes(model: bundle.LatentDiffusion) -> dict[str, dict[str, tuple[int, ...]]]:
    """{part: {path of an array: its shape}}."""
    return {
        part: {
            p: x.shape for p, x in traverse_util.flatten_dict(model.params[part], sep="/").items()
        }
        for part in PARTS
    }


def _say_unknown(path: epath.Path, unknown: tuple[str, ...], ignored: bool) -> None:
    if not unknown:
        return
    said = f"{path}: {len(unknown)} tensors belong to no module of the model, as"
    said += f" {', '.join(unknown[:3])}"
    if not ignored:
        raise ValueError(f"{said}; --ignore-unknown (ignore_unknown=True) leaves them out")
    LOG.warning(f"{said}; they are left out")


def total_size(lora: LoRA) -> int:
    """Numbers that a LoRA holds."""
    return sum(deltas.size(update.delta) for _, _, update in _updates(lora))


__all__ = [
    "LoRA",
    "dropped",
    "from_tree",
    "init",
    "merged",
    "read",
    "to_tree",
    "total_size",
    "write",
]
