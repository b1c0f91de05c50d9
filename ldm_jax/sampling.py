"""The jittable function behind every sampling command and every training grid."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax import diffusion, guidance, latents, solvers
from ldm_jax.bundle import LatentDiffusion, bind
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
) -> Callable:
    """sample(params, cond, null, keys, guidance_scale, eta=0.0, x_T=None, start=0) -> images.

    `shape` is the latent's (h, w, c). `spacing` is one of `solvers.levels`; by default the model's
    own (`config.sampling`). The function is pure: jit it with your own shardings.
    `params` are as in `bundle.params`; `cond` and `null` hold [B, ...] arrays (`null` and
    `guidance_scale` are unused unless `guided`); `keys` is [B] typed keys, one per image: its
    pixels depend on nothing else. `x_T` [B, h, w, c] is unit normal, drawn from the keys by
    default; `start` is the first level that runs. Prompt, seed, guidance scale, eta and start are
    traced: a new one never recompiles.

    Returns images [B, H, W, c] in about [-1, 1], not clipped; with `decode=False` the unscaled
    latents that the first stage decodes. With `trace(x, denoised)` a pair: that, and what `trace`
    returned at every level, stacked: see `solvers.sample`.
    """
    solvers.make(solver)  # refuses an unknown name now, not at the first call
    levels = levels_of(bundle, steps, spacing)

    def sample(
        params: dict,
        cond: Cond,
        null: Cond | None,
        keys: jax.Array,
        guidance_scale: Any,
        eta: Any = 0.0,
        x_T: jax.Array | None = None,
        start: Any = 0,
    ) -> Any:
        x_keys, step_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        x_T = diffusion.rowwise_normal(x_keys, shape) if x_T is None else x_T
        net = bind(bundle.unet, params["unet"])
        if guided:
            model = guidance.classifier_free(net, cond, null, guidance_scale)
        else:
            model = lambda x, t: net(x, t, cond)  # noqa: E731
        denoise = diffusion.denoiser(model, bundle.prediction)
        rule = solvers.make(solver, eta)
        out = solvers.sample(rule, denoise, levels, x_T, step_keys, start=start, trace=trace)
        latent, traced = out if trace is not None else (out, None)
        if decode:
            image = latents.decode(
                bundle.first_stage, params["first_stage"], latent, bundle.latent_scale
            )
        else:
            image = latent / bundle.latent_scale
        return image if trace is None else (image, traced)

    return sample
