"""`scheduler_config.json` of diffusers as a noise schedule and its spacing, and back."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm_jax import diffusion, schema
from ldm_jax.convert.diffusers.part_configs import class_name
from ldm_jax.runtime import reading
from ldm_jax.solvers.levels import FINAL

SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
SPACINGS = ("leading", "trailing", "linspace")

MOST_TIMESTEPS = 100_000  # published models have 1000; tables are made of this length

# Default spacing of each class.
CLASSES = {
    "DDIMScheduler": "leading",
    "DDPMScheduler": "leading",
    "PNDMScheduler": "leading",
    "DEISMultistepScheduler": "linspace",
    "DPMSolverMultistepScheduler": "linspace",
    "DPMSolverSDEScheduler": "linspace",
    "DPMSolverSinglestepScheduler": "linspace",
    "EulerAncestralDiscreteScheduler": "linspace",
    "EulerDiscreteScheduler": "linspace",
    "HeunDiscreteScheduler": "linspace",
    "KDPM2AncestralDiscreteScheduler": "linspace",
    "KDPM2DiscreteScheduler": "linspace",
    "LMSDiscreteScheduler": "linspace",
    "UniPCMultistepScheduler": "linspace",
}
# Options that the file of another class must have.
SAID = {"beta_start", "beta_end", "beta_schedule"}
# Classes that may end at alphas_cumprod[0], and whether they end at 1 by default.
SET_ALPHA_TO_ONE = {"DDIMScheduler": True, "PNDMScheduler": False}
# Classes with other default betas.
STABLE_BETAS = (
    "DPMSolverSDEScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
)
# Options of how a class samples, with the values that our samplers follow; `left_out` names other
# values. The solver itself is chosen when a picture is drawn, not by the folder.
AS_OURS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas"), (False, None)),
    **dict.fromkeys(("use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas"), (False, None)),
    **dict.fromkeys(("use_dynamic_shifting", "sigma_min", "sigma_max"), (False, None)),
    "shift_terminal": (None,),
    "euler_at_final": (False, None),
    "lower_order_final": (True, None),
    "final_sigmas_type": ("zero", None),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh2", "logrho"),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),
    "predict_x0": (True,),
    "disable_corrector": ([], None),
    "lambda_min_clipped": (-math.inf, None),
    "variance_type": ("fixed_small", None),
    "thresholding": (False, None),
}
# Options of ours that do the same as one that is not followed by itself.
INSTEAD = {
    "use_karras_sigmas": "--spacing karras",
    "use_exponential_sigmas": "--spacing exponential",
    "thresholding": "--dynamic-threshold",
}
# Pipelines whose timesteps have offset 1 whatever their scheduler's file has.
OFFSET_ONE = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
)


def diffusion_config(options: Mapping[str, Any], where: str) -> schema.DiffusionConfig:
    """Schedule and prediction type. ValueError names the file and what cannot be translated."""
    name = _known(options, where)
    _check_numbers(options, where)
    prediction = options.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"{where}: prediction_type={prediction!r} is not one of {', '.join(PREDICTIONS)}"
        )
    if options.get("trained_betas") is not None:
        fields = _recognised(np.asarray(options["trained_betas"], np.float64), where)
    else:
        kind = options.get("beta_schedule", "linear")
        if kind not in SCHEDULES:
            raise ValueError(
                f"{where}: beta_schedule={kind!r} is not one of {', '.join(SCHEDULES)}"
            )
        start, end = (0.00085, 0.012) if name in STABLE_BETAS else (1e-4, 0.02)
        fields = _schedule(
            SCHEDULES[kind], options.get("beta_start", start), options.get("beta_end", end)
        ) | {"timesteps": options.get("num_train_timesteps", 1000)}
    config = schema.DiffusionConfig(
        **fields,
        zero_terminal_snr=bool(options.get("rescale_betas_zero_snr", False)),
        prediction=PREDICTIONS[prediction],
    )
    with reading.refusals(where):
        diffusion.from_config(config)
    return config


def _check_numbers(options: Mapping[str, Any], where: str) -> None:
    """ValueError for an invalid number of timesteps, beta or list of betas."""
    for key in ("num_train_timesteps", "beta_start", "beta_end", "trained_betas"):
        value = options.get(key, 2)
        if key == "num_train_timesteps":
            good = type(value) is int and 2 <= value <= MOST_TIMESTEPS
        elif key == "trained_betas":
            good = value in (None, 2) or (
                isinstance(value, list)
                and 2 <= len(value) <= MOST_TIMESTEPS
                and all(type(x) in (int, float) for x in value)
            )
        else:
            good = type(value) in (int, float)
        if not good:
            raise ValueError(f"{where}: {key}={value!r:.200} is not supported")


def _schedule(kind: str, start: float, end: float) -> dict[str, Any]:
    if kind == "cosine":
        start = end = None
    return {"schedule": kind, "beta_start": start, "beta_end": end}


def _recognised(betas: np.ndarray, where: str) -> dict[str, Any]:
    """Fields of the schedule that has these betas; ValueError if none of ours does."""
    for kind in ("scaled_linear", "linear", "sqrt", "cosine"):
        start, end = (float(betas[i] ** (2 if kind == "sqrt" else 1)) for i in (0, -1))
        fields = _schedule(kind, start, end) | {"timesteps": len(betas)}
        if kind == "cosine" or 0 < start <= end < 1:
            ours = diffusion.make_schedule(
                kind, len(betas), fields["beta_start"], fields["beta_end"]
            )
            if np.allclose(ours.betas, betas, rtol=1e-5, atol=0):
                return fields
    raise ValueError(
        f"{where}: trained_betas ({len(betas)} from {betas[0]} to {betas[-1]}) are none of the"
        " schedules scaled_linear, linear, sqrt and cosine"
    )


def sampling_config(options: Mapping[str, Any], pipeline: str, where: str) -> schema.SamplingConfig:
    """Spacing of the timesteps in the pipeline; ValueError if it is unknown."""
    name = _known(options, where)
    spacing = options.get("timestep_spacing", CLASSES.get(name, "leading"))
    if spacing not in SPACINGS:
        raise ValueError(
            f"{where}: timestep_spacing={spacing!r} is not one of {', '.join(SPACINGS)}"
        )
    to_one = options.get("set_alpha_to_one", SET_ALPHA_TO_ONE.get(name, True))
    has_choice = name in SET_ALPHA_TO_ONE or name not in CLASSES
    return schema.SamplingConfig(
        spacing=spacing,
        steps_offset=1 if pipeline in OFFSET_ONE else options.get("steps_offset", 0),
        final="alphas_cumprod_0" if has_choice and not to_one else "one",
        rule="diffusers",
    )


def left_out(options: Mapping[str, Any], pipeline: str) -> list[str]:
    """Options that change what this pipeline samples and that our sampler does not have."""
    by_default = class_name(options) in ("DDIMScheduler", "DDPMScheduler")
    clips = pipeline not in OFFSET_ONE and options.get("clip_sample", by_default)
    others = [
        f"{key}={options[key]!r:.40}" + (f" ({INSTEAD[key]})" if key in INSTEAD else "")
        for key, ours in AS_OURS.items()
        if key in options and options[key] not in ours
    ]
    if class_name(options) == "PNDMScheduler" and not options.get("skip_prk_steps", False):
        others.append("skip_prk_steps=False")
    return ["clip_sample=True"] * bool(clips) + others


def scheduler_options(
    diffusion_config: schema.DiffusionConfig, sampling: schema.SamplingConfig
) -> dict[str, Any]:
    """Inverse of the two: a DDIMScheduler, which has every option that ours has."""
    final = FINAL[sampling.spacing] if sampling.final is None else sampling.final
    return {
        "_class_name": "DDIMScheduler",
        **_betas(diffusion_config),
        "prediction_type": _key(PREDICTIONS, diffusion_config.prediction),
        "rescale_betas_zero_snr": diffusion_config.zero_terminal_snr,
        "clip_sample": False,
        "set_alpha_to_one": final == "one",
        "steps_offset": sampling.steps_offset,
        "timestep_spacing": sampling.spacing,
    }


def _betas(config: schema.DiffusionConfig) -> dict[str, Any]:
    if config.schedule == "sqrt":  # diffusers has no name for it
        plain = diffusion.make_schedule(
            "sqrt", config.timesteps, config.beta_start, config.beta_end
        )
        return {"num_train_timesteps": config.timesteps, "trained_betas": plain.betas.tolist()}
    start, end = config.beta_start, config.beta_end
    if config.schedule != "cosine":
        start = diffusion.DEFAULT_BETAS[0] if start is None else start
        end = diffusion.DEFAULT_BETAS[1] if end is None else end
    ends = {"beta_start": start, "beta_end": end} if start is not None else {}
    return {
        "num_train_timesteps": config.timesteps,
        "beta_schedule": _key(SCHEDULES, config.schedule),
        **ends,
    }


def upscale_config(
    options: Mapping[str, Any], factor: int, max_noise_level: int, where: str
) -> schema.UpscaleCondConfig:
    """The noise that the x4 upscaler puts on the small image, from its `low_res_scheduler`."""
    noise = diffusion_config(options, where)
    if noise.schedule not in ("scaled_linear", "linear") or noise.timesteps != 1000:
        raise ValueError(
            f"{where}: beta_schedule={options.get('beta_schedule')!r}, num_train_timesteps="
            f"{noise.timesteps}: scaled_linear or linear and 1000 are supported"
        )
    return schema.UpscaleCondConfig(
        factor=factor,
        max_noise_level=max_noise_level,
        schedule=noise.schedule,
        beta_start=noise.beta_start,
        beta_end=noise.beta_end,
    )


def low_res_scheduler_options(config: schema.UpscaleCondConfig) -> dict[str, Any]:
    """Inverse of `upscale_config`: a DDPMScheduler."""
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": config.schedule,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
    }


def is_known(options: Mapping[str, Any]) -> bool:
    """True if there is a solver for the scheduler."""
    return class_name(options) in CLASSES


def _known(options: Mapping[str, Any], where: str) -> str:
    """The scheduler's class. ValueError for one without a solver here and without a beta schedule.

    LCMScheduler has one, and names every option in which its class may differ; the schedulers of
    flow matching have none.
    """
    name = class_name(options)
    if name not in CLASSES and not options.keys() >= SAID and not options.get("trained_betas"):
        raise ValueError(
            f"{where}: _class_name {name} is not one of {', '.join(CLASSES)}, and its noise"
            f" schedule is not said by {', '.join(sorted(SAID))}"
        )
    return name


def _key(table: Mapping[str, str], value: str) -> str:
    return next(theirs for theirs, ours in table.items() if ours == value)
