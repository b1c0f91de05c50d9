"""The page in the browser: gradio's components before the service that the API has too."""

import asyncio
import atexit
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import fastapi
import gradio as gr
import pydantic

from ldm_jax.runtime import images
from ldm_jax.sample.web import names, page_fields, page_style, pictures
from ldm_jax.sample.web.catalog import Entry
from ldm_jax.sample.web.enlarge import LDSR
from ldm_jax.sample.web.guard import NoAddresses
from ldm_jax.sample.web.jobs import CancelledError, Job
from ldm_jax.sample.web.limits import RefusedError
from ldm_jax.sample.web.page_fields import FILLS, FIRST, NEEDS, RESIZES, WORDS
from ldm_jax.sample.web.service import Result, Service
from ldm_jax.sample.web.translate import UPSCALERS

TICK = 0.2
"""Seconds between two looks at a job."""
BRUSH = "#f97316"
FILLED = (
    *("classes", "prompt", "negative", "sampler", "schedule", "steps", "width", "height"),
    *("scale", "seed", "skip", "hires", "hr_scale", "hr_upscaler", "hr_steps", "hr_strength"),
    "strength",
)
"""Fields that the text of a picture may fill."""


def mounted(app: fastapi.FastAPI, service: Service) -> Any:
    """The application with the page at `/`."""
    if "GRADIO_TEMP_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="ldm_web_")  # of files that come and go, not /tmp/gradio
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["GRADIO_TEMP_DIR"] = folder
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    blocks = Page(service).blocks()
    whole = gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        theme=gr.themes.Default(**fonts),
        head=f"<style>{page_style.CSS}</style>",  # `css` would not reach what is around the page
        js=page_style.KEYS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        show_error=True,
        enable_monitoring=False,
        max_file_size=service.limits.body,
        allowed_paths=[],
    )
    # gradio checks the files that a browser names only after a launch: a page that is mounted would
    # give any file of the machine
    blocks.has_launched = True
    return NoAddresses(whole, below="/gradio_api/")


class Page:
    """Components, and what happens at them."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.jobs: dict[str, Job] = {}
        """The job of each session."""

    # --- layout -----------------------------------------------------------------------------------

    def blocks(self) -> gr.Blocks:
        """The page."""
        with gr.Blocks(title="ldm-web", fill_width=True, delete_cache=(600, 3600)) as blocks:
            self.tab = gr.State("text")
            self.seeds, self.last_seed = gr.State([]), gr.State(-1)
            titles = [entry.title for entry in self.service.models()]
            self.model = gr.Dropdown(titles, value=titles[0], label="Model", elem_id="model")
            with gr.Row(elem_id="work"):
                with gr.Column(scale=3, min_width=320):
                    self._words()
                    self._tabs()
                    self._settings()
                with gr.Column(scale=2, min_width=320):
                    self._results()
            self._events(blocks)
        return blocks

    def _words(self) -> None:
        entry = self.service.current
        classes, words = list(entry.classes or ()), entry.kind in WORDS
        self.classes = gr.Dropdown(
            classes, label="Class", visible=bool(classes), elem_id="class",
            value=classes[0] if classes else None,
        )  # fmt: skip
        most = self.service.limits.prompt
        self.prompt = gr.Textbox(
            label="Prompt", lines=3, elem_id="prompt", visible=words, max_length=most
        )
        self.negative = gr.Textbox(
            label="Negative prompt", lines=1, elem_id="negative", visible=words, max_length=most
        )
        styles = list(self.service.styles())
        self.styles = gr.Dropdown(
            styles, multiselect=True, label="Styles", visible=words and bool(styles)
        )
        known = self._networks(entry)
        with gr.Row(visible=bool(known), elem_id="networks") as self.networks:
            self.network = gr.Dropdown(
                known, value=None, label="LoRA and embeddings", scale=3, elem_id="network"
            )
            self.weight = gr.Slider(
                -2, 2, value=1, step=0.05, label="Weight", scale=2, elem_id="weight"
            )
            self.insert = gr.Button("Add to the prompt", scale=1, elem_id="insert")

    def _networks(self, entry: Entry) -> list[str]:
        """What stands in a prompt for each LoRA and each embedding that fits a model."""
        if entry.kind != "text":
            return []
        known = self.service.place.embeddings(entry)
        words = [name for name, one in known.items() if not isinstance(one, str)]
        return [f"<lora:{file.name}:1>" for file in self.service.loras()] + words

    def _tabs(self) -> None:
        upscalers = [name for name in self.service.upscalers() if name != "None"]
        entry = self.service.current
        self.tabs, self.notes = {}, {}

        def note(tab: str) -> None:
            told = page_fields.refusal(entry, tab)
            self.notes[tab] = gr.Markdown(told, visible=bool(told), elem_classes="note")

        with gr.Tabs(elem_id="tabs", overflow_behavior="wrap") as self.row:
            label = FIRST.get(entry.kind, "Text to image")
            with gr.Tab(label, id="text") as self.tabs["text"]:
                note("text")
                with gr.Accordion(
                    "Hires fix", open=False, visible=entry.kind == "text", elem_id="hires"
                ) as self.larger:
                    self.hires = gr.Checkbox(label="Draw on at a larger size")
                    with gr.Row():
                        self.hr_scale = gr.Slider(1, 4, value=2, step=0.05, label="Enlarge by")
                        known = [*UPSCALERS, *({LDSR} & {*upscalers})]
                        self.hr_upscaler = gr.Dropdown(known, value="Latent", label="Upscaler")
                    with gr.Row():
                        most = self.service.limits.steps
                        self.hr_steps = gr.Slider(
                            0, most, value=0, step=1, label="Steps (0: as below)"
                        )
                        self.hr_strength = gr.Slider(0, 1, value=0.7, step=0.01, label="Denoising")
            with gr.Tab("Image to image", id="image") as self.tabs["image"]:
                note("image")
                self.image = gr.Image(
                    type="pil", label="Picture", sources=["upload", "clipboard"], elem_id="image"
                )
            with gr.Tab("Inpaint", id="inpaint") as self.tabs["inpaint"]:
                note("inpaint")
                self.canvas = gr.ImageEditor(
                    type="pil", label="Paint the mask", elem_id="canvas",
                    sources=["upload", "clipboard"], layers=False, transforms=(), format="png",
                    # one sees through it; any alpha is mask
                    brush=gr.Brush(
                        default_size=max(2, entry.size // 20), colors=[(BRUSH, 0.6)],
                        default_color=(BRUSH, 0.6), color_mode="fixed",
                    ),
                )  # fmt: skip
                with gr.Row():
                    self.blur = gr.Slider(0, 64, value=4, step=1, label="Mask blur", elem_id="blur")
                    self.fill = gr.Dropdown(FILLS, value="original", type="index", label="Content")
                with gr.Row():
                    self.only = gr.Checkbox(label="Only around the mask", elem_id="only")
                    self.padding = gr.Slider(0, 256, value=32, step=4, label="Padding")
                    self.invert = gr.Checkbox(label="Draw what is not painted")
            with gr.Tab("Upscale", id="upscale") as self.tabs["upscale"]:
                self.small = gr.Image(
                    type="pil", label="Picture", sources=["upload", "clipboard"], elem_id="small"
                )
                with gr.Row():
                    self.upscaler = gr.Dropdown(upscalers, value=upscalers[0], label="Upscaler")
                    self.factor = gr.Slider(1, 8, value=2, step=0.25, label="Enlarge by")
            with gr.Tab("PNG info", id="info") as self.tabs["info"]:
                self.file = gr.File(
                    label="Picture", type="binary", file_types=[".png", ".jpg", ".jpeg", ".webp"],
                    elem_id="file",
                )  # fmt: skip
                self.info = gr.Textbox(label="Its text", lines=6, elem_id="info", buttons=["copy"])
                with gr.Row():
                    self.to_text = gr.Button("To text to image", elem_id="to_text", size="md")
                    self.to_image = gr.Button("To image to image", elem_id="to_image", size="md")

    def _settings(self) -> None:
        limits, entry = self.service.limits, self.service.current
        with gr.Row():
            self.sampler = gr.Dropdown(
                self.service.samplers(), value="DPM++ 2M", label="Sampler", elem_id="sampler"
            )
            labels = [(label, name) for name, (label, _) in names.SCHEDULES.items()]
            self.schedule = gr.Dropdown(labels, value="automatic", label="Schedule")
            self.steps = gr.Slider(
                1, limits.steps, value=20, step=1, label="Steps", elem_id="steps"
            )
        with gr.Row():
            self.width = gr.Number(
                entry.size, precision=0, label="Width", minimum=1, elem_id="width"
            )
            self.height = gr.Number(
                entry.size, precision=0, label="Height", minimum=1, elem_id="height"
            )
            self.scale = gr.Slider(
                1, 30, value=_scale(entry), step=0.5, label="Guidance", elem_id="guidance"
            )
        with gr.Row(elem_id="seeds"):
            self.seed = gr.Number(
                -1, precision=0, label="Seed", elem_id="seed", min_width=120, scale=2
            )
            self.any = gr.Button("Any", min_width=80, elem_id="any")
            self.again = gr.Button("Last", min_width=80, elem_id="last")
            self.skip = gr.Slider(
                1, 12, value=1, step=1, label="Clip skip", visible=entry.kind == "text", scale=2
            )
        with gr.Row():
            self.batch = gr.Slider(
                1, limits.batch, value=1, step=1, label="Pictures at once", elem_id="batch"
            )
            self.rounds = gr.Slider(
                1, limits.images, value=1, step=1, label="Times", elem_id="times"
            )
        with gr.Row(visible=False) as self.of_pictures:
            self.strength = gr.Slider(
                0, 1, value=0.75, step=0.01, label="Denoising", elem_id="strength"
            )
            self.resize = gr.Dropdown(RESIZES, value=RESIZES[1], type="index", label="Resizing")

    def _results(self) -> None:
        with gr.Row(elem_id="actions"):
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate", scale=2)
            self.interrupt = gr.Button("Interrupt", elem_id="interrupt", min_width=80)
            self.cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", min_width=80)
        self.status = gr.HTML(page_style.HINT, elem_id="status")
        self.preview = gr.Image(
            label="So far", visible=False, elem_id="preview", buttons=[], interactive=False,
            format="png",
        )  # fmt: skip
        self.gallery = gr.Gallery(
            label="Pictures", elem_id="gallery", format="png", columns=2, object_fit="contain",
            buttons=["download", "fullscreen"], interactive=False,
        )  # fmt: skip
        self.text = gr.Textbox(
            label="How they were made", lines=4, buttons=["copy"], elem_id="text", interactive=False
        )

    # --- events -----------------------------------------------------------------------------------

    def _events(self, blocks: gr.Blocks) -> None:
        private: dict[str, Any] = {"api_visibility": "private"}
        light = private | {"show_progress": "hidden", "queue": False}
        where = [self.tab, self.of_pictures]
        for name, tab in self.tabs.items():
            tab.select(lambda name=name: _at(name), None, where, **light)
        fields = [*self._fields().values()]
        self.generate.click(
            self._generate,
            [self.tab, self.model, *fields],
            [self.status, self.preview, self.gallery, self.text, self.seeds, self.last_seed],
            concurrency_limit=None,
            show_progress="hidden",
            trigger_mode="once",
            **private,
        )
        self.interrupt.click(self._stop("interrupt"), None, None, **light)
        self.cancel.click(self._stop("cancel"), None, None, **light)
        blocks.unload(self._left)
        self.gallery.select(_picked, self.seeds, self.last_seed, **light)
        self.any.click(lambda: -1, None, self.seed, **light)
        self.again.click(lambda seed: seed, self.last_seed, self.seed, **light)
        self.insert.click(
            page_fields.inserted, [self.prompt, self.network, self.weight], self.prompt, **light
        )
        chosen = [self.classes, self.prompt, self.negative, self.styles, self.networks]
        chosen += [self.network, self.width, self.height, self.scale, self.skip, self.larger]
        chosen += [self.tabs["text"], *self.notes.values()]
        self.model.change(self._chosen, self.model, chosen, **light)
        self.file.change(self._read, self.file, self.info, concurrency_limit=None, **private)
        # in gradio's queue: an event outside of it cannot warn
        for button, tab in ((self.to_text, "text"), (self.to_image, "image")):
            button.click(
                self._sent(tab),
                [self.model, self.info, self.file],
                [self.row, *where, self.image, *self._filled()],
                concurrency_limit=None,
                show_progress="hidden",
                **private,
            )

    def _fields(self) -> dict[str, Any]:
        """The components that a request is made of."""
        kept = (
            *("classes", "prompt", "negative", "styles", "image", "canvas", "blur", "fill", "only"),
            *("padding", "invert", "small", "upscaler", "factor", "hires", "hr_scale"),
            *("hr_upscaler", "hr_steps", "hr_strength", "sampler", "schedule", "steps", "width"),
            *("height", "scale", "seed", "batch", "rounds", "strength", "resize", "skip"),
        )
        return {name: getattr(self, name) for name in kept}

    def _filled(self) -> list[Any]:
        """The components that the text of a picture fills."""
        return [self._fields()[name] for name in FILLED]

    async def _generate(
        self, request: gr.Request, tab: str, title: str, *values: Any
    ) -> AsyncIterator[tuple]:
        """Steps of a job: (status, preview, gallery, text, seeds, first seed)."""
        session = str(request.session_hash)
        try:
            given = dict(zip(self._fields(), values, strict=True))
            entry, keeps = self._entry(title), self.service.folders.out is not None
            asked = page_fields.asked(entry, tab, given, save=keeps)
            job = self.service.submit(asked, session, look=True)
        except RefusedError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except pydantic.ValidationError as error:
            told = "; ".join(f"{e['loc'][-1]}: {e['msg']}" for e in error.errors())
            raise gr.Error(told, print_exception=False) from error
        self.jobs[session] = job
        keep, shown, size = gr.skip(), None, page_fields.size_of(asked, entry)
        hidden, same = gr.update(visible=False), [gr.skip()] * 4
        try:
            while not job.future.done():
                place, preview = self.service.queue.place(job), job.watch.preview
                if place and job.watch.stop == "cancel":  # the queue drops it when it is its turn
                    raise CancelledError
                picture = keep
                if preview is not None and preview is not shown:
                    strip = preview[0] if len(preview) == 1 else images.grid(preview, len(preview))
                    picture = gr.update(value=pictures.of_array(strip), visible=True)
                shown = preview
                yield page_style.bar(job, place, size), picture, *same
                await asyncio.sleep(TICK)
            result: Result = job.future.result()
        except CancelledError:
            yield "Cancelled.", hidden, *same
            return
        except ValueError as error:  # of a task: it says what is wrong with the request
            yield "", hidden, *same
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            yield "", hidden, *same
            raise gr.Error("it failed; the server's log says how", print_exception=False) from error
        finally:
            if not job.future.done():  # the browser has gone
                job.cancel()
        drawn = [images.open_picture(result.png(i)) for i in range(len(result.pictures))]
        told, text = page_style.ended(job, len(drawn)), "\n\n".join(filter(None, result.infotexts))
        seed = result.seeds[0] if result.seeds else keep
        yield told, hidden, drawn, text, result.seeds, seed

    def _entry(self, title: str) -> Entry:
        return next(entry for entry in self.service.models() if entry.title == title)

    def _stop(self, how: str) -> Any:
        def stop(request: gr.Request) -> None:
            job = self.jobs.get(str(request.session_hash))
            if job is not None:  # one that waits has no picture to end with
                job.watch.stop = "cancel" if self.service.queue.place(job) else how

        return stop

    def _left(self, request: gr.Request) -> None:
        job = self.jobs.pop(str(request.session_hash), None)
        if job is not None:
            job.cancel()

    def _chosen(self, title: str) -> list[Any]:
        """What the page becomes for a model."""
        entry = self._entry(title)
        classes, words = list(entry.classes or ()), entry.kind in WORDS
        networks, told = self._networks(entry), page_fields.refusal
        return [
            gr.update(
                choices=classes, value=classes[0] if classes else None, visible=bool(classes)
            ),
            gr.update(visible=words),
            gr.update(visible=words),
            gr.update(visible=words and bool(self.service.styles())),
            gr.update(visible=bool(networks)),
            gr.update(choices=networks, value=None),
            entry.size,
            entry.size,
            _scale(entry),
            gr.update(visible=entry.kind == "text"),
            gr.update(visible=entry.kind == "text"),
            gr.update(label=FIRST.get(entry.kind, "Text to image")),
            *(gr.update(value=told(entry, t), visible=bool(told(entry, t))) for t in NEEDS),
        ]

    def _read(self, data: bytes | None) -> str:
        if data is None:
            return ""
        try:
            return page_fields.text_of(data)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def _sent(self, tab: str) -> Any:
        """What sends the text of a picture, or the picture too, to another tab."""

        def sent(title: str, text: str, data: bytes | None) -> list[Any]:
            try:
                found, left = page_fields.values_of(text, self._entry(title).classes or ())
                if tab == "image" and data is None:
                    raise RefusedError(422, "give a picture to begin with")
                picture = pictures.opened(data) if tab == "image" and data else gr.skip()
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from error
            if left:
                gr.Warning(f"not followed: {'; '.join(left)[:500]}")
            filled = [found.get(name, gr.skip()) for name in FILLED]
            return [gr.update(selected=tab), *_at(tab), picture, *filled]

        return sent


def _at(tab: str) -> tuple[str, Any]:
    """What a tab changes: its name, and whether the fields of pictures are shown."""
    return tab, gr.update(visible=tab in ("image", "inpaint"))


def _picked(seeds: list[int], event: gr.SelectData) -> int:
    """The seed of the picture that is looked at."""
    return seeds[event.index] if event.index < len(seeds) else -1


def _scale(entry: Entry) -> float:
    """Guidance that a model begins with on the page."""
    return 7.0 if entry.kind in WORDS else 1.5
