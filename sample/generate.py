"""Batches of images through one compiled program: the next one runs while this one is written."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax import bundle, finite, noise, seeds, sharding, solvers
from ldm_jax.runtime import overlap
from ldm_jax.sample import hosts, inputs, program, progress
from ldm_jax.sample.options import Options
from ldm_jax.sample.request import (
    Call,
    Request,
    calls_of,
    indices_of,
    keys_of,
    levels_of,
    scales_of,
    seeds_of,
)

DONATED = ("x_T", "init")  # as large as the latents and images that come out


class Made(NamedTuple):
    """Images that one call of the program drew and that are wanted.

    Each of several processes has its own images, see `hosts.own`, and all latents.
    """

    call: Call
    places: np.ndarray
    """Places of the images in the request, int [n]."""
    image: np.ndarray
    """float32 [n, H, W, c], about -1..1."""
    latent: np.ndarray
    """float32 [m, h, w, c], unscaled, of all m wanted images, also those of other processes."""
    previews: np.ndarray | None
    """float32 [n, P, H, W, c]: predicted images on the way, with --preview."""


def made(
    request: Request, calls: Sequence[Call] | None = None, run: Callable | None = None
) -> Iterator[Made]:
    """Images of the request, call by call (default: all of them); one program for all.

    run: the function to compile, see `exported.read`; default: the program of the request.
    The arrays of `request.batch` are arguments of the program, as are seed, scale, eta and start:
    other values do not recompile. A call is dispatched before the previous one is fetched.
    """
    options, calls = request.options, calls_of(request) if calls is None else calls
    mode, passes = progress.resolved(options), passes_of(request)
    count = sum(len(levels_of(one).t) for one in passes)
    left = sum(len(call.wanted) for call in calls)
    with progress.bars(mode, request.count, request.count - left, count * len(calls)) as bars:
        draws = [_drawer(one, run, bars) for one in passes]

        def dispatch(call: Call) -> tuple:
            made = draws[0](call, {})
            if request.second is None:
                return made
            image, z = (hosts.whole(ready(array)) for array in made)
            return draws[1](call, request.second.feed(image, z))

        for call, (image, z, *previews) in overlap.prefetch(calls, dispatch):
            own, image = hosts.own(ready(image))
            kept = np.isin(own, call.wanted)
            places, image = call.places[own[kept]], image[kept]
            previews = hosts.own(ready(previews[0]))[1][kept] if previews else None
            bars.images(len(call.wanted))
            if request.finish is not None:
                image = request.finish(places, image)
            yield Made(call, places, image, np.asarray(ready(z))[call.wanted], previews)


def passes_of(request: Request) -> list[Request]:
    """The request, and its second pass, which then shows the previews."""
    if request.second is None:
        return [request]
    options = dataclasses.replace(request.options, preview=0)
    return [dataclasses.replace(request, options=options), request.second.request]


def _drawer(request: Request, run: Callable | None, bars: progress.Bars) -> Callable[..., tuple]:
    """draw(call, further arrays of its batch) -> what the program gives; compiled at the first."""
    batch = batch_of(request)
    run = program.program_of(request, request.model, bars.step) if run is None else run
    compiled = None

    def draw(call: Call, fed: dict[str, np.ndarray]) -> tuple:
        nonlocal compiled
        arguments = arguments_of(request, batch, call, fed)
        if compiled is None:
            with bars.doing("compiling"):
                compiled = program.compiled(request, run, arguments)
        return compiled(*arguments)

    return draw


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
    wrap_model: Callable | None = None,
    decode: Callable | None = None,
    levels: solvers.Levels | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(places, unscaled latents) of each batch in every process; see `made` and `Request`."""
    names = [f"{i:05d}" for i in range(count)]
    request = Request(
        "", options, model, mesh, shape or model.latent_shape, guided, batch, names,
        details=[{}] * count, start=start, wrap_model=wrap_model, decode=decode, levels=levels,
    )  # fmt: skip
    for part in made(request):
        yield part.call.places[part.call.wanted], part.latent


def batch_of(request: Request) -> dict[str, np.ndarray]:
    """The request's batch, and x_T of --init-latents or --noise-source."""
    options = request.options
    x_T = inputs.start_latents(options, request.count, request.shape)
    if options.noise_source != "own":
        x_T = noise_of(request, x_T)
    for name in ("subseed", "subseed_strength", "seed_resize_from", "eta_noise_seed_delta"):
        if getattr(options, name) and options.noise_source == "own":
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} is of the noise of other programs: give --noise-source cpu or nv, or"
                f" leave out --{flag}"
            )
    return request.batch if x_T is None else {**request.batch, "x_T": x_T}


def noise_of(request: Request, given: np.ndarray | None) -> np.ndarray:
    """x_T of another program's noise, float32 [N, h, w, c].

    ValueError for options that do not go together.
    """
    options = request.options
    if given is not None:
        raise ValueError("--init-latents and --noise-source both give the noise: leave out one")
    finite.checked(options.subseed_strength, "--subseed-strength", least=0)
    if options.subseed_strength > 1:
        raise ValueError(f"--subseed-strength {options.subseed_strength} is not in 0..1")
    smaller = options.seed_resize_from
    if smaller is not None:
        down = request.model.config.first_stage.downsample
        smaller = tuple(pixels // down for pixels in smaller)
        if min(smaller) < 1:
            raise ValueError(f"--seed-resize-from {options.seed_resize_from}: at least {down} each")
    varied, drawn = options.subseed_strength > 0, []
    for one, index in zip(generators_of(request), indices_of(request).tolist(), strict=True):
        other = options.subseed + index if varied else 0
        drawn.append(
            noise.initial(
                options.noise_source,
                one,
                request.shape,
                subseed=seeds.checked(other, "--subseed"),
                strength=options.subseed_strength,
                resized_from=smaller,
            )
        )
    return np.stack(drawn)


def generators_of(request: Request) -> list[int]:
    """Seed of the generator of each image, with --noise-source. ValueError for one out of range."""
    given = zip(seeds_of(request).tolist(), indices_of(request).tolist(), strict=True)
    if request.options.subseed_strength > 0:
        return [seeds.checked(seed, "--seed") for seed, _ in given]
    return [seeds.checked(seed + index, "--seed") for seed, index in given]


NOISES = 32
"""Noises of steps are filled up to a multiple: nearly as many steps are then the same program."""


def step_noise_of(request: Request, places: np.ndarray) -> np.ndarray | None:
    """Noise of the steps of some of the images, of --noise-source, float32 [B, S, h, w, c].

    S is the number of levels or more. None for a solver that draws none, or draws it from keys.
    """
    options = request.options
    draws = options.eta or solvers.make(options.solver).noisy
    if options.noise_source == "own" or not draws:
        return None
    levels, start = len(levels_of(request).t), request.start or 0
    delta, known = options.eta_noise_seed_delta, {}
    table = np.zeros((len(places), -(-levels // NOISES) * NOISES, *request.shape), np.float32)
    generators = generators_of(request)
    for row, place in enumerate(places.tolist()):
        if place not in known:
            seed = generators[place]
            seeds.checked(seed + delta, "--seed with --eta-noise-seed-delta")
            given = (seed, request.shape, levels - start, delta)
            known[place] = noise.of_steps(options.noise_source, *given)
        table[row, start:levels] = known[place]
    return table


def ready(array: jax.Array) -> jax.Array:
    """Wait for the array in Python, so that Ctrl-C works while the device computes."""
    while not array.is_ready():
        time.sleep(0.002)
    return array


def arguments_of(
    request: Request,
    batch: dict[str, np.ndarray],
    call: Call,
    fed: dict[str, np.ndarray] | None = None,
) -> tuple:
    """Arguments of `program.program_of` for a call, the batch split over all processes' devices.

    fed: arrays of this call alone, which `Second.feed` gives.
    Every process makes the whole batch on its host, and places those of its own devices.
    """
    split = sharding.batch_sharding(request.mesh)
    place = lambda x: sharding.place(np.asarray(x), split)  # noqa: E731
    given = {name: place(x[call.places]) for name, x in batch.items()}
    given |= {name: place(x) for name, x in (fed or {}).items()}
    step_noise = step_noise_of(request, call.places)
    if step_noise is not None:
        given["step_noise"] = place(step_noise)
    down = request.model.config.first_stage.downsample
    sizes = [request.shape[:2], tuple(down * side for side in request.shape[:2])]
    donated = {
        name: given.pop(name)
        for name in DONATED
        if name in given and given[name].shape[1:3] in sizes  # one of another size is of no use
    }
    keys = keys_of(request, call.places)
    keys = jax.random.wrap_key_data(
        place(jax.random.key_data(keys)), impl=jax.random.key_impl(keys)
    )
    scales = place(scales_of(request)[call.places])
    last = () if request.start is None else (request.start,)
    return (request.model.params, donated, given, keys, scales, request.options.eta, *last)
