"""What the page and the API share: models, settings, and one queue before one engine."""

import dataclasses
import json
import os
import random
import re
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from ldm_jax import schema
from ldm_jax.data.tokens import FileTokenizer
from ldm_jax.prompting import parameters
from ldm_jax.runtime import images
from ldm_jax.sample import class2img, img2img, inpaint, superres, text2img, unconditional, write
from ldm_jax.sample.options import label_ids
from ldm_jax.sample.request import Request, calls_of
from ldm_jax.sample.web import catalog, engine, jobs, names, pictures
from ldm_jax.sample.web.asked import Asked, Extra, ExtraBatch, ExtraSingle, Img2Img
from ldm_jax.sample.web.catalog import Entry
from ldm_jax.sample.web.jobs import Job, Watch
from ldm_jax.sample.web.limits import Limits, RefusedError
from ldm_jax.sample.web.settings import EMPHASIS, SOURCES, Settings

FILLS = ("fill", "original", "noise", "nothing")
RESIZES = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
LDSR = "LDSR"


@dataclasses.dataclass(frozen=True)
class Result:
    """Pictures of a job, and how they were made."""

    pictures: list[np.ndarray]
    """uint8 [H, W, c]."""
    settings: list[dict[str, Any]]
    """As `ldm-sample` keeps them in a picture; {} for one that was not drawn."""
    infotexts: list[str]
    """As webui keeps them."""
    seeds: list[int]
    subseeds: list[int]
    entry: Entry
    facts: dict[str, Any]
    """What the request became: sampler_name, steps, cfg_scale, width, height, clip_skip, ..."""
    files: list[str]
    """Paths of the pictures in the folder of the server, if they are kept."""

    def png(self, i: int) -> bytes:
        """A picture with its texts."""
        settings = self.settings[i] or None
        return images.png(self.pictures[i], settings, self.infotexts[i] or None)


@dataclasses.dataclass(frozen=True)
class Files:
    """Folders of the server."""

    out: str | None = None
    loras: str | None = None
    embeddings: str | None = None
    styles: str | None = None
    """A .csv file."""


class Service:
    """The server without its protocol."""

    def __init__(
        self,
        paths: Sequence[str],
        files: Files | None = None,
        limits: Limits | None = None,
        *,
        dtype: str = "float32",
        private: bool = False,
    ) -> None:
        """private: pictures do not name folders of the server."""
        self.files, self.limits = files or Files(), limits or Limits()
        self.dtype, self.private = dtype, private
        self.engine = engine.Engine()
        self.entries = catalog.entries(paths)
        self.settings = Settings(sd_model_checkpoint=self.entries[0].title)
        self.queue = jobs.Queue(self.limits.queue)
        self._random = random.SystemRandom()

    # --- what there is ----------------------------------------------------------------------------

    def models(self) -> list[Entry]:
        """The models, the first of the command first."""
        return self.entries

    @property
    def current(self) -> Entry:
        """The model of requests that do not name another."""
        return catalog.named(self.entries, self.settings.now()["sd_model_checkpoint"])

    def select(self, title: str) -> None:
        """Make another model the current one. RefusedError for an unknown one."""
        entry = catalog.named(self.entries, title)
        self.settings.change({"sd_model_checkpoint": entry.title})

    def load(self, entry: Entry) -> None:
        """Load a model now; the first request would otherwise."""
        given = text2img.Options(model=entry.path, out="", step=entry.step, dtype=self.dtype)
        self.engine.load(given)

    def samplers(self) -> list[str]:
        """Names of the samplers."""
        return list(names.samplers())

    def schedulers(self) -> list[str]:
        """Names of the schedules."""
        return list(names.SCHEDULES)

    def loras(self) -> list[catalog.File]:
        """LoRAs that prompts may name."""
        return catalog.files_in(self.files.loras)

    def embeddings(self) -> list[catalog.File]:
        """Words that prompts may hold."""
        found = catalog.files_in(self.files.embeddings)
        return [file for file in found if re.fullmatch(r"[^<>\s]+", file.name)]

    def upscalers(self) -> list[str]:
        """Names of what enlarges."""
        own = [LDSR] if any(entry.kind == "superres" for entry in self.entries) else []
        return ["None", *RESIZES, *own]

    def upscaling(self) -> Entry | None:
        """The model of LDSR."""
        return next((entry for entry in self.entries if entry.kind == "superres"), None)

    def styles(self) -> dict[str, Any]:
        """Styles by name."""
        return {}

    # --- requests ---------------------------------------------------------------------------------

    def submit(self, asked: Asked | Extra, client: str, *, look: bool = False) -> Job:
        """Put a request into the queue; its future gives a `Result`, or raises.

        client: whoever asks; look: with previews. RefusedError at once for what is out of bounds.
        """
        asked.check(self.limits)
        if isinstance(asked, Extra):
            job = self.queue.submit("extras", client, self._enlarging(asked))
        else:
            job = self.queue.submit(type(asked).__name__.lower(), client, self._drawing(asked))
        job.watch.wants_preview = look
        return job

    def _drawing(self, asked: Asked) -> Any:
        settings = self.settings.overridden(asked.override_settings)
        entry = catalog.named(self.entries, settings["sd_model_checkpoint"])
        self.limits.size(asked.width or entry.size, asked.height or entry.size)
        names.chosen(asked.sampler_name or asked.sampler_index, asked.scheduler)
        given: dict[str, bytes] = {}
        if isinstance(asked, Img2Img):
            if not asked.init_images:
                raise RefusedError(404, "Init image not found")
            for i, text in enumerate(asked.init_images):
                given[f"init_{i}.png"] = pictures.decoded(text, f"init_images[{i}]", self.limits)
            if asked.mask:
                given["mask.png"] = pictures.decoded(asked.mask, "mask", self.limits)
        asked = asked.model_copy(update=dict.fromkeys(asked.PICTURES))

        def work(watch: Watch) -> Result:
            return self._draw(asked, entry, settings, given, watch)

        return work

    def _draw(
        self, asked: Asked, entry: Entry, settings: dict, given: dict[str, bytes], watch: Watch
    ) -> Result:
        watch.does("loading")
        with tempfile.TemporaryDirectory() as folder:
            for name, data in given.items():
                epath.Path(folder, name).write_bytes(data)
            what, seeds, subseeds = self._request(asked, entry, settings, folder, list(given))
            what_is_kept = write.settings_of(what, calls_of(what))
        told = json.dumps(what_is_kept).replace(f"{folder}/", "")
        kept = [self._public(one) for one in json.loads(told)]
        watch.count = what.count
        drawn: list[tuple[int, np.ndarray]] = []
        for part in self.engine.draw(what, watch):
            drawn += zip(part.places.tolist(), part.image, strict=True)
        shown = [picture for _, picture in drawn]
        kept = [kept[place] for place, _ in drawn]
        texts = [
            self._infotext(one, picture.shape[:2], entry)
            for one, picture in zip(kept, shown, strict=True)
        ]
        height, width = (side * what.model.config.first_stage.downsample for side in what.shape[:2])
        options = what.options
        facts = {
            "sampler_name": parameters.SAMPLERS[options.solver],
            "steps": options.steps,
            "cfg_scale": options.guidance_scale,
            "width": width,
            "height": height,
            "clip_skip": options.clip_skip,
            "denoising_strength": getattr(options, "strength", None),
            "subseed_strength": options.subseed_strength,
        }
        places = [place for place, _ in drawn]
        result = Result(
            shown, kept, texts, [seeds[i] for i in places], [subseeds[i] for i in places],
            entry, facts, [],
        )  # fmt: skip
        if asked.save_images and not asked.do_not_save_samples:
            result = dataclasses.replace(result, files=self.save(result))
        return result

    def _infotext(self, settings: dict[str, Any], size: tuple[int, int], entry: Entry) -> str:
        text = {"prompt": settings.get("class", ""), **settings, "model": entry.name}
        return parameters.written(text, size)

    def _public(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings of a picture, without the folders of a server that others reach."""
        if not self.private:
            return settings
        folders = [self.files.loras, self.files.embeddings, *(e.path for e in self.entries)]
        told = json.dumps(settings)
        for folder in sorted(filter(None, folders), key=len, reverse=True):
            told = told.replace(json.dumps(folder)[1:-1], os.path.basename(folder.rstrip("/")))
        return json.loads(told)

    def _request(
        self, asked: Asked, entry: Entry, settings: dict, folder: str, given: list[str]
    ) -> tuple[Request, list[int], list[int]]:
        """(request, seed and subseed of each picture)."""
        seed, subseed = (
            self._random.randrange(2**32 - 2) if number == -1 else number
            for number in (asked.seed, asked.subseed)
        )
        count, split = asked.batch_size * asked.n_iter, self.engine.split
        solver, spacing = names.chosen(asked.sampler_name or asked.sampler_index, asked.scheduler)
        varied = asked.subseed_strength > 0
        resized = (asked.seed_resize_from_h, asked.seed_resize_from_w)
        shared = {
            "model": entry.path,
            "out": "",
            "step": entry.step,
            "dtype": self.dtype,
            "num_images": count,
            "batch_size": -(-asked.batch_size // split) * split,
            "steps": asked.steps,
            "solver": solver,
            "spacing": spacing,
            "eta": (asked.eta or 0.0) if solver == "ddim" else 0.0,
            "seed": seed,
            "subseed": subseed if varied else 0,
            "subseed_strength": asked.subseed_strength,
            "seed_resize_from": resized if min(resized) > 0 else None,
            "noise_source": SOURCES[settings["randn_source"]],
            "height": asked.height,
            "width": asked.width,
            "progress": "none",
        }
        kinds = {"text": self._text, "class": self._class, "unconditional": self._unconditional}
        make = kinds.get(entry.kind)
        if entry.kind == "inpaint" and isinstance(asked, Img2Img) and "mask.png" in given:
            make = self._text if self._reads_text(shared) else self._unconditional
        if make is None:
            raise RefusedError(
                422,
                f"{entry.title}: is a model of {entry.kind}, which {type(asked).__name__.lower()}"
                " does not take; choose another with sd_model_checkpoint",
            )
        task, options = make(asked, shared, settings)
        if isinstance(asked, Img2Img):
            task, options = _from_pictures(asked, options, folder, given)
        what = task.request(task.Options(**options), self.engine.load)
        if not varied:  # picture i is the first one of seed + i
            numbers = [seed + i for i in range(what.count)]
            what = dataclasses.replace(
                what, seeds=np.asarray(numbers, np.uint64), indices=np.zeros(what.count, int)
            )
            return what, numbers, [subseed] * what.count
        return what, [seed] * what.count, [subseed + i for i in range(what.count)]

    def _reads_text(self, shared: dict[str, Any]) -> bool:
        model = self.engine.load(text2img.Options(**shared))
        return schema.text_of(model.config.cond) is not None

    def _text(self, asked: Asked, shared: dict, settings: dict) -> tuple[Any, dict]:
        embeddings = tuple(f"{file.path}=<{file.name}>" for file in self.embeddings())
        plain = text2img.Options(**shared)
        # webui's language needs the start and end tokens of CLIP or BERT
        speaks = isinstance(self.engine.load(plain).tokenizer, FileTokenizer)
        own = {
            "prompt": (asked.prompt,),
            "negative_prompt": asked.negative_prompt or "",
            "guidance_scale": max(asked.cfg_scale, 1.0),
            "prompt_syntax": "webui" if speaks else "plain",
            "emphasis": EMPHASIS[settings["emphasis"]],
            "clip_skip": settings["CLIP_stop_at_last_layers"],
            "lora_dir": self.files.loras,
            "embedding": embeddings,
        }
        return text2img, shared | own

    def _class(self, asked: Asked, shared: dict, settings: dict) -> tuple[Any, dict]:
        del settings
        name = asked.prompt.strip()
        if asked.negative_prompt:
            raise RefusedError(422, "negative_prompt: the model is one of classes, without texts")
        model = self.engine.load(class2img.Options(**shared))
        if not name:
            return self._unconditional(asked, shared, {})
        try:
            labels = label_ids(model, [name])
        except ValueError as error:
            raise RefusedError(422, str(error).replace("--labels", "prompt")) from error
        scale = max(asked.cfg_scale, 1.0) if "cfg_scale" in asked.model_fields_set else 1.5
        if not model.config.cond.null_class:
            if "cfg_scale" in asked.model_fields_set and scale != 1:
                raise RefusedError(422, f"cfg_scale {scale}: the model has no null class; take 1")
            scale = 1.0
        return class2img, shared | {"labels": labels, "guidance_scale": scale}

    def _unconditional(self, asked: Asked, shared: dict, settings: dict) -> tuple[Any, dict]:
        del settings
        for name in ("prompt", "negative_prompt"):
            if (getattr(asked, name) or "").strip():
                raise RefusedError(422, f"{name}: the model draws without a text; leave it out")
        return unconditional, shared | {"guidance_scale": 1.0}

    # --- enlarging --------------------------------------------------------------------------------

    def _enlarging(self, asked: Extra) -> Any:
        texts = [("image", asked.image)] if isinstance(asked, ExtraSingle) else []
        if isinstance(asked, ExtraBatch):
            texts = [(f"imageList[{i}]", one.data) for i, one in enumerate(asked.imageList)]
            self.limits.count(1, len(texts))
        for name in (asked.upscaler_1, asked.upscaler_2):
            if name not in self.upscalers():
                raise RefusedError(
                    400, f"upscaler {name!r:.60} is not one of {', '.join(self.upscalers())}"
                )
        given = [pictures.decoded(text, what, self.limits) for what, text in texts]
        for data, (what, _) in zip(given, texts, strict=True):
            self.limits.size(*_wanted(asked, pictures.opened(data).size), what=f"enlarged {what}")

        def work(watch: Watch) -> Result:
            watch.count = len(given)
            shown = []
            for data in given:
                shown.append(self._enlarged(asked, data, watch))
                watch.images += 1
            return Result(shown, [{}] * len(shown), [""] * len(shown), [], [], self.current, {}, [])

        return work

    def _enlarged(self, asked: Extra, data: bytes, watch: Watch) -> np.ndarray:
        small = pictures.opened(data)
        first = self._by(asked.upscaler_1, small, asked, watch)
        share = asked.extras_upscaler_2_visibility
        if share and asked.upscaler_2 != "None":
            first = Image.blend(first, self._by(asked.upscaler_2, small, asked, watch), share)
        array = np.asarray(first)
        return array if array.ndim == 3 else array[..., None]

    def _by(self, name: str, small: Image.Image, asked: Extra, watch: Watch) -> Image.Image:
        size = _wanted(asked, small.size)
        how = RESIZES.get(name, Image.Resampling.LANCZOS)
        if name == LDSR:
            small = self._super_resolved(small, size, watch)
        elif name == "None":
            return small
        return small.resize(size, how)

    def _super_resolved(
        self, small: Image.Image, size: tuple[int, int], watch: Watch
    ) -> Image.Image:
        """Enlarged by the model as often as it needs to be as large as `size`."""
        entry = self.upscaling()
        assert entry is not None
        while small.width < size[0] or small.height < size[1]:
            with tempfile.TemporaryDirectory() as folder:
                path = epath.Path(folder, "small.png")
                path.write_bytes(images.png(_array(small.convert("RGB"))))
                options = superres.Options(
                    model=entry.path, out="", step=entry.step, dtype=self.dtype,
                    images=(str(path),), batch_size=self.engine.split, progress="none",
                )  # fmt: skip
                what = superres.request(options, self.engine.load)
            (drawn,) = self.engine.draw(what, watch)
            small = pictures.of_array(drawn.image[0])
        return small

    # --- keeping ----------------------------------------------------------------------------------

    def save(self, result: Result) -> list[str]:
        """Write the pictures into the folder of the server; their paths."""
        if self.files.out is None:
            raise RefusedError(422, "save_images: the server was started without --out")
        folder = epath.Path(self.files.out, time.strftime("%Y-%m-%d"))
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(p.name[:5]) for p in folder.glob("[0-9]" * 5 + "-*.png")), default=-1)
        paths = []
        for i, seed in enumerate(result.seeds):
            path = folder / f"{number + i:05d}-{seed}.png"
            images.save_png(path, result.pictures[i], result.settings[i], result.infotexts[i])
            paths.append(str(path))
        return paths


def _from_pictures(
    asked: Img2Img, options: dict[str, Any], folder: str, given: list[str]
) -> tuple[Any, dict[str, Any]]:
    """(task, options) of a request that begins with pictures."""
    files = [str(epath.Path(folder, name)) for name in given]
    masks = tuple(path for path in files if path.endswith("mask.png"))
    starts = tuple(path for path in files if path not in masks)
    options = {
        **options,
        "images": starts,
        # each picture that it starts from is drawn as often
        "num_images": options["num_images"],
        "strength": 0.75 if asked.denoising_strength is None else asked.denoising_strength,
    }
    if not masks:
        return img2img, options
    own = {
        "masks": masks,
        "content": FILLS[asked.inpainting_fill],
        "only_masked": asked.inpaint_full_res,
        "padding": asked.inpaint_full_res_padding,
        "mask_blur": float(asked.mask_blur if asked.mask_blur is not None else asked.mask_blur_x),
    }
    return inpaint, options | own


def _wanted(asked: Extra, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of an enlarged picture."""
    if asked.resize_mode == 1:
        return asked.upscaling_resize_w, asked.upscaling_resize_h
    return tuple(round(side * asked.upscaling_resize) for side in size)  # type: ignore[return-value]


def _array(picture: Image.Image) -> np.ndarray:
    array = np.asarray(picture)
    return array if array.ndim == 3 else array[..., None]
