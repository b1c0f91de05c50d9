"""Tables of levels against the reference's rules, for every number of steps."""

from pathlib import Path

import jax
import numpy as np
import pytest

from ldm_jax import diffusion, solvers
from ldm_jax.solvers.levels import FINAL

SD = diffusion.make_schedule("scaled_linear")
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "samplers.npz")


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_leading_equals_golden(steps):
    table = solvers.levels(SD, steps)
    np.testing.assert_array_equal(table.t[::-1], GOLDEN[f"ddim_timesteps_{steps}"])
    sigmas = table.sigma_next / table.sigma * np.sqrt(table.beta)  # DDIM's, eta = 1
    np.testing.assert_allclose(sigmas[::-1], GOLDEN[f"ddim_sigmas_eta1_{steps}"], rtol=3e-6)


def test_leading_follows_the_reference_for_all_steps():
    refused = []
    for steps in range(1, 1001):
        rule = [t + 1 for t in range(0, 1000, 1000 // steps)]
        if max(rule) == 1000:
            refused.append(steps)
            with pytest.raises(ValueError, match=f"steps={steps} .*'trailing'"):
                solvers.levels(SD, steps)
        else:
            np.testing.assert_array_equal(solvers.levels(SD, steps).t, rule[::-1])
    spans = ((3, 3), (9, 9), (27, 27), (36, 37), (101, 111), (251, 333), (501, 1000))
    assert refused == [s for a, b in spans for s in range(a, b + 1)]
    lengths = {s: len(solvers.levels(SD, s).t) for s in (30, 45, 60, 75, 80, 150, 400)}
    assert lengths == {30: 31, 45: 46, 60: 63, 75: 77, 80: 84, 150: 167, 400: 500}


@pytest.mark.parametrize("timesteps", [2, 7, 1000])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_exactly_the_steps_asked_for(timesteps, spacing):
    schedule = diffusion.make_schedule("linear", timesteps, 1e-4, 0.02)
    for steps in range(1, timesteps + 1):
        t = solvers.levels(schedule, steps, spacing).t
        assert t.dtype == np.int32
        assert len(t) == steps
        assert t[0] == timesteps - 1
        assert t[-1] >= 0
        assert np.all(np.diff(t) < 0)
    np.testing.assert_array_equal(t, np.arange(timesteps)[::-1])


def test_trailing_equals_the_papers_rule():
    for steps in (1, 2, 5, 10, 20, 25, 30, 50, 100, 250):
        rule = np.round(np.arange(1000, 0, -1000 / steps)).astype(int) - 1
        np.testing.assert_array_equal(solvers.levels(SD, steps, "trailing").t, rule)


def test_linspace_includes_both_ends():
    np.testing.assert_array_equal(solvers.levels(SD, 4, "linspace").t, [999, 666, 333, 0])


def test_quadratic_follows_the_reference():
    t = solvers.levels(SD, 5, "quadratic").t
    np.testing.assert_array_equal(t, [801, 451, 201, 51, 1])  # (i sqrt(800) / 4)^2, and 1
    with pytest.raises(ValueError, match="steps=2 with spacing 'quadratic' starts at timestep 3"):
        solvers.levels(diffusion.make_schedule("linear", 3), 2, "quadratic")


def test_time_uniform_follows_dpm_solver():
    table = solvers.levels(SD, 8, "time_uniform")
    continuous = np.linspace(1, 1 / 1000, 9)  # n-th timestep is at (n + 1) / 1000
    np.testing.assert_allclose(table.t, ((continuous - 1 / 1000) * 1000)[:-1], rtol=1e-6)
    assert table.t.dtype == np.float32
    log_alpha = 0.5 * np.log(SD.alphas_cumprod)
    expected = np.exp(np.interp(continuous, np.arange(1, 1001) / 1000, log_alpha))
    np.testing.assert_allclose(table.alpha, expected[:-1], rtol=1e-6)
    np.testing.assert_allclose(table.alpha_next, expected[1:], rtol=1e-6)


@pytest.mark.parametrize("spacing", FINAL)
def test_a_step_leads_to_the_next_level(spacing):
    table = solvers.levels(SD, 8, spacing)
    np.testing.assert_array_equal(table.alpha_next[:-1], table.alpha[1:])
    np.testing.assert_array_equal(table.sigma_next[:-1], table.sigma[1:])
    np.testing.assert_allclose(table.alpha**2 + table.sigma**2, 1, rtol=1e-6)
    if table.t.dtype == np.int32:
        np.testing.assert_allclose(table.alpha**2, SD.alphas_cumprod[table.t], rtol=1e-6)


@pytest.mark.parametrize("spacing", FINAL)
def test_final_level(spacing):
    ends = {"one": 1.0, "alphas_cumprod_0": np.sqrt(SD.alphas_cumprod[0]).astype(np.float32)}
    for final, alpha in ends.items():
        assert solvers.levels(SD, 8, spacing, final).alpha_next[-1] == alpha
    of_reference = ("leading", "quadratic", "time_uniform")
    default = "alphas_cumprod_0" if spacing in of_reference else "one"
    assert solvers.levels(SD, 8, spacing).alpha_next[-1] == ends[default]
    assert solvers.levels(SD, 8, spacing, "one").sigma_next[-1] == 0


def noise(table):
    """sigma / alpha, float64."""
    return table.sigma.astype(np.float64) / table.alpha


def test_karras_and_exponential_follow_the_papers():
    lowest, highest = np.sqrt(1 / SD.alphas_cumprod[[0, -1]] - 1)
    ramp = np.linspace(1, 0, 8)
    karras = (lowest ** (1 / 7) + ramp * (highest ** (1 / 7) - lowest ** (1 / 7))) ** 7
    np.testing.assert_allclose(noise(solvers.levels(SD, 8, "karras")), karras, rtol=1e-6)
    exponential = np.exp(np.log(lowest) + ramp * np.log(highest / lowest))
    np.testing.assert_allclose(noise(solvers.levels(SD, 8, "exponential")), exponential, rtol=1e-6)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_levels_by_noise_span_the_schedule(spacing):
    table = solvers.levels(SD, 8, spacing)
    assert table.t.dtype == np.float32
    assert (table.t[0], table.t[-1]) == (999, 0)
    log = np.interp(table.t, np.arange(1000), np.log(SD.alphas_cumprod))
    np.testing.assert_allclose(2 * np.log(table.alpha), log, atol=1e-4)
    # With timestep 0 as the end, it is where the last step leads to, and no level twice.
    short, long = solvers.levels(SD, 8, spacing, "alphas_cumprod_0"), solvers.levels(SD, 9, spacing)
    np.testing.assert_array_equal(short.alpha, long.alpha[:-1])
    assert short.t[-1] > 0
    assert len(solvers.levels(SD, 1, spacing).t) == 1


def test_levels_by_noise_begin_below_pure_noise():
    table = solvers.levels(diffusion.zero_terminal_snr(SD), 8, "karras")
    assert table.t[0] == 999
    np.testing.assert_allclose(noise(table)[0], 4096, rtol=1e-3)


@pytest.mark.parametrize("spacing", FINAL)
def test_columns_about_the_step(spacing):
    table = solvers.levels(SD, 8, spacing, "alphas_cumprod_0")
    lam, lam_next = (np.log(a / s) for a, s in zip(table[1:5:2], table[2:5:2]))
    np.testing.assert_allclose(table.h, lam_next - lam, atol=2e-5)
    np.testing.assert_array_equal(table.t_next, [*table.t[1:], 0])
    assert table.t_next.dtype == table.t.dtype
    middle = np.log(table.alpha_mid / table.sigma_mid)
    np.testing.assert_allclose(middle, (lam + lam_next) / 2, atol=2e-5)
    np.testing.assert_allclose(table.alpha_mid**2 + table.sigma_mid**2, 1, rtol=1e-6)
    log = np.interp(table.t_mid, np.arange(1000), np.log(SD.alphas_cumprod))
    np.testing.assert_allclose(2 * np.log(table.alpha_mid), log, atol=1e-4)


def test_inverted_levels_lead_back():
    table = solvers.levels(SD, 8, "trailing", "alphas_cumprod_0")
    back = solvers.inverted(table)
    np.testing.assert_array_equal(back.t, [0, *table.t[:0:-1]])
    np.testing.assert_array_equal(back.t_next, table.t[::-1])
    np.testing.assert_array_equal(back.sigma_next, table.sigma[::-1])
    np.testing.assert_array_equal(back.alpha, table.alpha_next[::-1])
    np.testing.assert_allclose(back.beta, 1 - (back.alpha / back.alpha_next) ** 2, rtol=1e-4)
    for column, same in zip(solvers.inverted(back)[:-2], table[:-2]):  # without what `sample` adds
        np.testing.assert_allclose(column, same, rtol=1e-6)
    with pytest.raises(ValueError, match="final='alphas_cumprod_0'"):
        solvers.inverted(solvers.levels(SD, 8, "trailing"))


def test_beta_keeps_its_digits():
    table = solvers.levels(SD, 1000, "trailing")
    np.testing.assert_allclose(table.beta[::-1], SD.betas, rtol=1e-7)


def test_zero_terminal_snr_begins_in_pure_noise():
    shifted = diffusion.zero_terminal_snr(SD)
    table = solvers.levels(shifted, 10, "trailing")
    assert table.alpha[0] == 0
    assert table.sigma[0] == 1
    assert table.beta[0] == 1
    for spacing in FINAL:
        table = jax.tree.leaves(solvers.levels(shifted, 10, spacing))
        assert all(np.all(np.isfinite(a)) for a in table)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0,), "steps=0 is not in 1..1000"),
        ((1001, "trailing"), "steps=1001 is not in 1..1000"),
        ((10, "karas"), "'karas' is not one of leading"),
        ((10, "leading", "zero"), "'zero' is not one of alphas_cumprod_0, one"),
    ],
)
def test_bad_arguments_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        solvers.levels(SD, *args)
