"""Segmentation map to image: `ldm-sample semantic --model PATH --out DIR --maps street.png`."""

import dataclasses

import numpy as np
from etils import epath

from ldm_jax import bundle, conditioning, schema
from ldm_jax.runtime import flags, images, reading
from ldm_jax.sample import superres
from ldm_jax.sample.draw import draw
from ldm_jax.sample.options import Options, latent_shape, open_model
from ldm_jax.sample.request import Request

NAME = "semantic"
LOSSY = ("JPEG", "MPO", "WEBP")


@dataclasses.dataclass(frozen=True)
class Options(Options):
    """Images of segmentation maps, by a model of semantic synthesis."""

    maps: flags.Files = ()
    """PNG files as large as the image, all of one size: grey or palette images whose values are
    class ids, or images in the colours of --palette. Each gets num_images images and a row of the
    grid."""
    palette: flags.OptionalFile = None
    """JSON file with the colours of the classes: a list of [red, green, blue] numbered from 0, or
    an object of id and colour."""
    guidance_scale: float = 1.0
    """Guidance away from an image without a map; 1 samples without it, at half the cost."""
    batch_size: int = 8
    """Most images per call of the compiled sampler, over all devices."""


def main(options: Options) -> int:
    """Writes num_images images of every map."""
    return draw(request(options))


def request(options: Options) -> Request:
    """The request of the options. ValueError for options that the model does not allow."""
    if not options.maps:
        raise ValueError("give --maps FILE.png")
    colours = None if options.palette is None else read_palette(options.palette)
    maps = [read_map(path, colours) for path in options.maps]
    model, mesh, options = open_model(options)
    check(model, options, maps)
    every = [path for path in options.maps for _ in range(options.num_images)]
    return Request(
        NAME,
        options,
        model,
        mesh,
        shape=latent_shape(model, *maps[0].shape, f"{options.maps[0]}: "),
        guided=options.guidance_scale != 1,
        batch={"segmentation": np.repeat(np.stack(maps), options.num_images, axis=0)},
        names=superres.named(every, options.seed),
        details=[{"map": path, "maps": [path]} for path in every],
        row_labels=[epath.Path(path).stem[:24] for path in options.maps],
    )


def check(model: bundle.LatentDiffusion, options: Options, maps: list[np.ndarray]) -> None:
    """ValueError if the model draws from no maps, or not from these."""
    cond = model.config.cond
    if not isinstance(cond, schema.SemanticCondConfig):
        kind = conditioning.name_of(cond)
        raise ValueError(f"{options.model}: is trained with {kind}, not with segmentation maps")
    for path, ids in zip(options.maps, maps, strict=True):
        if ids.shape != maps[0].shape:
            raise ValueError(
                f"{path}: is {ids.shape[0]}x{ids.shape[1]} and {options.maps[0]} is"
                f" {maps[0].shape[0]}x{maps[0].shape[1]} (height x width): give maps of one size"
            )
        if ids.min() < 0 or ids.max() >= cond.num_classes:
            y, x = np.argwhere((ids < 0) | (ids >= cond.num_classes))[0]
            raise ValueError(
                f"{path}: holds class {ids[y, x]} (at row {y}, column {x}), but the model has"
                f" {cond.num_classes}: 0..{cond.num_classes - 1}"
            )


def read_map(path: str, colours: dict[tuple[int, ...], int] | None = None) -> np.ndarray:
    """Class ids, int32 [H, W], of a grey or palette image, or with `colours` of one in colours.

    ValueError names the file, and its fault.
    """
    try:
        data = reading.read_bytes(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: does not exist; give a PNG file") from error
    try:
        with images.open_picture(data) as image:
            image.load()
            kind, mode = image.format, image.mode
            grey = mode in ("1", "L", "P", "I") or mode.startswith("I;")
            values = np.asarray(image if grey and colours is None else image.convert("RGB"))
    except Exception as error:  # Pillow raises errors of many classes, see `transforms`
        raise ValueError(f"{path}: is not an image, or a broken one ({error})") from error
    if kind in LOSSY:
        raise ValueError(f"{path}: is {kind}, whose compression changes class ids; give a PNG")
    if values.ndim == 2:
        return values.astype(np.int32)
    if colours is None:
        raise ValueError(
            f"{path}: is in colours ({mode}); give --palette FILE.json, or a grey or palette PNG"
            " whose values are class ids"
        )
    present, where = np.unique(values.reshape(-1, 3), axis=0, return_inverse=True)
    known = [colours.get(tuple(colour)) for colour in present.tolist()]
    if None in known:
        y, x = np.argwhere(where.reshape(values.shape[:2]) == known.index(None))[0]
        raise ValueError(
            f"{path}: the colour {present[known.index(None)].tolist()} (at row {y}, column {x}) is"
            f" none of the {len(colours)} of --palette"
        )
    return np.asarray(known, np.int32)[where].reshape(values.shape[:2])


def read_palette(path: str) -> dict[tuple[int, ...], int]:
    """{(red, green, blue): class id} from a JSON file. ValueError names its fault."""
    data = reading.read_json(path, "give --palette a JSON file")
    if not isinstance(data, list | dict) or not data:
        raise ValueError(f"--palette {path}: give a list of [red, green, blue], or {{id: colour}}")
    colours = {}
    for label, colour in data.items() if isinstance(data, dict) else enumerate(data):
        fits = isinstance(colour, list) and len(colour) == 3 and set(colour) <= set(range(256))
        if not fits or not str(label).isdecimal():
            raise ValueError(
                f"--palette {path}: {label!r}: {colour!r} is not an id and [red, green, blue] in"
                " 0..255"
            )
        if colours.setdefault(tuple(colour), int(label)) != int(label):
            raise ValueError(f"--palette {path}: the colour {colour} stands there twice")
    return colours
