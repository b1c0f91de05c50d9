"""Networks of latent diffusion as stateless Flax Linen modules."""
