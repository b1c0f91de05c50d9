"""DDIM inversion: image to noise along the exact flow, and back to the image."""

import gaussian
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import diffusion, solvers

SD = diffusion.make_schedule("scaled_linear")
KEYS = jax.random.split(jax.random.key(0), 2)
Z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 4)), jnp.float32)


def errors(name, steps):
    """Of the noise against the exact flow, and of the way back against the image."""
    table = solvers.levels(SD, steps, "trailing", "alphas_cumprod_0")
    image = gaussian.exact(Z, table.alpha_next[-1], table.sigma_next[-1])

    @jax.jit
    def there_and_back(image):
        back = solvers.inverted(table)
        x_T = solvers.sample(solvers.make(name), gaussian.denoise, back, image, KEYS)
        return x_T, solvers.sample(solvers.make(name), gaussian.denoise, table, x_T, KEYS)

    x_T, again = there_and_back(image)
    exact = gaussian.exact(Z, table.alpha[0], table.sigma[0])
    return np.sqrt(np.mean((x_T - exact) ** 2)), np.sqrt(np.mean((again - image) ** 2))


def test_inversion_then_sampling_returns_the_latent():
    """With DDIM the rms errors halve as the steps double.

    steps              25       50       100      200      400
    noise reached      5.9e-2   3.1e-2   1.6e-2   8.0e-3   4.2e-3
    latent, again      1.2e-1   6.0e-2   3.1e-2   1.6e-2   8.1e-3
    """
    there, back = zip(*(errors("ddim", steps) for steps in (50, 100, 200)))
    for error in there, back:
        np.testing.assert_allclose(np.log2(np.divide(error[:-1], error[1:])), 1, atol=0.1)
    assert there[-1] < 0.009
    assert back[-1] < 0.017


def test_inversion_by_a_solver_of_order_two():
    (there, back), (there_fine, back_fine) = errors("heun", 25), errors("heun", 50)
    assert abs(np.log2(there / there_fine) - 2) < 0.1
    assert np.log2(back / back_fine) > 1.9  # the errors of both ways cancel in part
    assert back_fine < 3e-4
