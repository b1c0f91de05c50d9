"""Samples drawn batch by batch from a model of any task, and their features."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tyro.conf import arg

from ldm_jax import bundle, conditioning, sampling, schema, sharding
from ldm_jax.metrics import features
from ldm_jax.models import clip
from ldm_jax.runtime import flags, images, rundir
from ldm_jax.runtime.log import LOG
from ldm_jax.sample import options as sample_options
from ldm_jax.sample import program
from ldm_jax.sample.evaluate import extraction, image_sets

SHOWN = 64  # images in grid.png
PAPER = 50_000  # samples of a figure in the paper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(extraction.Options):
    """Options of samples that `ldm-eval` draws."""

    model: flags.Path = ""
    """Run, diffusers folder or checkpoint that samples are drawn from, of any task: classes take
    turns, other conditions are those of --data."""
    data: flags.Path = ""
    """Source of captions, maps, masks and small images: a run or a folder of images. Default: the
    model's own run."""
    data_split: Literal["train", "eval"] = "eval"
    """Split of a run's data."""
    captions: Literal["none", "sidecar", "metadata"] = "none"
    """Captions of a folder: NAME.txt beside NAME.png (sidecar), or metadata.jsonl."""
    labels: Literal["balanced", "data"] = "balanced"
    """Classes in turn, or those of --data in its order."""
    count: int | None = None
    """Samples: default 50 000 of a model, all of files."""
    steps: int = 50
    """Solver steps."""
    solver: Annotated[str, arg(metavar="NAME")] = "ddim"
    """Name of a solver."""
    spacing: Annotated[str | None, arg(metavar="NAME")] = None
    """As of ldm-sample."""
    spacing_rule: Literal["compvis", "diffusers"] | None = None
    """Spacing of the timesteps; default: that of the model's own sampler."""
    eta: float = 0.0
    """Noise of DDIM: 0 is deterministic, 1 ancestral."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 samples without it."""
    guidance_rescale: float = 0.0
    """As in ldm-sample."""
    guidance_interval: Annotated[tuple[float, float] | None, arg(metavar="LOWEST HIGHEST")] = None
    """As in ldm-sample."""
    dynamic_threshold: float | None = None
    """As in ldm-sample."""
    quantize_x0: bool = False
    """As in ldm-sample."""
    seed: int = 0
    """Sample number i depends on (seed, i) alone, and on its condition."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the model."""
    step: int | None = None
    """Training step of a run; default: the newest."""
    ema: bool = True
    """Averaged weights; --no-ema takes the raw ones."""
    config: flags.OptionalFile = None
    """YAML of a checkpoint file."""
    variant: Annotated[str | None, arg(metavar="NAME")] = None
    """Variant of the weights in a diffusers folder."""
    tokenizer: flags.OptionalDir = None
    """Folder with the tokenizer's files, where the model comes without."""
    npz: bool = False
    """Write samples.npz too: arr_0 uint8 [N, H, W, c], as the ADM suite reads it."""


class Given(NamedTuple):
    """Samples in files or to be drawn: their number, size, facts, and features."""

    count: int
    shape: tuple[int, int, int]
    facts: dict[str, Any]
    produce: Callable[[int, epath.Path], Iterator[tuple[extraction.Outputs, int]]]


def drawn(
    options: Options,
    opened: extraction.Opened,
    base: schema.DataConfig | None,
    how: image_sets.Preparation,
) -> tuple[Given, schema.DataConfig | None]:
    """Samples of --model, and the data that its images are to be prepared as."""
    shared = {f.name for f in dataclasses.fields(sample_options.Options)}
    picked = {n: x for n, x in dataclasses.asdict(options).items() if n in shared - {"npz"}}
    asked = sample_options.Options(**picked)
    model, mesh, asked = sample_options.open_model(asked, opened.mesh)
    config, count = model.config, PAPER if options.count is None else options.count
    if count < 1:
        raise ValueError(f"--count {count}: give at least 1")
    grey = config.first_stage.in_channels == 1
    base = base or schema.DataConfig(size=config.size, channels=1 if grey else 3)
    conditions = _conditions(options, model, base, how, count)
    guided = options.guidance_scale != 1 and config.cond is not None
    if guided and options.guidance_scale == 0:
        LOG.warning(
            "--guidance-scale 0 leaves out the condition in all images: 1 samples with it, without"
            " guidance"
        )
    weights = rundir.params_hash(jax.device_get(model.params))
    sampler = {
        name: getattr(asked, name)
        for name in (
            *("steps", "solver", "spacing", "eta", "seed", "guidance_scale", "guidance_rescale"),
            *("guidance_interval", "dynamic_threshold", "quantize_x0", "dtype"),
        )
    }
    if asked.spacing_rule != "compvis":  # the only one before it had a name
        sampler["spacing_rule"] = asked.spacing_rule
    steps = len(sample_options.levels_of(model, asked).t)
    facts = {
        "model_weights": weights,
        "sampler": sampler,
        "labels": options.labels if conditions is None else "data",
        "conditions": None if conditions is None else conditions.about,
        "saved": options.npz,
        "Sampler": f"{asked.solver}, {steps} steps, guidance {asked.guidance_scale:g}",
    }
    run = program.make_run(model, asked, guided, model.latent_shape)

    def numbered(params: dict, batch: dict, numbers: jax.Array) -> jax.Array:
        # inside the program, because `numbers` are split over all processes
        keys = sampling.keys_of(options.seed, numbers)
        return run(params, batch, keys, options.guidance_scale, options.eta)[0]

    jitted = jax.jit(numbered, out_shardings=sharding.batch_sharding(mesh))
    draw = functools.partial(jitted, model.params)

    def produce(first: int, out: epath.Path) -> Iterator:
        return _batches(options, opened, draw, conditions, model, (first, count), out)

    side = config.size
    channels = config.first_stage.in_channels
    return Given(count, (side, side, channels), facts, produce), base


def _conditions(
    options: Options,
    model: bundle.LatentDiffusion,
    base: schema.DataConfig,
    how: image_sets.Preparation,
    count: int,
) -> image_sets.ImageSet | None:
    """Records that samples are conditioned on; None for classes in turn and without condition.

    ValueError if the records lack the model's condition.
    """
    cond = model.config.cond
    if cond is None or (isinstance(cond, schema.ClassCondConfig) and options.labels == "balanced"):
        return None
    if schema.text_of(cond) is not None:
        sample_options.check_tokenizer(model, options.model)
    image_set = image_sets.opened(
        options.data,
        options.data_split,
        base,
        how,
        limit=count,
        tokenizer=model.tokenizer,
        num_ids=conditioning.map_ids(cond),
        captions=options.captions,
        repeat=True,
        flag="--data",
    )
    _check_batch(image_set, model, options)
    return image_set


def _check_batch(
    image_set: image_sets.ImageSet, model: bundle.LatentDiffusion, options: Options
) -> None:
    """ValueError if a record lacks an array that `conditioning.from_batch` reads."""
    split = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    batch, _ = next(image_set.batches(1, 0, split))
    latent = (1, *model.latent_shape)
    encode = lambda image: jnp.zeros(latent)  # noqa: E731
    try:
        jax.eval_shape(
            lambda params, batch: conditioning.from_batch(
                model.config.cond, model.cond_stage, params, batch, encode
            ),
            model.params["cond_stage"],
            batch,
        )
    except KeyError as error:
        held = ", ".join(sorted(batch))
        raise ValueError(
            f"{options.data or options.model}: {conditioning.name_of(model.config.cond)}"
            f" needs {error} of every record, and these have {held}: give --data with them, or draw"
            " the samples with ldm-sample --npz and give them as --samples"
        ) from error


def _batches(
    options: Options,
    opened: extraction.Opened,
    draw: Callable,
    conditions: image_sets.ImageSet | None,
    model: bundle.LatentDiffusion,
    span: tuple[int, int],
    out: epath.Path,
) -> Iterator[tuple[extraction.Outputs, int]]:
    """Features of samples from batch `span[0]` on, up to `span[1]` samples."""
    first, count = span
    size, split = options.batch_size, sharding.batch_sharding(opened.mesh)
    extract = features.extractor(opened.network, opened.mesh)
    texts = _texts(opened, conditions)
    given = conditions.batches(size, first, split) if conditions is not None else None
    for i in range(first, -(-count // size)):
        indices = np.arange(i * size, (i + 1) * size)
        real = min(size, count - i * size)
        batch = next(given)[0] if given is not None else _labels(model, indices, split)
        image = draw(batch, features.place(indices.astype(np.int32), split))
        outputs = features.fetch(extract(image), real)
        if i == 0 or options.npz:
            pixels = images.to_uint8(_whole(image))[:real]
            if options.npz:
                outputs["image"] = pixels
            if i == 0 and jax.process_index() == 0:
                _draw(out, pixels[:SHOWN])
        if texts is not None:
            outputs["text"] = texts(indices)[:real]
        yield outputs, real


def _labels(model: bundle.LatentDiffusion, indices: np.ndarray, split: Any) -> dict[str, jax.Array]:
    """Labels of all classes in turn."""
    cond = model.config.cond
    if cond is None:
        return {}
    return {"label": features.place((indices % cond.num_classes).astype(np.int32), split)}


def _whole(image: jax.Array) -> np.ndarray:
    if image.is_fully_addressable:
        return np.asarray(image)
    return multihost_utils.process_allgather(image, tiled=True)


def _texts(
    opened: extraction.Opened, conditions: image_sets.ImageSet | None
) -> Callable[[np.ndarray], np.ndarray] | None:
    """CLIP's embeddings of the captions of samples, if the model and the data have them."""
    model = opened.clip
    if model is None or model.tokenizer is None or conditions is None or not conditions.caption:
        return None

    @jax.jit
    def embed(params: dict, ids: jax.Array) -> jax.Array:
        return clip.embed_text(model.text, params, ids, model.end_id)

    params = jax.device_put(model.params["text"])

    def texts(indices: np.ndarray) -> np.ndarray:
        ids = model.tokenizer.encode([conditions.caption(int(i)) for i in indices])
        return np.asarray(embed(params, ids))

    return texts


def _draw(out: epath.Path, pixels: np.ndarray) -> None:
    columns = math.ceil(len(pixels) ** 0.5)
    sheet = images.grid(pixels, columns, scale=max(1, 48 // pixels.shape[1]))
    images.save_png(out / "grid.png", sheet)
