"""Floating-point operations of a traced function, counted in its jaxpr.

XLA's own cost analysis counts the body of a loop once and a custom kernel as nothing; here a scan
counts as often as it runs, and a Pallas kernel as often as its grid says. Only contractions count:
matrix products and convolutions.
"""

import math
from typing import Any

LANES, SUBLANES = 128, 8  # a TPU's matrix unit works on whole tiles of these


def count(jaxpr: Any, padded: bool = False) -> float:
    """Operations (a multiply-add is two) of a closed jaxpr, by all devices together.

    A `while` of unknown length counts once, a `cond` as its most expensive branch. Recomputation in
    a gradient counts again; to count the operations that a model needs, trace it without remat and
    with plain attention.
    padded: matrix products as a TPU executes them, in whole tiles.
    """
    total = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            total += _dot(eqn, padded)
        elif name == "conv_general_dilated":
            total += _conv(eqn)
        elif name == "cond":
            total += max(count(branch, padded) for branch in eqn.params["branches"])
        else:
            total += _times(eqn) * sum(count(inner, padded) for inner in _inner(eqn))
    return total


def kernels(jaxpr: Any) -> dict[str, dict[tuple, float]]:
    """Executed operations of one call of each Pallas kernel, padding included.

    By the kernel's name, then by the shapes of its inputs and outputs, in this order:
    {"name": {((2, 8), (8,), (2,)): 1e9}}.
    """
    by_kernel: dict[str, dict[tuple, float]] = {}
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "pallas_call":
            shapes = tuple(var.aval.shape for var in (*eqn.invars, *eqn.outvars))
            operations = _times(eqn) * sum(count(inner, padded=True) for inner in _inner(eqn))
            by_kernel.setdefault(eqn.params["name"] or "pallas_call", {})[shapes] = operations
        else:
            for inner in _inner(eqn):
                for name, calls in kernels(inner).items():
                    by_kernel.setdefault(name, {}).update(calls)
    return by_kernel


def largest_batched(jaxpr: Any) -> dict | None:
    """{"shape", "bytes", "local"} of the largest result of a batched matrix product, or None.

    In these models, the logits of an attention that is not fused. `local`: the shape is that on one
    device, inside a `shard_map`; else that on all. Kernels are not looked into.
    """
    largest: dict | None = None
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = eqn.primitive.name
        if name == "dot_general" and eqn.params["dimension_numbers"][1][0]:
            aval = eqn.outvars[0].aval
            size = math.prod(aval.shape) * aval.dtype.itemsize
            candidates = [{"shape": list(aval.shape), "bytes": size, "local": False}]
        elif name == "pallas_call":
            continue
        else:
            candidates = [c for c in map(largest_batched, _inner(eqn)) if c is not None]
            candidates = [c | {"local": c["local"] or name == "shard_map"} for c in candidates]
        for candidate in candidates:
            if largest is None or candidate["bytes"] > largest["bytes"]:
                largest = candidate
    return largest


def _times(eqn: Any) -> int:
    if eqn.primitive.name == "pallas_call":
        return math.prod(eqn.params["grid_mapping"].grid)
    if eqn.primitive.name == "shard_map":  # shapes inside are those of one device
        return math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"])
    return eqn.params["length"] if eqn.primitive.name == "scan" else 1


def _dot(eqn: Any, padded: bool) -> float:
    (contracted, other), (batch, _) = eqn.params["dimension_numbers"]
    lhs, rhs = (var.aval.shape for var in eqn.invars)
    rest = math.prod(lhs) // math.prod(lhs[i] for i in (*contracted, *batch))
    depth = math.prod(lhs[i] for i in contracted)
    columns = math.prod(rhs) // math.prod(rhs[i] for i in other)
    columns //= math.prod(lhs[i] for i in batch)
    if padded:
        rest, depth, columns = _up(rest, SUBLANES), _up(depth, LANES), _up(columns, LANES)
    return 2.0 * math.prod(lhs[i] for i in batch) * rest * depth * columns


def _up(n: int, size: int) -> int:
    return -(-n // size) * size


def _conv(eqn: Any) -> float:
    """Zeros of a dilated input (in the gradient of a strided convolution) do not count."""
    rhs = eqn.invars[1].aval.shape
    out_features = rhs[eqn.params["dimension_numbers"].rhs_spec[0]]
    per_output = math.prod(rhs) / out_features / math.prod(eqn.params["lhs_dilation"])
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * per_output


def _inner(eqn: Any) -> list[Any]:
    """Jaxprs among an equation's parameters: bodies of jit, scan, remat, custom derivatives."""
    values = [v for p in eqn.params.values() for v in (p if isinstance(p, (tuple, list)) else (p,))]
    return [v for v in values if hasattr(v, "eqns") or hasattr(getattr(v, "jaxpr", None), "eqns")]
