"""LPIPS, discriminators and the adaptive weight against stored numbers of a torch re-statement."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import GOLDEN, weight

from ldm_jax import losses
from ldm_jax.convert import auxiliary, table
from ldm_jax.models import discriminator, lpips
from ldm_jax.models.discriminator import PatchGAN


@pytest.fixture(scope="module")
def stored():
    with np.load(GOLDEN / "first_stage_losses.npz") as file:
        return dict(file)


def inputs():
    rng = np.random.default_rng(11)
    image = np.tanh(rng.standard_normal((2, 16, 20, 3))).astype(np.float32)
    reconstruction = image + 0.3 * rng.standard_normal(image.shape).astype(np.float32)
    return image, reconstruction, rng.standard_normal((2, 16, 20, 4)).astype(np.float32)


@pytest.mark.torch
def test_the_numbers_are_those_of_the_re_statement(stored):
    """They were written by `np.savez_compressed(path, **golden(*inputs(), weight))`."""
    pytest.importorskip("torch", reason="torch is the reference")
    from torch_first_stage import golden

    found = golden(*inputs(), weight)
    assert found.keys() == stored.keys()
    for name, x in found.items():
        np.testing.assert_allclose(x, stored[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_lpips(stored):
    rows, shapes = list(auxiliary.lpips_entries()), lpips.shapes(4)
    tensors = {n: weight(n, x.shape) for n, x in table.to_torch(rows, shapes).items()}
    params = table.from_torch(rows, tensors, shapes)
    image, reconstruction, _ = inputs()
    found = jax.jit(lpips.LPIPS(width=4).apply)({"params": params}, image, reconstruction)
    np.testing.assert_allclose(found, stored["lpips"], rtol=1e-4)


def judge(norm):
    """(discriminator, its variables)"""
    model = PatchGAN(8, 2, norm)
    start = jax.jit(model.init)(jax.random.key(0), discriminator.smallest_image(model, 3))
    tensors = auxiliary.discriminator_state_dict(model, start)
    own = ("running_mean", "running_var", "loc", "scale", "num_batches_tracked", "initialized")
    tensors |= {n: weight(n, x.shape) for n, x in tensors.items() if not n.endswith(own)}
    return auxiliary.discriminator_from(tensors)


@pytest.mark.parametrize("norm", ["batch", "act"])
def test_discriminator(stored, norm):
    model, variables = judge(norm)
    image, reconstruction, _ = inputs()
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    logits, state = jax.jit(train)(variables, reconstruction)
    np.testing.assert_allclose(logits, stored[f"{norm}_train"], rtol=1e-4, atol=1e-5)
    logits = jax.jit(model.apply)({**variables, **state}, image)
    np.testing.assert_allclose(logits, stored[f"{norm}_eval"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_adaptive_weight(stored):
    model, variables = judge("act")
    image, reconstruction, features = inputs()
    _, state = model.apply(variables, reconstruction, train=True, mutable=["batch_stats"])

    def nll(images, error_logvar):
        error = losses.reconstruction_error("l1", image, images)
        return jnp.mean(losses.summed_nll(error, error_logvar)), None

    def generator(images):
        return losses.generator(model.apply({**variables, **state}, images)), None

    _, metrics, _ = losses.adversarial(
        nll, generator, jnp.asarray(reconstruction), jnp.zeros(()), features, 0.5, 1.0
    )
    assert float(metrics["d_weight"]) == pytest.approx(float(stored["d_weight"]), rel=1e-4)
