"""Models and compiled programs that stay, and requests that are drawn by segments of levels."""

import collections
import json
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from ldm_jax import bundle, export, schema, sharding
from ldm_jax.convert import tiny_decoder
from ldm_jax.models.tiny_decoder import SCALE
from ldm_jax.runtime import images
from ldm_jax.runtime.log import LOG
from ldm_jax.sample import adapters, exported, generate, options, program
from ldm_jax.sample.request import Call, Request, calls_of
from ldm_jax.sample.web.jobs import CancelledError, Watch
from ldm_jax.sample.web.limits import RefusedError
from ldm_jax.sampling import Segments, Table

SEGMENT = 0.25
"""Seconds of a segment, within which a job that is cancelled ends."""
PREVIEWS = 0.1
"""Share of the time that previews may take."""


NOT_IN_PROGRAMS = ("steps", "spacing", "spacing_rule", "preview")
"""Facts of `exported.facts_of` that the programs of segments do not depend on."""


class Programs(NamedTuple):
    """A request's program in three, compiled; see `program.segments_of`."""

    begin: Callable
    run: Callable
    end: Callable


STOPS = ("interrupt", "skip")
"""Ways to end a call with its pictures as they are."""


class _Pass(NamedTuple):
    """A request, or the first or the second pass of it."""

    what: Request
    parts: Segments
    batch: dict[str, np.ndarray]
    first: int
    """First level that runs."""
    last: int
    """Number of levels."""


def _pass_of(what: Request) -> _Pass:
    parts = program.segments_of(what)
    batch = _padded(generate.batch_of(what), parts.table)
    return _Pass(what, parts, batch, what.start or 0, parts.table.count)


class Drawn(NamedTuple):
    """Pictures of one call of a request."""

    call: Call
    places: np.ndarray
    """Places of the pictures in the request, int [n]."""
    image: np.ndarray
    """uint8 [n, H, W, c]."""


class Kept:
    """The values that were used last, at most so many; threads may share it."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.RLock()
        self._values: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of a key; one that is not there is made, after the oldest has gone."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            while len(self._values) >= self.most:
                self._values.popitem(last=False)
            value = self._values[key] = make()
            return value

    def clear(self) -> None:
        """Forget all."""
        self._values.clear()


class Engine:
    """Draws requests on the devices of this process; one at a time, in one thread."""

    def __init__(
        self, keep_models: int = 2, keep_programs: int = 16, decoder: str | None = None
    ) -> None:
        """decoder: a file of TAESD's decoder, for previews."""
        self._quick = None if decoder is None else _quick(decoder)
        self.mesh = sharding.make_mesh(schema.MeshConfig())
        self._models, self._adapted = Kept(keep_models), Kept(1)
        self._programs = Kept(keep_programs)

    @property
    def split(self) -> int:
        """Number of devices that a batch is split over."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def load(self, asked: Any, mesh: Any = None) -> bundle.LatentDiffusion:
        """The model of a task's options with their adapters, as `options.load_model`, but kept."""
        del mesh  # always our own
        names = ("model", "step", "ema", "dtype", "config", "variant", "tokenizer")
        base = tuple(getattr(asked, name) for name in names)
        files = adapters.files(asked.lora, asked.embedding)
        changed = tuple(epath.Path(path).stat().mtime for path in files)
        own = (asked.lora, asked.embedding, asked.clip_skip, asked.ignore_unknown, changed)
        plain = not files and asked.clip_skip == 1

        def loaded() -> bundle.LatentDiffusion:
            return self._models.get(base, lambda: options.load_base(asked, self.mesh))

        if plain:
            return loaded()
        return self._adapted.get((base, own), lambda: options.adapted(loaded(), asked))

    def draw(self, what: Request, watch: Watch) -> Iterator[Drawn]:
        """Pictures call by call, those that are interrupted as they are.

        CancelledError for a job that is cancelled. RefusedError 422 for pictures that are not
        finite, 507 where the memory of a device does not suffice.
        """
        passes = [_pass_of(one) for one in generate.passes_of(what)]
        calls, before = calls_of(what), watch.step
        levels = sum(one.last - one.first for one in passes)
        watch.steps += levels * len(calls)
        for number, call in enumerate(calls):
            if watch.stop in ("interrupt", "last") and number:
                return
            image = self._guarded(what, passes, call, watch)
            watch.step = before + levels * (number + 1)
            if image is not None:
                places = call.places[call.wanted]
                yield Drawn(call, places, _finished(what, places, image[call.wanted]))
            if watch.stop == "skip":
                watch.stop = None
            watch.images += len(call.wanted)

    def _guarded(self, what: Request, passes: list[_Pass], call: Call, watch: Watch) -> Any:
        """float32 images [B, H, W, c]; None for a call that ended before its first level."""
        try:
            image, z = self._pass(passes[0], call, {}, watch)
            if what.second is not None and watch.stop not in STOPS:
                image, _ = self._pass(passes[1], call, what.second.feed(image, z), watch)
            return image
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            full = any(sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "Out of memory"))
            if isinstance(error, MemoryError) or full:
                self._programs.clear()  # their buffers may be what is in the way
                raise RefusedError(
                    507,
                    f"the memory of the device does not suffice for {len(call.places)} pictures of"
                    f" this size at once: take a smaller width and height, or batch_size (now"
                    f" {what.options.batch_size})",
                ) from error
            raise

    def _pass(self, one: _Pass, call: Call, fed: dict[str, np.ndarray], watch: Watch) -> Any:
        """(float32 images [B, H, W, c], latents); Nones if it ended before its first level."""
        params, *others = generate.arguments_of(one.what, one.batch, call, fed)
        arguments = (params, one.parts.table, *others)
        programs, held, state = self._begun(one, arguments, watch)
        level, levels, before = one.first, 1, watch.step
        shown, cost = time.monotonic(), 0.0
        watch.does("sampling")
        while level < one.last:
            if watch.stop == "cancel":
                raise CancelledError("the request was cancelled")
            if watch.stop in STOPS:
                break
            began = time.monotonic()
            upto = min(level + levels, one.last)
            state = programs.run(params, held, state, level, upto)
            generate.ready(state[1])
            each = (time.monotonic() - began) / (upto - level)
            levels = max(1, int(SEGMENT / max(each, 1e-6)))
            level, watch.step = upto, before + upto - one.first
            due = time.monotonic() - shown > cost / PREVIEWS
            if watch.wants_preview and due and level < one.last:
                began = time.monotonic()
                watch.preview = _shown(self._preview(one.what, programs, params, held, state))
                shown, cost = time.monotonic(), time.monotonic() - began
        if level == one.first < one.last:
            return None, None
        watch.does("decoding")
        image, z = programs.end(params, held, state if level == one.last else _predicted(state))
        return np.asarray(generate.ready(image)), np.asarray(z)

    def _preview(
        self, what: Request, programs: Programs, params: Any, held: Any, state: Any
    ) -> jax.Array:
        """Images [B, H, W, c] that are predicted so far."""
        down, x0 = what.model.config.first_stage.downsample, state[2]
        if self._quick is not None and (down, x0.shape[-1]) == self._quick[0]:
            return self._quick[1](x0)
        return programs.end(params, held, _predicted(state))[0]

    def _begun(self, one: _Pass, arguments: tuple, watch: Watch) -> tuple[Programs, Any, Any]:
        """(programs, held, state at the first level); compiles what is not kept."""
        shapes = tuple((x.shape, x.dtype) for x in map(_array, jax.tree.leaves(arguments)))
        facts = {k: v for k, v in exported.facts_of(one.what).items() if k not in NOT_IN_PROGRAMS}
        facts = json.dumps(facts, sort_keys=True, default=str)
        key = (facts, export.identity(one.what.model), shapes)
        made: list[Any] = []

        def compiled() -> Programs:
            watch.does("compiling")
            began = time.monotonic()
            programs, *begun = _compiled(one.parts, arguments)
            made.extend(begun)
            took = time.monotonic() - began
            watch.compiled += took
            watch.paused += took if watch.began is not None else 0.0
            LOG.info(f"compiled {_described(one.what, arguments)} in {took:.1f} s")
            return programs

        programs = self._programs.get(key, compiled)
        return programs, *(made or programs.begin(*arguments))


def _compiled(parts: Segments, arguments: tuple) -> tuple[Programs, Any, Any]:
    """(programs, held, state at the first level)."""
    params = arguments[0]
    begin = jax.jit(parts.begin).lower(*arguments).compile()
    held, state = begin(*arguments)
    # a state goes in as it comes out, where it lies too
    placed = jax.tree.map(lambda x: x.sharding, state)
    run = jax.jit(parts.run, out_shardings=placed).lower(params, held, state, 0, 1).compile()
    end = jax.jit(parts.end).lower(params, held, state).compile()
    return Programs(begin, run, end), held, state


def _described(what: Request, arguments: tuple) -> str:
    """`4 pictures of 512x512 (width x height), ddim`."""
    height, width = (side * what.model.config.first_stage.downsample for side in what.shape[:2])
    return f"{len(arguments[4])} of {width}x{height} (width x height), {what.options.solver}"


def _padded(batch: dict[str, np.ndarray], table: Table) -> dict[str, np.ndarray]:
    """The batch whose schedules of prompts are as long as the table, for one program."""
    length = len(table.rows.t)

    def longer(schedule: np.ndarray) -> np.ndarray:
        return np.pad(schedule, ((0, 0), (0, 0), (0, length - schedule.shape[2])))

    return batch | {name: longer(batch[name]) for name in ("steps", "null_steps") if name in batch}


def _array(leaf: Any) -> Any:
    return leaf if hasattr(leaf, "dtype") else np.asarray(leaf)


def _predicted(state: Any) -> Any:
    """A state whose picture is the one that is predicted so far."""
    carry, _, x0 = state
    return carry, x0, x0


def _quick(path: str) -> tuple[tuple[int, int], Callable]:
    """((side of a latent pixel, its channels), function of scaled latents) of a decoder's file."""
    net, params = tiny_decoder.load(path)
    channels = params["layers_0"]["kernel"].shape[2]
    params = jax.device_put(params)
    apply = jax.jit(lambda params, z: net.apply({"params": params}, z))
    return (SCALE, channels), lambda z: apply(params, z)


def _shown(image: jax.Array) -> np.ndarray | None:
    pictures = np.asarray(image)
    return images.to_uint8(pictures) if images.finite_images(pictures).all() else None


def _finished(what: Request, places: np.ndarray, image: np.ndarray) -> np.ndarray:
    """uint8 pictures. RefusedError for some that are not finite."""
    if what.finish is not None and images.finite_images(image).all():
        image = what.finish(places, image)
    lost = int((~images.finite_images(image)).sum())
    if lost:
        raise RefusedError(
            422,
            f"{lost} of {len(image)} pictures are not finite (NaN or infinity): try a smaller"
            " cfg_scale or smaller weights in the prompt",
        )
    return images.to_uint8(image)
