"""Dynamic thresholding and quantization of the predicted x0."""

from types import SimpleNamespace

import gaussian
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import denoising, diffusion, solvers
from ldm_jax.diffusion import Denoised

LEVEL = SimpleNamespace(t=500, alpha=np.float32(0.6), sigma=np.float32(0.8))
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)


def says(x0):
    return lambda x, level: Denoised(x0, (x - level.alpha * x0) / level.sigma)


def test_dynamic_threshold_scales_each_image_by_its_own_quantile():
    x0 = X * jnp.array([0.1, 5.0])[:, None, None, None]
    out = denoising.dynamic_threshold(says(x0), 0.9)(X, LEVEL)
    np.testing.assert_array_equal(out.x0[0], x0[0])  # within [-1, 1] as it is
    s = np.quantile(np.abs(x0[1]), 0.9)
    np.testing.assert_allclose(out.x0[1], np.clip(x0[1], -s, s) / s, rtol=1e-5)
    np.testing.assert_allclose(LEVEL.alpha * out.x0 + LEVEL.sigma * out.eps, X, atol=1e-6)


def test_dynamic_threshold_to_a_limit():
    x0 = 10 * X
    out = denoising.dynamic_threshold(says(x0), 0.5, limit=4.0)(X, LEVEL)
    assert np.isclose(np.max(np.abs(out.x0)), 4.0)
    s = np.quantile(np.abs(x0[0]), 0.5)
    assert np.isclose(out.x0[0, 0, 0, 0], np.clip(x0[0, 0, 0, 0], -s, s) * 4 / s)


def test_quantized_x0_keeps_the_predicted_noise():
    code = lambda x0: jnp.round(x0)  # noqa: E731
    out = denoising.quantize_x0(says(X), code)(X, LEVEL)
    np.testing.assert_array_equal(out.x0, np.round(X))
    np.testing.assert_array_equal(out.eps, says(X)(X, LEVEL).eps)


def test_a_sample_of_quantized_x0_is_quantized():
    """The last step to no noise returns the x0 that the closure gave."""
    table = solvers.levels(diffusion.make_schedule("scaled_linear"), 4, "trailing")
    keys = jax.random.split(jax.random.key(0), 2)
    denoise = denoising.quantize_x0(gaussian.denoise, jnp.round)
    x_T = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 4)), jnp.float32)
    out = solvers.sample(solvers.make("ddim"), denoise, table, x_T, keys)
    np.testing.assert_array_equal(out, np.round(out))
    assert np.ptp(out) > 2
