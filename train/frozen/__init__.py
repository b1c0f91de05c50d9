"""Frozen parts of a diffusion model in training: first stage, text encoder."""

from ldm_jax.train.frozen.parts import Frozen, Sources, find, prepare

__all__ = ["Frozen", "Sources", "find", "prepare"]
