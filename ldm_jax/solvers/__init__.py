"""Samplers as pairs of pure functions under one scan.

    name              calls per level   order     fresh noise   earlier outputs used
    ddim, euler       1                 1         ddim by eta   -
    ddpm              1                 -         yes           -
    euler_ancestral   1                 -         yes           -
    plms              1, first level 2  2         -             3
    lms               1                 4         -             3
    deis              1                 3         -             2
    dpmpp_2m          1                 2         -             1
    dpmpp_2m_sde      1                 -         yes           1
    dpmpp_3m_sde      1                 -         yes           2
    unipc             1                 3         -             1
    heun, kdpm2       2                 2         -             -
    dpmpp_2s          2                 2         -             -

The order is that of the error against the exact flow as steps shrink evenly in log(alpha / sigma);
a step from pure noise or to none always has one call.
"""

from collections.abc import Callable

import jax

from ldm_jax.solvers.adams import deis, lms
from ldm_jax.solvers.ddim import ddim
from ldm_jax.solvers.ddpm import ddpm
from ldm_jax.solvers.diffusers_levels import SPACINGS as DIFFUSERS_SPACINGS
from ldm_jax.solvers.diffusers_levels import diffusers_levels
from ldm_jax.solvers.dpm_solver import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s, dpmpp_3m_sde
from ldm_jax.solvers.euler import euler, euler_ancestral
from ldm_jax.solvers.heun import heun
from ldm_jax.solvers.kdpm2 import kdpm2
from ldm_jax.solvers.levels import Levels, Spacing, inverted, levels, table
from ldm_jax.solvers.loop import Solver, prepared, sample, segment
from ldm_jax.solvers.masked import composite, fresh_noise, masked
from ldm_jax.solvers.plms import plms
from ldm_jax.solvers.unipc import unipc

SOLVERS: dict[str, Callable[..., Solver]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "plms": plms,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "lms": lms,
    "kdpm2": kdpm2,
    "unipc": unipc,
    "deis": deis,
}

__all__ = [
    "DIFFUSERS_SPACINGS",
    "SOLVERS",
    "Levels",
    "Solver",
    "Spacing",
    "composite",
    "diffusers_levels",
    "fresh_noise",
    "inverted",
    "levels",
    "make",
    "masked",
    "prepared",
    "sample",
    "segment",
    "table",
]


def make(name: str, eta: jax.Array | float = 0.0) -> Solver:
    """The solver of this name; those that take no eta (all but "ddim") ignore a traced one.

    The stochastic ones (`Solver.noisy`) draw as much noise as their papers do.
    ValueError for an unknown name, and for a Python eta other than 0 that the solver cannot use.
    """
    if name not in SOLVERS:
        raise ValueError(f"solver {name!r} is not one of {', '.join(SOLVERS)}")
    if name == "ddim":
        return ddim(eta)
    if isinstance(eta, int | float) and eta != 0:
        raise ValueError(f"eta={eta}: solver {name!r} takes none; leave it at 0 or use 'ddim'")
    return SOLVERS[name]()
