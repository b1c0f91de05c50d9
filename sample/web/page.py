"""The page in the browser: gradio's components before the service that the API has too."""

import asyncio
import atexit
import base64
import html
import io
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import fastapi
import gradio as gr
import numpy as np
import pydantic
from PIL import Image

from ldm_jax.prompting import parameters
from ldm_jax.runtime import images
from ldm_jax.sample.web import names, pictures
from ldm_jax.sample.web.asked import Asked, Extra, ExtraSingle, Img2Img, Txt2Img
from ldm_jax.sample.web.catalog import Entry
from ldm_jax.sample.web.guard import NoAddresses
from ldm_jax.sample.web.jobs import CancelledError, Job
from ldm_jax.sample.web.limits import RefusedError
from ldm_jax.sample.web.service import Result, Service
from ldm_jax.sample.web.translate import UPSCALERS

TICK = 0.2
"""Seconds between two looks at a job."""
FILLS = ("fill", "original", "latent noise", "latent nothing")
RESIZES = ("just resize", "crop and resize", "resize and fill", "just resize (latent)")
KEYS = """
() => {
  const click = (id) => document.querySelector(id)?.click();
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") click("#interrupt");
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    click("#generate");
  });
  document.body.dataset.keys = "ready";
}
"""
CSS = """
.gradio-container {width: 100% !important; max-width: 90rem !important; margin: auto}
#status progress {width: 100%; height: 0.6rem; accent-color: var(--color-accent)}
#status {min-height: 3rem}
#generate {min-height: 3rem}
#gallery img, #preview img {image-rendering: pixelated}
@media (max-width: 40rem) {
  .gradio-container .app {padding: 0.5rem !important}
  #work .row, #work .form {flex-wrap: wrap; min-width: 0}
  #work .column {min-width: 0 !important; width: 100%}
  #work {flex-direction: column}
}
"""
NEEDS = {
    "text": ("text", "class", "unconditional"),
    "image": ("text", "class", "unconditional"),
    "inpaint": ("text", "class", "unconditional", "inpaint"),
}
"""{tab: kinds of models that can do it}."""


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
        css=CSS,
        js=KEYS,
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
            self.last_seed = gr.State(-1)
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
        of_class = entry.kind == "class"
        self.classes = gr.Dropdown(
            list(entry.classes or ()), label="Class", visible=of_class, elem_id="class",
            value=(entry.classes or (None,))[0],
        )  # fmt: skip
        self.prompt = gr.Textbox(
            label="Prompt", lines=3, elem_id="prompt", visible=not of_class,
            max_length=self.service.limits.prompt,
        )  # fmt: skip
        self.negative = gr.Textbox(
            label="Negative prompt", lines=1, elem_id="negative", visible=not of_class,
            max_length=self.service.limits.prompt,
        )  # fmt: skip
        files = [f"<lora:{file.name}:1>" for file in self.service.loras()]
        known = self.service.embeddings().items()
        words = [name for name, one in known if not isinstance(one, str)]
        self.styles = gr.Dropdown(
            list(self.service.styles()), multiselect=True, label="Styles",
            visible=bool(self.service.styles()),
        )  # fmt: skip
        with gr.Row(visible=bool(files or words)):
            self.network = gr.Dropdown(files + words, label="LoRA and embeddings", scale=3)
            self.weight = gr.Slider(-2, 2, value=1, step=0.05, label="Weight", scale=2)
            self.insert = gr.Button("Add to the prompt", scale=1)

    def _tabs(self) -> None:
        upscalers = [name for name in self.service.upscalers() if name != "None"]
        self.tabs = {}
        with gr.Tabs():
            with (
                gr.Tab("Text to image", elem_id="tab_text") as self.tabs["text"],
                gr.Accordion("Hires fix", open=False),
            ):
                self.hires = gr.Checkbox(label="Draw on at a larger size")
                with gr.Row():
                    self.hr_scale = gr.Slider(1, 4, value=2, step=0.05, label="Enlarge by")
                    self.hr_upscaler = gr.Dropdown(
                        list(UPSCALERS), value="Latent", label="Upscaler"
                    )
                with gr.Row():
                    most = self.service.limits.steps
                    self.hr_steps = gr.Slider(0, most, value=0, step=1, label="Steps (0: as below)")
                    self.hr_strength = gr.Slider(0, 1, value=0.7, step=0.01, label="Denoising")
            with gr.Tab("Image to image", elem_id="tab_image") as self.tabs["image"]:
                self.image = gr.Image(type="pil", label="Picture", sources=["upload", "clipboard"])
            with gr.Tab("Inpaint", elem_id="tab_inpaint") as self.tabs["inpaint"]:
                self.canvas = gr.ImageEditor(
                    type="pil", label="Paint over what is to be drawn anew", elem_id="canvas",
                    sources=["upload", "clipboard"], layers=False, transforms=(), format="png",
                    brush=gr.Brush(colors=["#ffffff"], default_size=24, color_mode="fixed"),
                )  # fmt: skip
                with gr.Row():
                    self.blur = gr.Slider(0, 64, value=4, step=1, label="Mask blur")
                    self.fill = gr.Dropdown(FILLS, value="original", type="index", label="Content")
                with gr.Row():
                    self.only = gr.Checkbox(label="Only around the mask")
                    self.padding = gr.Slider(0, 256, value=32, step=4, label="Padding")
                    self.invert = gr.Checkbox(label="Draw what is not painted")
            with gr.Tab("Upscale", elem_id="tab_upscale") as self.tabs["upscale"]:
                self.small = gr.Image(type="pil", label="Picture", sources=["upload", "clipboard"])
                with gr.Row():
                    self.upscaler = gr.Dropdown(upscalers, value=upscalers[0], label="Upscaler")
                    self.factor = gr.Slider(1, 8, value=2, step=0.25, label="Enlarge by")
            with gr.Tab("PNG info", elem_id="tab_info") as self.tabs["info"]:
                self.file = gr.File(
                    label="Picture", type="binary", file_types=[".png", ".jpg", ".jpeg", ".webp"],
                    elem_id="file",
                )  # fmt: skip
                self.info = gr.Textbox(label="Its text", lines=6, elem_id="info", buttons=["copy"])
                self.reuse_text = gr.Button("Use it", elem_id="reuse")

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
            self.width = gr.Number(entry.size, precision=0, label="Width", minimum=1)
            self.height = gr.Number(entry.size, precision=0, label="Height", minimum=1)
            self.scale = gr.Slider(
                1, 30, value=_scale(entry), step=0.5, label="Guidance", elem_id="guidance"
            )
        with gr.Row():
            self.seed = gr.Number(-1, precision=0, label="Seed (-1: any)", elem_id="seed")
            self.again = gr.Button("Last seed", min_width=80)
            self.skip = gr.Slider(1, 12, value=1, step=1, label="Clip skip")
        with gr.Row():
            self.batch = gr.Slider(
                1, limits.batch, value=1, step=1, label="Pictures at once", elem_id="batch"
            )
            most = limits.images // limits.batch
            self.rounds = gr.Slider(1, most, value=1, step=1, label="Times", elem_id="times")
        with gr.Row(visible=False) as self.of_pictures:
            self.strength = gr.Slider(
                0, 1, value=0.75, step=0.01, label="Denoising", elem_id="strength"
            )
            self.resize = gr.Dropdown(RESIZES, value=RESIZES[1], type="index", label="Resizing")

    def _results(self) -> None:
        with gr.Row():
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate", scale=2)
            self.interrupt = gr.Button("Interrupt", elem_id="interrupt", min_width=80)
            self.cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", min_width=80)
        self.status = gr.HTML("Ctrl+Enter generates, Escape interrupts.", elem_id="status")
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
        for name, tab in self.tabs.items():
            tab.select(_tab(name), None, [self.tab, self.of_pictures], **light)
        fields = [*self._fields().values()]
        self.generate.click(
            self._generate,
            [self.tab, self.model, *fields],
            [self.status, self.preview, self.gallery, self.text, self.last_seed],
            concurrency_limit=None,
            show_progress="hidden",
            trigger_mode="once",
            **private,
        )
        self.interrupt.click(self._stop("interrupt"), None, None, **light)
        self.cancel.click(self._stop("cancel"), None, None, **light)
        blocks.unload(self._left)
        self.again.click(lambda seed: seed, self.last_seed, self.seed, **light)
        self.insert.click(_inserted, [self.prompt, self.network, self.weight], self.prompt, **light)
        chosen = [self.classes, self.prompt, self.negative, self.width, self.height, self.scale]
        self.model.change(self._chosen, self.model, chosen, **light)
        self.file.change(self._read, self.file, self.info, **private)
        filled = [self.prompt, self.negative, self.sampler, self.schedule, self.steps, self.width]
        filled += [self.height, self.scale, self.seed, self.skip]
        self.reuse_text.click(self._reused, [self.info, *filled], filled, **light)

    def _fields(self) -> dict[str, Any]:
        """The components that a request is made of."""
        kept = (
            *("classes", "prompt", "negative", "styles", "image", "canvas", "blur", "fill", "only"),
            *("padding", "invert", "small", "upscaler", "factor", "hires", "hr_scale"),
            *("hr_upscaler", "hr_steps", "hr_strength", "sampler", "schedule", "steps", "width"),
            *("height", "scale", "seed", "batch", "rounds", "strength", "resize", "skip"),
        )
        return {name: getattr(self, name) for name in kept}

    async def _generate(
        self, request: gr.Request, tab: str, title: str, *values: Any
    ) -> AsyncIterator[tuple]:
        """Steps of a job: (status, preview, gallery, text, seed)."""
        session = str(request.session_hash)
        try:
            given = dict(zip(self._fields(), values, strict=True))
            asked = self._asked(tab, title, given)
            job = self.service.submit(asked, session, look=True)
        except RefusedError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except pydantic.ValidationError as error:
            told = "; ".join(f"{e['loc'][-1]}: {e['msg']}" for e in error.errors())
            raise gr.Error(told, print_exception=False) from error
        self.jobs[session] = job
        keep, shown = gr.skip(), None
        try:
            while not job.future.done():
                preview = job.watch.preview
                if preview is shown or preview is None:
                    picture = keep
                else:
                    strip = preview[0] if len(preview) == 1 else images.grid(preview, len(preview))
                    picture = gr.update(value=pictures.of_array(strip), visible=True)
                shown = preview
                yield _bar(self.service, job), picture, keep, keep, keep
                await asyncio.sleep(TICK)
            result: Result = job.future.result()
        except CancelledError:
            yield "Cancelled.", gr.update(visible=False), keep, keep, keep
            return
        except ValueError as error:  # of a task: it says what is wrong with the request
            yield "", gr.update(visible=False), keep, keep, keep
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            yield "", gr.update(visible=False), keep, keep, keep
            raise gr.Error("it failed; the server's log says how", print_exception=False) from error
        finally:
            if not job.future.done():  # the browser has gone
                job.cancel()
        drawn = [images.open_picture(result.png(i)) for i in range(len(result.pictures))]
        seed = result.seeds[0] if result.seeds else keep
        text = "\n\n".join(filter(None, result.infotexts))
        yield _ended(job, drawn), gr.update(visible=False), drawn, text, seed

    def _asked(self, tab: str, title: str, given: dict[str, Any]) -> Asked | Extra:
        """The request of a tab."""
        entry = next(entry for entry in self.service.models() if entry.title == title)
        if tab == "upscale":
            if given["small"] is None:
                raise RefusedError(422, "give a picture to enlarge")
            return ExtraSingle(
                image=_encoded(given["small"]),
                upscaler_1=given["upscaler"],
                upscaling_resize=given["factor"],
            )
        tab = "text" if tab == "info" else tab
        if entry.kind not in NEEDS[tab]:
            raise RefusedError(
                422, f"{entry.title} is a model of {entry.kind}, which is not for this tab"
            )
        shared = {
            "prompt": (given["classes"] if entry.kind == "class" else given["prompt"]) or "",
            "negative_prompt": "" if entry.kind == "class" else given["negative"],
            "styles": given["styles"] or None,
            "sampler_name": given["sampler"],
            "scheduler": given["schedule"],
            "steps": given["steps"],
            "cfg_scale": given["scale"],
            "seed": -1 if given["seed"] is None else given["seed"],
            "batch_size": given["batch"],
            "n_iter": given["rounds"],
            "width": given["width"],
            "height": given["height"],
            "save_images": self.service.folders.out is not None,
            "override_settings": {
                "sd_model_checkpoint": title,
                "CLIP_stop_at_last_layers": given["skip"] if entry.kind == "text" else 1,
            },
        }
        if tab == "text":
            hires = {
                "enable_hr": True,
                "hr_scale": given["hr_scale"],
                "hr_upscaler": given["hr_upscaler"],
                "hr_second_pass_steps": given["hr_steps"],
                "denoising_strength": given["hr_strength"],
            }
            return Txt2Img(**shared, **(hires if given["hires"] else {}))
        shared |= {"denoising_strength": given["strength"], "resize_mode": given["resize"]}
        if tab == "image":
            if given["image"] is None:
                raise RefusedError(422, "give a picture to begin with")
            return Img2Img(**shared, init_images=[_encoded(given["image"])])
        start, mask = _painted(given["canvas"])
        return Img2Img(
            **shared,
            init_images=[_encoded(start)],
            mask=_encoded(mask),
            mask_blur=given["blur"],
            inpainting_fill=given["fill"],
            inpaint_full_res=given["only"],
            inpaint_full_res_padding=given["padding"],
            inpainting_mask_invert=int(given["invert"]),
        )

    def _stop(self, how: str) -> Any:
        def stop(request: gr.Request) -> None:
            job = self.jobs.get(str(request.session_hash))
            if job is not None:
                job.watch.stop = how

        return stop

    def _left(self, request: gr.Request) -> None:
        job = self.jobs.pop(str(request.session_hash), None)
        if job is not None:
            job.cancel()

    def _chosen(self, title: str) -> list[Any]:
        """What the fields of the words and the size become for a model."""
        entry = next(entry for entry in self.service.models() if entry.title == title)
        of_class = entry.kind == "class"
        classes = list(entry.classes or ())
        return [
            gr.update(choices=classes, value=classes[0] if classes else None, visible=of_class),
            gr.update(visible=not of_class),
            gr.update(visible=not of_class),
            entry.size,
            entry.size,
            _scale(entry),
        ]

    def _read(self, data: bytes | None) -> str:
        if data is None:
            return ""
        try:
            info = images.info_of(data)
            known = parameters.of_info(info, "the picture")
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        if known is None:
            return "The picture says nothing of how it was made."
        return info.get("parameters") or "\n".join(
            [
                known.prompt,
                f"{parameters.NEGATIVE} {known.negative_prompt}",
                ", ".join(f"{name}: {value}" for name, value in known.fields.items()),
            ]
        )

    def _reused(self, text: str, *before: Any) -> list[Any]:
        """The fields as a picture's text has them; the others as they are."""
        known = parameters.parse(text)
        given, left = parameters.options(known)
        if left:
            gr.Warning(f"not followed: {'; '.join(left)[:500]}")
        spacings = {spacing: name for name, (_, spacing) in names.SCHEDULES.items() if spacing}
        found = {
            0: known.prompt,
            1: known.negative_prompt,
            2: parameters.SAMPLERS.get(given.get("solver", "")),
            3: spacings.get(given.get("spacing", ""), "automatic"),
        }
        fields = ("steps", "width", "height", "guidance_scale", "seed", "clip_skip")
        found |= {4 + i: given.get(name) for i, name in enumerate(fields)}
        return [old if found[i] is None else found[i] for i, old in enumerate(before)]


def _tab(name: str) -> Any:
    """What a tab changes: its name, and whether the fields of pictures are shown."""
    return lambda: (name, gr.update(visible=name in ("image", "inpaint")))


def _scale(entry: Entry) -> float:
    """Guidance that a model begins with on the page."""
    return 7.0 if entry.kind in ("text", "inpaint") else 1.5


def _bar(service: Service, job: Job) -> str:
    """HTML of how far a job is."""
    watch, place = job.watch, service.queue.place(job)
    if place:
        told = f"waits; {place - 1} before it" if place > 1 else "waits; it is the next one"
        return f"<progress></progress> {told}"
    if watch.doing != "sampling" or not watch.steps:
        took = time.monotonic() - watch.since
        return f"<progress></progress> {html.escape(watch.doing)} ... {took:.0f} s"
    eta = "" if watch.eta is None else f", {watch.eta:.0f} s left"
    told = f"step {watch.step} of {watch.steps}{eta}"
    return f'<progress value="{watch.fraction:.3f}"></progress> {told}'


def _ended(job: Job, drawn: list[Any]) -> str:
    compiled = f"; compiled in {job.watch.compiled:.1f} s" if job.watch.compiled else ""
    count = f"{len(drawn)} picture{'s' * (len(drawn) != 1)}"
    return f"{count}{compiled}. Ctrl+Enter generates, Escape interrupts."


def _inserted(prompt: str, name: str | None, weight: float) -> str:
    """The prompt with a LoRA or an embedding."""
    if not name:
        return prompt
    if name.startswith("<lora:"):
        name = name.replace(":1>", f":{weight:g}>")
    elif weight != 1:
        name = f"({name}:{weight:g})"
    return f"{prompt} {name}".strip()


def _encoded(picture: Image.Image) -> str:
    """Base64 of a PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _painted(canvas: dict[str, Any] | None) -> tuple[Image.Image, Image.Image]:
    """(picture, mask in mode L) of the canvas. RefusedError without one of them."""
    if canvas is None or canvas.get("background") is None:
        raise RefusedError(422, "give a picture to paint on")
    start = canvas["background"]
    painted = [np.asarray(layer.convert("RGBA"))[..., 3] for layer in canvas["layers"]]
    mask = np.max(painted, axis=0) if painted else np.zeros(start.size[::-1], np.uint8)
    if not mask.any():
        raise RefusedError(422, "paint over what is to be drawn anew")
    return start.convert("RGB"), Image.fromarray(np.uint8(255 * (mask > 0)))
