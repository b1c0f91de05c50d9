"""Layout to image: `ldm-sample layout2img --model PATH --out DIR --boxes scene.json`."""

import dataclasses

import numpy as np
from etils import epath

from ldm_jax import conditioning, schema
from ldm_jax.data import boxes
from ldm_jax.runtime import flags
from ldm_jax.sample import superres
from ldm_jax.sample.draw import draw
from ldm_jax.sample.options import Options, latent_shape, open_model
from ldm_jax.sample.request import Request

NAME = "layout2img"


@dataclasses.dataclass(frozen=True)
class Options(Options):
    """Images of boxes with classes, by a layout model."""

    boxes: flags.Files = ()
    """JSON files: {"objects": [{"class": NAME or ID, "box": [left, top, right, bottom]}, ...]}, in
    fractions of the image or, with "size": [width, height], in pixels. Each gets num_images images
    and a row of the grid."""
    class_names: flags.OptionalFile = None
    """Names of the classes: "coco" (its 80 things), a JSON list of names or object of name and id,
    or OpenImages' class-descriptions-boxable.csv; without it, classes are ids."""
    height: int | None = None
    """Pixels; default: the size the model was trained at."""
    width: int | None = None
    """Pixels; default: the size the model was trained at."""
    guidance_scale: float = 1.0
    """Guidance away from a picture without objects; 1 samples without it, at half the cost."""
    batch_size: int = 8
    """Most images per call of the compiled sampler, over all devices."""


def main(options: Options) -> int:
    """Writes num_images images of every layout."""
    return draw(request(options))


def request(options: Options) -> Request:
    """The request of the options. ValueError for options that the model does not allow."""
    if not options.boxes:
        raise ValueError("give --boxes FILE.json")
    names = None if options.class_names is None else boxes.read_names(options.class_names)
    layouts = [boxes.read_layout(path, names) for path in options.boxes]
    model, mesh, options = open_model(options)
    cond = model.config.cond
    if not isinstance(cond, schema.LayoutCondConfig):
        kind = conditioning.name_of(cond)
        raise ValueError(f"{options.model}: is trained with {kind}, not with layouts")
    every = [path for path in options.boxes for _ in range(options.num_images)]
    return Request(
        NAME,
        options,
        model,
        mesh,
        shape=latent_shape(model, options.height, options.width),
        guided=options.guidance_scale != 1,
        batch=tokenize(cond.encoder, options.boxes, layouts, options.num_images),
        names=superres.named(every, options.seed),
        details=[{"layout": path, "boxes": [path]} for path in every],
        row_labels=[epath.Path(path).stem[:24] for path in options.boxes],
    )


def tokenize(
    encoder: schema.BERTTextConfig,
    paths: tuple[str, ...],
    layouts: list[list[boxes.Box]],
    num_images: int,
) -> dict[str, np.ndarray]:
    """`tokens` and `null_tokens` (no objects), int32 [layouts * num_images, L].

    ValueError names the file that does not fit the model.
    """
    sizes = (encoder.vocab_size, encoder.max_length)
    one_each = []
    for path, layout in zip(paths, layouts, strict=True):
        try:
            one_each.append(boxes.tokenize(layout, *sizes))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    tokens = np.repeat(np.stack(one_each), num_images, axis=0)
    null_tokens = np.repeat(boxes.tokenize([], *sizes)[None], len(tokens), axis=0)
    return {"tokens": tokens, "null_tokens": null_tokens}
