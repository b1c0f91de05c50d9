"""The first stage's objective against NumPy in float64, and torch's KL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import filled

from ldm_jax import losses, schema
from ldm_jax.models import autoencoder, quantize

RNG = np.random.default_rng(0)
IMAGE, DECODED = RNG.uniform(-1, 1, (2, 3, 4, 4, 3)).astype(np.float32)
MEAN, LOGVAR = RNG.normal(size=(2, 3, 2, 2, 4)).astype(np.float32)


@pytest.mark.parametrize("pixel", ["l1", "l2"])
@pytest.mark.parametrize("error_logvar", [0.0, -0.75])
def test_likelihood_and_kl_by_hand(pixel, error_logvar):
    error = losses.reconstruction_error(pixel, IMAGE, DECODED)
    difference = IMAGE.astype(np.float64) - DECODED
    expected = np.abs(difference) if pixel == "l1" else difference**2
    np.testing.assert_allclose(error, expected, rtol=1e-5, atol=1e-6)
    rows = (expected / np.exp(error_logvar) + error_logvar).reshape(3, -1).sum(1)
    found = losses.summed_nll(error, jnp.float32(error_logvar))
    np.testing.assert_allclose(found, rows, rtol=1e-5)
    mean, logvar = MEAN.astype(np.float64), LOGVAR.astype(np.float64)
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).reshape(3, -1).sum(1)
    np.testing.assert_allclose(losses.gaussian_kl(MEAN, LOGVAR), kl, rtol=1e-5)


def test_kl_of_a_unit_normal_is_zero():
    zeros = jnp.zeros((2, 4, 4, 3))
    assert losses.gaussian_kl(zeros, zeros).tolist() == [0, 0]


def test_psnr():
    assert float(losses.psnr(jnp.asarray(4.0))) == pytest.approx(0)  # black against white
    assert float(losses.psnr(jnp.asarray(4.0 / 255**2))) == pytest.approx(48.13, abs=0.01)
    assert np.isfinite(float(losses.psnr(jnp.asarray(0.0))))


# --- error with a perceptual distance; codebook --------------------------------------------------


def test_a_perceptual_distance_is_added_to_every_value():
    perceptual = np.float32([0.5, 1.0, 2.0])
    error = losses.reconstruction_error("l1", IMAGE, DECODED, perceptual, 0.3)
    expected = np.abs(IMAGE - DECODED) + 0.3 * perceptual[:, None, None, None]
    np.testing.assert_allclose(error, expected, rtol=1e-6)
    averaged = losses.averaged_nll(error)
    np.testing.assert_allclose(averaged, expected.reshape(3, -1).mean(1), rtol=1e-6)


def test_codebook_terms():
    config = schema.AutoencoderVQConfig(beta=0.3)
    codes = RNG.normal(size=(8, 4)).astype(np.float32)
    indices = jnp.asarray([[[0, 1], [1, 1]]] * 3)
    loss, metrics, count = losses.codebook(config, codes, MEAN, indices)
    expected = quantize.codebook_loss(config, codes, MEAN, indices)
    np.testing.assert_array_equal(loss, expected)
    assert count.tolist() == [3, 9] + [0] * 6
    assert {n: float(x) for n, x in metrics.items()} == pytest.approx(
        {"perplexity": np.exp(0.25 * np.log(4) + 0.75 * np.log(4 / 3)), "used_codes": 2}
        | {"code_usage": 0.25},
        rel=1e-5,
    )


# --- discriminator -------------------------------------------------------------------------------

REAL, FAKE = RNG.normal(size=(2, 3, 2, 2, 1)).astype(np.float32) * 2


def test_losses_of_logits_by_hand():
    real, fake = REAL.astype(np.float64), FAKE.astype(np.float64)
    hinge = (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()) / 2
    vanilla = (np.log1p(np.exp(-real)).mean() + np.log1p(np.exp(fake)).mean()) / 2
    for name, expected in (("hinge", hinge), ("vanilla", vanilla)):
        found = losses.DISCRIMINATOR_LOSSES[name](REAL, FAKE)
        assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(losses.generator(FAKE)) == pytest.approx(-fake.mean(), rel=1e-5)


def test_the_factor_is_adopted_at_its_step():
    found = [float(losses.adopted(0.8, jnp.int32(step), 3)) for step in (0, 2, 3, 4)]
    assert found == pytest.approx([0, 0, 0.8, 0.8])
    assert float(losses.adopted(0.8, jnp.int32(0), 0)) == pytest.approx(0.8)


def test_r1_of_a_linear_discriminator():
    """Logits w.x of two patches: the mean logit's gradient is half of w, wherever x is."""
    weights = RNG.normal(size=(4, 4, 3)).astype(np.float32)

    def logits(image):
        patch = jnp.einsum("bhwc,hwc->b", image, weights)
        return jnp.stack([patch, jnp.zeros_like(patch)], 1)[:, :, None, None]

    expected = 0.5 * np.sum(np.square(weights.astype(np.float64) / 2))
    assert float(losses.r1(logits, IMAGE)) == pytest.approx(expected, rel=1e-5)


def test_lecam_by_hand():
    averages = losses.start_lecam()
    for _ in range(2):
        averages = losses.update_lecam(averages, REAL, FAKE, 0.9)
    real, fake = REAL.astype(np.float64), FAKE.astype(np.float64)
    assert float(averages.real) == pytest.approx(0.19 * real.mean(), rel=1e-5)
    assert float(averages.fake) == pytest.approx(0.19 * fake.mean(), rel=1e-5)
    averages = losses.LogitAverages(jnp.float32(0.7), jnp.float32(-0.4))
    expected = (np.maximum(0, real + 0.4) ** 2).mean() + (np.maximum(0, 0.7 - fake) ** 2).mean()
    assert float(losses.lecam(averages, REAL, FAKE)) == pytest.approx(expected, rel=1e-5)


# --- generator against discriminator -------------------------------------------------------------


def test_adaptive_weight_by_hand():
    a, b = RNG.normal(size=(2, 3, 3, 4, 3)).astype(np.float32)
    expected = 0.5 * np.linalg.norm(a) / (np.linalg.norm(b) + 1e-4)
    assert float(losses.adaptive_weight(a, b, 0.5)) == pytest.approx(expected, rel=1e-5)
    assert float(losses.adaptive_weight(a, 0 * b, 0.5)) == pytest.approx(0.5e4)  # clipped before
    assert float(losses.adaptive_weight(0 * a, b, 0.5)) == 0
    gradient = jax.grad(lambda a: losses.adaptive_weight(a, b, 0.5))(a)
    assert not gradient.any()


def test_a_value_with_a_given_gradient():
    x, logvar = jnp.asarray(IMAGE), jnp.float32(0.3)
    given = jnp.asarray(DECODED), jnp.float32(-2)
    value, found = jax.value_and_grad(
        lambda inputs: losses.with_gradient(jnp.sum(inputs[0]) ** 2, inputs, given)
    )((x, logvar))
    assert float(value) == pytest.approx(float(jnp.sum(x)) ** 2, rel=1e-6)
    jax.tree.map(np.testing.assert_array_equal, found, given)


class Case:
    """A tiny first stage whose generator's loss is a square, with the terms of `adversarial`."""

    model = autoencoder.from_config(
        schema.AutoencoderKLConfig(
            channels=32, channel_mult=(1,), num_res_blocks=0, mid_attention=False
        )
    )
    image = np.tanh(RNG.normal(size=(2, 8, 8, 3))).astype(np.float32)

    @classmethod
    def terms(cls):
        def nll(reconstruction, error_logvar):
            error = losses.reconstruction_error("l1", cls.image, reconstruction)
            return jnp.mean(losses.summed_nll(error, error_logvar)), {"error": jnp.mean(error)}

        def generator(reconstruction):
            return jnp.mean(jnp.square(reconstruction + 0.3)), reconstruction.shape

        return nll, generator

    @classmethod
    def loss(cls, params, error_logvar, disc_factor):
        """Through `adversarial`."""
        variables = {"params": params}
        mean, _ = cls.model.apply(variables, cls.image, method="encode")
        reconstruction, state = cls.model.apply(
            variables, mean, method="decode", mutable=["intermediates"]
        )
        features = autoencoder.last_features(state)
        return losses.adversarial(
            *cls.terms(), reconstruction, error_logvar, features, 0.5, disc_factor
        )

    @classmethod
    def plain(cls, params, error_logvar, weight, nll_weight=1.0):
        """The same sum, under weights that are known."""
        mean, _ = cls.model.apply({"params": params}, cls.image, method="encode")
        reconstruction = cls.model.apply({"params": params}, mean, method="decode")
        nll, generator = cls.terms()
        return (
            nll_weight * nll(reconstruction, error_logvar)[0]
            + weight * generator(reconstruction)[0]
        )


@pytest.fixture(scope="module")
def params():
    return filled(jax.eval_shape(Case.model.init, jax.random.key(0), Case.image)["params"])


def test_adversarial_is_the_weighted_sum(params):
    logvar = jnp.float32(0.2)

    @jax.jit
    def run(params, logvar):
        def loss(params, logvar):
            value, metrics, aux = Case.loss(params, logvar, 0.8)
            return value, (metrics, aux[0])

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, logvar)

    (value, (metrics, aux)), grads = run(params, logvar)
    assert set(metrics) == {"nll", "generator", "d_weight"}
    assert set(aux) == {"error"}

    def last_kernel(*weights):  # of a whole backward pass
        gradient = jax.grad(Case.plain)(params, logvar, *weights)
        return gradient["decoder"]["conv_out"]["kernel"]

    expected = losses.adaptive_weight(
        *jax.jit(lambda: (last_kernel(0, 1), last_kernel(1, 0)))(), 0.5
    )
    assert float(metrics["d_weight"]) == pytest.approx(float(expected), rel=1e-5)

    weight = 0.8 * metrics["d_weight"]
    plain, plain_grads = jax.jit(jax.value_and_grad(Case.plain, (0, 1)))(params, logvar, weight)
    assert float(value) == pytest.approx(float(plain), rel=1e-6)
    # a bias before a norm has no gradient but rounding, which the other gradients measure
    whole = max(np.abs(x).max() for x in jax.tree.leaves(plain_grads))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_grads)):
        limit = 1e-5 * max(np.abs(b).max(), 0.01 * whole)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=limit)


def test_the_weight_costs_two_convolutions_and_no_backward_pass(params):
    def convolutions(loss):
        gradient = jax.grad(loss, (0, 1))
        program = jax.make_jaxpr(gradient)(params, jnp.float32(0.2))
        return str(program).count("conv_general_dilated[")

    with_weight = convolutions(lambda p, v: Case.loss(p, v, 0.8)[0])
    assert with_weight == convolutions(lambda p, v: Case.plain(p, v, 0.4)) + 2
