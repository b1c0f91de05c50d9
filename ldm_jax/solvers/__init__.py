"""Samplers as pairs of pure functions under one scan."""

import jax

from ldm_jax.solvers.ddim import ddim
from ldm_jax.solvers.ddpm import ddpm
from ldm_jax.solvers.levels import Levels, levels
from ldm_jax.solvers.loop import Solver, sample

SOLVERS = {"ddim": ddim, "ddpm": ddpm}

__all__ = ["SOLVERS", "Levels", "Solver", "levels", "make", "sample"]


def make(name: str, eta: jax.Array | float = 0.0) -> Solver:
    """The solver of this name; those that take no eta (all but "ddim") ignore a traced one.

    ValueError for an unknown name, and for a Python eta other than 0 that the solver cannot use.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver {name!r} is not one of {', '.join(SOLVERS)}")
    if name == "ddim":
        return ddim(eta)
    if isinstance(eta, int | float) and eta != 0:
        raise ValueError(f"eta={eta}: solver {name!r} takes none; leave it at 0 or use 'ddim'")
    return SOLVERS[name]()
