"""Parts that a diffusion model trains on and that do not train: first stage, text encoder."""

from ldm_jax.train.frozen.parts import Found, Frozen, find, prepare

__all__ = ["Found", "Frozen", "find", "prepare"]
