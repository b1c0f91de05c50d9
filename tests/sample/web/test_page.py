"""The page without a browser: what its fields ask for, and what forged requests get."""

import asyncio
import json
import threading
import types

import gradio as gr
import numpy as np
import pytest
import web
from fastapi.testclient import TestClient
from PIL import Image

from ldm_jax.sample.web import api, page, page_fields, page_style
from ldm_jax.sample.web.asked import ExtraSingle, Img2Img, Txt2Img
from ldm_jax.sample.web.jobs import Job
from ldm_jax.sample.web.limits import RefusedError


@pytest.fixture(scope="module")
def service(tmp_path_factory, ldm_run):
    folder = tmp_path_factory.mktemp("page")
    run = web.text_run(folder)
    web.adapters(run, folder)
    made = web.service(
        run, ldm_run, loras=str(folder / "loras"), embeddings=str(folder / "embeddings")
    )
    yield made
    made.queue.close()


@pytest.fixture(scope="module")
def shown(service):
    made = page.Page(service)
    made.blocks()
    return made


@pytest.fixture
def given(shown):
    """Values of the fields as the page begins; indices of choices where a field gives these."""

    def value(part):
        if getattr(part, "type", None) == "index":
            return part.choices.index((part.value, part.value))
        return part.value

    return {name: value(part) for name, part in shown._fields().items()}


@pytest.fixture
def asked(service, given):
    """The request of a tab for a model, number `model`, with some other values of the fields."""

    def make(tab, model=0, **fields):
        return page_fields.asked(service.models()[model], tab, given | fields, save=False)

    return make


def test_text_to_image(service, asked):
    one = asked("text", prompt="red", skip=2, seed=None)
    assert isinstance(one, Txt2Img)
    told = (one.prompt, one.sampler_name, one.scheduler, one.steps, one.seed)
    assert told == ("red", "DPM++ 2M", "automatic", 20, -1)
    assert (one.width, one.height, one.cfg_scale, one.enable_hr) == (16, 16, 7.0, False)
    assert one.override_settings == {
        "sd_model_checkpoint": service.models()[0].title,
        "CLIP_stop_at_last_layers": 2,
    }
    one = asked("text", hires=True, hr_upscaler="Lanczos", batch=3)
    assert (one.enable_hr, one.hr_scale, one.hr_upscaler) == (True, 2, "Lanczos")
    assert one.denoising_strength == 0.7
    one.check(service.limits)
    assert page_fields.size_of(one, service.models()[0]) == "3x16x16"


def test_class_to_image(shown, service, asked):
    parts = shown._chosen(service.models()[1].title)
    classes, prompt, negative, _, networks, _, width, _, scale, skip, larger, tab, *notes = parts
    assert classes["visible"]
    hidden = (prompt, negative, networks, skip, larger, *notes)
    assert not any(part["visible"] for part in hidden)
    assert (width, scale, tab["label"]) == (16, 1.5, "Class to image")
    one = asked("text", 1, classes=classes["value"], prompt="red", negative="sea", hires=True)
    assert (one.prompt, one.negative_prompt, one.enable_hr) == (classes["choices"][0], "", False)
    parts = shown._chosen(service.models()[0].title)
    assert not parts[0]["visible"]
    assert parts[1]["visible"]
    assert parts[5]["choices"] == ["<lora:other:1>", "<lora:sky:1>", "cat"]  # wide does not fit


def test_pictures(asked):
    start = Image.fromarray(np.uint8(web.noise()))
    one = asked("image", image=start)
    assert isinstance(one, Img2Img)
    assert np.array_equal(web.opened(one.init_images[0]), web.noise())
    assert (one.resize_mode, one.mask) == (1, None)

    layer = np.zeros((16, 16, 4), np.uint8)
    layer[2:5, 3:9] = 200
    canvas = {"background": start.convert("RGBA"), "layers": [Image.fromarray(layer)]}
    one = asked("inpaint", canvas=canvas, fill=2)
    assert np.array_equal(web.opened(one.mask), 255 * (layer[..., 3] > 0))
    assert (one.inpainting_fill, one.inpaint_full_res, one.mask_blur) == (2, False, 4)

    one = asked("upscale", small=start, factor=3)
    assert isinstance(one, ExtraSingle)
    assert (one.upscaler_1, one.upscaling_resize) == ("Lanczos", 3)


@pytest.mark.parametrize(
    ("tab", "fields", "message"),
    [
        ("image", {}, "give a picture to begin with"),
        ("upscale", {}, "give a picture to enlarge"),
        ("inpaint", {}, "give a picture to paint on"),
        (
            "inpaint",
            {"canvas": {"background": Image.new("RGB", (16, 16)), "layers": []}},
            "paint over",
        ),
    ],
)
def test_what_is_missing(asked, tab, fields, message):
    with pytest.raises(RefusedError, match=message):
        asked(tab, **fields)


def test_tabs_say_what_a_model_cannot(shown, service, asked, monkeypatch):
    entry = service.models()[0]._replace(kind="inpaint")
    monkeypatch.setattr(service, "entries", [entry])
    text, image, inpaint = shown._chosen(entry.title)[-3:]
    assert "is a model of inpaint, which is not for this tab" in text["value"]
    assert [part["visible"] for part in (text, image, inpaint)] == [True, True, False]
    with pytest.raises(RefusedError, match="is a model of inpaint"):
        asked("text")


def test_the_text_of_a_picture_fills_the_fields():
    text = "a fox\nNegative prompt: sea\nSteps: 9, Sampler: Euler, Schedule type: Karras, Seed: 4"
    text += ", CFG scale: 3, Size: 24x32, Clip skip: 2"
    told = {
        **{"prompt": "a fox", "negative": "sea", "steps": 9, "sampler": "Euler"},
        **{"schedule": "karras", "seed": 4, "scale": 3.0, "width": 24, "height": 32, "skip": 2},
    }
    assert page_fields.values_of(text, ()) == (told | {"hires": False}, [])
    found, left = page_fields.values_of(f"{text}, Denoising strength: 0.5, ENSD: 3, Eta: 1", ())
    assert (found["strength"], found["hires"]) == (0.5, False)
    assert left == ["Eta: 1", "eta_noise_seed_delta: 3"]
    larger = ", Denoising strength: 0.5, Hires upscale: 1.5, Hires upscaler: Lanczos"
    found, left = page_fields.values_of(text + larger, ())
    names = ("hires", "hr_scale", "hr_upscaler", "hr_steps", "hr_strength")
    assert [found[name] for name in names] == [True, 1.5, "Lanczos", 0, 0.5]
    assert left == []
    assert "strength" not in found
    assert page_fields.values_of("7", ("6", "7"))[0]["classes"] == "7"
    assert set(told | found | {"classes": "", "strength": 0}) == set(page.FILLED)


def test_a_picture_is_sent_to_a_tab(shown, service):
    title, data = service.models()[0].title, web.base64.b64decode(web.encoded(web.noise()))
    row, tab, of_pictures, picture, *_ = shown._sent("image")(title, "a fox", data)
    assert (row["selected"], tab, of_pictures["visible"]) == ("image", "image", True)
    assert np.array_equal(picture, web.noise())
    for text, given, message in (
        ("a fox", None, "give a picture to begin with"),
        ("a fox\nSteps: 9, Seed: 4, Size: 99999x32", data, "8192 pixels at most"),
    ):
        with pytest.raises(gr.Error, match=message):
            shown._sent("image")(title, text, given)
    with pytest.raises(gr.Error, match="no picture"):
        shown._read(b"x")


def test_words_are_inserted():
    assert page_fields.inserted("a fox", "<lora:sky:1>", 0.4) == "a fox <lora:sky:0.4>"
    assert page_fields.inserted("a fox", "cat", 1) == "a fox cat"
    assert page_fields.inserted("", "cat", 1.2) == "(cat:1.2)"
    assert page_fields.inserted("a fox", None, 1.2) == "a fox"


def test_the_line():
    job = Job(1, "txt2img", "", lambda watch: None)
    assert "waits; 2 before it" in page_style.bar(job, 3, "1x16x16")
    job.watch.does("compiling")
    job.watch.since -= 12
    assert "compiling the sampler for 1x16x16 ... 12 s" in page_style.bar(job, 0, "1x16x16")
    job.watch.does("sampling")
    job.watch.step, job.watch.steps = 3, 4
    told = page_style.bar(job, 0, "1x16x16")
    assert "0.750" in told
    assert "step 3 of 4, 0 s left" in told


@pytest.mark.parametrize("how", ["interrupt", "cancel"])
def test_a_job_that_waits_is_cancelled_at_once(shown, service, given, how):
    began, go_on = threading.Event(), threading.Event()
    running = service.queue.submit("other", "someone", lambda watch: (began.set(), go_on.wait(60)))
    began.wait(60)
    request = types.SimpleNamespace(session_hash="me")

    async def told():
        lines = []
        title = service.models()[0].title
        async for line, *_ in shown._generate(request, "text", title, *given.values()):
            lines.append(line)
            shown._stop(how)(request)
        return lines

    try:
        first, last = asyncio.run(told())
        assert "waits; it is the next one" in first
        assert last == "Cancelled."
        assert not running.future.done()
    finally:
        go_on.set()


def test_forged_requests(service, tmp_path):
    """gradio takes files by path, and copies, serves or fetches what it is not told to refuse."""
    secret = tmp_path / "secret.png"
    Image.fromarray(np.uint8(web.noise())).save(secret)
    http = TestClient(page.mounted(api.make(service), service), base_url="http://127.0.0.1")
    config = http.get("/config").json()
    event = max(config["dependencies"], key=lambda event: len(event["inputs"]))
    parts = {part["id"]: part for part in config["components"]}

    def ask(**picture):
        forged = {"meta": {"_type": "gradio.FileData"}, **picture}
        kinds = [parts[i]["type"] for i in event["inputs"]]
        values = [parts[i]["props"].get("value") for i in event["inputs"]]
        data = [
            forged if kind == "image" else value for kind, value in zip(kinds, values, strict=True)
        ]
        body = {"data": data, "fn_index": event["id"], "session_hash": "forged"}
        return http.post("/gradio_api/run/predict", json=body)

    answer = ask(path=str(secret))
    assert answer.status_code == 500
    assert "it was not uploaded by a user" in answer.json()["error"]
    answer = ask(path="http://example.com/a.png")
    assert (answer.status_code, answer.text) == (
        422,
        "a file is an address, and none is fetched: send the file",
    )
    for path in (secret, "pyproject.toml", "/etc/passwd", "http://example.com/a.png"):
        assert http.get(f"/gradio_api/file={path}").status_code == 403
    assert http.post("/gradio_api/queue/join", content=b"[" * 10**5).status_code == 422
    assert http.post("/gradio_api/queue/join", content=b" " * 2**20 + b"{}").status_code == 413
    named = json.dumps(http.get("/gradio_api/info").json())
    assert named == '{"named_endpoints": {}, "unnamed_endpoints": {}}'
