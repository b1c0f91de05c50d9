"""The first stage on a batch: reconstruction, its likelihood, regularization of the latents.

`contperceptual.py` of the reference for KL latents, `vqperceptual.py` for quantized ones.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from ldm_jax import diffusion, losses, schema
from ldm_jax.convert import auxiliary
from ldm_jax.models import attention, autoencoder, lpips
from ldm_jax.runtime import rundir

DECODER = ("post_quant_conv", "decoder")  # parts that `train_only: decoder` trains


class Reconstruction(NamedTuple):
    """Output of the first stage for one microbatch, its examples on axis 0."""

    image: jax.Array
    """Float32 [B, H, W, c], not clipped."""
    features: jax.Array
    """Input of the decoder's last convolution."""
    regularization: jax.Array
    """Scalar: the weighted KL or the codebook's weighted loss."""
    metrics: dict[str, jax.Array]
    z: jax.Array
    """The latents, those of a quantized stage before their codes replace them."""
    indices: jax.Array | None
    """Indices of the codes, int32 [B, h, w]; None without a codebook."""


def module(config: schema.AutoencoderTrainConfig, mesh: Mesh | None = None) -> Any:
    """The autoencoder as the recipe runs it on the mesh's devices."""
    platform = mesh.devices.flat[0].platform if mesh is not None else "cpu"
    return autoencoder.from_config(
        config.model,
        dtype=jnp.dtype(config.dtype),
        attention=attention.choose(platform, mesh, config.attention),
        remat=config.remat,
    )


def make(config: schema.AutoencoderTrainConfig, mesh: Mesh) -> Callable:
    """reconstruct(params, image, encode_keys, dropout_key, train) -> Reconstruction.

    Training reconstructs a sample of a KL posterior, evaluation its mode.
    """
    net = module(config, mesh)

    def kl(apply: Callable, image: jax.Array, keys: jax.Array, train: bool) -> tuple:
        mean, logvar = (a.astype(jnp.float32) for a in apply(image, method="encode"))
        z = mean
        if train:
            noise = diffusion.rowwise_normal(keys, mean.shape[1:])
            z = mean + jnp.exp(0.5 * logvar) * noise
        kl = jnp.mean(losses.gaussian_kl(mean, logvar))
        return z, z, config.loss.kl_weight * kl, {"kl": kl}, None

    def vq(apply: Callable, image: jax.Array, codebook_nc: jax.Array) -> tuple:
        z = apply(image, method="encode")
        codes, indices = net.apply(
            {"params": {"quantize": {"embedding": codebook_nc}}}, z, method="quantize"
        )
        loss_b, usage, _ = losses.codebook(config.model, codebook_nc, z, indices)
        loss = jnp.mean(loss_b)
        return z, codes, config.loss.codebook_weight * loss, {"codebook": loss, **usage}, indices

    def reconstruct(
        params: dict, image: jax.Array, keys: jax.Array, dropout_key: jax.Array, train: bool
    ) -> Reconstruction:
        params = params["autoencoder"]
        if config.train_only == "decoder":
            params = {n: p if n in DECODER else jax.lax.stop_gradient(p) for n, p in params.items()}
        rngs = {"dropout": dropout_key}
        apply = functools.partial(net.apply, {"params": params}, train=train, rngs=rngs)
        if isinstance(config.model, schema.AutoencoderVQConfig):
            parts = vq(apply, image, params["quantize"]["embedding"])
            apply = functools.partial(apply, quantize=False)  # z is quantized already
        else:
            parts = kl(apply, image, keys, train)
        z, codes, regularization, metrics, indices = parts
        decoded, state = apply(codes, method="decode", mutable=["intermediates"])
        features = autoencoder.last_features(state)
        return Reconstruction(decoded, features, regularization, metrics, z, indices)

    return reconstruct


def make_nll(config: schema.AutoencoderTrainConfig) -> Callable:
    """nll(perceptual, image, reconstruction, error_logvar) -> (scalar, metrics).

    `perceptual` are the parameters of LPIPS, {} where its weight is 0. Summed over an image for KL
    latents, averaged for quantized ones, as the reference does.
    """
    loss = config.loss
    distance = lpips.LPIPS(jnp.dtype(config.dtype))
    quantized = isinstance(config.model, schema.AutoencoderVQConfig)

    def nll(
        perceptual: dict, image: jax.Array, reconstruction: jax.Array, error_logvar: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        mse = jnp.mean(jnp.square(image - reconstruction), axis=(1, 2, 3))
        metrics = {"psnr": jnp.mean(losses.psnr(mse))}
        perceptual_b = None
        if loss.perceptual_weight:
            perceptual_b = distance.apply({"params": perceptual}, image, reconstruction)
            metrics["perceptual"] = jnp.mean(perceptual_b)
        error = losses.reconstruction_error(
            loss.pixel, image, reconstruction, perceptual_b, loss.perceptual_weight
        )
        metrics["rec_loss"] = jnp.mean(error)
        if quantized:
            return jnp.mean(losses.averaged_nll(error)), metrics
        return jnp.mean(losses.summed_nll(error, error_logvar)), metrics

    return nll


# --- LPIPS ----------------------------------------------------------------------------------------


def find_perceptual(config: schema.AutoencoderTrainConfig, workdir: epath.PathLike) -> dict:
    """Host parameters of LPIPS: from the run's `frozen/`, at the first start from the given files.

    {} where its weight is 0. Only reads. FileNotFoundError and ValueError name the files that are
    needed.
    """
    loss = config.loss
    if not loss.perceptual_weight:
        return {}
    if loss.perceptual_vgg == "random":
        return jax.device_get(lpips.random_params(jax.random.key(0)))
    kept = rundir.read_frozen(workdir, "perceptual", lambda config: lpips.shapes())
    if kept is not None:
        return kept[0]
    for option, path, published in (
        ("vgg", loss.perceptual_vgg, auxiliary.VGG16),
        ("lin", loss.perceptual_lin, auxiliary.LPIPS),
    ):
        if not path:
            raise ValueError(
                f"loss.perceptual_weight is {loss.perceptual_weight:g}, but"
                f" --loss.perceptual-{option} names no file: give {published}; or set"
                " --loss.perceptual-weight 0, or --loss.perceptual-vgg random"
            )
    return auxiliary.load_lpips(loss.perceptual_vgg, loss.perceptual_lin)


def keep_perceptual(
    config: schema.AutoencoderTrainConfig, run: epath.PathLike, params: dict
) -> None:
    """Keep the weights in the run, which then no longer needs the files; random ones are made."""
    if params and config.loss.perceptual_vgg != "random":
        rundir.write_frozen(run, "perceptual", params, None)
