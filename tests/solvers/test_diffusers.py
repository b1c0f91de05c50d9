"""Every solver against the scheduler of diffusers that does the same, on a closed-form model.

All three prediction types in one batch: rows 0 to 2 predict eps, v and x0.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import diffusion, solvers

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SD = diffusion.make_schedule("scaled_linear")
SHAPE = (3, 4, 4)
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, *SHAPE)), jnp.float32)
KEYS = jax.random.split(jax.random.key(0), 3)
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
BETAS = {"beta_start": 8.5e-4, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def model_of(prediction):
    @jax.jit
    def model(x, t_b):
        alpha, sigma = diffusion.signal_and_noise(SD, t_b, x.ndim)
        eps = 0.8 * jnp.tanh(x) + 0.3 * jnp.sin(t_b.astype(jnp.float32) / 70)[:, None, None, None]
        x0 = diffusion.x0_from_eps(x, eps, alpha, sigma)
        return diffusion.target(prediction, x0, eps, alpha, sigma)

    return model


DRAWING = [
    importlib.import_module(f"diffusers.schedulers.scheduling_{name}")
    for name in ("ddim", "ddpm", "euler_ancestral_discrete", "dpmsolver_multistep")
]
MODELS = {prediction: model_of(prediction) for prediction in PREDICTIONS}


def denoise(x, level):
    parts = [
        diffusion.denoiser(MODELS[prediction], prediction)(x[row : row + 1], level)
        for row, prediction in enumerate(PREDICTIONS)
    ]
    return diffusion.Denoised(*(jnp.concatenate(part) for part in zip(*parts)))


def noise_of(row, i):
    """What the row is given at level i."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(KEYS[row : row + 1], i)
    return torch.from_numpy(np.array(diffusion.rowwise_normal(keys, SHAPE)))


def theirs(scheduler, row, table, monkeypatch, **of_step):
    """x_0 of one row by a scheduler that `set_timesteps` has been called on."""
    # Schedulers with a first sigma above 1 as scale of their noise work in x / alpha.
    by_sigma = scheduler.init_noise_sigma > 1
    model = MODELS[tuple(PREDICTIONS)[row]]
    x = torch.from_numpy(np.array(X[row : row + 1])) / (table.alpha[0] if by_sigma else 1)
    for i, t in enumerate(scheduler.timesteps):
        for module in DRAWING:
            draw = lambda *args, i=i, **options: noise_of(row, i)  # noqa: E731
            monkeypatch.setattr(module, "randn_tensor", draw)
        x_in = jnp.asarray(scheduler.scale_model_input(x, t).numpy())
        t_b = jnp.asarray(t.numpy()).reshape(1)
        out = torch.from_numpy(np.array(model(x_in, t_b)))
        x = scheduler.step(out, t, x, **of_step).prev_sample
    return x.numpy() * (table.alpha_next[-1] if by_sigma else 1)


def compare(ours, scheduler, table, monkeypatch, rows=(0, 1, 2), steps=None, **of_step):
    """`scheduler(prediction_type=...)`, run on its own timesteps."""
    out = solvers.sample(ours, denoise, table, X, KEYS)
    for row in rows:
        reference = scheduler(prediction_type=tuple(PREDICTIONS.values())[row])
        reference.set_timesteps(len(table.t) if steps is None else steps)
        expected = theirs(reference, row, table, monkeypatch, **of_step)
        error = np.max(np.abs(out[row : row + 1] - expected)) / np.max(np.abs(expected))
        assert error <= 3e-5, (row, error)


def scheduler_of(name, **options):
    def build(prediction_type):
        kind = getattr(diffusers, name) if isinstance(name, str) else name
        return kind(**BETAS, prediction_type=prediction_type, **options)

    return build


LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {"timestep_spacing": "trailing"}
NO_SAMPLE = (0, 1)  # their scheduler knows no prediction of x0


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(
    ("name", "theirs_name", "rows"),
    [
        ("euler", "EulerDiscreteScheduler", (0, 1, 2)),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler", NO_SAMPLE),
        ("heun", "HeunDiscreteScheduler", (0, 1, 2)),
        ("lms", "LMSDiscreteScheduler", (0, 1, 2)),
        ("kdpm2", "KDPM2DiscreteScheduler", NO_SAMPLE),
    ],
)
def test_in_sigma_space(name, theirs_name, rows, spacing, monkeypatch):
    table = solvers.levels(SD, 20, spacing, "one")
    scheduler = scheduler_of(theirs_name, **(LEADING if spacing == "leading" else TRAILING))
    compare(solvers.make(name), scheduler, table, monkeypatch, rows)


@pytest.mark.parametrize("name", ["karras", "exponential"])
def test_spacings_by_noise(name, monkeypatch):
    table = solvers.levels(SD, 20, name)
    scheduler = scheduler_of("EulerDiscreteScheduler", **{f"use_{name}_sigmas": True})
    compare(solvers.make("euler"), scheduler, table, monkeypatch)


@pytest.mark.parametrize(("spacing", "eta"), [("leading", 0.0), ("trailing", 0.7)])
def test_ddim(spacing, eta, monkeypatch):
    options = LEADING if spacing == "leading" else TRAILING
    options = {**options, "set_alpha_to_one": spacing == "trailing", "clip_sample": False}
    scheduler = scheduler_of("DDIMScheduler", **options)
    table = solvers.levels(SD, 20, spacing)
    compare(solvers.make("ddim", eta), scheduler, table, monkeypatch, eta=eta)


def test_ddpm(monkeypatch):
    scheduler = scheduler_of("DDPMScheduler", clip_sample=False, **TRAILING)
    compare(solvers.make("ddpm"), scheduler, solvers.levels(SD, 20, "trailing"), monkeypatch)


def test_plms(monkeypatch):
    scheduler = scheduler_of("PNDMScheduler", skip_prk_steps=True, **LEADING)
    compare(solvers.make("plms"), scheduler, solvers.levels(SD, 20), monkeypatch, (0,))


class ThirdOrder(diffusers.DPMSolverMultistepScheduler):
    """Their third-order SDE step has the constant in front of D2 with the wrong sign.

    -0.5 where k-diffusion, and their own step without noise, have 0.5: a term that does not vanish
    with the step. It is taken back here.
    """

    def multistep_dpm_solver_third_order_update(self, outputs, *args, sample, noise):
        x = super().multistep_dpm_solver_third_order_update(outputs, sample=sample, noise=noise)
        i = self.step_index
        lam = -torch.log(self.sigmas[i - 2 : i + 2])
        h_1, h_0, h = torch.diff(lam)
        r0, r1 = h_0 / h, h_1 / h
        second = (outputs[-1] - outputs[-2]) / r0 - (outputs[-2] - outputs[-3]) / r1
        return x + self._sigma_to_alpha_sigma_t(self.sigmas[i + 1])[0] * second / (r0 + r1)


@pytest.mark.parametrize(
    ("steps", "spacing", "their_spacing"),
    [
        (10, "trailing", "trailing"),  # below 15 the last steps are of lower order
        (27, "time_uniform", "linspace"),  # 27 steps of 37 timesteps each: nothing to round
    ],
)
@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
        ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("dpmpp_3m_sde", ThirdOrder,
         {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun"}),
        ("unipc", "UniPCMultistepScheduler", {}),
        ("deis", "DEISMultistepScheduler", {"solver_order": 3}),
    ],
)  # fmt: skip
def test_multistep(name, kind, options, steps, spacing, their_spacing, monkeypatch):
    low = kind == "DEISMultistepScheduler" or "final_sigmas_type" in options
    table = solvers.levels(SD, steps, spacing, "alphas_cumprod_0" if low else "one")
    scheduler = scheduler_of(kind, **options, timestep_spacing=their_spacing)
    compare(solvers.make(name), scheduler, table, monkeypatch)


def test_dpmpp_2s(monkeypatch):
    """Their singlestep solver takes two of its own levels per step: ours and the one halfway."""
    table = solvers.levels(SD, 10, "trailing", "alphas_cumprod_0")

    def scheduler(prediction_type):
        options = {"solver_order": 2, "final_sigmas_type": "sigma_min"}
        out = scheduler_of("DPMSolverSinglestepScheduler", **options)(prediction_type)
        give_up = out.set_timesteps

        def set_timesteps(steps):
            give_up(steps)
            pairs = lambda a, b: torch.from_numpy(np.stack([a, b], 1).ravel())  # noqa: E731
            out.timesteps = pairs(table.t.astype(np.float32), table.t_mid)
            noise = pairs(table.sigma / table.alpha, table.sigma_mid / table.alpha_mid)
            end = torch.tensor([table.sigma_next[-1] / table.alpha_next[-1]])
            out.sigmas = torch.cat([noise, end])
            out.set_begin_index(0)

        out.set_timesteps = set_timesteps
        return out

    compare(solvers.make("dpmpp_2s"), scheduler, table, monkeypatch, steps=20)
