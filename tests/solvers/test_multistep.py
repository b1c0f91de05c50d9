"""PLMS and DPM-Solver++(2M): the reference's trajectories; lower orders at the end."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import diffusion, guidance, solvers
from ldm_jax.solvers.multistep import histories

pytestmark = pytest.mark.usefixtures("quick_compilation")

SD = diffusion.make_schedule("scaled_linear")
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "samplers.npz")


def golden_eps(x, t_b, c):
    """The closed-form model of golden/samplers.npz."""
    wave = 0.3 * jnp.sin(t_b.astype(jnp.float32) / 70)
    return 0.8 * jnp.tanh(x) + wave[:, None, None, None] + c[:, None, None, :]


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize(
    ("name", "key", "spacing"),
    [("plms", "plms", "leading"), ("dpmpp_2m", "dpmpp2m", "time_uniform")],
)
def test_trajectory_equals_the_reference(name, key, spacing, steps):
    c, uc = jnp.asarray(GOLDEN["c"]), jnp.asarray(GOLDEN["uc"])
    x_T = jnp.asarray(GOLDEN["x_T"].transpose(0, 2, 3, 1))
    table = solvers.levels(SD, steps, spacing)

    @jax.jit
    def sample(scale):
        denoise = diffusion.denoiser(guidance.classifier_free(golden_eps, c, uc, scale), "eps")
        keys = jax.random.split(jax.random.key(0), 2)
        return solvers.sample(solvers.make(name), denoise, table, x_T, keys)

    for scale in (1.0, 3.0):
        expected = GOLDEN[f"{key}_{steps}_g{scale}"].transpose(0, 2, 3, 1)
        assert np.max(np.abs(sample(scale) - expected)) <= 1e-5 * np.max(np.abs(expected))


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
