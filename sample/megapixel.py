"""Images beyond the training size: `ldm-sample megapixel --model RUN --out DIR --height 2048 ...`.

Three ways, for models of semantic maps, small images, text, classes, or of neither:

    (no flag)         the whole image at once: UNet and decoder are convolutional
    --window, --tile  overlapping windows, blended at every step; decoding tile by tile. Saves
                      memory, and the UNet sees the size that it was trained on
    --space N         one image over N devices, with the pixels of one device
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from etils import epath
from tyro.conf import arg

from ldm_jax import bundle, conditioning, schema, sharding
from ldm_jax.large import tiling, windows
from ldm_jax.runtime import flags
from ldm_jax.runtime.log import LOG
from ldm_jax.sample import editing, semantic, superres
from ldm_jax.sample.draw import draw
from ldm_jax.sample.inputs import read_images
from ldm_jax.sample.options import latent_shape, open_model
from ldm_jax.sample.request import Request

NAME = "megapixel"
WAY = ("window", "stride", "at_once", "window_clip", "tie_clip", "tile", "tile_levels", "space")


@dataclasses.dataclass(frozen=True)
class Options(editing.Options):
    """Images larger than those a model was trained on. Sizes are in pixels of the result."""

    height: int | None = None
    """Pixels; default: the training size, or that of --maps and --images. Small --images are scaled
    to cover the size that gives this height and width, and cut at their centre."""
    width: int | None = None
    """Pixels; default: as for height."""
    images: flags.Files = ()
    """Small images, for a model of super-resolution."""
    maps: flags.Files = ()
    """Segmentation maps as large as the result, for a model of semantic synthesis."""
    palette: flags.OptionalFile = None
    """JSON file with the colours of the classes in --maps, as in `ldm-sample semantic`."""
    noise_level: int | None = None
    """Noise added to the small images, by Stable Diffusion's upscaler only; default: 20."""
    window: Annotated[tuple[int, ...], arg(metavar="HEIGHT WIDTH", help_behavior_hint="")] = ()
    """Height and width of overlapping windows, or one number for both. Default: no windows."""
    stride: Annotated[tuple[int, ...], arg(metavar="DOWN ACROSS", help_behavior_hint="")] = ()
    """From one window to the next, down and across; default: half a window."""
    at_once: int | None = None
    """Windows of an image in one call of the UNet; fewer take less memory. Default: all."""
    window_clip: Annotated[tuple[float, float], arg(metavar="LEAST GREATEST")] = (0.01, 0.5)
    """Least and greatest weight of a pixel, which falls towards the border of its window."""
    tie_clip: Annotated[tuple[float, float] | None, arg(metavar="LEAST GREATEST")] = None
    """Least and greatest weight of a window, which falls towards the border of the image; default:
    all weigh the same."""
    tile: Annotated[tuple[int, ...], arg(metavar="HEIGHT WIDTH", help_behavior_hint="")] = ()
    """Height and width of the tiles that are decoded one after another, overlaps included, or one
    number for both. Default: decode in one pass."""
    tile_levels: int = 2
    """Number of the decoder's highest resolutions that are tiled; the others run whole."""
    space: int = 1
    """Devices that share an image, split along its height; -1: all."""
    batch_size: int | None = None
    """Most images per call of the compiled sampler, over all devices; default: one for each device,
    or for each --space of them."""


def main(options: Options) -> int:
    """Writes num_images images of every map, small image, prompt or label."""
    return draw(request(options))


def request(options: Options) -> Request:
    """The request of the options. ValueError for options that the model does not allow."""
    check(options)
    mesh = sharding.make_mesh(schema.MeshConfig())
    if options.space != 1:
        mesh = sharding.spatial_mesh(options.space)
    alone = options.export is not None or options.from_export is not None
    if options.batch_size is None:
        size = 1 if alone else mesh.shape["data"] * mesh.shape["fsdp"]
        options = dataclasses.replace(options, batch_size=size)
    model, mesh, options = open_model(options, mesh)
    asked = inputs_for(model, options)
    wrap_model, decode = way(model, options, mesh, asked.shape)
    return Request(
        NAME,
        dataclasses.replace(options, guidance_scale=asked.scale),
        model,
        mesh,
        shape=asked.shape,
        guided=asked.scale != 1,
        batch=asked.batch,
        names=asked.names,
        details=asked.details,
        row_labels=asked.row_labels,
        wrap_model=wrap_model,
        decode=decode,
        program={name: np.asarray(getattr(options, name)).tolist() for name in WAY},
    )


def check(options: Options) -> None:
    """ValueError for ways that exclude each other, before anything is read."""
    if options.space != 1 and (options.window or options.tile):
        flag = "--window" if options.window else "--tile"
        raise ValueError(
            f"--space {options.space} with {flag}: an image over several devices is computed whole;"
            " give one of them"
        )
    for name in ("stride", "at_once", "tie_clip"):
        if getattr(options, name) and not options.window:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is an option of windows: give --window too")
    for flag, (low, high) in (
        ("--window-clip", options.window_clip),
        ("--tie-clip", options.tie_clip or (0.1, 1)),
    ):
        if not 0 < low <= high:
            raise ValueError(f"{flag} {low:g} {high:g}: give two positive weights, the least first")
    if options.space < 1 and options.space != -1:
        raise ValueError(f"--space {options.space}: give a number of devices, or -1 for all")
    if options.maps and (options.height or options.width):
        raise ValueError("--height and --width are those of --maps; leave them out")


# --- windows, tiles and devices
# -----------------------------------------------------------------------------------------


def way(
    model: bundle.LatentDiffusion, options: Options, mesh: Any, shape: tuple[int, int, int]
) -> tuple[Callable | None, Callable | None]:
    """`wrap_model` and `decode` of `generate`. ValueError for sizes that do not fit."""
    if options.space != 1:
        return spread(model, mesh, shape)
    wrap_model = decode = None
    if options.window:
        cut = windows_of(model, options)
        windows.windowed(lambda x, t, cond: x, **cut)  # refuses impossible sizes at once
        wrap_model = lambda net: windows.windowed(net, **cut)  # noqa: E731
        count = windows.count(*shape[:2], cut["window"], cut["stride"])
        LOG.info(f"{count} windows at every step, {min(options.at_once or count, count)} at a time")
    if options.tile:
        how = {"tile": pair("--tile", options.tile), "levels": options.tile_levels}
        stage = model.first_stage
        decode = lambda params, z: tiling.decode(stage, params, z, 1.0, **how)  # noqa: E731
    return wrap_model, decode


def windows_of(model: bundle.LatentDiffusion, options: Options) -> dict[str, Any]:
    """Arguments of `windows.windowed`, in pixels of the latent."""
    down, side = model.config.first_stage.downsample, pair("--window", options.window)
    *window, _ = latent_shape(model, *side, where="--window: ")
    stride = pair("--stride", options.stride) if options.stride else None
    if stride is None:
        stride = tuple(max(1, n // 2) * down for n in window)
    for pixels in stride:
        if pixels < down or pixels % down:
            near = max(1, round(pixels / down)) * down
            raise ValueError(
                f"--stride {pixels} is not a multiple of {down}, by which the first stage"
                f" downsamples: take {near}"
            )
    return {
        "window": tuple(window),
        "stride": tuple(n // down for n in stride),
        "clip": options.window_clip,
        "tie_clip": options.tie_clip,
        "at_once": options.at_once,
    }


def spread(
    model: bundle.LatentDiffusion, mesh: Any, shape: tuple[int, int, int]
) -> tuple[Callable, Callable]:
    """As `way`, with the height of every image over the axis `space` of the mesh."""
    space, down = mesh.shape["space"], model.config.first_stage.downsample
    if shape[0] % space:
        step = math.lcm(down * 2 ** (len(model.config.unet.channel_mult) - 1), down * space)
        height = shape[0] * down
        below, above = height // step * step, (height // step + 1) * step
        near = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"--space {space}: the height {height} cannot be split among so many: take {near}"
        )
    where = sharding.image_sharding(mesh)
    split = lambda x: jax.lax.with_sharding_constraint(x, where)  # noqa: E731

    def wrap_model(net: Callable) -> Callable:
        def run(x, t, cond):
            concat = None if cond.concat is None else split(cond.concat)
            return split(net(split(x), t, cond._replace(concat=concat)))

        return run

    def decode(params: dict, z: jax.Array) -> jax.Array:
        return split(model.first_stage.apply({"params": params}, split(z), method="decode"))

    LOG.info(f"each of {space} devices has {shape[0] // space * down} rows of an image")
    return wrap_model, decode


def pair(flag: str, values: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of one or two numbers."""
    if len(values) not in (1, 2) or min(values) < 1:
        given = " ".join(map(str, values))
        raise ValueError(f"{flag} {given}: give height and width, or one number for both")
    return values if len(values) == 2 else values * 2


# --- conditions
# ----------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """Arrays and labels of every image."""

    batch: dict[str, np.ndarray]
    """Input of `conditioning.from_batch`, [N, ...] for N images."""
    shape: tuple[int, int, int]
    """(h, w, c) of the latent."""
    names: list[str]
    """File name of every image."""
    details: list[dict]
    """Settings of every image for its PNG."""
    row_labels: list[str]
    """Labels of the grid's rows."""
    scale: float
    """Guidance; 1 is without."""


def inputs_for(model: bundle.LatentDiffusion, options: Options) -> Inputs:
    """The inputs of the options. ValueError for inputs that the model cannot read."""
    cond = model.config.cond
    if isinstance(cond, schema.SemanticCondConfig):
        refuse(options, "maps", "palette")
        return from_maps(model, options)
    if isinstance(cond, schema.SuperResCondConfig) or superres.upscaler(model) is not None:
        refuse(options, "images", "noise_level", "prompt", "negative_prompt")
        return from_images(model, options)
    if isinstance(cond, schema.ClassCondConfig | schema.TextCondConfig | None):
        refuse(options, "prompt", "negative_prompt", "labels")
        return from_prompts_or_labels(model, options)
    raise ValueError(
        f"{options.model}: is trained with {conditioning.name_of(cond)}; {NAME} takes models"
        " of semantic maps, small images, text, classes, or without condition"
    )


def refuse(options: Options, *known: str) -> None:
    """ValueError for a flag that another kind of model takes."""
    every = ("images", "maps", "palette", "noise_level", "prompt", "negative_prompt", "labels")
    for name in every:
        if name not in known and getattr(options, name):
            flag, flags = (
                ", ".join("--" + n.replace("_", "-") for n in names) for names in ([name], known)
            )
            raise ValueError(f"{flag}: {options.model} is of another kind, which takes {flags}")


def from_prompts_or_labels(model: bundle.LatentDiffusion, options: Options) -> Inputs:
    """Inputs from prompts, labels, or nothing in particular."""
    what = editing.asked(model, options)
    shape = latent_shape(model, options.height, options.width)
    every = np.repeat(np.arange(len(what.names)), options.num_images).tolist()
    alone = what.alone or [{}]
    details = [{"asked": what.labels[j], **alone[j]} for j in every]
    batch = {name: x[every] for name, x in what.batch.items()}
    labels = what.labels if any(what.labels) else []
    stems = [f"_{what.names[j]}" if what.names[j] else "" for j in every]
    names = [f"{i:05d}{stem}_seed{options.seed}" for i, stem in enumerate(stems)]
    return Inputs(batch, shape, names, details, labels, what.scale)


def from_maps(model: bundle.LatentDiffusion, options: Options) -> Inputs:
    """Inputs from segmentation maps."""
    if not options.maps:
        raise ValueError("give --maps FILE.png")
    colours = None if options.palette is None else semantic.read_palette(options.palette)
    maps = [semantic.read_map(path, colours) for path in options.maps]
    semantic.check(model, options, maps)
    shape = latent_shape(model, *maps[0].shape, f"{options.maps[0]}: ")
    batch = {"segmentation": np.repeat(np.stack(maps), options.num_images, axis=0)}
    scale = 1.0 if options.guidance_scale is None else options.guidance_scale
    return from_files(options, "maps", batch, shape, scale)


def from_images(model: bundle.LatentDiffusion, options: Options) -> Inputs:
    """Inputs from small images, and a prompt for all of them where the model reads one."""
    if len(options.prompt) > 1:
        raise ValueError(f"{len(options.prompt)} of --prompt: one goes with all --images")
    latent_shape(model, options.height, options.width)
    fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(superres.Options)}
    fields["prompt"] = "".join(options.prompt)
    small = superres.with_defaults(model, superres.Options(**fields))
    factor = model.config.first_stage.downsample
    side = tuple(None if n is None else n // factor for n in (options.height, options.width))
    low = read_images(options.images, side, channels=model.config.first_stage.in_channels)
    height, width = (n * factor for n in low.shape[1:3])
    shape = latent_shape(model, height, width, f"{options.images[0]}: {factor} times its ")
    batch = superres.inputs(model, small, np.repeat(low, options.num_images, axis=0))
    return from_files(options, "images", batch, shape, small.guidance_scale)


def from_files(options: Options, name: str, batch: dict, shape: tuple, scale: float) -> Inputs:
    """Inputs from the files of the option `name`."""
    paths = getattr(options, name)
    every = [path for path in paths for _ in range(options.num_images)]
    details = [{"asked": path, name: [path]} for path in every]
    labels = [epath.Path(path).stem[:24] for path in paths]
    return Inputs(batch, shape, superres.named(every, options.seed), details, labels, scale)
