"""Pictures of classes from a run: python docs/sample.py RUN OUT.png LABEL ..."""

import sys

import jax
import jax.numpy as jnp

import ldm_jax
from ldm_jax import conditioning, sampling
from ldm_jax.runtime import images


def main(run: str, out: str, *labels: str, steps: int = 50) -> None:
    """Writes one picture per label, side by side."""
    model = ldm_jax.load(run)
    batch = {"label": jnp.array([int(label) for label in labels])}
    args = (model.config.cond, model.cond_stage, model.params["cond_stage"], batch)
    cond, null = conditioning.from_batch(*args), conditioning.null_like(*args)
    keys = sampling.keys_of(0, jnp.arange(len(labels)))  # a picture depends on its key alone
    sample = jax.jit(sampling.make_sampler(model, shape=model.latent_shape, steps=steps))
    pictures = sample(model.params, cond, null, keys, 1.5)  # guidance scale; [N, H, W, c]
    images.save_png(out, images.grid(images.to_uint8(pictures), columns=len(labels)))


if __name__ == "__main__":
    main(*sys.argv[1:])
