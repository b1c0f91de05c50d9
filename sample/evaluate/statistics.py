"""Statistics of a data set: `ldm-eval statistics --data PATH --out DIR [...]`."""

import dataclasses
from typing import Literal

import jax

from ldm_jax.metrics import gaussian
from ldm_jax.runtime import flags
from ldm_jax.runtime.log import LOG
from ldm_jax.sample.evaluate import extraction, image_sets, report

NAME = "statistics"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(extraction.Options):
    """statistics.npz of a data set, which `ldm-eval samples --reference`, pytorch-fid and the ADM
    suite read."""

    data: flags.Path
    """Run, whose data are used; folder of images; or .npz with arr_0."""
    split: Literal["train", "eval"] = "train"
    """Split of a run's data."""
    count: int | None = None
    """The first so many images; default: all."""
    size: int | None = None
    """Pixels that a folder's images are resized to; default: as the run's training does."""
    crop: Literal["center", "none"] | None = None
    """Crop of a folder's images to squares; default: center."""
    resize: Literal["area", "bicubic"] | None = None
    """Filter; default: bicubic, or that of the run."""


def main(options: Options) -> int:
    """Writes statistics.npz and result.json."""
    images = image_sets.opened(
        options.data,
        options.split,
        None,
        image_sets.Preparation(options.size, options.crop, options.resize),
        limit=options.count,
        flag="--data",
    )
    opened = extraction.opened(options)
    out = extraction.out_folder(options)
    outputs = extraction.image_features(
        out / "features" / "data", opened, images, options, "features"
    )
    if jax.process_index() != 0:
        return 0
    reference = report.reference_of(outputs)
    meta = {
        **extraction.about(opened.network),
        "size": list(images.shape),
        "images": images.about,
    }
    gaussian.write(out / "statistics.npz", reference.features, reference.spatial, meta)
    facts = {**meta, "name": options.data, "count": images.count}
    report.write(out, NAME, options, {}, facts)
    LOG.info(f"{out / 'statistics.npz'}: mean and covariance of {images.count} images")
    return 0
