"""Request of a task: arrays, names and settings of every image, before anything is computed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax import bundle, seeds, solvers
from ldm_jax.sample import options
from ldm_jax.sample.options import Options


class Second(NamedTuple):
    """A pass over what a request has drawn, as the second one of a hires fix."""

    request: "Request"
    """The same images in the same order; its batch lacks what `feed` gives."""
    feed: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]
    """(images float32 [B, H, W, c], unscaled latents [B, h, w, c]) of a call of the first pass ->
    arrays of the second one's batch: `init` or `init_latent`."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Images that one compiled program draws; number i below is the place in this list."""

    task: str
    """As on the command line."""
    options: Options
    """Options of the task, the model's defaults filled in."""
    model: bundle.LatentDiffusion
    mesh: Any
    shape: tuple[int, int, int]
    """(h, w, c) of the latent."""
    guided: bool
    """The program samples with guidance."""
    batch: dict[str, np.ndarray]
    """Input of `conditioning.from_batch` and `make_run`: host arrays, [N, ...] for N images."""
    names: list[str]
    """File names without ending."""
    details: list[dict[str, Any]]
    """Settings of each image: facts, and the options that with num_images=1 draw it alone."""
    alone: bool = True
    """`details` draw an image alone; False: an image is one of all that the options draw."""
    row_labels: Sequence[str] = ()
    """Labels of the grid's rows; none for a square of images."""
    row_lengths: Sequence[int] | None = None
    """Images in each row; default: as many in all."""
    left: np.ndarray | None = None
    """[rows, H, W, c] in [-1, 1], images before the others of their row in the grid; or
    several for each, [rows, n, H, W, c]."""
    seeds: np.ndarray | None = None
    """uint64 [N]; default: the options' for all."""
    indices: np.ndarray | None = None
    """Number of each image under its seed, int [N]; default: from the options' first_index on."""
    scales: np.ndarray | None = None
    """Guidance scales, float32 [N]; default: the options' for all."""
    start: int | None = None
    """First level that runs; None is all of them, in a program that cannot skip any."""
    wrap_model: Callable | None = None
    """model -> model, inside of guidance, as `windows.windowed`."""
    decode: Callable | None = None
    """(params of the first stage, unscaled latents) -> images; default: in one pass."""
    levels: solvers.Levels | None = None
    """Others than those of the options; see `sampling.make_sampler`."""
    program: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Values that `wrap_model` and `decode` depend on: with others it is another program."""
    finish: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    """(places, images [n, H, W, c]) -> the images as they are written."""
    problems: tuple[str, ...] = ()
    """Inputs that could not be read, and are not among the images; reported at the end."""
    second: Second | None = None
    """Draws on with the images; the names, details and options of this one count."""

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.names)

    def replaced(self, **changes: Any) -> "Request":
        """The same with other `guided`, `seeds` or `indices`, in the second pass too."""
        second = self.second and self.second._replace(
            request=self.second.request.replaced(**changes)
        )
        return dataclasses.replace(self, second=second, **changes)

    @property
    def last(self) -> "Request":
        """The pass whose images are kept."""
        return self if self.second is None else self.second.request


class Call(NamedTuple):
    """One call of the compiled program."""

    places: np.ndarray
    """Number in the request of each image of the batch, int [B]."""
    wanted: np.ndarray
    """Places in the batch whose images are kept, int [n]; the others fill it up."""


def calls_of(request: Request, size: int | None = None) -> list[Call]:
    """All images in order, `size` in a call: by default as many as there are, up to --batch-size.

    The last call is filled up by repeating the last image.
    """
    count, split = request.count, request.mesh.shape["data"] * request.mesh.shape["fsdp"]
    if size is None:
        # no larger than the list, rounded up so that every device has as many rows
        size = min(request.options.batch_size, -(-count // split) * split)
    return [
        Call(np.minimum(np.arange(first, first + size), count - 1), np.arange(last - first))
        for first in range(0, count, size)
        for last in [min(first + size, count)]
    ]


def seeds_of(request: Request) -> np.ndarray:
    """Seed of each image, uint64 [N]."""
    if request.seeds is not None:
        return request.seeds
    return np.full(request.count, request.options.seed, np.uint64)


def indices_of(request: Request) -> np.ndarray:
    """Number of each image under its seed, int [N]. ValueError for one that is not below 2**32."""
    indices = request.indices
    if indices is None:
        indices = request.options.first_index + np.arange(request.count)
    first = int(indices.min())
    seeds.check_numbers(first, int(indices.max()) + 1 - first, "--first-index")
    return indices


def keys_of(request: Request, places: np.ndarray) -> jax.Array:
    """Keys of some of the images; see `sampling.keys_of`."""
    # a list of thousands of prompts has few seeds: a root key for each of those
    different, which = np.unique(seeds_of(request)[places], return_inverse=True)
    numbers = indices_of(request)[places].astype(np.uint32)
    return _folded(seeds.root_keys(different)[which], numbers)


_folded = jax.jit(jax.vmap(jax.random.fold_in))


def levels_of(request: Request) -> solvers.Levels:
    """The levels of the program, all of which run unless `request.start` says otherwise."""
    if request.levels is not None:
        return request.levels
    return options.levels_of(request.model, request.options)


def scales_of(request: Request) -> np.ndarray:
    """Guidance scale of each image, float32 [N]."""
    scales = (
        np.full(request.count, request.options.guidance_scale)
        if request.scales is None
        else request.scales
    )
    return scales.astype(np.float32)
