"""Repeat an image from the settings in its PNG: `ldm-sample again IMAGE.png --out DIR`.

A PNG is untrusted data. Of its settings only those that shape the picture (SHAPING) are used, each
checked for the type on the command line; none of them decides what is written, or where. Input
files must have the hashes in the PNG.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import numpy as np
from etils import epath
from tyro.conf import Positional, arg

from ldm_jax import finite
from ldm_jax.prompting import parameters
from ldm_jax.runtime import flags, images, reading, storage
from ldm_jax.runtime.log import LOG
from ldm_jax.sample import exported, generate, hosts, write
from ldm_jax.sample.draw import draw, refuse_lost
from ldm_jax.sample.request import Call, Request
from ldm_jax.schema import serialize

SHAPING = frozenset(
    (
        *("model", "step", "ema", "config", "variant", "tokenizer", "dtype", "from_export"),
        *("steps", "solver", "spacing", "spacing_rule", "eta"),
        *("guidance_scale", "guidance_rescale"),
        *("guidance_interval", "dynamic_threshold", "quantize_x0", "preview"),
        *("lora", "ignore_unknown", "embedding", "clip_skip"),
        *("prompt_syntax", "emphasis"),
        *(
            "noise_source",
            "eta_noise_seed_delta",
            "subseed",
            "subseed_strength",
            "seed_resize_from",
        ),
        *("image_format", "image_quality"),
        *("seed", "seeds", "first_index", "num_images", "batch_size", "init_latents"),
        *("height", "width", "labels", "prompt", "negative_prompt", "images", "masks", "pad"),
        *("hires_scale", "hires_size", "hires_upscaler", "hires_steps", "hires_strength"),
        *("resize_mode", "mask_invert"),
        *("content", "only_masked", "padding", "mask_blur"),
        *("strength", "noise_level", "maps", "palette", "boxes", "class_names"),
        *("window", "stride", "at_once", "window_clip", "tie_clip", "tile", "tile_levels", "space"),
        *("clip", "clip_tokenizer", "query_image", "database", "neighbours", "include_query"),
    )
)
"""Options of all tasks that a PNG may set."""
MAX_BATCH = 4096
"""Largest batch of a program that a PNG may ask for."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Repeat an image of ldm-sample, and compare the two pixel for pixel.

    Everything that it was made from must be there: the model and the files, unchanged. On the same
    kind and number of devices and with the same version of JAX the images are equal.
    """

    image: Annotated[str, Positional, arg(metavar="IMAGE.png")]
    """PNG file that ldm-sample wrote."""
    out: flags.Dir = "again"
    """Folder for the new one; made if missing."""
    model: Annotated[str | None, arg(metavar="PATH")] = None
    """Present path of the model; default: the path in the PNG."""
    overwrite: bool = False
    """Write into a folder that already holds images."""


def main(options: Options, tasks: Mapping[str, types.ModuleType]) -> int:
    """Writes the image under the same name. tasks: the modules by name."""
    foreign = None if options.model is None else of_others(options, tasks["text2img"])
    if foreign is not None:
        return draw(foreign)
    kept = write.read_settings(options.image)
    task = tasks.get(str(kept.get("task")))
    if "grid" in kept:
        raise ValueError(f"{options.image}: is a grid; give one of its {kept['grid']!r:.20} images")
    if "call" not in kept or not hasattr(task, "request"):
        raise ValueError(
            f"{options.image}: does not say how it was made (task {kept.get('task')!r:.40});"
            " older versions and other programs leave that out"
        )
    with reading.refusals(options.image, "it is not as ldm-sample wrote it"):
        facts = facts_of(kept)
        asked = restored(task.Options, kept, options)
        asked = confirmed(asked, facts["files"], options.image)
    size, index = facts["call"]
    LOG.info(f"{options.image}: {kept['task']} by the model {asked.model}")
    if write.made_with()["device"] != facts["made_with"].get("device"):  # as many images on each
        size = -(-size // jax.device_count()) * jax.device_count()
        asked = dataclasses.replace(asked, batch_size=size)
    if hasattr(task, "writing_below"):
        asked = task.writing_below(asked, options.out)
    what = task.request(asked).replaced(guided=facts["guided"])
    place = place_of(what, facts["index"], options.image)
    call = Call(np.full(size, place), np.array([index]))
    name = epath.Path(options.image).stem
    what = dataclasses.replace(what, names=[name] * what.count)
    settings = {place: kept}

    out = write.open_out(what.options)
    run = exported.read(what)[0] if what.options.from_export is not None else None
    with hosts.together():
        (made,) = generate.made(what, [call], run)
        refuse_lost(write.part(out, what, made, settings), what)
    new = write.path_of(out, what.options, name)
    LOG.info(f"{new}: {compared(new, options.image, kept)}")
    return 0


def of_others(options: Options, task: types.ModuleType) -> Request | None:
    """The request of a picture by another program: webui, NovelAI or ComfyUI; None for our own.

    ValueError for one that says nothing. A warning tells what of its settings is not followed.
    """
    info = images.read_info(options.image)
    if "ldm_jax" in info:
        return None
    with reading.refusals(options.image, "it is not as webui, NovelAI or ComfyUI write it"):
        known = parameters.of_info(info, options.image)
        if known is None:
            raise ValueError("says nothing of how it was made")
        given, left = parameters.options(known)
    if left:
        LOG.warning(f"{options.image}: not followed: {'; '.join(left)[:1000]}")
    to = {"model": options.model, "out": options.out, "overwrite": options.overwrite}
    asked = task.Options(**to, **given)
    finite.check_fields(asked)
    return task.request(asked)


FACTS = {
    "call": tuple[int, int],
    "index": int,
    "guided": bool,
    "files": dict[str, str],
    "made_with": dict[str, str],
}


def facts_of(kept: dict[str, Any]) -> dict[str, Any]:
    """Facts of a PNG beside options. ValueError names one of a wrong type or range."""
    facts = {name: serialize.typed(kept.get(name), hint, name) for name, hint in FACTS.items()}
    size, place = facts["call"]
    if not 0 <= place < size <= MAX_BATCH:
        raise ValueError(f"call {[size, place]} is no place in a batch of at most {MAX_BATCH}")
    return facts


def restored(kind: type, kept: dict[str, Any], options: Options) -> Any:
    """Options of a task: those that shape the picture from the PNG, the others at their defaults.

    ValueError for a value of another type than the command line takes.
    """
    hints, given = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if field.name in kept and field.name in SHAPING:
            value = kept[field.name]
            if isinstance(field.default, tuple) and isinstance(value, str):
                value = [value]
            given[field.name] = serialize.typed(value, hints[field.name], field.name)
    given["out"], given["overwrite"] = options.out, options.overwrite
    if options.model is not None:
        given["model"] = options.model
    asked = kind(**given)
    finite.check_fields(asked)
    return asked


def confirmed(asked: Any, hashes: dict[str, str], image: str) -> Any:
    """`asked`, after a check that all input files are unchanged since the image was made.

    ValueError names a file that has changed, is gone, or has no hash in the PNG. The program of
    --from-export is code: without a hash, as in older pictures, the picture is drawn without it.
    """
    if asked.from_export is not None and asked.from_export not in hashes:
        LOG.warning(f"{image}: does not say which program {asked.from_export} was; drawn without")
        asked = dataclasses.replace(asked, from_export=None)
    for path in write.input_files(type(asked), vars(asked)):
        if path not in hashes:
            raise ValueError(f"{image}: names {path} without its hash")
        if not epath.Path(path).exists():
            raise ValueError(f"{image}: was made from {path}, which does not exist here")
        if storage.sha256(path) != hashes[path]:
            raise ValueError(f"{image}: was made from {path}, which has changed since")
    return asked


def place_of(what: Request, index: int, image: str) -> int:
    """Place in a request of the image with a number. ValueError if there is none."""
    place = index - what.options.first_index
    if not 0 <= place < what.count:
        raise ValueError(f"{image}: is number {index}, and its settings draw {what.count} images")
    return place


def compared(drawn: epath.Path, original: str, kept: dict[str, Any]) -> str:
    """Text on the difference between the new image and the old one."""
    old, new = (images.read_written(path).astype(int) for path in (original, drawn))
    if old.shape == new.shape and (old == new).all():
        return f"equal to {original}, pixel for pixel"
    here = write.made_with()
    changes = [
        f"{k} {v} -> {here.get(k)}" for k, v in kept["made_with"].items() if v != here.get(k)
    ]
    why = f" ({', '.join(changes)})" if changes else ""
    if old.shape != new.shape:
        return f"of another size than {original}{why}"
    differ = np.abs(old - new).max(-1)
    return (
        f"differs from {original}{why} in {(differ > 0).mean():.2%} of the pixels, by up to"
        f" {differ.max()} of 255"
    )
