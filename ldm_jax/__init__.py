"""Latent Diffusion and Stable Diffusion as pure JAX functions and Flax Linen modules.

model = ldm_jax.load("runs/ldm")
cond, null = model.encode({"label": jnp.array([3, 7])})
sample = jax.jit(ldm_jax.make_sampler(model, steps=50))
images = sample(model.params, cond, ldm_jax.keys(seed=0, n=2), null, guidance_scale=1.5)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm_jax.conditioning import Cond as Cond
    from ldm_jax.loading import load as load
    from ldm_jax.prompting.batch import prompts as prompts
    from ldm_jax.sampling import keys as keys
    from ldm_jax.sampling import make_sampler as make_sampler
    from ldm_jax.saving import save as save

    __version__: str

LAZY = {  # on first use: `from ldm_jax import schema` needs neither JAX nor Orbax
    "Cond": "ldm_jax.conditioning",
    "keys": "ldm_jax.sampling",
    "load": "ldm_jax.loading",
    "make_sampler": "ldm_jax.sampling",
    "prompts": "ldm_jax.prompting.batch",
    "save": "ldm_jax.saving",
    "checkpoint": "ldm_jax.runtime",
}
__all__ = ["Cond", "keys", "load", "make_sampler", "prompts", "save"]


def __getattr__(name: str) -> Any:
    if name in LAZY:
        module = importlib.import_module(LAZY[name])
        return getattr(module, name, None) or importlib.import_module(f"{LAZY[name]}.{name}")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("ldm-jax")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
