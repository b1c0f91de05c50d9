"""Solvers by name."""

import jax
import pytest

from ldm_jax import solvers


def test_make_by_name():
    for name in solvers.SOLVERS:
        assert isinstance(solvers.make(name), solvers.Solver)
    with pytest.raises(ValueError, match="'rk45' is not one of ddim, ddpm, plms"):
        solvers.make("rk45")


def test_eta_for_a_solver_that_takes_none():
    with pytest.raises(ValueError, match=r"eta=0.5: solver 'ddpm' takes none"):
        solvers.make("ddpm", 0.5)

    @jax.jit
    def traced(eta):
        assert isinstance(solvers.make("ddpm", eta), solvers.Solver)
        return eta

    traced(0.5)
