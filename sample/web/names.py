"""Samplers and schedules by the names of stable-diffusion-webui."""

from ldm_jax import solvers
from ldm_jax.prompting import parameters
from ldm_jax.sample.web.limits import RefusedError

ALIASES = {
    "ddim": ("ddim",),
    "ddpm": ("ddpm",),
    "deis": ("deis",),
    "dpmpp_2m": ("k_dpmpp_2m",),
    "dpmpp_2m_sde": ("k_dpmpp_2m_sde",),
    "dpmpp_2s": ("k_dpmpp_2s",),
    "dpmpp_3m_sde": ("k_dpmpp_3m_sde",),
    "euler": ("k_euler",),
    "euler_ancestral": ("k_euler_a", "k_euler_ancestral"),
    "heun": ("k_heun",),
    "kdpm2": ("k_dpm_2",),
    "lms": ("k_lms",),
    "plms": ("plms",),
    "unipc": ("unipc",),
}
"""{solver: other names of the sampler}."""
SCHEDULES: dict[str, tuple[str, str | None]] = {
    "automatic": ("Automatic", None),
    "uniform": ("Uniform", "linspace"),
    "karras": ("Karras", "karras"),
    "exponential": ("Exponential", "exponential"),
    "sgm_uniform": ("SGM Uniform", "trailing"),
    "ddim": ("DDIM", "leading"),
}
"""{schedule: (label, spacing)}; automatic is the model's own."""


def samplers() -> dict[str, str]:
    """{name: solver}, those that webui has first."""
    return {name: solver for solver, name in parameters.SAMPLERS.items()}


def chosen(
    sampler: str | None, scheduler: str | None, default: str = "Euler"
) -> tuple[str, str | None]:
    """(solver, spacing or None) of names in any case; "DPM++ 2M Karras" is of both.

    RefusedError 400 for an unknown one, with the names that there are.
    """
    name, spacing = (sampler or default).strip(), None
    known = {shown.casefold(): solver for shown, solver in samplers().items()}
    known |= {solver: solver for solver in solvers.SOLVERS}
    known |= {alias: solver for solver, aliases in ALIASES.items() for alias in aliases}
    wanted = name.casefold()
    for label, kind in SCHEDULES.values():
        if wanted not in known and wanted.endswith(f" {label.casefold()}"):
            wanted, spacing = wanted.removesuffix(f" {label.casefold()}"), kind
            break
    if wanted not in known:
        raise RefusedError(
            400, f"Sampler not found: {name!r:.60} is not one of {', '.join(samplers())}"
        )
    if scheduler is not None and scheduler.casefold() not in ("", "automatic"):
        labels = {label.casefold(): one for one, (label, _) in SCHEDULES.items()}
        key = labels.get(scheduler.casefold(), scheduler.casefold())
        if key not in SCHEDULES:
            raise RefusedError(
                400, f"Scheduler not found: {scheduler!r:.60} is not one of {', '.join(SCHEDULES)}"
            )
        spacing = SCHEDULES[key][1]
    return known[wanted], spacing
