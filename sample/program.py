"""The program of a request: conditioning, solver and decoder as one function, compiled once."""

import functools
import time
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp

from ldm_jax import (
    bundle,
    conditioning,
    diffusion,
    latents,
    resizing,
    sampling,
    sharding,
    solvers,
)
from ldm_jax.runtime.log import LOG
from ldm_jax.sample import progress
from ldm_jax.sample.options import Options
from ldm_jax.sample.request import Request


def program_of(
    request: Request, model: bundle.LatentDiffusion, step: Callable[[], None] | None = None
) -> Callable:
    """run(params, donated batch, batch, keys, scales, eta[, start]): `make_run` of a request.

    model: that of the request, or its portable copy; its weights are not used.
    ValueError for options that the sampler cannot use.
    """
    run = make_run(
        model,
        request.options,
        request.guided,
        request.shape,
        wrap_model=request.wrap_model,
        decode=request.decode,
        levels=request.levels,
        step=step,
    )

    def program(params, donated, batch, keys, scales, eta, *start):
        return run(params, {**batch, **donated}, keys, scales, eta, *start)

    return program


def compiled(request: Request, run: Callable, arguments: tuple) -> Callable:
    """Compile `run` for arguments like these, with log lines, as it takes a while."""
    # Images stay on the devices that draw them. Latents are small: every process gets all of them,
    # and then the buffers of their inputs, of another layout, cannot be donated to them.
    alone = jax.process_count() == 1
    split = sharding.batch_sharding(request.mesh)
    out = (split, split if alone else sharding.replicated(request.mesh))
    out = (*out, split) if request.options.preview else out
    jitted = jax.jit(run, out_shardings=out, donate_argnums=(1,) if alone else ())
    where = jax.config.jax_compilation_cache_dir
    if progress.resolved(request.options) == "steps":
        kept = "not kept for the next time: --progress images is"
    elif where is None:
        kept = "not kept for the next time"
    else:
        kept = f"kept in {where} for the next time; --no-compilation-cache turns that off"
    LOG.info(f"compiling the sampler for batches of {len(arguments[3])} ({kept}) ...")
    began = time.perf_counter()
    program = jitted.lower(*arguments).compile()
    LOG.info(f"compiled in {time.perf_counter() - began:.1f} s{planned(program)}")
    return program


def planned(program: Any) -> str:
    """Text on the memory that the compiler plans on each device; empty where it gives none."""
    memory = program.memory_analysis()
    if memory is None:
        return ""
    given = memory.argument_size_in_bytes / 1e9
    peak = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e9
    return f"; memory of each device: {peak:.3f} GB beside {given:.3f} GB of weights and inputs"


def make_run(
    model: bundle.LatentDiffusion,
    options: Options,
    guided: bool,
    shape: tuple[int, int, int],
    *,
    wrap_model: Callable | None = None,
    decode: Callable | None = None,
    levels: solvers.Levels | None = None,
    step: Callable[[], None] | None = None,
) -> Callable:
    """run(params, batch, keys, scale, eta, start=0) -> (images, unscaled latents[, previews]).

    To be jitted. The conditioning is encoded once, before the scan over the levels. Beside it
    `batch` may hold
    x_T: [B, h, w, c], the noise to start from.
    init: [B, H, W, c], an image in [-1, 1] to start from, noised to the level `start`; or
    init_latent: [B, h, w, c], its unscaled latent.
    init_mask: [B, H, W, 1], 1 where the image is drawn; elsewhere `init` is kept.
    step_noise: [B, S, h, w, c], see `sampling.make_sampler`.
    hole: [B], what `init` is under the mask: so much noise, and nothing of the image.
    A latent of another size than `shape` is brought to it.

    wrap_model: model -> model, inside of guidance, as `windows.windowed`.
    decode: decode(params of the first stage, unscaled latents) -> images; default: the first stage
    in one pass.
    levels: see `sampling.make_sampler`.
    step: called on the host at every step.
    previews: [B, options.preview, H, W, c], the predicted x0 at as many levels, if not 0.
    """
    trace = None
    if options.preview or step is not None:
        trace = functools.partial(_trace_step, step, options.preview > 0)
    settings = _settings(options, guided, shape, wrap_model, levels)
    sample = sampling.make_sampler(model, trace=trace, **settings)
    decode = _decoder(model) if decode is None else decode

    def run(params, batch, keys, scale, eta, start=0):
        arguments = _arguments(model, guided, shape, params, batch, keys, scale, eta, start)
        z = sample(params, *arguments)
        z, x0 = z if trace is not None else (z, None)
        stage, z = params["first_stage"], z / model.latent_scale
        image = decode(stage, z).astype("float32")
        if not options.preview:
            return image, z
        shown = preview_levels(start, len(x0), options.preview)
        previews = jax.lax.map(lambda x: decode(stage, x / model.latent_scale), x0[shown])
        return image, z, jnp.moveaxis(previews.astype("float32"), 0, 1)

    return run


def segments_of(request: Request) -> sampling.Segments:
    """The program of a request in three, to be watched and stopped; the same images.

    begin(params, table, donated batch, batch, keys, scales, eta[, start]) -> (held, state)
    run(params, held, state, first, last) -> state, see `sampling.Segments`
    end(params, held, state) -> (images, unscaled latents)
    ValueError for options that the sampler cannot use.
    """
    model, guided, shape = request.model, request.guided, request.shape
    settings = _settings(request.options, guided, shape, request.wrap_model, request.levels)
    parts = sampling.make_segments(model, **settings)
    decode = _decoder(model) if request.decode is None else request.decode

    def begin(params, table, donated, batch, keys, scales, eta, start=0):
        batch = {**batch, **donated}
        arguments = _arguments(model, guided, shape, params, batch, keys, scales, eta, start)
        return parts.begin(params, table, *arguments)

    def end(params, held, state):
        z = parts.end(params, held, state) / model.latent_scale
        return decode(params["first_stage"], z).astype("float32"), z

    return parts._replace(begin=begin, end=end)


def _decoder(model: bundle.LatentDiffusion) -> Callable:
    """decode(params of the first stage, unscaled latents) -> images, in one pass."""
    return lambda p, z: model.first_stage.apply({"params": p}, z, method="decode")


def _settings(
    options: Options,
    guided: bool,
    shape: tuple[int, int, int],
    wrap_model: Callable | None,
    levels: solvers.Levels | None,
) -> dict[str, Any]:
    """Options of `sampling.make_sampler`. ValueError for some of a guidance that there is not."""
    _check_guidance(options, guided)
    names = ("steps", "solver", "spacing", "spacing_rule", "guidance_rescale", "guidance_interval")
    names += ("dynamic_threshold", "quantize_x0")
    given = {name: getattr(options, name) for name in names}
    return given | {"shape": shape, "decode": False, "wrap_model": wrap_model, "levels": levels}


def _arguments(
    model: bundle.LatentDiffusion,
    guided: bool,
    shape: tuple[int, int, int],
    params: dict,
    batch: dict[str, jax.Array],
    keys: jax.Array,
    scale: Any,
    eta: Any,
    start: Any,
) -> tuple:
    """Arguments of `sampling.make_sampler`'s function after the parameters, by position."""
    encode = functools.partial(
        latents.encode, model.first_stage, params["first_stage"], scale=model.latent_scale
    )
    given = (model.config.cond, model.cond_stage, params["cond_stage"], batch, encode)
    cond = conditioning.from_batch(*given)
    null = conditioning.null_like(*given) if guided else None
    init, mask = batch.get("init"), batch.get("init_mask")
    x_T, (height, width, _) = batch.get("x_T"), shape
    if init is not None:
        # a sample of the posterior, as in the reference; the kept part is its mode
        draws = jax.vmap(jax.random.fold_in, (0, None))(keys, 2) if mask is None else None
        init = encode(init, keys=draws)
    elif "init_latent" in batch:
        init = model.latent_scale * batch["init_latent"]
    if init is not None and init.shape[1:3] != (height, width):
        init = resizing.resized(init, (height, width))
    reduced = functools.partial(  # a latent pixel is kept only if all its pixels are
        einops.reduce, pattern="b (h y) (w x) c -> b h w c", reduction="max", h=height, w=width
    )
    mask = mask if mask is None else reduced(mask)
    if "hole" in batch:
        under = reduced(batch["mask"]) if mask is None else mask
        noise = x_T
        if noise is None:  # of its own: with that of the first level it would be too much
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, 3)
            noise = diffusion.rowwise_normal(own, shape)
        init = jnp.where(under > 0, batch["hole"][:, None, None, None] * noise, init)
    return cond, keys, null, scale, eta, x_T, start, init, mask, batch.get("step_noise")


def _check_guidance(options: Options, guided: bool) -> None:
    for name in ("guidance_rescale", "guidance_interval"):
        if not guided and getattr(options, name):
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} {getattr(options, name)} changes guidance, and there is none: leave it"
                " out, or sample with a guidance scale other than 1"
            )


def _trace_step(step: Callable[[], None] | None, kept: bool, x: jax.Array, denoised: Any) -> Any:
    """A `trace` of `make_sampler`: calls the host, and returns the predicted x0."""
    del x
    if step is not None:
        jax.debug.callback(step)
    return denoised.x0 if kept else None


def preview_levels(start: Any, count: int, number: int) -> jax.Array:
    """Int [number]: levels of start..count - 1, evenly, the last one included; start is traced."""
    ran = count - jnp.asarray(start)
    return jnp.clip(start + jnp.arange(1, number + 1) * ran // number - 1, 0, count - 1)
