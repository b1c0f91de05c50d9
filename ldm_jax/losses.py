"""First-stage objective: reconstruction, KL or codebook loss, and adversarial loss.

From `contperceptual.py` of CompVis/latent-diffusion and `vqperceptual.py` of
CompVis/taming-transformers. Images are [B, H, W, c] in [-1, 1]; logits are those of a
discriminator, positive for real.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax import schema
from ldm_jax.models import quantize

Aux = Any

# --- reconstruction, KL, codebook ----------------------------------------------------------------


def reconstruction_error(
    pixel: str,
    image: jax.Array,
    reconstruction: jax.Array,
    perceptual_b: jax.Array | None = None,
    perceptual_weight: float = 1.0,
) -> jax.Array:
    """|image - reconstruction| ("l1") or its square ("l2"), [B, H, W, c].

    The perceptual distance of an image [B], weighted, is added to each of its values, as the
    reference does: summed over an image it counts as often as the image has values.
    """
    difference = image - reconstruction
    error = jnp.abs(difference) if pixel == "l1" else jnp.square(difference)
    if perceptual_b is None:
        return error
    return error + perceptual_weight * perceptual_b[:, None, None, None]


def summed_nll(error: jax.Array, error_logvar: jax.Array) -> jax.Array:
    """[B]: negative log-likelihood summed over an image, beside the KL (`contperceptual.py`).

    error: [B, H, W, c]. error_logvar: its log-variance, a scalar.
    """
    return jnp.sum(error / jnp.exp(error_logvar) + error_logvar, axis=(1, 2, 3))


def averaged_nll(error: jax.Array) -> jax.Array:
    """[B]: the error averaged over an image, beside the codebook's loss (`vqperceptual.py`)."""
    return jnp.mean(error, axis=(1, 2, 3))


def gaussian_kl(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of [B, h, w, z], summed over h, w, z: [B]."""
    return 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))


def codebook(
    config: schema.AutoencoderVQConfig, codebook_nc: jax.Array, z: jax.Array, indices: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """(`quantize.codebook_loss` [B], metrics, how often each code was taken [n]).

    Latents z [B, h, w, c] before quantization, and their codes' indices [B, h, w]. The metrics are
    of this batch: "perplexity", "used_codes", "code_usage" (the share of codes that were taken).
    """
    count_n = quantize.assigned(z, indices, len(codebook_nc)).count_n
    metrics = quantize.usage(count_n)
    metrics["code_usage"] = metrics["used_codes"] / len(codebook_nc)
    return quantize.codebook_loss(config, codebook_nc, z, indices), metrics, count_n


def psnr(mse: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB from the mean squared error of images in [-1, 1]."""
    # 4 is the square of the range; equal images give 126 dB, not infinity, which JSON lacks
    return 10.0 * jnp.log10(4.0 / jnp.maximum(mse, 1e-12))


# --- discriminator -------------------------------------------------------------------------------


def hinge(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Hinge loss of the discriminator, a scalar: no gradient beyond logits of 1 and -1."""
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))


def vanilla(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Loss of the discriminator, a scalar: half the cross-entropy of Goodfellow et al. 2014."""
    return 0.5 * (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake)))


DISCRIMINATOR_LOSSES = {"hinge": hinge, "vanilla": vanilla}


def generator(fake: jax.Array) -> jax.Array:
    """Loss of the generator, a scalar, used with both losses of the discriminator."""
    return -jnp.mean(fake)


def adopted(disc_factor: float, step: jax.Array, disc_start: int) -> jax.Array:
    """`disc_factor` from the optimizer step `disc_start` on, 0 before (`adopt_weight`)."""
    return jnp.where(step < disc_start, 0.0, jnp.float32(disc_factor))


def r1(logits_of: Callable[[jax.Array], jax.Array], image: jax.Array) -> jax.Array:
    """Half the mean squared norm of the real images' gradient (Mescheder et al. 2018, eq. 9).

    The gradient is that of an image's mean logit over its patches, of which the losses are means
    too. A penalty every k steps takes k times its weight (StyleGAN2's lazy regularization).
    """

    def score(image: jax.Array) -> jax.Array:
        return jnp.sum(jnp.mean(logits_of(image), axis=(1, 2, 3)))

    return 0.5 * jnp.mean(jnp.sum(jnp.square(jax.grad(score)(image)), axis=(1, 2, 3)))


class LogitAverages(NamedTuple):
    """Moving averages of the discriminator's logits, scalars, 0 before the first step."""

    real: jax.Array
    fake: jax.Array


def start_lecam() -> LogitAverages:
    """The averages before the first step."""
    return LogitAverages(jnp.zeros(()), jnp.zeros(()))


def update_lecam(
    averages: LogitAverages, real: jax.Array, fake: jax.Array, decay: float = 0.99
) -> LogitAverages:
    """decay * averages + (1 - decay) * means of these logits."""
    means = LogitAverages(*(jax.lax.stop_gradient(jnp.mean(x)) for x in (real, fake)))
    return jax.tree.map(lambda a, m: decay * a + (1 - decay) * m, averages, means)


def lecam(averages: LogitAverages, real: jax.Array, fake: jax.Array) -> jax.Array:
    """LeCam regularization, a scalar, for few images (Tseng et al. 2021, and their code).

    Real logits above the average fake logit are drawn to it, and fake logits below the average
    real one to that.
    """
    above = jax.nn.relu(real - averages.fake)
    below = jax.nn.relu(averages.real - fake)
    return jnp.mean(jnp.square(above)) + jnp.mean(jnp.square(below))


# --- generator against discriminator -------------------------------------------------------------


def last_kernel_gradient(features: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Gradient of the kernel of the decoder's last convolution, float32 [3, 3, c, out].

    features: [B, H, W, c], input of that convolution (`autoencoder.last_features`).
    cotangent: [B, H, W, out], gradient of a loss to the reconstruction.
    """
    layout = ("NHWC", "HWIO", "NHWC")
    shape = (3, 3, features.shape[-1], cotangent.shape[-1])

    def convolve(kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            features, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=layout
        )

    # linear in the kernel: its transpose is the gradient, and nothing is convolved forwards
    transposed = jax.linear_transpose(convolve, jax.ShapeDtypeStruct(shape, features.dtype))
    return transposed(cotangent.astype(features.dtype))[0].astype(jnp.float32)


def adaptive_weight(
    nll_grad: jax.Array, generator_grad: jax.Array, disc_weight: float
) -> jax.Array:
    """Weight of the generator's loss, a scalar without a gradient.

    |nll_grad| / (|generator_grad| + 1e-4), at most 1e4, times `disc_weight`; both are gradients to
    the decoder's last kernel (`calculate_adaptive_weight`; VQGAN, Esser et al. 2021, eq. 7).
    """
    ratio = _norm(nll_grad) / (_norm(generator_grad) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, 1e4)) * disc_weight


def with_gradient(value: jax.Array, inputs: Any, cotangents: Any) -> jax.Array:
    """Return the scalar `value` with `cotangents` as its only gradients, to the arrays `inputs`."""

    def zero(x: jax.Array, cotangent: jax.Array) -> jax.Array:
        # 0, with the cotangent as its gradient to x
        return jnp.sum(jax.lax.stop_gradient(cotangent) * (x - jax.lax.stop_gradient(x)))

    return jax.lax.stop_gradient(value) + sum(
        jax.tree.leaves(jax.tree.map(zero, inputs, cotangents))
    )


def adversarial(
    nll: Callable[[jax.Array, jax.Array], tuple[jax.Array, Aux]],
    generator: Callable[[jax.Array], tuple[jax.Array, Aux]],
    reconstruction: jax.Array,
    error_logvar: jax.Array,
    features: jax.Array,
    disc_weight: float,
    disc_factor: jax.Array | float,
) -> tuple[jax.Array, dict[str, jax.Array], tuple[Aux, Aux]]:
    """(nll + d_weight * disc_factor * generator's loss, metrics, the second values of both).

    nll: (reconstruction, error_logvar) -> (scalar, anything). generator: reconstruction -> (scalar,
        anything), the discriminator's parameters held fixed.
    features: input of the decoder's last convolution (`autoencoder.last_features`).
    disc_factor: from `adopted`.
    The loss has gradients to `reconstruction` and `error_logvar` alone. Each of `nll` and
    `generator` is differentiated once, to the reconstruction; the gradients to the last kernel, of
    which the adaptive weight is made, cost one convolution each, and the decoder and encoder see
    one backward pass, of the weighted sum. Metrics: "nll", "generator", "d_weight".
    """
    # both gradients end here, where they are weighted; the decoder is passed once, with their sum
    fixed = jax.lax.stop_gradient((reconstruction, error_logvar))
    of_nll = jax.value_and_grad(nll, argnums=(0, 1), has_aux=True)
    (nll_value, nll_aux), (nll_grad, logvar_grad) = of_nll(*fixed)
    of_generator = jax.value_and_grad(generator, has_aux=True)
    (generator_value, generator_aux), generator_grad = of_generator(fixed[0])
    d_weight = adaptive_weight(
        last_kernel_gradient(features, nll_grad),
        last_kernel_gradient(features, generator_grad),
        disc_weight,
    )
    weight = d_weight * disc_factor
    loss = with_gradient(
        nll_value + weight * generator_value,
        (reconstruction, error_logvar),
        (nll_grad + weight * generator_grad, logvar_grad),
    )
    metrics = {"nll": nll_value, "generator": generator_value, "d_weight": d_weight}
    return loss, metrics, (nll_aux, generator_aux)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x)))
