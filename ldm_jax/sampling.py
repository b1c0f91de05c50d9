"""The jittable sampler that every sampling command and every training preview runs."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import conditioning, denoising, diffusion, finite, guidance, schema, seeds, solvers
from ldm_jax.bundle import LatentDiffusion, bind, with_kv_cache
from ldm_jax.conditioning import Cond
from ldm_jax.models.unet import UNet


def keys(seed: int, n: int, first: int = 0) -> jax.Array:
    """Typed keys [n] of the images number `first` to `first + n - 1` of a seed.

    The pixels of an image depend on its key alone: not on its batch, nor on the devices.
    ValueError for a seed that is not in 0..2**64 - 1, or a number not in 0..2**32 - 1.
    """
    seeds.check_numbers(first, n)
    return keys_of(seed, first + np.arange(n))


def keys_of(seed: int, indices: Any) -> jax.Array:
    """Keys [N] of images: number i of a seed has fold_in(root_key(seed), i), whatever its batch."""
    if isinstance(indices, jax.Array):  # perhaps traced
        indices = indices.astype(jnp.uint32)
    else:  # without 64-bit types a large NumPy integer would lose its upper bits
        indices = np.asarray(indices, np.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(seeds.root_key(seed), indices)


def levels_of(
    model: LatentDiffusion,
    steps: int,
    spacing: solvers.Spacing | None,
    solver: str | solvers.Solver = "ddim",
    rule: str | None = None,
) -> solvers.Levels:
    """The levels of `steps` steps: of the model's own spacing, or of another.

    rule: "compvis" or "diffusers", whose spacings differ by solver; default: the model's own. The
    spacings that diffusers lacks are ours in both. ValueError for an unknown rule or spacing, and
    for a number of steps that a spacing cannot make.
    """
    own = model.config.sampling
    rule = own.rule if rule is None else rule
    if rule not in ("compvis", "diffusers"):
        raise ValueError(f"spacing_rule {rule!r} is not one of compvis, diffusers")
    spacing = own.spacing if spacing is None else spacing
    if rule == "diffusers" and spacing in solvers.DIFFUSERS_SPACINGS:
        name = solver if isinstance(solver, str) else ""
        given = (steps, spacing, own.final, own.steps_offset, name)
        return solvers.diffusers_levels(model.schedule, *given)
    if spacing == own.spacing:
        return solvers.levels(model.schedule, steps, spacing, own.final, own.steps_offset)
    return solvers.levels(model.schedule, steps, spacing)


def start_of(strength: float, count: int) -> int:
    """First of `count` levels that runs, for a strength in 0..1: the last int(strength * count) do.

    The reference noises to the level before the one where it starts; here both are one, as in
    diffusers.
    """
    return count - int(strength * count + 1e-6)  # 0.29 * 100 is below 29


class Table(NamedTuple):
    """Levels as an argument of a program, which takes other levels, and other numbers of them."""

    rows: solvers.Levels
    """[R, ...], the last level repeated up to a multiple of ROWS."""
    count: Any
    """Number of levels."""


ROWS = 1000


def noised(init: jax.Array, table: Table, start: jax.Array | int, noise: jax.Array) -> jax.Array:
    """`init` [B, h, w, c] with unit normal `noise` at the level `start`, an int or traced.

    At 0 the noise alone, from which every sampler starts; at the number of levels `init` alone.
    """
    levels, count = table
    row = jnp.clip(jnp.asarray(start), 0, count - 1)
    at_start = jnp.asarray(levels.alpha)[row] * init + jnp.asarray(levels.sigma)[row] * noise
    return jnp.where(start == 0, noise, jnp.where(start == count, init, at_start))


def _other(keys: jax.Array) -> jax.Array:
    """Keys [B] for draws independent of the levels' own, whose keys fold in the level number."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, 2**30)


def make_sampler(
    model: LatentDiffusion,
    steps: int = 50,
    *,
    shape: tuple[int, int, int] | None = None,
    solver: str | solvers.Solver = "ddim",
    spacing: solvers.Spacing | None = None,
    spacing_rule: str | None = None,
    decode: bool = True,
    trace: Callable[[jax.Array, diffusion.Denoised], Any] | None = None,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    dynamic_threshold: float | None = None,
    threshold_limit: float = 1.0,
    quantize_x0: bool = False,
    wrap_model: Callable[[Callable], Callable] | None = None,
    remat: bool = False,
    levels: solvers.Levels | None = None,
    **unknown: Any,
) -> Callable[..., Any]:
    """sample(params, cond, keys, null=None, guidance_scale=1.0, eta=0.0, x_T=None, start=0,
    init=None, mask=None, step_noise=None) -> images.

    The function is pure: jit it with your own shardings; every argument may be given by position.
    params: as `model.params`.
    cond, null: [B, ...] arrays, as `model.encode` gives them. Guidance runs if and only if `null`
    is given, away from it by `guidance_scale` (a number, or [B]).
    keys: [B] typed keys, one per image, as `keys` makes them: its pixels depend on nothing else.
    eta: noise of DDIM, 0 to 1.
    x_T: [B, h, w, c] unit normal; default: drawn from the keys.
    start: the first level that runs.
    init: [B, h, w, c], a scaled latent that sampling starts from, noised with x_T to the level
    `start`: 0 ignores it (x_T alone), the number of levels returns it unchanged.
    mask: [B, h, w, 1], 1 where the image is drawn; elsewhere `init` is kept: see
    `solvers.masked`.
    step_noise: [B, S or more, h, w, c] unit normal, for each level of a solver that draws noise;
    default: drawn from the keys.
    Prompt, seed, guidance scale, eta, start, init and mask are traced: a new one never recompiles.

    shape: (h, w, c) of the latent; default: the model's own.
    solver: one of `solvers.SOLVERS`, or a `Solver` of your own, which is given no eta.
    spacing: one of `solvers.levels`; default: the model's own (`config.sampling`).
    spacing_rule: "compvis" or "diffusers", of `levels_of`; default: the model's own.
    decode: False returns the scaled latents, which `model.decode` takes.
    trace: trace(x, denoised) of every level. The result is then a pair: the images, and what
    `trace` returned, stacked: see `solvers.sample`.
    guidance_rescale: phi in 0..1 of `guidance.rescaled`.
    guidance_interval: (lowest, highest) timestep with guidance; see `guidance.classifier_free`.
    dynamic_threshold: percentile in (0, 100] of `denoising.dynamic_threshold`, which brings the
    predicted x0 into [-threshold_limit, threshold_limit] (scaled latents have a std of about 1).
    quantize_x0: the predicted x0 becomes codes of the first stage, which must be a VQ one.
    wrap_model: model(x, t, cond) -> such a model, to which guidance is applied. For example
    `lambda model: windows.windowed(model, stride=(32, 32))`. In cond, `kv_cache` has been made of
    `context` and is read in its place: the examples of both go together.
    remat: a backward pass computes each step again instead of keeping its activations.
    levels: others than those of `steps` and `spacing`, as `solvers.inverted`, which lead from a
    scaled latent, given as x_T, to its noise.

    Returns images [B, H, W, c] in about [-1, 1], not clipped. The latent can take the place of x_T
    or of init: with `decode=False`, one of them may be donated to `jax.jit`.
    Raises ValueError for an option that is out of its range or cannot apply, or for conditions and
    keys of different numbers; TypeError for a call of before November 2026.
    """
    if unknown:
        name = next(iter(unknown))
        hint = f"; it is now {NEW_CALL}" if name == "guided" else ""
        raise TypeError(f"make_sampler has no option {name!r}{hint}")
    return _made(
        model, steps, shape, solver, spacing, spacing_rule, decode, trace, guidance_rescale,
        guidance_interval, dynamic_threshold, threshold_limit, quantize_x0, wrap_model, remat,
        levels,
    )[0]  # fmt: skip


class Segments(NamedTuple):
    """`make_sampler`'s function in three, each to be jitted: another prompt, seed, number of
    segments or length of one recompiles none of them, nor do other steps or another spacing up to a
    multiple of ROWS levels (but whole timesteps and fractional ones are two programs)."""

    begin: Callable[..., tuple[Any, Any]]
    """(params, table, the other arguments of `sample`) -> (held, state): what stays, and what
    changes from level to level."""
    run: Callable[..., Any]
    """(params, held, state, first, last) -> state after the levels `first` to `last` - 1. Begin at
    `start`, end at `table.count`; `state[2]` is the scaled latent of the image that is predicted so
    far."""
    end: Callable[..., jax.Array]
    """(params, held, state) -> images."""
    table: Table
    """The levels, of NumPy arrays and an int."""


def make_segments(model: LatentDiffusion, steps: int = 50, **options: Any) -> Segments:
    """`make_sampler` that can be watched and stopped: the same images, bit for bit on CPU.

    options: those of `make_sampler` but trace and remat.
    """
    defaults: dict[str, Any] = {
        name: parameter.default
        for name, parameter in inspect.signature(make_sampler).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    odd = {*options} - ({*defaults} - {"trace", "remat"})
    if odd:
        raise TypeError(f"make_segments has no option {min(odd)!r}")
    return _made(model, steps, **{**defaults, **options})[1]


def _made(
    model: LatentDiffusion,
    steps: int,
    shape: tuple[int, int, int] | None,
    solver: str | solvers.Solver,
    spacing: solvers.Spacing | None,
    spacing_rule: str | None,
    decode: bool,
    trace: Callable[[jax.Array, diffusion.Denoised], Any] | None,
    guidance_rescale: float,
    guidance_interval: tuple[float, float] | None,
    dynamic_threshold: float | None,
    threshold_limit: float,
    quantize_x0: bool,
    wrap_model: Callable[[Callable], Callable] | None,
    remat: bool,
    levels: solvers.Levels | None,
) -> tuple[Callable[..., Any], Segments]:
    """The results of `make_sampler` and of `make_segments`."""
    if model.unet is None:
        raise ValueError(
            "the model is a first stage alone, which encodes and decodes but cannot sample"
        )
    unet, make_solver = model.unet, _solver(solver)
    shape = model.latent_shape if shape is None else shape
    if levels is None:
        levels = levels_of(model, steps, spacing, solver, spacing_rule)
    _check_guidance(guidance_rescale, guidance_interval, levels)
    _check_x0(model, dynamic_threshold, threshold_limit, quantize_x0)
    guide = (guidance_rescale, guidance_interval)

    def denoiser(params: dict, held: _Held) -> Callable:
        """denoise(x, level) of one request."""
        cond, start, init, mask = held.cond, held.start, held.init, held.mask
        guided = (cond, held.null, held.guidance_scale, wrap_model, guide)
        model_at = _guided(unet, params["unet"], *guided)

        def of_step(x: jax.Array, level: Any) -> diffusion.Denoised:
            step = None if cond.texts is None else level.number - start
            return diffusion.denoiser(model_at(step), model.prediction)(x, level)

        denoise: Callable = of_step
        if dynamic_threshold is not None:
            denoise = denoising.dynamic_threshold(denoise, dynamic_threshold / 100, threshold_limit)
        if quantize_x0:
            denoise = denoising.quantize_x0(denoise, _to_codes(model, params["first_stage"]))
        if init is not None and mask is not None:
            noise = solvers.fresh_noise(_other(held.keys), shape)
            denoise = solvers.masked(denoise, init, mask, noise)
        return denoise

    def prepare(
        table: Table,
        params: dict,
        cond: Cond,
        keys: jax.Array,
        null: Cond | None = None,
        guidance_scale: Any = 1.0,
        eta: Any = 0.0,
        x_T: jax.Array | None = None,
        start: Any = 0,
        init: jax.Array | None = None,
        mask: jax.Array | None = None,
        step_noise: jax.Array | None = None,
    ) -> tuple[_Held, jax.Array]:
        _check_call(cond, keys, null, guidance_scale, guidance_rescale, guidance_interval)
        finite.check_known(guidance_scale, "guidance_scale")
        finite.check_known(eta, "eta")
        # two keys an image: the noise it starts from is independent of the noise of its steps
        x_keys, step_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        x_T = diffusion.rowwise_normal(x_keys, shape) if x_T is None else x_T
        if init is not None:
            x_T = noised(init, table, start, x_T)
        elif mask is not None:
            raise ValueError("mask keeps `init` outside of it: give init too")
        cond = with_kv_cache(unet, params["unet"], cond)
        null = None if null is None else with_kv_cache(unet, params["unet"], null)
        noise = step_keys if step_noise is None else step_noise
        held = (cond, null, guidance_scale, eta, step_keys, start, init, mask, table.rows, noise)
        return _Held(*held), x_T

    def finish(params: dict, held: _Held, latent: jax.Array) -> jax.Array:
        if held.mask is not None and held.init is not None:
            # outside, the solver leaves the model's guess
            latent = solvers.composite(latent, held.init, held.mask)
        return model.decode(latent, params) if decode else latent

    prepare_whole = functools.partial(prepare, Table(levels, len(levels.t)))

    @functools.wraps(prepare_whole)  # names of the arguments, which may be given by position
    def sample(params: dict, *args: Any, **named: Any) -> Any:
        held, x_T = prepare_whole(params, *args, **named)
        out = solvers.sample(
            make_solver(held.eta), denoiser(params, held), levels, x_T, held.noise,
            start=held.start, trace=trace, remat=remat,
        )  # fmt: skip
        latent, traced = out if trace is not None else (out, None)
        result = finish(params, held, latent)
        return result if trace is None else (result, traced)

    def begin(params: dict, table: Table, *args: Any, **named: Any) -> tuple[_Held, Any]:
        held, x_T = prepare(table, params, *args, **named)
        return held, (make_solver(held.eta).init(x_T), x_T, x_T)

    def run(params: dict, held: _Held, state: Any, first: Any, last: Any) -> Any:
        solver, denoise = make_solver(held.eta), denoiser(params, held)
        return solvers.segment(solver, denoise, held.rows, state, held.noise, first, last)

    def end(params: dict, held: _Held, state: Any) -> jax.Array:
        return finish(params, held, state[1])

    return sample, Segments(begin, run, end, _table(make_solver(0.0), levels))


def _table(solver: solvers.Solver, levels: solvers.Levels) -> Table:
    """The levels as an argument of a program."""
    count = len(levels.t)
    more = -count % ROWS
    rows = jax.tree.map(
        lambda column: np.concatenate([column, np.repeat(column[-1:], more, axis=0)]),
        solvers.prepared(solver, levels),
    )
    return Table(rows, count)


class _Held(NamedTuple):
    """Arrays of a request that stay the same at all its levels."""

    cond: Cond
    null: Cond | None
    guidance_scale: Any
    eta: Any
    keys: jax.Array
    """Typed keys [B] of what is drawn at the steps."""
    start: Any
    init: jax.Array | None
    mask: jax.Array | None
    rows: solvers.Levels
    """See `Table`."""
    noise: jax.Array
    """The same keys, or the noise of the steps, [B, S or more, h, w, c]."""


NEW_CALL = (
    "make_sampler(model, steps, ...) and sample(params, cond, keys, null=None, guidance_scale=1.0,"
    " eta=0.0, x_T=None, start=0, init=None, mask=None, step_noise=None); guidance runs if null is"
    " given"
)


def _guided(
    unet: UNet,
    params: dict,
    cond: Cond,
    null: Cond | None,
    scale: Any,
    wrap_model: Callable[[Callable], Callable] | None,
    guide: tuple[float, tuple[float, float] | None],
) -> Callable[[Any], Callable[[jax.Array, jax.Array], jax.Array]]:
    """model_at(step)(x, t) -> raw prediction, guided away from `null` if that is given.

    guide: rescale and interval of `guidance.classifier_free`.
    step: number of the step, from that on which runs first; None for conditions without `texts`.
    """
    net = bind(unet, params)
    net = net if wrap_model is None else wrap_model(net)
    guided = functools.partial(guidance.classifier_free, net, shared=wrap_model is None)

    def model_at(step: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
        if cond.texts is None:
            if null is None:
                return lambda x, t: net(x, t, cond)
            return guided(cond, null, scale, *guide)
        parts = conditioning.at_step(cond, step)
        if null is None:
            return lambda x, t: net(x, t, jax.tree.map(lambda x: x[:, 0], parts))
        away = jax.tree.map(lambda x: x[:, 0], conditioning.at_step(null, step))
        return guided(parts, away, scale, *guide, weights=cond.texts.weights)

    return model_at


def _solver(solver: str | solvers.Solver) -> Callable[[Any], solvers.Solver]:
    """make(eta) -> Solver; ValueError for an unknown name at once, not at the first call."""
    if isinstance(solver, solvers.Solver):
        return lambda eta: solver
    solvers.make(solver)
    return lambda eta: solvers.make(solver, eta)


def _check_call(
    cond: Any, keys: Any, null: Any, guidance_scale: Any, rescale: float, interval: Any
) -> None:
    """Refuse a call that cannot be meant, in one sentence; works under jit: shapes and types
    only."""
    typed = isinstance(keys, jax.Array) and jax.dtypes.issubdtype(keys.dtype, jax.dtypes.prng_key)
    if not typed:
        kind = type(keys).__name__
        raise TypeError(
            f"keys must be [B] typed keys, as ldm_jax.keys makes them, and is {kind}: the call is"
            f" {NEW_CALL}"
        )
    if not isinstance(cond, Cond) or not isinstance(null, Cond | None):
        odd = cond if not isinstance(cond, Cond) else null
        raise TypeError(
            f"cond and null are Cond, as model.encode gives them, and one is {type(odd).__name__}"
        )
    if keys.ndim != 1:
        raise ValueError(f"keys has the shape {keys.shape}: give [B], one key for each image")
    for name, given in (("cond", cond), ("null", null)):
        for leaf in jax.tree.leaves(given):
            if leaf.shape[0] != len(keys):
                raise ValueError(
                    f"{name} is of {leaf.shape[0]} images, and there are {len(keys)} keys: give one"
                    " key for each image, as ldm_jax.keys(seed, n) makes them"
                )
    if null is not None:
        return
    if isinstance(guidance_scale, int | float) and guidance_scale != 1:
        raise ValueError(
            f"guidance_scale={guidance_scale}, but null is not given: guidance is away from it"
        )
    if rescale or interval is not None:
        option = f"guidance_rescale={rescale}" if rescale else f"guidance_interval={interval}"
        raise ValueError(f"{option} changes guidance, but null is not given: leave it out")


def _to_codes(model: LatentDiffusion, params: dict) -> Callable[[jax.Array], jax.Array]:
    """Scaled latents to the nearest codes of the first stage, scaled too."""

    def codes(latent):
        z = latent / model.latent_scale
        nearest, _ = model.first_stage.apply({"params": params}, z, method="quantize")
        return model.latent_scale * nearest

    return codes


def _check_guidance(
    rescale: float, interval: tuple[float, float] | None, levels: solvers.Levels
) -> None:
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale={rescale} is not in 0..1, the part that is rescaled")
    if interval is None:
        return
    lowest, highest = interval
    if not any(lowest <= t <= highest for t in levels.t):
        raise ValueError(
            f"guidance_interval={interval}: none of the {len(levels.t)} timesteps"
            f" {levels.t[0]:g}..{levels.t[-1]:g} is in it; give (lowest, highest) around some"
        )


def _check_x0(
    model: LatentDiffusion, percentile: float | None, limit: float, quantize: bool
) -> None:
    if percentile is not None and not 0 < percentile <= 100:
        raise ValueError(
            f"dynamic_threshold={percentile} is not in (0, 100]: it is a percentile, such as 99.5"
        )
    if not limit > 0:
        raise ValueError(f"threshold_limit={limit} is not positive")
    if quantize and not isinstance(model.config.first_stage, schema.AutoencoderVQConfig):
        raise ValueError(
            "quantize_x0 needs a first stage with a codebook (VQ), and this model has another:"
            " leave it out"
        )
