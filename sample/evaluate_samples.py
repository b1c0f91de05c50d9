"""Samples against a data set: `ldm-eval samples --model RUN --count 50000 --out DIR [...]`."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ldm_jax import bundle, checkpoint, conditioning, images, rundir, sampling, schema, sharding
from ldm_jax.metrics import features, gaussian, scores
from ldm_jax.models import clip
from ldm_jax.sample import evaluate_features, evaluate_figures, evaluate_images, generate
from ldm_jax.sample import options as sample_options

NAME = "samples"
SHOWN = 64  # images in grid.png
PAPER = 50_000  # samples of a figure in the paper


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(evaluate_features.Options):
    """FID and its relatives of samples: drawn here from a model, or lying in files."""

    model: str = ""
    """Run, diffusers folder or checkpoint that samples are drawn from, of any task: classes take
    turns, other conditions are those of --data."""
    samples: str = ""
    """Instead of --model: folder of images, or .npz with arr_0, taken as they are."""
    reference: str = ""
    """Run, folder of images, .npz of images, or .npz of statistics (of `ldm-eval statistics`,
    pytorch-fid or the ADM suite). Default: what the model's own run trains on, prepared alike."""
    reference_split: Literal["train", "eval"] = "train"
    """Of a run's data."""
    reference_count: int | None = None
    """The first so many; default: all."""
    data: str = ""
    """Where captions, maps, masks and small images come from: a run or a folder of images.
    Default: the model's own run."""
    data_split: Literal["train", "eval"] = "eval"
    """Of a run's data."""
    labels: Literal["balanced", "data"] = "balanced"
    """Classes in turn, or those of --data in its order."""
    size: int | None = None
    """Pixels that a folder's images are resized to; default: the model's training size."""
    crop: Literal["center", "none"] | None = None
    """How a folder's images are cut to squares; default: as in training."""
    resize: Literal["area", "bicubic"] | None = None
    """Filter; default: as in training."""
    count: int | None = None
    """Samples: default 50 000 of a model, all of files."""
    steps: int = 50
    """Solver steps."""
    solver: str = "ddim"
    """Name of a solver."""
    spacing: str | None = None
    """Which timesteps are visited; default: as the model's own sampler."""
    eta: float = 0.0
    """Noise of DDIM: 0 is deterministic, 1 ancestral."""
    guidance_scale: float = 1.0
    """Classifier-free guidance; 1 samples without it."""
    guidance_rescale: float = 0.0
    """As of ldm-sample."""
    guidance_interval: tuple[float, float] | None = None
    """As of ldm-sample."""
    dynamic_threshold: float | None = None
    """As of ldm-sample."""
    quantize_x0: bool = False
    """As of ldm-sample."""
    seed: int = 0
    """Sample number i depends on (seed, i) alone, and on its condition."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the model."""
    step: int | None = None
    """Training step of a run; default: the newest."""
    ema: bool = True
    """Averaged weights; --no-ema takes the raw ones."""
    config: str | None = None
    """YAML of a checkpoint file."""
    variant: str | None = None
    """Variant of the weights in a diffusers folder."""
    tokenizer: str | None = None
    """Folder with the tokenizer's files, where the model comes without."""
    npz: bool = False
    """Write samples.npz too: arr_0 uint8 [N, H, W, c], as the ADM suite reads it."""


class Given(NamedTuple):
    """Samples that are there or can be drawn: their number, size, what they are, and features."""

    count: int
    shape: tuple[int, int, int]
    facts: dict[str, Any]
    produce: Callable[[int, epath.Path], Iterator[tuple[evaluate_features.Found, int]]]


def main(options: Options) -> int:
    """Writes result.json, row.md, and grid.png of samples that are drawn here."""
    if bool(options.model) == bool(options.samples):
        raise ValueError("give --model, to draw samples, or --samples, a folder or .npz of them")
    opened = evaluate_features.opened(options)
    base = evaluate_images.config_of(options.model) if options.model else None
    how = evaluate_images.Preparation(options.size, options.crop, options.resize)
    if options.samples:
        given = _files(options, opened)
    else:
        given, base = _drawn(options, opened, base, how)
    source, saved = _reference(options, base, how)
    if source is not None:
        evaluate_images.check_sizes(given.shape, source.shape, ("samples", "reference images"))
    if saved is not None and "size" in saved.meta:
        evaluate_images.check_sizes(given.shape, saved.meta["size"], ("samples", "the statistics"))
    out = evaluate_features.out_folder(options)
    folder = out / "features"
    reference = _reference_features(options, opened, source, saved, folder)
    settings = {**evaluate_features.about(opened.network), **given.facts}
    found = evaluate_features.kept(
        folder / NAME, settings, given.count, lambda i: given.produce(i, out), options, NAME
    )
    if jax.process_index() != 0:
        return 0
    figures = evaluate_figures.distances(opened.network, found, reference)
    if "text" in found:
        figures["clip_score"] = float(scores.clip_score(found["features"], found["text"]).mean())
    if "image" in found:
        with (out / "samples.npz").open("wb") as file:
            np.savez(file, arr_0=found["image"])
    facts = {
        **settings,
        "name": options.model or options.samples,
        "count": given.count,
        "reference": options.reference if source is None else source.about,
        "Reference": f"{options.reference or 'training data'}, {reference.features.count or '?'}",
        "precision": f"k = {evaluate_figures.NEIGHBOURS}",
    }
    evaluate_figures.write(out, NAME, options, figures, facts)
    return 0


# --- reference -----------------------------------------------------------------------------------


def _reference(
    options: Options, base: schema.DataConfig | None, how: evaluate_images.Preparation
) -> tuple[evaluate_images.ImageSet | None, gaussian.Saved | None]:
    """(images, statistics) of --reference, of which one is None."""
    path = options.reference
    if path.endswith(".npz") and _holds(path, "mu"):
        return None, gaussian.read(path)
    images = evaluate_images.opened(
        path,
        options.reference_split,
        base,
        how,
        limit=options.reference_count,
        flag="--reference",
    )
    return images, None


def _holds(path: str, name: str) -> bool:
    with checkpoint.absolute(path).open("rb") as file:
        try:
            return name in np.load(file, allow_pickle=False).files
        except (ValueError, OSError, EOFError, AttributeError) as error:
            raise ValueError(f"{path}: is no .npz archive ({error})") from error


def _reference_features(
    options: Options,
    opened: evaluate_features.Opened,
    source: evaluate_images.ImageSet | None,
    saved: gaussian.Saved | None,
    folder: epath.Path,
) -> evaluate_figures.Reference | None:
    """Features of the reference; of saved statistics those of the images beside them, if any."""
    if saved is not None:
        found = evaluate_figures.reference_of_file(saved, opened.network, options.reference)
        if saved.images is None:
            return found
        source = evaluate_images.of_array(saved.images, {"npz": options.reference})
    rows = evaluate_features.of_images(folder / "reference", opened, source, options, "reference")
    if jax.process_index() != 0:
        return None
    if saved is not None:
        return found._replace(rows=rows["features"])
    return evaluate_figures.reference_of(rows)


# --- samples in files ----------------------------------------------------------------------------


def _files(options: Options, opened: evaluate_features.Opened) -> Given:
    path = options.samples
    if path.endswith(".npz"):
        found = evaluate_images.of_npz(path, options.count)
    elif checkpoint.absolute(path).is_dir():
        found = evaluate_images.of_folder(path, options.count)
    else:
        raise ValueError(f"--samples {path}: is no folder of images or .npz")
    if options.count is not None and found.count < options.count:
        raise ValueError(f"--samples {path}: holds {found.count} images, not {options.count}")

    def produce(first: int, out: epath.Path) -> Iterator:
        del out
        rows = sharding.batch_sharding(opened.mesh)
        batches = ((r["image"], n) for r, n in found.batches(options.batch_size, first, rows))
        for x in features.extract(opened.network, opened.mesh, batches):
            yield x, len(x["features"])

    return Given(found.count, found.shape, {"samples": found.about}, produce)


# --- samples drawn here --------------------------------------------------------------------------


def _drawn(
    options: Options,
    opened: evaluate_features.Opened,
    base: schema.DataConfig | None,
    how: evaluate_images.Preparation,
) -> tuple[Given, schema.DataConfig | None]:
    """Samples of --model, and the data that its images are to be prepared as."""
    shared = {f.name for f in dataclasses.fields(sample_options.Options)}
    picked = {n: x for n, x in dataclasses.asdict(options).items() if n in shared - {"npz"}}
    asked = sample_options.Options(**picked)
    model, mesh, asked = sample_options.open_model(asked, opened.mesh)
    config, count = model.config, PAPER if options.count is None else options.count
    if count < 1:
        raise ValueError(f"--count {count}: give at least 1")
    base = base or schema.DataConfig(size=config.size)
    conditions = _conditions(options, model, base, how, count)
    guided = options.guidance_scale != 1 and config.cond is not None
    weights = rundir.params_hash(jax.device_get(model.params))
    sampler = {
        name: getattr(asked, name)
        for name in (
            *("steps", "solver", "spacing", "eta", "seed", "guidance_scale", "guidance_rescale"),
            *("guidance_interval", "dynamic_threshold", "quantize_x0", "dtype"),
        )
    }
    facts = {
        "model": weights,
        "sampler": sampler,
        "labels": options.labels if conditions is None else "data",
        "conditions": None if conditions is None else conditions.about,
        "saved": options.npz,
        "Sampler": f"{asked.solver}, {asked.steps} steps, guidance {asked.guidance_scale:g}",
    }
    run = jax.jit(
        generate.make_run(model, asked, guided, model.latent_shape),
        out_shardings=sharding.batch_sharding(mesh),
    )

    def draw(batch: dict, indices: np.ndarray) -> jax.Array:
        keys = jax.device_put(
            sampling.keys_of(options.seed, indices), sharding.batch_sharding(mesh)
        )
        return run(model.params, batch, keys, options.guidance_scale, options.eta)[0]

    def produce(first: int, out: epath.Path) -> Iterator:
        return _batches(options, opened, draw, conditions, model, (first, count), out)

    side = config.size
    channels = config.first_stage.in_channels
    return Given(count, (side, side, channels), facts, produce), base


def _conditions(
    options: Options,
    model: bundle.LatentDiffusion,
    base: schema.DataConfig,
    how: evaluate_images.Preparation,
    count: int,
) -> evaluate_images.ImageSet | None:
    """Records that samples are conditioned on; None where classes take turns, or nothing is asked.

    ValueError if the records lack what the model is conditioned on.
    """
    cond = model.config.cond
    if cond is None or (isinstance(cond, schema.ClassCondConfig) and options.labels == "balanced"):
        return None
    if schema.text_of(cond) is not None:
        sample_options.check_tokenizer(model, options.model)
    own = None if not evaluate_images.config_of(options.model) else base
    found = evaluate_images.opened(
        options.data,
        options.data_split,
        own,
        how,
        limit=count,
        tokenizer=model.tokenizer,
        flag="--data",
    )
    _check_rows(found, model, options)
    return found


def _check_rows(
    found: evaluate_images.ImageSet, model: bundle.LatentDiffusion, options: Options
) -> None:
    """ValueError if a record lacks what `conditioning.from_batch` reads."""
    rows = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    batch, _ = next(found.batches(1, 0, rows))
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
            f"{options.data or options.model}: {type(model.config.cond).__name__} needs {error} of"
            f" every record, and these have {held}: give --data with them, or draw the samples with"
            " ldm-sample --npz and give them as --samples"
        ) from error


def _batches(
    options: Options,
    opened: evaluate_features.Opened,
    draw: Callable,
    conditions: evaluate_images.ImageSet | None,
    model: bundle.LatentDiffusion,
    span: tuple[int, int],
    out: epath.Path,
) -> Iterator[tuple[evaluate_features.Found, int]]:
    """Features of samples from batch `span[0]` on, up to `span[1]` samples."""
    first, count = span
    size, rows = options.batch_size, sharding.batch_sharding(opened.mesh)
    extract = features.extractor(opened.network, opened.mesh)
    texts = _texts(opened, conditions)
    given = conditions.batches(size, first, rows) if conditions is not None else None
    for i in range(first, -(-count // size)):
        indices = np.arange(i * size, (i + 1) * size)
        real = min(size, count - i * size)
        batch = next(given)[0] if given is not None else _labels(model, indices, rows)
        image = draw(batch, indices)
        found = features.fetch(extract(image), real)
        if i == 0 or options.npz:
            pixels = images.to_uint8(_whole(image))[:real]
            if options.npz:
                found["image"] = pixels
            if i == 0 and jax.process_index() == 0:
                _draw(out, pixels[:SHOWN])
        if texts is not None:
            found["text"] = texts(indices)[:real]
        yield found, real


def _labels(model: bundle.LatentDiffusion, indices: np.ndarray, rows: Any) -> dict[str, jax.Array]:
    """Classes in turn."""
    cond = model.config.cond
    if cond is None:
        return {}
    return {"label": features.place((indices % cond.num_classes).astype(np.int32), rows)}


def _whole(image: jax.Array) -> np.ndarray:
    if image.is_fully_addressable:
        return np.asarray(image)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(image, tiled=True)


def _texts(
    opened: evaluate_features.Opened, conditions: evaluate_images.ImageSet | None
) -> Callable[[np.ndarray], np.ndarray] | None:
    """CLIP's embeddings of the captions of samples, where both are there."""
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
