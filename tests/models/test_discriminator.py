"""PatchGAN against torch in training and evaluation, and on four devices as on one."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from reference import draw, filled, max_difference

from ldm_jax import schema, sharding
from ldm_jax.convert import auxiliary
from ldm_jax.models import discriminator
from ldm_jax.models.discriminator import PatchGAN

IMAGES = 0.7 * draw(4, 17, 20, 3), 0.5 + 0.4 * draw(4, 17, 20, 3, seed=2)


def model_and_variables(norm, layers=2):
    """Weights that hide nothing; an ActNorm is as it is before its first batch."""
    model = PatchGAN(width=8, layers=layers, norm=norm)
    fresh = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 24, 24, 3)))
    params = filled(fresh["params"])
    if norm == "batch":
        stats = jax.tree.map(np.abs, filled(fresh["batch_stats"], seed=1))
        return model, {"params": params, "batch_stats": stats}
    start = model.init(jax.random.key(0), jnp.zeros((1, 24, 24, 3)))
    params = {n: start["params"][n] if n.startswith("norm") else p for n, p in params.items()}
    return model, {"params": params, "batch_stats": start["batch_stats"]}


def in_training(model):
    """step(variables, image) -> (logits, gradients of their sum of squares, new statistics)"""

    @jax.jit
    def step(variables, image):
        def loss(params, image):
            logits, new = model.apply(
                {**variables, "params": params}, image, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.square(logits)), (logits, new)

        grads, (logits, new) = jax.grad(loss, (0, 1), has_aux=True)(variables["params"], image)
        return logits, grads, {**variables, **new}

    return step


@pytest.mark.torch
@pytest.mark.parametrize(("norm", "layers"), [("batch", 2), ("act", 2), ("batch", 1)])
def test_two_steps_and_evaluation_are_those_of_torch(norm, layers):
    torch = pytest.importorskip("torch", reason="torch is the reference")
    from torch_first_stage import nchw, nhwc, patch_gan

    model, variables = model_and_variables(norm, layers)
    theirs = patch_gan(3, 8, layers, norm)
    theirs.load_state_dict(_tensors(torch, model, variables))  # strictly
    step = in_training(model)
    for image in IMAGES:
        x = nchw(image).requires_grad_()
        expected = theirs.train()(x)
        theirs.zero_grad()
        expected.square().sum().backward()
        logits, (grads, image_grad), variables = step(variables, image)
        np.testing.assert_allclose(logits, nhwc(expected), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(image_grad, nhwc(x.grad), rtol=1e-3, atol=_small(x.grad))
        with torch.no_grad():
            for p in theirs.parameters():
                p -= 1e-3 * p.grad
        moved = jax.tree.map(lambda p, g: p - 1e-3 * g, variables["params"], grads)
        variables = {**variables, "params": moved}
        for name, x in _tensors(torch, model, variables).items():
            if not name.endswith("num_batches_tracked"):
                found = theirs.state_dict()[name]
                torch.testing.assert_close(x, found, rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        expected = theirs.eval()(nchw(IMAGES[0]))
    found = model.apply(variables, IMAGES[0])
    np.testing.assert_allclose(found, nhwc(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "act"])
def test_on_four_devices_as_on_one(norm):
    """Rows that differ in mean and spread: statistics of a device's own rows would be others."""
    model, variables = model_and_variables(norm)
    image = IMAGES[0] * np.float32([0.1, 1, 2, 4])[:, None, None, None]
    step = in_training(model)
    alone = step(variables, image)
    mesh = sharding.make_mesh(schema.MeshConfig(data=2, fsdp=2))
    shardings = sharding.by_rules(variables, sharding.RULES, mesh)
    spread = step(
        sharding.place(jax.device_get(variables), shardings),
        jax.device_put(image, sharding.batch_sharding(mesh)),
    )
    assert max_difference(spread[0], alone[0]) < 2e-5
    for a, b in zip(jax.tree.leaves(spread[2]), jax.tree.leaves(alone[2])):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(spread[1]), jax.tree.leaves(alone[1])):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max())


def test_act_norm_normalizes_its_first_batch_alone():
    model, variables = model_and_variables("act", layers=1)
    for image in IMAGES:
        _, state = model.apply(
            variables,
            image,
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: module.name == "norm_1",
        )
        x = state["intermediates"]["norm_1"]["__call__"][0]
        variables = {**variables, "batch_stats": state["batch_stats"]}
        first = image is IMAGES[0]
        assert (float(jnp.abs(jnp.mean(x, (0, 1, 2))).max()) < 1e-4) == first
        assert (float(jnp.abs(jnp.std(x, (0, 1, 2), ddof=1) - 1).max()) < 1e-3) == first


@pytest.mark.parametrize("norm", ["batch", "act"])
def test_initial_weights(norm):
    model = PatchGAN(width=16, norm=norm)
    variables = jax.jit(model.init)(jax.random.key(3), discriminator.smallest_image(model, 3))
    params = variables["params"]
    assert float(jnp.std(params["conv_3"]["kernel"])) == pytest.approx(0.02, rel=0.02)
    assert ("bias" in params["conv_2"]) == (norm == "act")
    assert float(jnp.abs(params["conv_in"]["bias"]).max()) <= 1 / 48**0.5
    if norm == "batch":
        scales = jnp.concatenate([params[f"norm_{i}"]["scale"] for i in (1, 2, 3)])
        assert float(jnp.mean(scales)) == pytest.approx(1, abs=0.01)
        assert float(jnp.std(scales)) == pytest.approx(0.02, rel=0.2)
    else:
        assert not variables["batch_stats"]["norm_1"]["initialized"]


@pytest.mark.parametrize(("layers", "millions"), [(3, 2.77), (2, 0.66)])
def test_sizes_are_those_of_the_reference(layers, millions):
    config = types.SimpleNamespace(width=64, layers=layers, norm="batch")
    model = discriminator.from_config(config, dtype=jnp.bfloat16)
    image = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    count = sum(x.size for x in jax.tree.leaves(variables["params"]))
    assert count / 1e6 == pytest.approx(millions, abs=0.005)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    sharding.by_rules(variables, sharding.RULES, AbstractMesh((2, 8, 2), sharding.AXES))
    logits = jax.eval_shape(model.apply, variables, image)
    side = 256 // 2**layers - 2
    assert (logits.shape, logits.dtype) == ((2, side, side, 1), jnp.float32)


def test_bfloat16_stays_close():
    model, variables = model_and_variables("batch")
    found, _ = in_training(model.clone(dtype=jnp.bfloat16))(variables, IMAGES[0])[:2]
    exact, _ = in_training(model)(variables, IMAGES[0])[:2]
    assert 0 < max_difference(found, exact) < 0.1


def test_the_smallest_image_has_one_patch():
    for layers in (1, 2, 3, 4):
        model = PatchGAN(width=4, layers=layers)
        image = discriminator.smallest_image(model, 3)
        variables = jax.eval_shape(model.init, jax.random.key(0), image)
        assert jax.eval_shape(model.apply, variables, image).shape == (1, 1, 1, 1)
        with pytest.raises(
            ValueError, match=rf"too small .* {layers} layers.* at least {3 * 2**layers}"
        ):
            jax.eval_shape(model.apply, variables, image[:, 1:])


@pytest.mark.parametrize("options", [{"layers": 0}, {"norm": "group"}])
def test_refuses_what_cannot_be(options):
    with pytest.raises(ValueError, match="give at least one layer and one of batch, act"):
        jax.eval_shape(PatchGAN(**options).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def _tensors(torch, model, variables):
    found = auxiliary.discriminator_state_dict(model, jax.device_get(variables))
    return {name: torch.tensor(np.array(x)) for name, x in found.items()}


def _small(x):
    return 1e-5 * float(x.abs().max())
