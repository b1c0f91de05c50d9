"""From what is asked, in webui's words, to the request of a sampling task."""

import dataclasses
import random
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ldm_jax import schema
from ldm_jax.adapters import textual_inversion
from ldm_jax.data.tokens import FileTokenizer
from ldm_jax.prompting import parameters
from ldm_jax.sample import class2img, img2img, inpaint, text2img, unconditional
from ldm_jax.sample.inputs import open_mask
from ldm_jax.sample.options import label_ids
from ldm_jax.sample.request import Request
from ldm_jax.sample.web import catalog, names
from ldm_jax.sample.web.asked import Asked, Img2Img, Txt2Img
from ldm_jax.sample.web.catalog import Entry
from ldm_jax.sample.web.engine import Engine, Kept
from ldm_jax.sample.web.enlarge import LDSR, Enlarger
from ldm_jax.sample.web.jobs import Watch
from ldm_jax.sample.web.limits import RefusedError
from ldm_jax.sample.web.settings import EMPHASIS, SOURCES

LEADING = ("ddim", "ddpm", "plms")
"""Solvers whose steps are those of latent diffusion's own samplers, where a model has these."""
RESIZE_MODES = ("just", "crop", "fill", "latent")
FILLS = ("fill", "original", "noise", "nothing")
UPSCALERS = {shown: name for name, shown in parameters.UPSCALERS.items()}
"""{name: --hires-upscaler}; the first six enlarge latents."""


class Place(NamedTuple):
    """What a request is made for."""

    engine: Engine
    folders: catalog.Folders
    dtype: str
    enlarger: Enlarger
    words: Kept
    """{embedding, when it changed, model: `Embedding`, or why it is none for this model}."""

    def embeddings(self, entry: Entry) -> dict[str, Any]:
        """{name: `Embedding`, or the sentence why it is none for a model}."""
        files = catalog.embeddings(self.folders)
        if not files:
            return {}
        given = text2img.Options(model=entry.path, out="", step=entry.step, dtype=self.dtype)
        model = self.engine.load(given)

        def read(file: catalog.File) -> Any:
            try:
                return textual_inversion.read(file.path, model, token=f"<{file.name}>")
            except ValueError as error:
                return str(error)

        keys = [(file, epath.Path(file.path).stat().mtime, entry.name) for file in files]
        made = (self.words.get(key, lambda key=key: read(key[0])) for key in keys)
        return dict(zip((file.name for file in files), made, strict=True))


class Asking(NamedTuple):
    """A request, its model, and the settings of the server for it."""

    asked: Asked
    entry: Entry
    settings: dict[str, Any]
    pictures: dict[str, bytes]
    """{file name: picture}: `init_0.png`, ..., `mask.png`."""


class Made(NamedTuple):
    """The request of a task."""

    request: Request
    seeds: list[int]
    """Of each picture, [N]."""
    subseeds: list[int]


def request_of(asking: Asking, place: Place, folder: str, watch: Watch) -> Made:
    """The request of a sampling task; its pictures are written into a folder.

    RefusedError or ValueError for what the model does not allow.
    """
    asked, entry = asking.asked, asking.entry
    for name, data in asking.pictures.items():
        epath.Path(folder, name).write_bytes(data)
    seed, subseed = (
        random.SystemRandom().randrange(2**32 - 2) if number == -1 else number
        for number in (asked.seed, asked.subseed)
    )
    varied = asked.subseed_strength > 0
    shared = _shared(asking, place) | {"seed": seed, "subseed": subseed if varied else 0}
    task, options = _kind(asking, shared, place)(asking, shared, place)
    if isinstance(asked, Txt2Img) and asked.enable_hr:
        if task is not text2img:
            raise RefusedError(422, f"enable_hr: {entry.title} is no model of text alone")
        options |= _hires(asked, place.enlarger.entry)
    if isinstance(asked, Img2Img):
        task, options = _from_pictures(asked, options, folder, list(asking.pictures))
    what = task.request(task.Options(**options), place.engine.load)
    if isinstance(asked, Txt2Img) and asked.enable_hr and asked.hr_upscaler == LDSR:
        what = _enlarged_by_model(what, place.enlarger, watch)
    count = range(what.count)
    if varied:
        return Made(what, [seed] * what.count, [subseed + i for i in count])
    # picture i is the first one of seed + i
    numbers = [seed + i for i in count]
    what = what.replaced(seeds=np.asarray(numbers, np.uint64), indices=np.zeros(what.count, int))
    return Made(what, numbers, [subseed] * what.count)


def _shared(asking: Asking, place: Place) -> dict[str, Any]:
    """Options that all tasks have."""
    asked, entry, split = asking.asked, asking.entry, place.engine.split
    solver, spacing = names.chosen(asked.sampler_name or asked.sampler_index, asked.scheduler)
    if spacing is None and entry.spacing == "leading" and solver not in LEADING:
        spacing = "linspace"  # exactly so many steps, as in k-diffusion
    resized = (asked.seed_resize_from_h, asked.seed_resize_from_w)
    source = SOURCES[asking.settings["randn_source"]]
    return {
        "model": entry.path,
        "out": "",
        "step": entry.step,
        "dtype": place.dtype,
        "num_images": asked.batch_size * asked.n_iter,
        "batch_size": -(-asked.batch_size // split) * split,
        "steps": asked.steps,
        "solver": solver,
        "spacing": spacing,
        "eta": (asked.eta or 0.0) if solver == "ddim" else 0.0,  # the others take none
        "subseed_strength": asked.subseed_strength,
        "seed_resize_from": resized if min(resized) > 0 else None,
        "noise_source": source,
        "eta_noise_seed_delta": 0 if source == "own" else asking.settings["eta_noise_seed_delta"],
        "height": asked.height,
        "width": asked.width,
        "progress": "none",
    }


def _kind(asking: Asking, shared: dict[str, Any], place: Place) -> Any:
    """The function that gives (task, options) for the kind of the model."""
    entry, name = asking.entry, type(asking.asked).__name__.lower()
    if entry.kind == "inpaint" and "mask.png" in asking.pictures:
        model = place.engine.load(text2img.Options(**shared))
        return _text if schema.text_of(model.config.cond) is not None else _unconditional
    kinds = {"text": _text, "class": _class, "unconditional": _unconditional}
    if entry.kind not in kinds:
        raise RefusedError(
            422,
            f"{entry.title}: is a model of {entry.kind}, which {name} does not take; choose another"
            " with sd_model_checkpoint",
        )
    return kinds[entry.kind]


def _text(asking: Asking, shared: dict[str, Any], place: Place) -> tuple[Any, dict[str, Any]]:
    asked, settings = asking.asked, asking.settings
    known, said = place.embeddings(asking.entry), f"{asked.prompt} {asked.negative_prompt}"
    fitting = [
        file
        for file in catalog.embeddings(place.folders)
        if file.name.casefold() in said.casefold() and not isinstance(known[file.name], str)
    ]
    # webui's language needs the start and end tokens of CLIP or BERT
    tokenizer = place.engine.load(text2img.Options(**shared)).tokenizer
    own = {
        "prompt": (asked.prompt,),
        "negative_prompt": asked.negative_prompt or "",
        "guidance_scale": max(asked.cfg_scale, 1.0),
        "prompt_syntax": "webui" if isinstance(tokenizer, FileTokenizer) else "plain",
        "emphasis": EMPHASIS[settings["emphasis"]],
        "clip_skip": settings["CLIP_stop_at_last_layers"],
        "lora_dir": place.folders.loras,
        "embedding": tuple(f"{f.path}=<{f.name}>" for f in fitting),
    }
    return text2img, shared | own


def _class(asking: Asking, shared: dict[str, Any], place: Place) -> tuple[Any, dict[str, Any]]:
    asked = asking.asked
    if asked.negative_prompt:
        raise RefusedError(422, "negative_prompt: the model is one of classes, without texts")
    name = asked.prompt.strip()
    if not name:
        return _unconditional(asking, shared, place)
    model = place.engine.load(class2img.Options(**shared))
    try:
        labels = label_ids(model, [name])
    except ValueError as error:
        raise RefusedError(422, str(error).replace("--labels", "prompt")) from error
    given = "cfg_scale" in asked.model_fields_set
    scale = max(asked.cfg_scale, 1.0) if given else 1.5
    if not model.config.cond.null_class:
        if given and scale != 1:
            raise RefusedError(422, f"cfg_scale {scale}: the model has no null class; take 1")
        scale = 1.0
    return class2img, shared | {"labels": labels, "guidance_scale": scale}


def _unconditional(asking: Asking, shared: dict[str, Any], place: Place) -> tuple[Any, dict]:
    del place
    for name in ("prompt", "negative_prompt"):
        if (getattr(asking.asked, name) or "").strip():
            raise RefusedError(422, f"{name}: the model draws without a text; leave it out")
    return unconditional, shared | {"guidance_scale": 1.0}


def _from_pictures(
    asked: Img2Img, options: dict[str, Any], folder: str, given: list[str]
) -> tuple[Any, dict[str, Any]]:
    """(task, options) of a request that begins with pictures."""
    files = [str(epath.Path(folder, name)) for name in given]
    strength = 0.75 if asked.denoising_strength is None else asked.denoising_strength
    mode = RESIZE_MODES[asked.resize_mode]
    options |= {
        "images": tuple(path for path in files if not path.endswith("mask.png")),
        "strength": strength,
        "resize_mode": mode,
    }
    masks = tuple(path for path in files if path.endswith("mask.png"))
    if not masks or not np.asarray(open_mask(masks[0])).any():  # blank: the whole picture changes
        return img2img, options
    if mode == "latent":
        raise RefusedError(422, "resize_mode 3: is not for pictures with a mask; take 0, 1 or 2")
    blur = asked.mask_blur if asked.mask_blur is not None else asked.mask_blur_x
    own = {
        "masks": masks,
        "mask_invert": asked.inpainting_mask_invert == 1,
        "content": FILLS[asked.inpainting_fill],
        "only_masked": asked.inpaint_full_res,
        "padding": asked.inpaint_full_res_padding,
        "mask_blur": float(blur),
    }
    return inpaint, options | own


def _enlarged_by_model(what: Request, enlarger: Enlarger, watch: Watch) -> Request:
    """The request whose second pass begins with what a model of super-resolution enlarged."""
    assert what.second is not None
    feed, second = what.second.feed, what.second.request
    down = second.model.config.first_stage.downsample
    size = second.shape[1] * down, second.shape[0] * down

    def fed(image: np.ndarray, z: np.ndarray) -> dict[str, np.ndarray]:
        return feed(enlarger.super_resolved(image, size, watch), z)

    details = [{**one, "hires_upscaler": LDSR} for one in what.details]
    return dataclasses.replace(what, second=what.second._replace(feed=fed), details=details)


def larger(asked: Txt2Img, size: int) -> tuple[int, int]:
    """(width, height) after the second pass, or more."""
    width, height = asked.width or size, asked.height or size
    if not (asked.hr_resize_x or asked.hr_resize_y):
        return int(width * asked.hr_scale), int(height * asked.hr_scale)
    wide = asked.hr_resize_x or asked.hr_resize_y * width // height
    return wide, asked.hr_resize_y or asked.hr_resize_x * height // width


def _hires(asked: Txt2Img, entry: Entry | None) -> dict[str, Any]:
    """Options of the second pass; entry: the model of super-resolution, if there is one."""
    name = asked.hr_upscaler or "Latent"
    known = UPSCALERS if entry is None else UPSCALERS | {LDSR: "lanczos"}
    if name not in known:
        raise RefusedError(400, f"hr_upscaler {name!r:.60} is not one of {', '.join(known)}")
    resized = (asked.hr_resize_y, asked.hr_resize_x)
    size = {"hires_size": resized} if any(resized) else {"hires_scale": asked.hr_scale}
    strength = 0.75 if asked.denoising_strength is None else asked.denoising_strength
    return size | {
        "hires_upscaler": known[name],
        "hires_steps": asked.hr_second_pass_steps,
        "hires_strength": strength,
    }
