"""Batches of images through one compiled program."""

import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import einops
import jax
import numpy as np
import tqdm

from ldm_jax import bundle, cli, conditioning, latents, sampling, sharding, solvers
from ldm_jax.sample.inputs import start_latents
from ldm_jax.sample.options import Options


def generate(
    model: bundle.LatentDiffusion,
    mesh: Any,
    options: Options,
    batch: dict[str, np.ndarray],
    count: int,
    guided: bool,
    shape: tuple[int, int, int] | None = None,
    start: int | None = None,
    *,
    around: Callable | None = None,
    decode: Callable | None = None,
    levels: solvers.Levels | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (indices, images float32, unscaled latents) of each batch; one program for all.

    batch: what `conditioning.from_batch` and `make_run` read, host arrays with `count` rows. They
    are arguments of the program, as are seed, scale, eta and start: others compile nothing anew.
    shape: (h, w, c) of the latent; default: the model's.
    start: first level that runs; None is all of them, in a program that cannot skip any.
    around, decode, levels: see `make_run`.
    The last batch is filled up by repeating its last image, and cut.
    """
    shape = model.latent_shape if shape is None else shape
    x_T = start_latents(options, count, shape)
    run = make_run(model, options, guided, shape, around=around, decode=decode, levels=levels)
    run = jax.jit(run, out_shardings=sharding.replicated(mesh))
    rows, split = sharding.batch_sharding(mesh), mesh.shape["data"] * mesh.shape["fsdp"]
    size, compiled = min(options.batch_size, -(-count // split) * split), None
    with tqdm.tqdm(total=count, unit="image", disable=not sys.stderr.isatty()) as bar:
        for first in range(0, count, size):
            real = np.arange(first, min(first + size, count))
            indices = np.minimum(np.arange(first, first + size), count - 1)
            given = {**batch, "x_T": x_T} if x_T is not None else batch
            given = {name: jax.device_put(x[indices], rows) for name, x in given.items()}
            keys = jax.device_put(sampling.keys_of(options.seed, indices), rows)
            arguments = (model.params, given, keys, options.guidance_scale, options.eta)
            arguments += () if start is None else (start,)
            if compiled is None:
                cli.say(f"compiling the sampler for batches of {size} ...")
                began = time.perf_counter()
                compiled = run.lower(*arguments).compile()
                cli.say(f"compiled in {time.perf_counter() - began:.1f} s{planned(compiled)}")
            image, z = compiled(*arguments)
            bar.update(len(real))
            yield real, np.asarray(image)[: len(real)], np.asarray(z)[: len(real)]


def planned(compiled: Any) -> str:
    """What the compiler plans to hold on each device, for people; empty where it does not tell."""
    memory = compiled.memory_analysis()
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
    around: Callable | None = None,
    decode: Callable | None = None,
    levels: solvers.Levels | None = None,
) -> Callable:
    """run(params, batch, keys, scale, eta, start=0) -> (images, unscaled latents), to be jitted.

    The conditioning is encoded once, before the scan over the levels. Beside it `batch` may hold
    x_T: [B, h, w, c], the noise to start from.
    init: [B, H, W, c], an image in [-1, 1] to start from, noised to the level `start`.
    hole: [B, H, W, 1], 1 where `init` is drawn anew; elsewhere it is kept.

    around: model -> model, inside of guidance, as `windows.windowed`.
    decode: decode(params of the first stage, unscaled latents) -> images; default: the first stage
    in one pass.
    levels: see `sampling.make_sampler`.
    """
    sample = sampling.make_sampler(
        model,
        shape=shape,
        steps=options.steps,
        solver=options.solver,
        spacing=options.spacing,
        guided=guided,
        decode=False,
        guidance_rescale=options.guidance_rescale,
        guidance_interval=options.guidance_interval,
        dynamic_threshold=options.dynamic_threshold,
        quantize_x0=options.quantize_x0,
        around=around,
        levels=levels,
    )
    if decode is None:
        decode = lambda p, z: model.first_stage.apply({"params": p}, z, method="decode")  # noqa: E731

    def run(params, batch, keys, scale, eta, start=0):
        stage = params["first_stage"]
        encode = functools.partial(
            latents.encode, model.first_stage, stage, scale=model.latent_scale
        )
        arguments = (model.config.cond, model.cond_stage, params["cond_stage"], batch, encode)
        cond = conditioning.from_batch(*arguments)
        null = conditioning.null_like(*arguments) if guided else None
        init, hole = batch.get("init"), batch.get("hole")
        if init is not None:
            # a sample of the posterior, as in the reference; what is kept is its mode
            draws = jax.vmap(jax.random.fold_in, (0, None))(keys, 2) if hole is None else None
            init = encode(init, keys=draws)
        if hole is not None:  # a latent pixel is kept if all that it stands for is
            hole = einops.reduce(hole, "b (h y) (w x) c -> b h w c", "max", h=shape[0], w=shape[1])
        z = sample(params, cond, null, keys, scale, eta, batch.get("x_T"), start, init, hole)
        return decode(stage, z).astype("float32"), z

    return run
