"""Levels for any number of steps, against the schedulers of diffusers themselves."""

import numpy as np
import pytest

from ldm_jax import diffusion, solvers

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SD = diffusion.make_schedule("scaled_linear")
BETAS = {"beta_start": 8.5e-4, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CLASSES = {
    "ddim": "DDIMScheduler", "plms": "PNDMScheduler", "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler", "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler", "lms": "LMSDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler", "deis": "DEISMultistepScheduler",
}  # fmt: skip
STEPS = (*range(1, 32), *range(33, 1000, 53), 48, 50, 61, 100, 103, 333, 334, 500, 998, 999)
SPACINGS = [("leading", 1), ("leading", 0), ("trailing", 0), ("linspace", 0)]


def scheduler_of(solver, spacing, offset, **more):
    options = {**BETAS, **more, "timestep_spacing": spacing, "steps_offset": offset}
    if solver == "plms":
        options["skip_prk_steps"] = True
    return getattr(diffusers, CLASSES[solver])(**options)


def theirs(scheduler, solver, steps):
    """Their timesteps of the levels, and sigma / alpha at them; None where they do not say."""
    scheduler.set_timesteps(steps)
    t, sigmas = scheduler.timesteps.numpy(), getattr(scheduler, "sigmas", None)
    sigmas = None if sigmas is None else sigmas.numpy()[:-1]
    if solver == "plms":  # the second timestep is visited twice
        return scheduler._timesteps[::-1], None
    if solver in ("heun", "kdpm2"):  # two calls for a level, but for the last
        return (t[::2] if solver == "heun" else None), sigmas[::2]
    return t, sigmas


@pytest.mark.parametrize("solver", CLASSES)
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
def test_timesteps_and_noise_of_any_number_of_steps(solver, spacing, offset):
    scheduler = scheduler_of(solver, spacing, offset)
    for steps in STEPS:
        ours = solvers.diffusers_levels(SD, steps, spacing, None, offset, solver)
        assert len(ours.t) == steps
        t, sigmas = theirs(scheduler, solver, steps)
        if t is not None:
            np.testing.assert_allclose(ours.t, t[:steps], rtol=1e-6, atol=1e-4, err_msg=str(steps))
            assert (t[steps:] == -1).all()  # their arange has one more, as floats go
        if sigmas is not None:
            found = ours.sigma / ours.alpha
            np.testing.assert_allclose(found, sigmas[:steps], rtol=2e-5, err_msg=str(steps))
        assert np.isfinite(np.concatenate([x.ravel() for x in ours if x is not None])).all()


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
def test_where_a_step_of_ddim_leads(spacing, offset, to_one):
    """With x0 = x / alpha and eps = 0, what comes out says alpha there."""
    final = "one" if to_one else "alphas_cumprod_0"
    scheduler = scheduler_of("ddim", spacing, offset, set_alpha_to_one=to_one, clip_sample=False)
    one = torch.ones(1, dtype=torch.float64)
    for steps in (1, 3, 6, 7, 9, 27, 30, 50, 77, 999):
        ours = solvers.diffusers_levels(SD, steps, spacing, final, offset, "ddim")
        scheduler.set_timesteps(steps)
        out = [float(scheduler.step(0 * one, t, one).prev_sample) for t in scheduler.timesteps]
        np.testing.assert_allclose(ours.alpha_next / ours.alpha, out, rtol=1e-5)


def test_steps_without_timesteps_are_refused():
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=rf"steps={steps} is not in 1\.\.1000"):
            solvers.diffusers_levels(SD, steps, "leading", None, 1, "ddim")
    for solver, spacing in (("ddim", "leading"), ("unipc", "leading"), ("dpmpp_2m", "linspace")):
        with pytest.raises(ValueError, match=rf"steps=1000 with spacing '{spacing}' of {solver}"):
            solvers.diffusers_levels(SD, 1000, spacing, None, 1, solver)
    assert len(solvers.diffusers_levels(SD, 1000, "trailing", None, 1, "ddim").t) == 1000
    assert len(solvers.diffusers_levels(SD, 1000, "leading", None, 0, "ddim").t) == 1000
