"""From the tensors of a LoRA file, in torch's layout, to updates of our arrays, and back."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import einops
import numpy as np

from ldm_jax import finite
from ldm_jax.adapters.deltas import Delta, Full, Hadamard, Kronecker, LowRank, Update
from ldm_jax.convert.adapters import lora_files
from ldm_jax.runtime.log import LOG

Shapes = Mapping[str, tuple[int, ...]]  # path of an array: its shape

ATTENTION = re.compile(r"/(to_[qkv]|to_out_0|self_attn/(q|k|v|out)_proj)/kernel$")
TRANSFORMER = re.compile(r"attentions_\d+/.+/kernel$|/(self_attn/\w+_proj|mlp/fc[12])/kernel$")
BLOCKS = re.compile(r"/(resnets|downsamplers|upsamplers)_\d+/.+/kernel$")
BASES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
"""{width of the context: base model}."""


def is_target(part: str, path: str, targets: str) -> bool:
    """True if `lora.init` makes an update for this array of a part of a model."""
    if targets == "attention":
        return ATTENTION.search(path) is not None
    if targets == "transformer":
        return TRANSFORMER.search(path) is not None
    if targets == "all":
        return TRANSFORMER.search(path) is not None or BLOCKS.search(path) is not None
    raise ValueError(f"targets {targets!r} is not one of attention, transformer, all")


# --- shapes, before anything is read --------------------------------------------------------------


def check(path: Any, content: lora_files.Content, shapes: Mapping[str, Shapes]) -> None:
    """ValueError for a file whose updates do not fit the model: another base, or damaged."""
    problems = []
    for part, modules in content.parts.items():
        for module, tensors in modules.items():
            _check_base(path, module, tensors, shapes[part])
            said = _problem(tensors, shapes[part].get(f"{module}/kernel"))
            problems += [f"{lora_files.dotted(part, module)}: {said}"] if said else []
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(problems[:5])}{more}")


def _check_base(path: Any, module: str, tensors: Mapping[str, Any], shapes: Shapes) -> None:
    """The keys and values of the cross-attention tell which text encoder a file is made for."""
    down = tensors.get("lora_down")
    if down is None or not module.endswith(("attn2/to_k", "attn2/to_v")):
        return
    theirs, ours = down.shape[1], shapes[f"{module}/kernel"][0]
    if theirs != ours:
        names = [f"{width} ({BASES.get(width, 'no known base')})" for width in (theirs, ours)]
        raise ValueError(
            f"{path}: is made for a model whose text has the width {names[0]}, this one's is"
            f" {names[1]}: take a LoRA of the same base model"
        )


def _problem(tensors: Mapping[str, Any], kernel: tuple[int, ...] | None) -> str | None:
    """The reason why the tensors of a module are no update of its kernel; None if they are."""
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    kinds = [kind for kind in KINDS if any(name.startswith(kind) for name in shapes)]
    if not kinds:
        return None if shapes.keys() & BESIDE.keys() else f"{', '.join(shapes)} alone is no update"
    if len(kinds) > 1:
        return f"has updates of several kinds at once: {', '.join(shapes)}"
    if kernel is None:
        return f"the model has no kernel there for {', '.join(shapes)}"
    try:
        size = KINDS[kinds[0]].size(shapes)
    except KeyError as error:
        return f"has {', '.join(shapes)}, but no {error.args[0]}"
    except (ValueError, IndexError) as error:
        said = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        return f"{error} ({said})"
    *window, fan_in, out = kernel
    wanted = (out, fan_in * math.prod(window))
    return None if size == wanted else f"updates a kernel of {_by(size)}, here it is {_by(wanted)}"


def _by(size: tuple[int, int]) -> str:
    return " x ".join(map(str, size))


# --- updates --------------------------------------------------------------------------------------


class Factors(NamedTuple):
    """Two tensors whose product is a kernel in torch's layout, or that kernel (`whole`).

    a, b: [out, r] and [r, in ...]; with a core of Tucker's, [r, r, h, w], a is [r, out].
    """

    whole: Any = None
    a: Any = None
    b: Any = None
    core: Any = None

    def size(self) -> tuple[int, int]:
        """(out, in * h * w), of the tensors' shapes. ValueError if they do not fit each other."""
        if self.whole is not None:
            return self.whole[0], math.prod(self.whole[1:])
        out, rank = (self.a[1], self.a[0]) if self.core is not None else self.a[:2]
        if rank != self.b[0] or (self.core is not None and self.core[:2] != (rank, rank)):
            raise ValueError("the ranks of its factors differ")
        return out, math.prod(self.b[1:]) * math.prod(
            self.core[2:] if self.core is not None else ()
        )

    def low_rank(self) -> LowRank:
        """In our layout: down [in, r] or [h, w, in, r], up [r, out]."""
        up = self.a if self.core is not None else self.a.reshape(len(self.a), -1).T
        down = self.b
        if self.core is not None:
            down = np.einsum("pqhw,qi->pihw", self.core, down.reshape(len(down), -1))
        return LowRank(_kernel(down), np.ascontiguousarray(up))

    def kernel(self) -> np.ndarray:
        """In our layout, [in, out] or [h, w, in, out]."""
        if self.whole is not None:
            return _kernel(self.whole)
        factors = self.low_rank()
        return factors.down @ factors.up


def _kernel(tensor: np.ndarray) -> np.ndarray:
    """A tensor of torch's layout in ours."""
    pattern = "o i h w -> h w i o" if tensor.ndim == 4 else "o i -> i o"
    return np.ascontiguousarray(einops.rearrange(tensor, pattern))


class Kind(NamedTuple):
    """A kind of update: (out, in * h * w) of its shapes, and the delta of its tensors."""

    size: Callable[[Mapping[str, Any]], tuple[int, int]]
    delta: Callable[[Mapping[str, np.ndarray], tuple[int, ...]], Delta]


def _lora(t: Mapping[str, Any]) -> Factors:
    up, down, core = t["lora_up"], t["lora_down"], t.get("lora_mid")
    if core is not None:  # LyCORIS writes up as [out, r, 1, 1] also here
        up = (up[1], up[0]) if isinstance(up, tuple) else up.reshape(len(up), -1).T
    return Factors(a=up, b=down, core=core)


def _loha(t: Mapping[str, Any]) -> tuple[Factors, Factors]:
    first, second = (
        Factors(a=t[f"hada_w{i}_a"], b=t[f"hada_w{i}_b"], core=t.get(f"hada_t{i}")) for i in "12"
    )
    return first, second


def _loha_size(shapes: Mapping[str, Any]) -> tuple[int, int]:
    first, second = (factors.size() for factors in _loha(shapes))
    if first != second:
        raise ValueError("its two products differ in size")
    return first


def _loha_delta(t: Mapping[str, np.ndarray], kernel: tuple[int, ...]) -> Hadamard:
    return Hadamard(*(_window(factors.low_rank(), kernel) for factors in _loha(t)))


def _window(factors: LowRank, kernel: tuple[int, ...]) -> LowRank:
    """Give down the axes of a convolution's kernel where the file has flattened them."""
    if len(kernel) == 4 and factors.down.ndim == 2 and len(factors.down) != kernel[2]:
        h, w, fan_in, _ = kernel
        down = einops.rearrange(factors.down, "(i h w) r -> h w i r", i=fan_in, h=h, w=w)
        return LowRank(down, factors.up)
    return factors


def _lokr(t: Mapping[str, Any]) -> tuple[Factors, Factors]:
    def factors(i: str) -> Factors:
        if f"lokr_w{i}" in t:
            return Factors(whole=t[f"lokr_w{i}"])
        return Factors(a=t[f"lokr_w{i}_a"], b=t[f"lokr_w{i}_b"], core=t.get(f"lokr_t{i}"))

    return factors("1"), factors("2")


def _lokr_size(shapes: Mapping[str, Any]) -> tuple[int, int]:
    (out, fan_in), (out2, fan_in2) = (factors.size() for factors in _lokr(shapes))
    return out * out2, fan_in * fan_in2


def _lokr_delta(t: Mapping[str, np.ndarray], kernel: tuple[int, ...]) -> Kronecker:
    first, second = (factors.kernel() for factors in _lokr(t))
    if len(kernel) == 4 and second.ndim == 2:
        h, w, fan_in, _ = kernel
        second = einops.rearrange(second, "(i h w) o -> h w i o", i=fan_in // len(first), h=h, w=w)
    rank = next((len(t[f"lokr_w{i}_b"]) for i in "21" if f"lokr_w{i}_b" in t), None)
    return Kronecker(first, second, rank)


KINDS = {
    "lora_": Kind(lambda t: _lora(t).size(), lambda t, kernel: _lora(t).low_rank()),
    "hada_": Kind(_loha_size, _loha_delta),
    "lokr_": Kind(_lokr_size, _lokr_delta),
    "diff": Kind(
        lambda t: Factors(whole=t["diff"]).size(), lambda t, kernel: Full(_kernel(t["diff"]))
    ),
}
BESIDE = {"diff_b": "bias", "w_norm": "scale", "b_norm": "bias", "bias": "bias"}
"""Updates of arrays beside a kernel: part of a file's name, ours of the array."""


def updates(
    module: str,
    tensors: Mapping[str, Any],
    shapes: Shapes,
    where: str,
    alpha: float | None,
    rank_stabilized: bool,
) -> dict[str, Update]:
    """{path of an array: its update} of one module, whose tensors `check` has seen.

    where: file and module, with which errors begin. alpha: that of PEFT's metadata.
    """
    arrays = {name: np.asarray(x).astype(np.float32) for name, x in tensors.items()}
    for name, x in arrays.items():
        finite.check_array(x, name, where)
    made, scale = {}, 1.0
    kind = next((kind for kind in KINDS if any(name.startswith(kind) for name in arrays)), None)
    if kind is not None:
        path = f"{module}/kernel"
        delta = KINDS[kind].delta(arrays, shapes[path])
        scale = _scale(arrays, delta.rank, where, alpha, rank_stabilized)
        made[path] = Update(delta, scale, _magnitude(arrays, where))
    for name, leaf in BESIDE.items():
        path = f"{module}/{leaf}"
        if name not in arrays:
            continue
        if shapes.get(path) != arrays[name].shape:
            raise ValueError(
                f"{where}: {name} {arrays[name].shape}, the model's {shapes.get(path)}"
            )
        # PEFT scales its bias as the rest of the update, LyCORIS does not
        made[path] = Update(Full(arrays[name]), scale if name == "bias" else 1.0)
    return made


def _scale(
    arrays: Mapping[str, np.ndarray],
    rank: int | None,
    where: str,
    alpha: float | None,
    rank_stabilized: bool,
) -> float:
    """Factor of an update in a file; a missing alpha, and one of 0, stand for the rank."""
    for name in {"scale", "alpha"} & arrays.keys():
        if arrays[name].size != 1:
            raise ValueError(f"{where}: {name} has the shape {arrays[name].shape}, not one number")
    if "scale" in arrays:
        return arrays["scale"].item()
    alpha = arrays["alpha"].item() if "alpha" in arrays else alpha
    if rank is None or alpha is None:
        return 1.0
    if alpha == 0:
        LOG.warning(f"{where}: alpha is 0; it counts as the rank, {rank}, as in kohya's scripts")
        return 1.0
    return alpha / (math.sqrt(rank) if rank_stabilized else rank)


def _magnitude(arrays: Mapping[str, np.ndarray], where: str) -> np.ndarray | None:
    """DoRA's norms: [out], or [in, 1] for those of the input channels.

    PEFT's are of the output, whatever their shape. Of LyCORIS' the shape tells: [out, 1, ...] or
    [1, in, ...].
    """
    if "magnitude" in arrays:
        return arrays["magnitude"].reshape(-1)
    norms = arrays.get("dora_scale")
    if norms is None:
        return None
    if norms.ndim > 1 and norms.shape[0] == 1 and norms.shape[1] > 1:
        return norms.reshape(-1, 1)
    return norms.reshape(-1)


def to_torch(delta: LowRank) -> tuple[np.ndarray, np.ndarray]:
    """(down, up) in torch's layout: [r, in] and [out, r], of a convolution [r, in, h, w] and
    [out, r, 1, 1]."""
    down, up = np.asarray(delta.down), np.asarray(delta.up).T
    if down.ndim == 4:
        return einops.rearrange(down, "h w i r -> r i h w"), up[..., None, None]
    return down.T, up
