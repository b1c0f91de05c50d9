"""Digits of a wanted slant: python docs/guide_digits.py RUN OUT.png

Turns the noise that sampling starts from, by gradients through every step of the sampler.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import ldm_jax
from ldm_jax.runtime import images


def slant(pictures: jax.Array) -> jax.Array:
    """[N, H, W, c] in [-1, 1] -> [N]: columns to the right per row up, of the line through the ink.

    Image moments: the covariance of column and row over the variance of rows.
    """
    ink_nhw = jnp.mean(jnp.clip(pictures, -1, 1) + 1, axis=-1) + 1e-6
    ink_nhw /= jnp.sum(ink_nhw, axis=(1, 2), keepdims=True)
    rows_h, cols_w = (jnp.arange(n, dtype=jnp.float32) for n in ink_nhw.shape[1:])
    row_n = jnp.einsum("nhw,h->n", ink_nhw, rows_h)
    col_n = jnp.einsum("nhw,w->n", ink_nhw, cols_w)
    covariance_n = jnp.einsum("nhw,h,w->n", ink_nhw, rows_h, cols_w) - row_n * col_n
    return -covariance_n / (jnp.einsum("nhw,h->n", ink_nhw, rows_h**2) - row_n**2)


def unit(x: jax.Array) -> jax.Array:
    """[N, h, w, c] with every image's length 1, or 0 where it was."""
    return x / jnp.maximum(jnp.sqrt(jnp.sum(x**2, axis=(1, 2, 3), keepdims=True)), 1e-12)


def guide(model, labels, goals, keys, steps=20, updates=20, rate=0.06, remat=True):
    """(pictures before, pictures after) [N, H, W, c], one per label, with these slants as goals.

    rate: radians by which the noise of a picture turns in an update, less close to its goal.
    """
    cond, null = model.encode({"label": jnp.asarray(labels)})
    # remat: the backward pass computes each step again instead of keeping all that was in it
    sample = ldm_jax.make_sampler(model, steps, remat=remat)

    def slants(x_T, params):
        pictures = sample(params, cond, keys, null, guidance_scale=3.0, x_T=x_T)
        return jnp.sum(slant(pictures)), pictures

    @jax.jit
    def update(x_T, params):
        (_, pictures), gradient = jax.value_and_grad(slants, has_aux=True)(x_T, params)
        left = jnp.clip((jnp.asarray(goals) - slant(pictures)) / 0.1, -1, 1)[:, None, None, None]
        # along the sphere where normal noise lies: the model knows no other
        turned = unit(unit(x_T) + rate * left * unit(gradient))
        return turned * x_T[0].size ** 0.5, pictures

    x_T = jax.vmap(lambda key: jax.random.normal(key, model.latent_shape))(keys)
    x_T, before = update(x_T, model.params)
    for _ in range(updates):
        x_T, after = update(x_T, model.params)
    return before, after


def main(run: str, out: str) -> None:
    """Each class as it comes (middle row), and led to both sides."""
    labels, goals = np.tile(np.arange(10), 2), np.repeat([-0.3, 0.3], 10)
    digit_keys = ldm_jax.keys(0, 10)[labels]  # one noise for both goals of a class
    before, after = guide(ldm_jax.load(run), labels, goals, digit_keys)
    rows = {"left": after[:10], "as drawn": before[:10], "right": after[10:]}
    for name, pictures in rows.items():
        print(f"{name:10}", np.round(np.asarray(slant(pictures), float), 2))
    pixels = np.concatenate([images.to_uint8(pictures) for pictures in rows.values()])
    images.save_png(out, images.grid(pixels, columns=10, scale=4, names=list(rows)))


if __name__ == "__main__":
    main(*sys.argv[1:])
