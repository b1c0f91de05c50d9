"""Samples against a data set: `ldm-eval samples --model RUN --count 50000 --out DIR [...]`."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import numpy as np
from etils import epath

from ldm_jax import schema, sharding
from ldm_jax.metrics import features, gaussian, scores
from ldm_jax.runtime import checkpoint, flags, reading
from ldm_jax.sample.evaluate import drawing, extraction, image_sets, report

NAME = "samples"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(drawing.Options):
    """FID and its relatives of samples: drawn here from a model, or lying in files."""

    samples: flags.Path = ""
    """Instead of --model: folder of images, or .npz with arr_0, taken as they are."""
    reference: flags.Path = ""
    """Run, folder of images, .npz of images, or .npz of statistics (of `ldm-eval statistics`,
    pytorch-fid or the ADM suite). Default: the training data of the model's own run, prepared
    alike."""
    reference_split: Literal["train", "eval"] = "train"
    """Split of a run's data."""
    reference_count: int | None = None
    """The first so many; default: all."""
    size: int | None = None
    """Pixels that a folder's images are resized to; default: the model's training size."""
    crop: Literal["center", "none"] | None = None
    """Crop of a folder's images to squares; default: as in training."""
    resize: Literal["area", "bicubic"] | None = None
    """Filter; default: as in training."""


def main(options: Options) -> int:
    """Writes result.json, row.md, and grid.png of samples that are drawn here."""
    if bool(options.model) == bool(options.samples):
        raise ValueError("give --model, to draw samples, or --samples, a folder or .npz of them")
    opened = extraction.opened(options)
    base = image_sets.config_of(options.model) if options.model else None
    how = image_sets.Preparation(options.size, options.crop, options.resize)
    if options.samples:
        given = _files(options, opened)
    else:
        given, base = drawing.drawn(options, opened, base, how)
    source, saved = _reference(options, base, how)
    if source is not None:
        image_sets.check_sizes(given.shape, source.shape, ("samples", "reference images"))
    if saved is not None and "size" in saved.meta:
        image_sets.check_sizes(given.shape, saved.meta["size"], ("samples", "the statistics"))
    out = extraction.out_folder(options)
    folder = out / "features"
    reference = _reference_features(options, opened, source, saved, folder)
    settings = {**extraction.about(opened.network), **given.facts}
    outputs = extraction.kept(
        folder / NAME, settings, given.count, lambda i: given.produce(i, out), options, NAME
    )
    if jax.process_index() != 0:
        return 0
    figures = report.distances(opened.network, outputs, reference)
    if "text" in outputs:
        figures["clip_score"] = float(
            scores.clip_score(outputs["features"], outputs["text"]).mean()
        )
    if "image" in outputs:
        with (out / "samples.npz").open("wb") as file:
            np.savez(file, arr_0=outputs["image"])
    facts = {
        **settings,
        "name": options.model or options.samples,
        "count": given.count,
        "reference": options.reference if source is None else source.about,
        "Reference": f"{options.reference or 'training data'}, {reference.features.count or '?'}",
        "neighbours": report.NEIGHBOURS,
    }
    report.write(out, NAME, options, figures, facts)
    return 0


# --- reference -----------------------------------------------------------------------------------


def _reference(
    options: Options, base: schema.DataConfig | None, how: image_sets.Preparation
) -> tuple[image_sets.ImageSet | None, gaussian.Saved | None]:
    """(images, statistics) of --reference, of which one is None."""
    path = options.reference
    if path.endswith(".npz") and _holds(path, "mu"):
        return None, gaussian.read(path)
    images = image_sets.opened(
        path,
        options.reference_split,
        base,
        how,
        limit=options.reference_count,
        flag="--reference",
    )
    return images, None


def _holds(path: str, name: str) -> bool:
    with reading.refusals(path, "give an .npz"), reading.npz(checkpoint.absolute(path)) as archive:
        return name in reading.array_names(archive)


def _reference_features(
    options: Options,
    opened: extraction.Opened,
    source: image_sets.ImageSet | None,
    saved: gaussian.Saved | None,
    folder: epath.Path,
) -> report.Reference | None:
    """Reference with its features; saved statistics have those of the images beside them, if
    any."""
    if saved is not None:
        described = report.reference_of_file(saved, opened.network, options.reference)
        if saved.images is None:
            return described
        source = image_sets.images_from_array(saved.images, {"npz": options.reference})
    outputs = extraction.image_features(folder / "reference", opened, source, options, "reference")
    if jax.process_index() != 0:
        return None
    if saved is not None:
        return described._replace(image_features=outputs["features"])
    return report.reference_of(outputs)


# --- samples in files ----------------------------------------------------------------------------


def _files(options: Options, opened: extraction.Opened) -> drawing.Given:
    path = options.samples
    if path.endswith(".npz"):
        image_set = image_sets.images_from_npz(path, options.count)
    elif checkpoint.absolute(path).is_dir():
        image_set = image_sets.images_from_folder(path, options.count)
    else:
        raise ValueError(f"--samples {path}: is no folder of images or .npz")

    def produce(first: int, out: epath.Path) -> Iterator:
        del out
        split = sharding.batch_sharding(opened.mesh)
        batches = ((r["image"], n) for r, n in image_set.batches(options.batch_size, first, split))
        for x in features.extract(opened.network, opened.mesh, batches):
            yield x, len(x["features"])

    return drawing.Given(image_set.count, image_set.shape, {"samples": image_set.about}, produce)
