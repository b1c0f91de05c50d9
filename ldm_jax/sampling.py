"""The jittable function behind every sampling command and every training grid."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax import denoising, diffusion, guidance, latents, schema, solvers
from ldm_jax.bundle import LatentDiffusion, bind, with_kv_cache
from ldm_jax.conditioning import Cond


def keys_of(seed: int, indices: Any) -> jax.Array:
    """Keys [N] of images: number i of a seed has fold_in(key(seed), i), whatever its batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(indices))


def levels_of(bundle: LatentDiffusion, steps: int, spacing: str | None) -> solvers.Levels:
    """The levels of `steps` steps: the model's own where the spacing is, or of another spacing."""
    own = bundle.config.sampling
    if spacing is None or spacing == own.spacing:
        return solvers.levels(bundle.schedule, steps, own.spacing, own.final, own.steps_offset)
    return solvers.levels(bundle.schedule, steps, spacing)


def start_of(strength: float, count: int) -> int:
    """First of `count` levels that runs, for a strength in 0..1: the last int(strength * count) do.

    The reference noises to the level before the one where it starts; here both are one, as in
    diffusers.
    """
    return count - int(strength * count + 1e-6)  # 0.29 * 100 is below 29


def noised(
    init: jax.Array, levels: solvers.Levels, start: jax.Array | int, noise: jax.Array
) -> jax.Array:
    """`init` [B, h, w, c] with unit normal `noise` at the level `start`, an int or traced.

    At 0 the noise alone, from which every sampler starts; at the number of levels `init` alone.
    """
    count = len(levels.t)
    row = jnp.clip(jnp.asarray(start), 0, count - 1)
    at_start = jnp.asarray(levels.alpha)[row] * init + jnp.asarray(levels.sigma)[row] * noise
    return jnp.where(start == 0, noise, jnp.where(start == count, init, at_start))


def _other(keys: jax.Array) -> jax.Array:
    """Keys [B] for draws that must not repeat those of the levels, whose number is folded in."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, 2**30)


def make_sampler(
    bundle: LatentDiffusion,
    *,
    shape: tuple[int, int, int],
    steps: int,
    solver: str = "ddim",
    spacing: str | None = None,
    guided: bool = True,
    decode: bool = True,
    trace: Callable | None = None,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    dynamic_threshold: float | None = None,
    threshold_limit: float = 1.0,
    quantize_x0: bool = False,
    wrap_model: Callable | None = None,
    remat: bool = False,
    levels: solvers.Levels | None = None,
) -> Callable:
    """sample(params, cond, null, keys, guidance_scale, eta, x_T, start, init, mask) -> images.

    `shape` is the latent's (h, w, c). `spacing` is one of `solvers.levels`; by default the model's
    own (`config.sampling`). The function is pure: jit it with your own shardings.
    `params` are as in `bundle.params`; `cond` and `null` hold [B, ...] arrays (`null` and
    `guidance_scale` are unused unless `guided`); `keys` is [B] typed keys, one per image: its
    pixels depend on nothing else. `x_T` [B, h, w, c] is unit normal, drawn from the keys by
    default; `start` is the first level that runs. `init` [B, h, w, c], a scaled latent, is what
    sampling starts from: noised with x_T to the level `start`, so that 0 ignores it (x_T itself)
    and the number of levels returns it. With `mask` [B, h, w, 1] `init` is also kept outside of
    it: see `solvers.masked`. Prompt, seed, guidance scale, eta, start, init and mask are traced: a
    new one never recompiles.

    guidance_rescale: phi in 0..1 of `guidance.rescaled`.
    guidance_interval: (lowest, highest) timestep with guidance; see `guidance.classifier_free`.
    dynamic_threshold: percentile in (0, 100] of `denoising.dynamic_threshold`, which brings the
    predicted x0 into [-threshold_limit, threshold_limit] (scaled latents have a std of about 1).
    quantize_x0: the predicted x0 becomes codes of the first stage, which must be a VQ one.
    wrap_model: model(x, t, cond) -> the same; what it returns is guided. For example
    `lambda model: windows.windowed(model, stride=(32, 32))`. In cond, `kv_cache` has been made of
    `context` and is read in its place: rows of both go together.
    remat: a backward pass computes each step again instead of keeping what is in it.
    levels: others than those of `steps` and `spacing`, as `solvers.inverted`, which lead from a
    scaled latent, given as x_T, to its noise.

    Returns images [B, H, W, c] in about [-1, 1], not clipped; with `decode=False` the unscaled
    latents that the first stage decodes. With `trace(x, denoised)` a pair: that, and what `trace`
    returned at every level, stacked: see `solvers.sample`. The latent can take the place of x_T or
    of init: with `decode=False`, one of them (argument 6 or 8) may be donated to `jax.jit`.
    Raises ValueError for an option that is out of its range or cannot apply.
    """
    solvers.make(solver)  # refuses an unknown name now, not at the first call
    levels = levels_of(bundle, steps, spacing) if levels is None else levels
    _check_guidance(guided, guidance_rescale, guidance_interval, levels)
    _check_x0(bundle, dynamic_threshold, threshold_limit, quantize_x0)

    def denoiser(params, cond, null, guidance_scale):
        """denoise(x, level) of one request."""
        net = bind(bundle.unet, params["unet"])
        net = net if wrap_model is None else wrap_model(net)
        cond = with_kv_cache(bundle.unet, params["unet"], cond)
        if guided:
            null = with_kv_cache(bundle.unet, params["unet"], null)
            model = guidance.classifier_free(
                net,
                cond,
                null,
                guidance_scale,
                guidance_rescale,
                guidance_interval,
                shared=wrap_model is None,
            )
        else:
            model = lambda x, t: net(x, t, cond)  # noqa: E731
        denoise = diffusion.denoiser(model, bundle.prediction)
        if dynamic_threshold is not None:
            denoise = denoising.dynamic_threshold(denoise, dynamic_threshold / 100, threshold_limit)
        if quantize_x0:
            denoise = denoising.quantize_x0(denoise, _to_codes(bundle, params["first_stage"]))
        return denoise

    def sample(
        params: dict,
        cond: Cond,
        null: Cond | None,
        keys: jax.Array,
        guidance_scale: Any,
        eta: Any = 0.0,
        x_T: jax.Array | None = None,
        start: Any = 0,
        init: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> Any:
        x_keys, step_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        x_T = diffusion.rowwise_normal(x_keys, shape) if x_T is None else x_T
        denoise = denoiser(params, cond, null, guidance_scale)
        if init is not None:
            x_T = noised(init, levels, start, x_T)
        if mask is not None:
            noise = solvers.fresh_noise(_other(step_keys), shape)
            denoise = solvers.masked(denoise, init, mask, noise)
        rule = solvers.make(solver, eta)
        out = solvers.sample(
            rule, denoise, levels, x_T, step_keys, start=start, trace=trace, remat=remat
        )
        latent, traced = out if trace is not None else (out, None)
        if mask is not None:
            latent = solvers.composite(latent, init, mask)
        if decode:
            image = latents.decode(
                bundle.first_stage, params["first_stage"], latent, bundle.latent_scale
            )
        else:
            image = latent / bundle.latent_scale
        return image if trace is None else (image, traced)

    return sample


def _to_codes(bundle: LatentDiffusion, params: dict) -> Callable[[jax.Array], jax.Array]:
    """Scaled latents to the nearest codes of the first stage, scaled too."""

    def codes(latent):
        z = latent / bundle.latent_scale
        nearest, _ = bundle.first_stage.apply({"params": params}, z, method="quantize")
        return bundle.latent_scale * nearest

    return codes


def _check_guidance(
    guided: bool, rescale: float, interval: tuple[float, float] | None, levels: solvers.Levels
) -> None:
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale={rescale} is not in 0..1, the part that is rescaled")
    if not guided and (rescale or interval is not None):
        option = f"guidance_rescale={rescale}" if rescale else f"guidance_interval={interval}"
        raise ValueError(
            f"{option} changes guidance, and this sampler has none: leave it out, or sample with"
            " a guidance scale other than 1"
        )
    if interval is None:
        return
    lowest, highest = interval
    if not any(lowest <= t <= highest for t in levels.t):
        raise ValueError(
            f"guidance_interval={interval}: none of the {len(levels.t)} timesteps"
            f" {levels.t[0]:g}..{levels.t[-1]:g} is in it; give (lowest, highest) around some"
        )


def _check_x0(
    bundle: LatentDiffusion, percentile: float | None, limit: float, quantize: bool
) -> None:
    if percentile is not None and not 0 < percentile <= 100:
        raise ValueError(
            f"dynamic_threshold={percentile} is not in (0, 100]: it is a percentile, such as 99.5"
        )
    if not limit > 0:
        raise ValueError(f"threshold_limit={limit} is not positive")
    if quantize and not isinstance(bundle.config.first_stage, schema.AutoencoderVQConfig):
        raise ValueError(
            "quantize_x0 needs a first stage with codes (AutoencoderVQConfig), and this model has"
            f" {type(bundle.config.first_stage).__name__}: leave it out"
        )
