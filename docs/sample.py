"""Pictures of classes from a run: python docs/sample.py RUN OUT.png LABEL ..."""

import sys

import jax
import jax.numpy as jnp

import ldm_jax
from ldm_jax.runtime import images


def main(run: str, out: str, *labels: str, steps: int = 50) -> None:
    """Write one picture per label, side by side."""
    model = ldm_jax.load(run)
    cond, null = model.encode({"label": jnp.array([int(label) for label in labels])})
    keys = ldm_jax.keys(seed=0, n=len(labels))  # a picture depends on its key alone
    sample = jax.jit(ldm_jax.make_sampler(model, steps=steps))
    pictures = sample(model.params, cond, keys, null, guidance_scale=1.5)  # [N, H, W, c]
    images.save_png(out, images.grid(images.to_uint8(pictures), columns=len(labels)))


if __name__ == "__main__":
    main(*sys.argv[1:])
