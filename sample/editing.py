"""Shared parts of the tasks that start from images of the user: files, prompts and labels."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ldm_jax import bundle, conditioning, schema
from ldm_jax.prompting import composed
from ldm_jax.runtime import flags
from ldm_jax.sample import text2img
from ldm_jax.sample.options import Options, check_tokenizer, label_ids, null_batch
from ldm_jax.sample.write import pictures_in


@dataclasses.dataclass(frozen=True)
class Options(Options):
    """Images, and prompts or labels to go with them: as many, or one for all."""

    images: flags.Files = ()
    """Image files, or a folder of them, which gives its names to what is drawn. One goes with every
    prompt or label; several, with as many or with one."""
    height: int | None = None
    """Pixels to which the images are scaled and cut; default: as they are."""
    width: int | None = None
    """Pixels to which the images are scaled and cut; default: as they are."""
    prompt: flags.Texts = ()
    """Text to draw, for a model of text; default: the empty text."""
    negative_prompt: flags.Text = ""
    """Text that guidance leads away from; default: the empty text."""
    labels: flags.Classes = ()
    """Classes, by id, or by name if the run keeps names; default: no class in particular."""
    num_images: int = 1
    """Images per pair of image and prompt or label."""
    guidance_scale: float | None = None
    """Classifier-free guidance; default: 7.5 with a prompt, 1.5 with a label, else 1, which samples
    without."""


def in_folder(options: Any) -> tuple[Any, list[str]]:
    """(options whose --images, and --masks, are files; names without ending of those of a folder).

    A folder of masks has one for each image, of its name. ValueError for a folder without pictures,
    and for an image without a mask.
    """
    folder = options.images[0] if len(options.images) == 1 else ""
    if not folder or not epath.Path(folder).is_dir():
        return options, []
    paths = list(pictures_in(epath.Path(folder), depth=0))
    if not paths:
        raise ValueError(f"--images {folder}: holds no pictures")
    options = dataclasses.replace(options, images=tuple(map(str, paths)))
    masks = getattr(options, "masks", ())
    if len(masks) == 1 and epath.Path(masks[0]).is_dir():
        known = {path.stem: str(path) for path in pictures_in(epath.Path(masks[0]), depth=0)}
        lacking = [path.name for path in paths if path.stem not in known]
        if lacking:
            raise ValueError(f"--masks {masks[0]}: has no mask named as {lacking[0]}")
        options = dataclasses.replace(options, masks=tuple(known[path.stem] for path in paths))
    return options, [path.stem for path in paths]


class Asked(NamedTuple):
    """Conditions that a model is asked to draw, n of them."""

    batch: dict[str, np.ndarray]
    """Input of `conditioning.from_batch`, arrays [n, ...]."""
    names: list[str]
    """Part of a file name for each; empty for nothing in particular."""
    labels: list[str]
    """Label of each in the grid."""
    scale: float
    """Guidance; 1 is without."""
    alone: Sequence[dict] = ()
    """Options that ask for each one alone."""

    @property
    def guided(self) -> bool:
        """The program samples with guidance."""
        return self.scale != 1 or composed.needs_guidance(self.batch)


def asked(model: bundle.LatentDiffusion, options: Options) -> Asked:
    """The prompts or labels of the options, or nothing in particular.

    ValueError for those that the model cannot read.
    """
    cond, text = model.config.cond, schema.text_of(model.config.cond)
    is_class = isinstance(cond, schema.ClassCondConfig)
    for flag, given, known, of in (
        ("--prompt", options.prompt, text, "text"),
        ("--negative-prompt", options.negative_prompt, text, "text"),
        ("--labels", options.labels, is_class, "classes"),
    ):
        if given and not known:
            kind = conditioning.name_of(cond)
            raise ValueError(f"{flag}: {options.model} is trained with {kind}, not with {of}")
    if options.labels:
        return _classes(model, options)
    if text is not None and (options.prompt or options.negative_prompt):
        check_tokenizer(model, options.model)
        prompts = options.prompt or ("",)
        batch = text2img.read(model, options, prompts, [options.negative_prompt] * len(prompts))
        scale = 7.5 if options.guidance_scale is None else options.guidance_scale
        alone = [{"prompt": [p]} for p in prompts]
        names = [text2img.slug(p) for p in prompts]
        return Asked(batch, names, [p[:24] for p in prompts], scale, alone)
    if options.guidance_scale not in (None, 1):
        raise ValueError(
            f"--guidance-scale {options.guidance_scale}: nothing is asked for, so there is nothing"
            " to guide; leave it at 1, or give --prompt or --labels to a model of text or classes"
        )
    beside = isinstance(cond, schema.InpaintCondConfig)
    batch = {} if beside else null_batch(model, options.model)
    return Asked(batch, [""], [""], 1.0)


def _classes(model: bundle.LatentDiffusion, options: Options) -> Asked:
    cond, labels = model.config.cond, label_ids(model, options.labels)
    default = 1.5 if cond.null_class else 1.0
    scale = default if options.guidance_scale is None else options.guidance_scale
    if scale != 1 and not cond.null_class:
        raise ValueError(
            f"--guidance-scale {scale}: {options.model} has no null class; sample with 1"
        )
    batch = {"label": np.asarray(labels, np.int32)}
    names = [f"class{label}" for label in labels]
    alone = [{"labels": [label]} for label in labels]
    return Asked(batch, names, [str(label) for label in labels], scale, alone)


class Pairs(NamedTuple):
    """The image and the condition of every picture to be drawn, N of them."""

    image: np.ndarray
    """Index of its image, int [N]."""
    asked: np.ndarray
    """Index of its condition in `Asked`, int [N]."""
    names: list[str]
    """File names without ending, [N]."""
    details: list[dict]
    """Settings of each PNG beside the options, [N]."""
    row_labels: list[str]
    """Labels of the grid's rows, one for each pair."""


def pairs(options: Options, what: Asked, stems: Sequence[str] = ()) -> Pairs:
    """Every image with its prompt or label, num_images times.

    stems: names of the images, for as many pictures of one each.
    ValueError if there are several of both, and not as many.
    """
    images, count = len(options.images), len(what.names)
    total = max(images, count)
    if {images, count} - {1, total}:
        raise ValueError(
            f"{images} --images and {count} of --prompt or --labels: give as many, or one of either"
        )
    every = np.repeat(np.arange(total), options.num_images)
    image, which = every % images, every % count
    names, details = [], []
    for i, (a, b) in enumerate(zip(image, which, strict=True)):
        parts = (text2img.slug(epath.Path(options.images[a]).stem), what.names[b])
        named = "_".join(part for part in parts if part)
        names.append(f"{i:05d}_{named}_seed{options.seed}")
        path = options.images[a]
        alone = what.alone[b] if what.alone else {}
        details.append(
            {"index": i, "image": path, "images": [path], "asked": what.labels[b], **alone}
        )
    if len(stems) == len(names) and len({*stems, "grid"}) > len(stems):
        names = list(stems)
    return Pairs(
        image, which, names, details, [what.labels[b] for b in range(count)] * (total // count)
    )


def side(options: Options) -> tuple[int | None, int | None]:
    """--height and --width."""
    return options.height, options.width


def channels(model: bundle.LatentDiffusion) -> int:
    """Channels of the images of a model."""
    return getattr(model.config.first_stage, "in_channels", model.config.first_stage.embed_dim)
