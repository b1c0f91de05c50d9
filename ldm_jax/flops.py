"""Floating-point operations of a traced function, counted in its jaxpr.

XLA's own cost analysis counts the body of a loop once and a custom kernel as nothing; here a scan
counts as often as it runs. Only contractions count: matrix products and convolutions.
"""

import math
from typing import Any


def count(jaxpr: Any) -> float:
    """Operations (a multiply-add is two) of a closed jaxpr, over all devices.

    A `while` of unknown length counts once, a `cond` as its most expensive branch.
    """
    total = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            total += _dot(eqn)
        elif name == "conv_general_dilated":
            total += _conv(eqn)
        elif name == "cond":
            total += max(map(count, eqn.params["branches"]))
        else:
            times = eqn.params["length"] if name == "scan" else 1
            total += times * sum(map(count, _inner(eqn)))
    return total


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)


def _conv(eqn: Any) -> float:
    """Zeros that a dilated input (the gradient of a strided convolution) brings do not count."""
    rhs = eqn.invars[1].aval.shape
    out_features = rhs[eqn.params["dimension_numbers"].rhs_spec[0]]
    per_output = math.prod(rhs) / out_features / math.prod(eqn.params["lhs_dilation"])
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * per_output


def _inner(eqn: Any) -> list[Any]:
    """Jaxprs among an equation's parameters: bodies of jit, scan, remat, custom derivatives."""
    values = [v for p in eqn.params.values() for v in (p if isinstance(p, (tuple, list)) else (p,))]
    return [v for v in values if hasattr(v, "eqns") or hasattr(getattr(v, "jaxpr", None), "eqns")]
