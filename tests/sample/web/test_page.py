"""The page without a browser: what its fields ask for, and what forged requests get."""

import json

import gradio as gr
import numpy as np
import pytest
import web
from fastapi.testclient import TestClient
from PIL import Image

from ldm_jax.sample.web import api, page
from ldm_jax.sample.web.asked import ExtraSingle, Img2Img, Txt2Img
from ldm_jax.sample.web.limits import RefusedError


@pytest.fixture(scope="module")
def service(tmp_path_factory, ldm_run):
    made = web.service(web.text_run(tmp_path_factory.mktemp("page")), ldm_run)
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


def test_text_to_image(shown, service, given):
    title = service.models()[0].title
    asked = shown._asked("text", title, given | {"prompt": "red", "skip": 2, "seed": None})
    assert isinstance(asked, Txt2Img)
    told = (asked.prompt, asked.sampler_name, asked.scheduler, asked.steps, asked.seed)
    assert told == ("red", "DPM++ 2M", "automatic", 20, -1)
    assert (asked.width, asked.height, asked.cfg_scale, asked.enable_hr) == (16, 16, 7.0, False)
    assert asked.override_settings == {
        "sd_model_checkpoint": title,
        "CLIP_stop_at_last_layers": 2,
    }
    asked = shown._asked("text", title, given | {"hires": True, "hr_upscaler": "Lanczos"})
    assert (asked.enable_hr, asked.hr_scale, asked.hr_upscaler) == (True, 2, "Lanczos")
    assert asked.denoising_strength == 0.7
    asked.check(service.limits)


def test_class_to_image(shown, service, given):
    title = service.models()[1].title
    classes, prompt, negative, width, _, scale = shown._chosen(title)
    assert classes["visible"]
    assert not prompt["visible"]
    assert not negative["visible"]
    assert (width, scale) == (16, 1.5)
    asked = shown._asked("text", title, given | {"classes": classes["value"], "prompt": "red"})
    assert (asked.prompt, asked.negative_prompt) == (classes["choices"][0], "")


def test_pictures(shown, service, given):
    title = service.models()[0].title
    start = Image.fromarray(np.uint8(web.noise()))
    asked = shown._asked("image", title, given | {"image": start})
    assert isinstance(asked, Img2Img)
    assert np.array_equal(web.opened(asked.init_images[0]), web.noise())
    assert (asked.resize_mode, asked.mask) == (1, None)

    layer = np.zeros((16, 16, 4), np.uint8)
    layer[2:5, 3:9] = 200
    canvas = {"background": start.convert("RGBA"), "layers": [Image.fromarray(layer)]}
    asked = shown._asked("inpaint", title, given | {"canvas": canvas, "fill": 2})
    assert np.array_equal(web.opened(asked.mask), 255 * (layer[..., 3] > 0))
    assert (asked.inpainting_fill, asked.inpaint_full_res, asked.mask_blur) == (2, False, 4)

    asked = shown._asked("upscale", title, given | {"small": start, "factor": 3})
    assert isinstance(asked, ExtraSingle)
    assert (asked.upscaler_1, asked.upscaling_resize) == ("Lanczos", 3)


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
def test_what_is_missing(shown, service, given, tab, fields, message):
    with pytest.raises(RefusedError, match=message):
        shown._asked(tab, service.models()[0].title, given | fields)


def test_a_model_that_a_tab_is_not_for(shown, service, given, monkeypatch):
    entry = service.models()[0]._replace(kind="superres")
    monkeypatch.setattr(service, "entries", [entry])
    with pytest.raises(RefusedError, match="is a model of superres"):
        shown._asked("text", entry.title, given)


def test_the_text_of_a_picture_fills_the_fields(shown):
    text = "a fox\nNegative prompt: sea\nSteps: 9, Sampler: Euler, Schedule type: Karras, Seed: 4"
    text += ", CFG scale: 3, Size: 24x32, Clip skip: 2"
    before = ("", "", "DDIM", "automatic", 20, 16, 16, 7.0, -1, 1)
    assert shown._reused(text, *before) == [
        "a fox", "sea", "Euler", "karras", 9, 24, 32, 3.0, 4, 2,
    ]  # fmt: skip
    assert shown._reused("a fox", *before) == ["a fox", *before[1:]]
    with pytest.raises(gr.Error, match="no picture"):
        shown._read(b"x")


def test_words_are_inserted():
    assert page._inserted("a fox", "<lora:sky:1>", 0.4) == "a fox <lora:sky:0.4>"
    assert page._inserted("a fox", "cat", 1) == "a fox cat"
    assert page._inserted("", "cat", 1.2) == "(cat:1.2)"
    assert page._inserted("a fox", None, 1.2) == "a fox"


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
