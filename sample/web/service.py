"""What the page and the API share: models, settings, and one queue before one engine."""

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from ldm_jax.prompting import parameters, styles
from ldm_jax.runtime import images
from ldm_jax.sample import text2img, write
from ldm_jax.sample.request import calls_of
from ldm_jax.sample.web import catalog, engine, jobs, names, pictures, translate
from ldm_jax.sample.web.asked import Asked, Extra, ExtraBatch, ExtraSingle, Img2Img, Txt2Img
from ldm_jax.sample.web.catalog import Entry, Folders
from ldm_jax.sample.web.enlarge import Enlarger, wanted
from ldm_jax.sample.web.jobs import Job, Watch
from ldm_jax.sample.web.limits import Limits, RefusedError
from ldm_jax.sample.web.settings import Settings
from ldm_jax.sample.web.translate import Asking, Place


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


class Service:
    """The server without its protocol."""

    def __init__(
        self,
        paths: Sequence[str],
        folders: Folders | None = None,
        limits: Limits | None = None,
        *,
        dtype: str = "float32",
        private: bool = False,
        decoder: str | None = None,
    ) -> None:
        """private: pictures do not name folders of the server; decoder: of previews, a file."""
        self.folders, self.limits = folders or Folders(), limits or Limits()
        self.private = private
        self.engine = engine.Engine(decoder=decoder)
        self.entries = catalog.entries(paths)
        self.settings = Settings(sd_model_checkpoint=self.entries[0].title)
        self.queue = jobs.Queue(self.limits.queue)
        large = next((entry for entry in self.entries if entry.kind == "superres"), None)
        self.enlarger = Enlarger(self.engine, large, dtype)
        kept = engine.Kept(1024)
        self.place = Place(self.engine, self.folders, dtype, self.enlarger, kept)

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
        given = text2img.Options(model=entry.path, out="", step=entry.step, dtype=self.place.dtype)
        self.engine.load(given)

    def samplers(self) -> list[str]:
        """Names of the samplers."""
        return list(names.samplers())

    def schedulers(self) -> list[str]:
        """Names of the schedules."""
        return list(names.SCHEDULES)

    def loras(self) -> list[catalog.File]:
        """LoRAs that prompts may name."""
        return catalog.files_in(self.folders.loras)

    def embeddings(self) -> dict[str, Any]:
        """{name: `Embedding`, or the sentence why it is none for the current model}."""
        entry = self.current
        return self.place.embeddings(entry) if entry.kind == "text" else {}

    def upscalers(self) -> list[str]:
        """Names of what enlarges."""
        return self.enlarger.names()

    def styles(self) -> dict[str, styles.Style]:
        """Styles by name."""
        return {} if self.folders.styles is None else styles.read(self.folders.styles)

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

    def _drawing(self, asked: Asked) -> Callable[[Watch], Result]:
        """The work of a request for pictures. RefusedError for what can be told without a model."""
        settings = self.settings.overridden(asked.override_settings)
        entry = catalog.named(self.entries, settings["sd_model_checkpoint"])
        self.limits.size(asked.width or entry.size, asked.height or entry.size)
        if isinstance(asked, Txt2Img) and asked.enable_hr:
            self.limits.size(*translate.larger(asked, entry.size), what="the enlarged picture")
        names.chosen(asked.sampler_name or asked.sampler_index, asked.scheduler)
        if asked.save_images and self.folders.out is None:
            raise RefusedError(422, "save_images: the server was started without --out")
        if asked.styles:  # before the model, whose words may be other ones
            asked = self._styled(asked)
        given = _pictures(asked, self.limits)
        bare = asked.model_copy(update=dict.fromkeys(asked.PICTURES))
        asking = Asking(bare, entry, settings, given)
        return lambda watch: self._draw(asking, watch)

    def _styled(self, asked: Asked) -> Asked:
        """The request with its styles in its texts. RefusedError for an unknown one."""
        try:
            chosen = styles.chosen(self.styles(), asked.styles or (), "styles")
        except ValueError as error:
            raise RefusedError(422, str(error)) from error
        texts = asked.prompt, asked.negative_prompt or ""
        for style in chosen:
            texts = style.around(*texts)
        asked = asked.model_copy(update={"prompt": texts[0], "negative_prompt": texts[1]})
        self.limits.texts(prompt=texts[0], negative_prompt=texts[1])
        return asked

    def _draw(self, asking: Asking, watch: Watch) -> Result:
        watch.does("loading")
        with tempfile.TemporaryDirectory() as folder:
            made = translate.request_of(asking, self.place, folder, watch)
            what = made.request
            told = json.dumps(write.settings_of(what, calls_of(what)))
        kept = json.loads(self._public(told.replace(f"{folder}/", "")))
        watch.count = what.count
        places, shown = [], []
        for part in self.engine.draw(what, watch):
            places += part.places.tolist()
            shown += list(part.image)
        down, options = what.model.config.first_stage.downsample, what.options
        facts = {
            "sampler_name": parameters.SAMPLERS[options.solver],
            "steps": options.steps,
            "cfg_scale": options.guidance_scale,
            "width": what.last.shape[1] * down,
            "height": what.last.shape[0] * down,
            "clip_skip": options.clip_skip,
            "denoising_strength": getattr(options, "strength", None),
            "subseed_strength": options.subseed_strength,
        }
        entry = asking.entry
        texts = [
            parameters.written(
                {"prompt": kept[i].get("class", ""), **kept[i], "model": entry.name},
                picture.shape[:2],
            )
            for i, picture in zip(places, shown, strict=True)
        ]
        result = Result(
            shown, [kept[i] for i in places], texts, [made.seeds[i] for i in places],
            [made.subseeds[i] for i in places], entry, facts, [],
        )  # fmt: skip
        asked = asking.asked
        if asked.save_images and not asked.do_not_save_samples:
            return dataclasses.replace(result, files=self.save(result))
        return result

    def _public(self, told: str) -> str:
        """Settings of pictures, without the folders of a server that others reach."""
        if not self.private:
            return told
        folders = [self.folders.loras, self.folders.embeddings, *(e.path for e in self.entries)]
        for folder in sorted(filter(None, folders), key=len, reverse=True):
            told = told.replace(json.dumps(folder)[1:-1], os.path.basename(folder.rstrip("/")))
        return told

    def _enlarging(self, asked: Extra) -> Callable[[Watch], Result]:
        """The work of a request to enlarge. RefusedError for one that is out of bounds."""
        texts = [("image", asked.image)] if isinstance(asked, ExtraSingle) else []
        if isinstance(asked, ExtraBatch):
            texts = [(f"imageList[{i}]", one.data) for i, one in enumerate(asked.imageList)]
            self.limits.count(1, len(texts))
        for name in (asked.upscaler_1, asked.upscaler_2):
            if name not in self.upscalers():
                known = ", ".join(self.upscalers())
                raise RefusedError(400, f"upscaler {name!r:.60} is not one of {known}")
        given = [pictures.decoded(text, what, self.limits) for what, text in texts]
        for data, (what, _) in zip(given, texts, strict=True):
            self.limits.size(*wanted(asked, data), what=f"enlarged {what}")

        def work(watch: Watch) -> Result:
            watch.count, shown = len(given), []
            for data in given:
                shown.append(self.enlarger.enlarged(asked, data, watch))
                watch.images += 1
            none = [""] * len(shown)
            return Result(shown, [{}] * len(shown), none, [], [], self.current, {}, [])

        return work

    # --- keeping ----------------------------------------------------------------------------------

    def save(self, result: Result) -> list[str]:
        """Write the pictures into the folder of the server; their paths."""
        assert self.folders.out is not None
        folder = epath.Path(self.folders.out, time.strftime("%Y-%m-%d"))
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(p.name[:5]) for p in folder.glob("[0-9]" * 5 + "-*.png")), default=-1)
        paths = []
        for i, seed in enumerate(result.seeds):
            path = folder / f"{number + i:05d}-{seed}.png"
            images.save_png(path, result.pictures[i], result.settings[i], result.infotexts[i])
            paths.append(str(path))
        return paths


def _pictures(asked: Asked, limits: Limits) -> dict[str, bytes]:
    """The pictures of a request by file name. RefusedError for one that is none."""
    if not isinstance(asked, Img2Img):
        return {}
    if not asked.init_images:
        raise RefusedError(404, "Init image not found")
    named = {
        f"init_{i}.png": pictures.decoded(text, f"init_images[{i}]", limits)
        for i, text in enumerate(asked.init_images)
    }
    if asked.mask:
        named["mask.png"] = pictures.decoded(asked.mask, "mask", limits)
    return named
