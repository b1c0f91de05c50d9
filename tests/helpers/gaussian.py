"""Gaussian data per channel: the perfect denoiser and the exact flow in closed form."""

import jax.numpy as jnp
import numpy as np

from ldm_jax import diffusion

MEAN = np.array([-1.0, -0.3, 0.3, 1.0], np.float32)[None, None, None]
STD = np.array([0.5, 0.8, 1.2, 2.0], np.float32)[None, None, None]


def exact(z, alpha, sigma):
    """Where the probability-flow ODE takes the quantile z [B, h, w, 4] when x0 ~ N(MEAN, STD^2)."""
    return alpha * MEAN + np.sqrt((alpha * STD) ** 2 + sigma**2) * z


def denoise(x, level):
    """E[x0 | x] and E[eps | x]."""
    alpha, sigma = level.alpha, level.sigma
    centred = (x - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)
    return diffusion.Denoised(MEAN + alpha * STD**2 * centred, sigma * centred)


def v_model(schedule):
    """The perfect v-prediction as a model(x, t_b)."""

    def model(x, t_b):
        alpha, sigma = diffusion.signal_and_noise(schedule, t_b, x.ndim)
        centred = (x - alpha * MEAN) / (jnp.square(alpha * STD) + jnp.square(sigma))
        x0, eps = MEAN + alpha * STD**2 * centred, sigma * centred
        return diffusion.v_from_eps(eps, x0, alpha, sigma)

    return model
