"""A whole step of generator and discriminator, losses and gradients, against torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import draw, filled

from ldm_jax import losses, schema
from ldm_jax.convert import auxiliary, table
from ldm_jax.convert.diffusers import tables
from ldm_jax.models import autoencoder, lpips
from ldm_jax.models.discriminator import PatchGAN

pytestmark = pytest.mark.torch

SIZES = {"channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4}
KL = schema.AutoencoderKLConfig(**SIZES, embed_dim=4)
VQ = schema.AutoencoderVQConfig(**SIZES, embed_dim=4, num_codes=12)
IMAGE = np.tanh(draw(2, 16, 16, 3))
NOISE = draw(2, 8, 8, 4, seed=2)
LOGVAR, KL_WEIGHT, CODEBOOK_WEIGHT, PERCEPTUAL_WEIGHT = 0.3, 0.05, 1.0, 0.7
DISC_WEIGHT, DISC_FACTOR = 0.5, 0.9
RATE = 1e-4  # of the gradient step between generator and discriminator
DISCRIMINATOR = PatchGAN(width=8, layers=2)
WIDTH = 8  # of LPIPS


@pytest.fixture(scope="module")
def weights():
    """(LPIPS, discriminator)"""
    shapes = jax.eval_shape(DISCRIMINATOR.init, jax.random.key(0), IMAGE)
    disc = filled(shapes)
    disc["batch_stats"] = jax.tree.map(np.abs, disc["batch_stats"])
    return filled(lpips.shapes(WIDTH), seed=3), disc


def first_stage(config):
    model = autoencoder.from_config(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGE)["params"]
    return model, filled(shapes, seed=4)


# --- ours ----------------------------------------------------------------------------------------


def reconstruct(model, params):
    """(reconstruction, features, regularization, error's log-variance or None)"""
    apply = functools.partial(model.apply, {"params": params})
    if isinstance(model, autoencoder.AutoencoderVQ):
        z = apply(IMAGE, method="encode")
        _, indices = apply(z, method="quantize")
        loss, _, _ = losses.codebook(VQ, params["quantize"]["embedding"], z, indices)
        regularization = CODEBOOK_WEIGHT * jnp.mean(loss)
    else:
        mean, logvar = apply(IMAGE, method="encode")
        z = mean + jnp.exp(0.5 * logvar) * NOISE
        regularization = KL_WEIGHT * jnp.mean(losses.gaussian_kl(mean, logvar))
    images, state = apply(z, method="decode", mutable=["intermediates"])
    return images, autoencoder.last_features(state), regularization


def our_step(model, params, error_logvar, vgg, disc):
    """{name: what torch has too} of a step."""
    vq = isinstance(model, autoencoder.AutoencoderVQ)

    def nll(images, error_logvar):
        perceptual = lpips.LPIPS(width=WIDTH).apply({"params": vgg}, IMAGE, images)
        error = losses.reconstruction_error("l1", IMAGE, images, perceptual, PERCEPTUAL_WEIGHT)
        found = losses.averaged_nll(error) if vq else losses.summed_nll(error, error_logvar)
        return jnp.mean(found), jnp.mean(perceptual)

    def judge(params, stats, images):
        return DISCRIMINATOR.apply(
            {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"]
        )

    def generator(images):
        fake, state = judge(disc["params"], disc["batch_stats"], images)
        return losses.generator(fake), state

    def generator_loss(trained):
        images, features, regularization = reconstruct(model, trained["autoencoder"])
        loss, metrics, aux = losses.adversarial(
            nll, generator, images, trained["logvar"], features, DISC_WEIGHT, DISC_FACTOR
        )
        return loss + regularization, (metrics, aux[1])

    trained = {"autoencoder": params, "logvar": error_logvar}
    (loss, (metrics, state)), grads = jax.value_and_grad(generator_loss, has_aux=True)(trained)
    moved = jax.tree.map(lambda p, g: p - RATE * g, params, grads["autoencoder"])

    def discriminator_loss(disc_params):
        images = jax.lax.stop_gradient(reconstruct(model, moved)[0])
        real, after = judge(disc_params, state["batch_stats"], IMAGE)
        fake, after = judge(disc_params, after["batch_stats"], images)
        return DISC_FACTOR * losses.hinge(real, fake), after

    (d_loss, after), d_grads = jax.value_and_grad(discriminator_loss, has_aux=True)(disc["params"])
    found = {**metrics, "loss": loss, "d_loss": d_loss}
    return found, grads, {"params": d_grads, **after}


# --- torch's -------------------------------------------------------------------------------------


class Theirs:
    """The same networks in torch; the first stage is that of diffusers."""

    def __init__(self, config, params, vgg, disc):
        import diffusers
        import torch
        import torch_first_stage as again

        self.again, self.torch, self.vq = again, torch, config is VQ
        sizes = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "latent_channels": 4,
        }
        if self.vq:
            self.net = diffusers.VQModel(**sizes, num_vq_embeddings=12, vq_embed_dim=4)
        else:
            self.net = diffusers.AutoencoderKL(**sizes)
        self.rows = tables.entries(params)
        self._load(self.net, table.to_torch(self.rows, params))
        self.lpips = again.LPIPS(WIDTH).requires_grad_(False)
        self._load(self.lpips, table.to_torch(list(auxiliary.lpips_entries()), vgg))
        self.disc = again.patch_gan(3, 8, 2, "batch").train()
        self._load(self.disc, auxiliary.discriminator_state_dict(DISCRIMINATOR, disc))
        self.logvar = torch.tensor(LOGVAR, requires_grad=True)

    def _load(self, module, tensors):
        module.load_state_dict({n: self.torch.tensor(np.array(x)) for n, x in tensors.items()})

    def reconstruct(self):
        """(images, regularization)"""
        x, net = self.again.nchw(IMAGE), self.net
        if self.vq:
            codes, loss = self.again.quantized(
                net.quantize.embedding.weight, net.encode(x).latents, VQ.beta
            )
            return net.decode(codes, force_not_quantize=True).sample, CODEBOOK_WEIGHT * loss
        moments = net.quant_conv(net.encoder(x))
        mean, logvar = moments.chunk(2, 1)
        z = mean + self.torch.exp(0.5 * logvar) * self.again.nchw(NOISE)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        return net.decode(z).sample, KL_WEIGHT * kl

    def step(self):
        again, x = self.again, self.again.nchw(IMAGE)
        images, regularization = self.reconstruct()
        error = (x - images).abs() + PERCEPTUAL_WEIGHT * self.lpips(x, images)
        summed = (error / self.logvar.exp() + self.logvar).sum() / len(x)
        nll = error.mean() if self.vq else summed
        generator = -self.disc(images).mean()
        last = self.net.decoder.conv_out.weight
        d_weight = again.adaptive_weight(nll, generator, last, DISC_WEIGHT)
        loss = nll + regularization + d_weight * DISC_FACTOR * generator
        loss.backward()
        parameters = dict(self.net.named_parameters())
        grads = {name: p.grad.clone() for name, p in parameters.items()}
        with self.torch.no_grad():
            for p in parameters.values():
                p -= RATE * p.grad
            images, _ = self.reconstruct()
        self.disc.zero_grad()
        d_loss = DISC_FACTOR * again.hinge(self.disc(x), self.disc(images))
        d_loss.backward()
        found = {"nll": nll, "generator": generator, "d_weight": d_weight}
        found |= {"loss": loss, "d_loss": d_loss}
        return {n: x.item() for n, x in found.items()}, grads

    def our_gradients(self, grads, params):
        return table.from_torch(self.rows, {n: g.numpy() for n, g in grads.items()}, params)

    def our_discriminator(self):
        """Gradients in the place of parameters, and statistics."""
        tensors = dict(self.disc.state_dict())
        tensors |= {name: p.grad for name, p in self.disc.named_parameters()}
        return auxiliary.discriminator_from({n: x.numpy() for n, x in tensors.items()})[1]


# --- comparison ----------------------------------------------------------------------------------


def assert_close(found, expected, record):
    """Every array to 1e-4 of its largest value, or of 1 % of the largest in the whole tree.

    The second where an array is nothing but rounding: a bias before a norm has no gradient.
    """
    whole = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))
    worst = 0.0
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected)):
        limit = 1e-4 * max(float(np.abs(b).max()), 0.01 * whole)
        worst = max(worst, float(np.abs(a - b).max()) / limit)
        np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path))
    record("of_the_limit", worst)


@pytest.mark.parametrize(
    "config", [pytest.param(KL, id="kl"), pytest.param(VQ, id="vq", marks=pytest.mark.slow)]
)
def test_a_step_is_that_of_torch(config, weights, record_property):
    pytest.importorskip("torch", reason="torch is the reference")
    pytest.importorskip("diffusers", reason="its first stages are the reference")
    model, params = first_stage(config)
    theirs = Theirs(config, params, *weights)
    expected, their_grads = theirs.step()
    step = jax.jit(functools.partial(our_step, model))
    found, grads, disc = step(params, jnp.float32(LOGVAR), *weights)
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-4), name
    assert 0.01 < expected["d_weight"] < 1e4  # neither nothing nor clipped
    assert_close(grads["autoencoder"], theirs.our_gradients(their_grads, params), record_property)
    if config is KL:
        assert float(grads["logvar"]) == pytest.approx(theirs.logvar.grad.item(), rel=1e-4)
    else:
        assert float(grads["logvar"]) == 0
    assert_close(disc["params"], theirs.our_discriminator()["params"], record_property)
    assert_close(disc["batch_stats"], theirs.our_discriminator()["batch_stats"], record_property)
