"""Samplers as pairs of pure functions under one scan."""

from ldm_jax.solvers.ddim import ddim
from ldm_jax.solvers.ddpm import ddpm
from ldm_jax.solvers.levels import Levels, levels
from ldm_jax.solvers.loop import Solver, sample, trajectory

SOLVERS = {"ddim": ddim, "ddpm": ddpm}

__all__ = ["SOLVERS", "Levels", "Solver", "ddim", "ddpm", "levels", "sample", "trajectory"]
