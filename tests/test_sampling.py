"""The sampling function: an image depends on its key alone, nothing recompiles, gradients flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import conditioning, diffusion, loading, sampling, schema, sharding

STEPS = 4


@pytest.fixture(scope="module")
def model(ldm_run):
    return loading.load(ldm_run)


@pytest.fixture(scope="module")
def guided(model):
    """sample(params, labels, keys, scale, eta, start) of the guided sampler, jitted."""
    sample = sampling.make_sampler(model, steps=STEPS)

    @jax.jit
    def run(params, labels, keys, scale, eta, start):
        arguments = (model.config.cond, model.cond_stage, params["cond_stage"], {"label": labels})
        cond, null = conditioning.from_batch(*arguments), conditioning.null_like(*arguments)
        return sample(params, cond, keys, null, scale, eta, start=start)

    return run


def conditions(model, labels):
    arguments = (
        model.config.cond,
        model.cond_stage,
        model.params["cond_stage"],
        {"label": jnp.asarray(labels)},
    )
    return conditioning.from_batch(*arguments), conditioning.null_like(*arguments)


LABELS = np.array([0, 1, 2, 3, 2, 1, 0], np.int32)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_image_depends_on_its_key_alone(ldm_run, model, guided, eta, record_property):
    keys = sampling.keys_of(3, range(7))
    together = np.asarray(guided(model.params, LABELS, keys, 2.0, eta, 0))
    assert together.shape == (7, 16, 16, 3)
    assert np.abs(together[0] - together[6]).max() > 0.1  # the same label, another key

    alone = guided(model.params, LABELS[4:5], sampling.keys_of(3, [4]), 2.0, eta, 0)
    found = float(np.abs(alone[0] - together[4]).max())
    record_property("alone", float(found))
    assert found < 1e-5

    mesh = sharding.make_mesh(schema.MeshConfig(data=2, fsdp=2))
    spread = loading.load(ldm_run, mesh=mesh).params
    order = np.array([4, 0, 1, 2, 3, 5, 6, 6])  # in another place, too
    rows = jax.device_put(
        (LABELS[order], sampling.keys_of(3, order)), sharding.batch_sharding(mesh)
    )
    meshed = guided(spread, *rows, 2.0, eta, 0)
    assert len(meshed.sharding.device_set) == 4
    found = float(np.abs(np.asarray(meshed) - together[order]).max())
    record_property("mesh", float(found))
    assert found < 1e-5


def test_latents_trace_and_given_noise_agree_with_the_images(model, guided):
    keys = sampling.keys_of(0, range(2))
    images = guided(model.params, LABELS[:2], keys, 2.0, 0.0, 0)
    sample = sampling.make_sampler(
        model,
        shape=model.latent_shape,
        steps=STEPS,
        decode=False,
        trace=lambda x, denoised: (x, denoised.x0),
    )
    # the noise that sample draws for itself
    x_T = diffusion.rowwise_normal(jax.vmap(jax.random.split)(keys)[:, 0], model.latent_shape)
    cond, null = conditions(model, LABELS[:2])
    z, (x, x0) = jax.jit(sample)(model.params, cond, keys, null, 2.0, 0.0, x_T)
    assert z.shape == (2, 8, 8, 4)
    np.testing.assert_allclose(model.decode(z), images, atol=1e-5)
    assert x.shape == x0.shape == (STEPS, 2, 8, 8, 4)
    np.testing.assert_array_equal(x[0], x_T)
    assert np.abs(x[1] - x[0]).max() > 0.01
