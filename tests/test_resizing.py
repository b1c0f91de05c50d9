"""Latents at another size, against torch."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ldm_jax import resizing

TORCH = {
    "latent": ("bilinear", False),
    "latent-antialiased": ("bilinear", True),
    "latent-bicubic": ("bicubic", False),
    "latent-bicubic-antialiased": ("bicubic", True),
    "latent-nearest": ("nearest", False),
    "latent-nearest-exact": ("nearest-exact", False),
}


@pytest.mark.parametrize("size", [(16, 10), (12, 21), (5, 4), (8, 7), (1, 1), (41, 3)])
@pytest.mark.parametrize("mode", resizing.MODES)
def test_the_numbers_are_torchs(mode, size):
    latent = np.random.default_rng(0).standard_normal((2, 8, 7, 4)).astype(np.float32)
    name, antialias = TORCH[mode]
    given = torch.from_numpy(latent.transpose(0, 3, 1, 2))
    expected = torch.nn.functional.interpolate(given, size, mode=name, antialias=antialias)
    for array in (latent, jnp.asarray(latent)):
        found = resizing.resized(array, size, mode)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected.numpy().transpose(0, 2, 3, 1), atol=2e-6)


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="mode 'lanczos' is not one of latent, latent-antialiased"):
        resizing.weights(2, 4, "lanczos")
