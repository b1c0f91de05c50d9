"""Latent Diffusion and Stable Diffusion as pure JAX functions and Flax Linen modules."""
