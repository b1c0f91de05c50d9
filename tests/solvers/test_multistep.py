"""Rows of multistep solvers: lower orders at the ends, distances to earlier outputs."""

import numpy as np
import pytest

from ldm_jax import diffusion, solvers
from ldm_jax.solvers.multistep import histories

SD = diffusion.make_schedule("scaled_linear")


@pytest.mark.parametrize(
    ("steps", "final", "lower_below", "expected"),
    [
        (10, "one", 15, [0, 1, 2, 2, 2, 2, 2, 2, 1, 0]),
        (16, "one", 15, [0, 1, *[2] * 13, 0]),
        (16, "alphas_cumprod_0", 15, [0, 1, *[2] * 14]),
        (16, "one", 0, [0, 1, *[2] * 14]),
        (16, "one", np.inf, [0, 1, *[2] * 12, 1, 0]),
    ],
)
def test_how_many_outputs_a_step_uses(steps, final, lower_below, expected):
    table = solvers.levels(SD, steps, "trailing", final)
    used = [len(behind) for _, n, _, behind in histories(table, 3, lower_below) if n == 2]
    assert used == expected


def test_distances_to_earlier_outputs():
    table = solvers.levels(SD, 20, "trailing")
    lam = np.log(table.alpha / table.sigma)
    *_, behind = next(row for row in histories(table, 4, 15) if row[:2] == (7, 3))
    np.testing.assert_allclose(behind, lam[7] - lam[[6, 5, 4]], rtol=1e-5)
    *_, behind = next(row for row in histories(table, 4, 15) if row[:2] == (7, 1))
    assert len(behind) == 1
