"""The first stage's objective against NumPy in float64, and torch's KL."""

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import losses, schema

RNG = np.random.default_rng(0)
IMAGE, DECODED = RNG.uniform(-1, 1, (2, 3, 4, 4, 3)).astype(np.float32)
MEAN, LOGVAR = RNG.normal(size=(2, 3, 2, 2, 4)).astype(np.float32)


@pytest.mark.parametrize("pixel", ["l1", "l2"])
@pytest.mark.parametrize("error_logvar", [0.0, -0.75])
def test_first_stage_by_hand(pixel, error_logvar):
    config = schema.FirstStageLossConfig(pixel=pixel, kl_weight=0.01)
    loss, metrics = losses.first_stage(
        config, *map(jnp.asarray, (IMAGE, DECODED, MEAN, LOGVAR, np.float32(error_logvar)))
    )
    difference = IMAGE.astype(np.float64) - DECODED
    error = np.abs(difference) if pixel == "l1" else difference**2
    rows = (error / np.exp(error_logvar) + error_logvar).reshape(3, -1).sum(1)
    mean, logvar = MEAN.astype(np.float64), LOGVAR.astype(np.float64)
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).reshape(3, -1).sum(1)
    np.testing.assert_allclose(loss, rows + 0.01 * kl, rtol=1e-5)
    mse = (difference**2).reshape(3, -1).mean(1)
    expected = {
        "loss": np.mean(rows + 0.01 * kl),
        "error": error.mean(),
        "kl": kl.mean(),
        "psnr": np.mean(10 * np.log10(4 / mse)),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5)


def test_kl_of_a_unit_normal_is_zero():
    zeros = jnp.zeros((2, 4, 4, 3))
    assert losses.gaussian_kl(zeros, zeros).tolist() == [0, 0]


@pytest.mark.torch
def test_kl_is_that_of_torch():
    torch = pytest.importorskip("torch", reason="torch is the reference here")
    from torch.distributions import Normal, kl_divergence

    mean, logvar = torch.tensor(MEAN), torch.tensor(LOGVAR)
    unit = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = kl_divergence(Normal(mean, torch.exp(0.5 * logvar)), unit).sum((1, 2, 3))
    found = losses.gaussian_kl(jnp.asarray(MEAN), jnp.asarray(LOGVAR))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


def test_psnr():
    assert float(losses.psnr(jnp.asarray(4.0))) == pytest.approx(0)  # black against white
    assert float(losses.psnr(jnp.asarray(4.0 / 255**2))) == pytest.approx(48.13, abs=0.01)
    assert np.isfinite(float(losses.psnr(jnp.asarray(0.0))))
