"""The likelihood of a reconstruction against NumPy in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.configs import tiny
from ldm_jax.train.autoencoder import reconstruction

RNG = np.random.default_rng(0)
IMAGE, DECODED = RNG.uniform(-1, 1, (2, 3, 4, 4, 3)).astype(np.float32)


@pytest.mark.parametrize("pixel", ["l1", "l2"])
@pytest.mark.parametrize(("stage", "logvar"), [("gan", 0.0), ("gan", -0.75), ("vq", -0.75)])
def test_nll_is_summed_for_kl_latents_and_averaged_for_codes(pixel, stage, logvar):
    config = tiny.get_config(stage)
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, pixel=pixel))
    nll = reconstruction.make_nll(config)
    value, metrics = nll({}, jnp.asarray(IMAGE), jnp.asarray(DECODED), jnp.float32(logvar))
    difference = IMAGE.astype(np.float64) - DECODED
    error = np.abs(difference) if pixel == "l1" else difference**2
    summed = (error / np.exp(logvar) + logvar).reshape(3, -1).sum(1)
    assert float(value) == pytest.approx(error.mean() if stage == "vq" else summed.mean(), rel=1e-5)
    mse = (difference**2).reshape(3, -1).mean(1)
    expected = {"rec_loss": error.mean(), "psnr": np.mean(10 * np.log10(4 / mse))}
    assert {n: float(x) for n, x in metrics.items()} == pytest.approx(expected, rel=1e-5)


def test_without_a_perceptual_weight_no_file_is_looked_for(tmp_path):
    assert reconstruction.find_perceptual(tiny.get_config("gan"), tmp_path) == {}
