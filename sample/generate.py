"""Batches of images through one compiled program: the next one runs while this one is written."""

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import bundle, cli, conditioning, export, latents, sampling, sharding, solvers
from ldm_jax.sample import inputs, progress
from ldm_jax.sample.options import Options
from ldm_jax.sample.plan import Call, Plan, calls_of, keys_of, scales_of

DONATED = ("x_T", "init")  # as large as the latents and images that come out


class Made(NamedTuple):
    """What one call of the program drew, of the rows that are wanted."""

    call: Call
    places: np.ndarray
    """Of the images in the plan, int [n]."""
    image: np.ndarray
    """float32 [n, H, W, c], about -1..1."""
    latent: np.ndarray
    """float32 [n, h, w, c], what decoding takes."""
    previews: np.ndarray | None
    """float32 [n, P, H, W, c]: predicted images on the way, with --preview."""


def made(
    plan: Plan, calls: Sequence[Call] | None = None, run: Callable | None = None
) -> Iterator[Made]:
    """Images of the plan, call by call (default: all of them); one program for all.

    run: what is compiled, as of `read`; default: the program of the plan.
    The rows of `plan.batch` are arguments of the program, as are seed, scale, eta and start: others
    compile nothing anew. A call is dispatched before the one before it is fetched.
    """
    options, calls = plan.options, calls_of(plan) if calls is None else calls
    batch, mode = batch_of(plan), progress.resolved(options)
    table = sampling.levels_of(plan.model, options.steps, options.spacing)
    count = len((table if plan.levels is None else plan.levels).t)
    left = sum(len(call.rows) for call in calls)
    with progress.bars(mode, plan.count, plan.count - left, count * len(calls)) as bars:
        run = program_of(plan, plan.model, bars.step) if run is None else run
        program = None

        def dispatch(call: Call) -> tuple:
            nonlocal program
            arguments = arguments_of(plan, batch, call)
            program = compiled(plan, run, arguments) if program is None else program
            return program(*arguments)

        for call, out in overlapped(calls, dispatch):
            image, z, *previews = (fetched(x)[call.rows] for x in out)
            bars.images(len(call.rows))
            places = call.places[call.rows]
            if plan.finish is not None:
                image = plan.finish(places, image)
            yield Made(call, places, image, z, previews[0] if previews else None)


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
    """(places, images, unscaled latents) of each batch, without a folder; see `made` and `Plan`."""
    names = [f"{i:05d}" for i in range(count)]
    plan = Plan(
        "", options, model, mesh, shape or model.latent_shape, guided, batch, names,
        details=[{}] * count, start=start, around=around, decode=decode, levels=levels,
    )  # fmt: skip
    for part in made(plan):
        yield part.places, part.image, part.latent


def batch_of(plan: Plan) -> dict[str, np.ndarray]:
    """The plan's rows, and x_T of --init-latents."""
    x_T = inputs.start_latents(plan.options, plan.count, plan.shape)
    return plan.batch if x_T is None else {**plan.batch, "x_T": x_T}


def overlapped(calls: Iterable[Any], dispatch: Callable) -> Iterator[tuple[Any, Any]]:
    """(call, dispatch(call)) in order, each when the next has been dispatched."""
    before = None
    for call in calls:
        now = (call, dispatch(call))
        if before is not None:
            yield before
        before = now
    if before is not None:
        yield before


def fetched(array: jax.Array) -> np.ndarray:
    """An array on the host; Ctrl-C is heard while the device works."""
    while not array.is_ready():
        time.sleep(0.002)
    return np.asarray(array)


def arguments_of(plan: Plan, batch: dict[str, np.ndarray], call: Call) -> tuple:
    """(params, donated rows, other rows, keys, scales, eta[, start]) of a call, on the devices."""
    rows = sharding.batch_sharding(plan.mesh)
    given = {name: jax.device_put(x[call.places], rows) for name, x in batch.items()}
    donated = {name: given.pop(name) for name in DONATED if name in given}
    keys = jax.device_put(keys_of(plan, call.places), rows)
    scales = jax.device_put(scales_of(plan)[call.places], rows)
    last = () if plan.start is None else (plan.start,)
    return (plan.model.params, donated, given, keys, scales, plan.options.eta, *last)


def compiled(plan: Plan, run: Callable, arguments: tuple) -> Callable:
    """`run` compiled for arguments like these, which takes a while and says so."""
    # rows stay where they are, on one host; several hosts write the same files
    alone = jax.process_count() == 1
    out = sharding.batch_sharding(plan.mesh) if alone else sharding.replicated(plan.mesh)
    jitted = jax.jit(run, out_shardings=out, donate_argnums=(1,) if alone else ())
    where = jax.config.jax_compilation_cache_dir
    if progress.resolved(plan.options) == "steps":
        kept = "not kept for the next time: --progress images is"
    elif where is None:
        kept = "not kept for the next time"
    else:
        kept = f"kept in {where} for the next time; --no-compilation-cache turns that off"
    cli.say(f"compiling the sampler for batches of {len(arguments[3])} ({kept}) ...")
    began = time.perf_counter()
    program = jitted.lower(*arguments).compile()
    cli.say(f"compiled in {time.perf_counter() - began:.1f} s{planned(program)}")
    return program


def planned(program: Any) -> str:
    """What the compiler plans to hold on each device, for people; empty where it does not tell."""
    memory = program.memory_analysis()
    if memory is None:
        return ""
    given = memory.argument_size_in_bytes / 1e9
    peak = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e9
    return f"; memory of each device: {peak:.3f} GB beside {given:.3f} GB of weights and inputs"


def program_of(
    plan: Plan, model: bundle.LatentDiffusion, step: Callable[[], None] | None = None
) -> Callable:
    """`make_run` of a plan, with the rows that may be donated apart; `model` without its weights.

    ValueError for options that the sampler cannot use.
    """
    run = make_run(
        model,
        plan.options,
        plan.guided,
        plan.shape,
        around=plan.around,
        decode=plan.decode,
        levels=plan.levels,
        step=step,
    )

    def program(params, donated, batch, keys, scales, eta, *start):
        return run(params, {**batch, **donated}, keys, scales, eta, *start)

    return program


def make_run(
    model: bundle.LatentDiffusion,
    options: Options,
    guided: bool,
    shape: tuple[int, int, int],
    *,
    around: Callable | None = None,
    decode: Callable | None = None,
    levels: solvers.Levels | None = None,
    step: Callable[[], None] | None = None,
) -> Callable:
    """run(params, batch, keys, scale, eta, start=0) -> (images, unscaled latents[, previews]).

    To be jitted. The conditioning is encoded once, before the scan over the levels. Beside it
    `batch` may hold
    x_T: [B, h, w, c], the noise to start from.
    init: [B, H, W, c], an image in [-1, 1] to start from, noised to the level `start`.
    hole: [B, H, W, 1], 1 where `init` is drawn anew; elsewhere it is kept.

    around: model -> model, inside of guidance, as `windows.windowed`.
    decode: decode(params of the first stage, unscaled latents) -> images; default: the first stage
    in one pass.
    levels: see `sampling.make_sampler`.
    step: called on the host at every step.
    previews: [B, options.preview, H, W, c], the predicted x0 at as many levels, if not 0.
    """
    trace = None
    if options.preview or step is not None:
        trace = functools.partial(_look, step, options.preview > 0)
    sample = sampling.make_sampler(
        model,
        shape=shape,
        steps=options.steps,
        solver=options.solver,
        spacing=options.spacing,
        guided=guided,
        decode=False,
        trace=trace,
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
        z, x0 = z if trace is not None else (z, None)
        image = decode(stage, z).astype("float32")
        if not options.preview:
            return image, z
        shown = preview_levels(start, len(x0), options.preview)
        previews = jax.lax.map(lambda x: decode(stage, x / model.latent_scale), x0[shown])
        return image, z, jnp.moveaxis(previews.astype("float32"), 0, 1)

    return run


def _look(step: Callable[[], None] | None, kept: bool, x: jax.Array, denoised: Any) -> Any:
    """A `trace` of `make_sampler`: tells the host, and keeps the predicted x0."""
    del x
    if step is not None:
        jax.debug.callback(step)
    return denoised.x0 if kept else None


def preview_levels(start: Any, count: int, number: int) -> jax.Array:
    """Int [number]: levels of start..count - 1, evenly, the last one included; start is traced."""
    ran = count - jnp.asarray(start)
    return jnp.clip(start + jnp.arange(1, number + 1) * ran // number - 1, 0, count - 1)


# --- programs in files ----------------------------------------------------------------------------


def facts_of(plan: Plan) -> dict[str, Any]:
    """What a program depends on beside the model and the shapes of its arguments."""
    options = plan.options
    names = ("steps", "solver", "spacing", "guidance_rescale", "guidance_interval")
    names += ("dynamic_threshold", "quantize_x0", "dtype", "preview")
    facts = {"task": plan.task, "guided": plan.guided, "starts later": plan.start is not None}
    facts |= {name: getattr(options, name) for name in names} | plan.program
    facts["latent"] = plan.shape
    return {name: list(x) if isinstance(x, tuple) else x for name, x in facts.items()}


def write(plan: Plan) -> None:
    """The program of a plan for --batch-size rows on one device, in the file --export."""
    options, rows = plan.options, plan.options.batch_size
    platforms = options.export_platforms or export.PLATFORMS
    run = program_of(plan, export.portable(plan.model, platforms))
    call = Call(np.minimum(np.arange(rows), plan.count - 1), np.arange(1))
    cli.say(f"lowering the sampler for batches of {rows} on {', '.join(platforms)} ...")
    program = export.lower(run, arguments_of(plan, batch_of(plan), call), platforms)
    meta = {"model": export.identity(plan.model), "rows": rows, "program": facts_of(plan)}
    export.write(options.export, program, meta)
    cli.say(f"{options.export}: the program alone; --from-export takes it with the same --model")


def read(plan: Plan) -> tuple[Callable, int]:
    """(run, its rows) of the file --from-export. ValueError if it is not that of the plan."""
    path = plan.options.from_export
    run, meta = export.read(path, model=plan.model)
    there, here = meta.get("program", {}), facts_of(plan)
    for name in here | there:
        if here.get(name) != there.get(name):
            raise ValueError(
                f"--from-export {path}: was exported with {name.replace('_', ' ')}"
                f" {there.get(name)}, and here it is {here.get(name)}: make them the same, or"
                " export it again"
            )
    return run, meta["rows"]
