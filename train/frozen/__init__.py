"""Parts that a diffusion model trains on and that do not train: first stage, text encoder."""

from ldm_jax.train.frozen.parts import Frozen, Sources, find, prepare

__all__ = ["Frozen", "Sources", "find", "prepare"]
