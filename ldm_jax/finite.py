"""Numbers and arrays that must be finite: refused where they come in, with their names."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 2**18  # values looked at together: what is made of them stays in the processor's cache
# the bits of the exponent, all of which are set in NaN and infinity alone
EXPONENTS = {
    np.dtype(np.float16): np.uint16(0x7C00),
    np.dtype(jnp.bfloat16): np.uint16(0x7F80),
}


def is_finite(x: np.ndarray) -> bool:
    """Tell whether a host array holds neither NaN nor infinity, in one pass and little memory."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return True
    flat, mask = x.ravel(order="K"), EXPONENTS.get(x.dtype)  # a view, also of a transposed array
    if mask is not None:  # NumPy takes ten times as long over these types
        flat = flat.view(mask.dtype)
        return all((flat[i : i + BLOCK] & mask).max() != mask for i in range(0, flat.size, BLOCK))
    return all(np.isfinite(flat[i : i + BLOCK]).all() for i in range(0, flat.size, BLOCK))


def check_array(x: np.ndarray, name: str, where: str) -> None:
    """ValueError that names the file and the tensor, for a host array that is not finite."""
    if is_finite(x):
        return
    bad = ~np.isfinite(x.astype(np.float32))
    first = [int(i) for i in np.argwhere(bad)[0]]
    raise ValueError(
        f"{where}: {name} is not finite: {int(bad.sum())} of its {x.size} values are NaN or"
        f" infinite as {x.dtype}, the first at {first}"
    )


def check_tree(tree: Any, where: str) -> None:
    """`check_array` of every leaf of a tree of host arrays."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        check_array(np.asarray(x), jax.tree_util.keystr(path, simple=True, separator="/"), where)


def checked(value: Any, name: str, *, nonzero: bool = False, least: float = -math.inf) -> float:
    """Return a number as a float; ValueError that begins with its name if it is not finite.

    nonzero: nor may it be 0. least: nor may it be less.
    """
    number = None if isinstance(value, bool | str) else value
    try:
        number = float(number)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number) and number >= least and not (nonzero and number == 0):
        return number
    limits = " other than 0" * nonzero + f" of at least {least:g}" * math.isfinite(least)
    raise ValueError(f"{name} {value!r} is not a finite number{limits}")


def check_known(value: Any, name: str) -> None:
    """ValueError for a number or NumPy array that is not finite; what is traced passes."""
    if isinstance(value, int | float):
        checked(value, name)
    elif isinstance(value, np.ndarray | np.generic) and not is_finite(np.asarray(value)):
        raise ValueError(f"{name} {value!s:.60} is not finite")


def check_fields(config: Any, name: str = "") -> None:
    """ValueError for a float in a dataclass, or in those inside it, that is not finite.

    It is named as the option that sets it: `--optimizer.learning-rate nan`.
    """
    if dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            inner = field.name.replace("_", "-")
            check_fields(getattr(config, field.name), f"{name}.{inner}" if name else f"--{inner}")
    elif isinstance(config, tuple | list):
        for value in config:
            check_fields(value, name)
    elif isinstance(config, float):
        checked(config, name)
