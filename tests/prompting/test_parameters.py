"""The text of pictures by other programs, and ours for them."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from ldm_jax.prompting import parameters
from ldm_jax.runtime import images

WEBUI = """masterpiece, (a cat:1.2) <lora:myStyle:0.8>
second line
Negative prompt: blurry, lowres
and more
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 42, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Denoising strength: 0.7, Clip skip: 2, \
Lora hashes: "myStyle: 3f1c0e9a7b2d, other: 1", Version: v1.10.1"""


def test_webuis_text_is_read():
    prompt, negative, fields = parameters.parse(WEBUI)
    assert prompt == "masterpiece, (a cat:1.2) <lora:myStyle:0.8>\nsecond line"
    assert negative == "blurry, lowres\nand more"
    assert (fields["Size-1"], fields["Size-2"], fields["Seed"]) == ("512", "768", "42")
    assert fields["Lora hashes"] == "myStyle: 3f1c0e9a7b2d, other: 1"
    given, left = parameters.options(parameters.parse(WEBUI))
    assert left == ["Denoising strength: 0.7"]
    assert (given["solver"], given["spacing"], given["clip_skip"]) == ("dpmpp_2m", "karras", 2)
    assert (given["width"], given["height"], given["noise_source"]) == (512, 768, "nv")


@pytest.mark.parametrize(
    ("text", "prompt", "fields"),
    [
        ("a cat: black, dog: x", "a cat: black, dog: x", 0),
        ("a cat: black, dog: x, sea: blue", "", 3),  # as in webui
        ("", "", 0),
        ("a\x00", "a", 0),
        ('a\nSteps: 2, Seed: "1\\"2, Size: 3', "a", 3),
    ],
)
def test_the_last_line_is_one_of_fields_if_it_has_three(text, prompt, fields):
    read = parameters.parse(text)
    assert (read.prompt, len(read.fields)) == (prompt, fields)


@pytest.mark.parametrize("character", [" ", "a", ":", '"', ","])
def test_the_time_is_linear_in_a_line(character):
    """A quadratic reader would need an hour."""
    assert parameters.parse("a\n" + character * 1_000_000).prompt.startswith("a")


def test_a_size_beyond_all_is_refused():
    text = "a\nSteps: 2, Seed: 1, Size: 100000x16"
    with pytest.raises(ValueError, match="asks for width 100000: 8192 pixels at most"):
        parameters.options(parameters.parse(text))


def test_a_long_text_is_refused():
    with pytest.raises(ValueError, match="at most"):
        parameters.parse("a" * (parameters.LONGEST + 1))


OURS = {
    "prompt": 'a "(cat:2)": x\nSteps: 1', "prompt_syntax": "webui", "negative_prompt": "no",
    "steps": 30, "solver": "heun", "spacing": "karras", "guidance_scale": 7.5, "seed": 5,
    "index": 2, "noise_source": "cpu", "clip_skip": 2, "emphasis": "no-norm",
    "model": "models/sd, new", "lora": ["a/b.pt:1:0.5"], "made_with": {"ldm_jax": "0.1.0"},
}  # fmt: skip


HIRES = {"hires_upscaler": "latent-bicubic-antialiased", "hires_strength": 0.6}
LARGER = {**HIRES, "hires_steps": 0, "hires_scale": 1.0, "height": 24, "width": 16}


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, {"seed": 7, "noise_source": "cpu"}),
        ({"noise_source": "own"}, {"seed": 5, "first_index": 2, "noise_source": "own"}),
        (
            {"subseed": 9, "subseed_strength": 0.25},
            {"seed": 5, "subseed": 11, "subseed_strength": 0.25},
        ),
        (
            LARGER | {"hires_scale": 1.5, "hires_steps": 8},
            {"seed": 7, **HIRES, "hires_scale": 1.5, "hires_steps": 8},
        ),
        (LARGER | {"hires_size": [40, 0]}, {"seed": 7, **HIRES, "hires_size": (40, 0)}),
    ],
)
def test_what_is_written_is_read(changes, asked):
    text = parameters.written(OURS | changes, (24, 16))
    given, left = parameters.options(parameters.parse(text))
    assert left == []
    wanted = {
        "prompt": (OURS["prompt"],), "negative_prompt": "no", "steps": 30, "solver": "heun",
        "spacing": "karras", "guidance_scale": 7.5, "clip_skip": 2, "emphasis": "no-norm",
        "height": 24, "width": 16, "num_images": 1, "prompt_syntax": "webui",
    }  # fmt: skip
    assert given == {"noise_source": "cpu", **wanted, **asked}
    assert 'Model: "sd, new"' in text


def test_brackets_of_a_plain_prompt_are_escaped():
    text = parameters.written(OURS | {"prompt_syntax": "plain", "prompt": r"(a) [\b]"}, (8, 8))
    assert parameters.parse(text).prompt == r"\(a\) \[\\b\]"


def test_what_is_not_known_is_told():
    text = "a\nSteps: 2, RNG: other, Emphasis: Odd, Sampler: Mine, Seed: x, Tiling: True"
    given, left = parameters.options(parameters.parse(text))
    assert left == ["Seed: x", "Sampler: Mine", "RNG: other", "Emphasis: Odd", "Tiling: True"]
    assert given.keys() == {"steps", "prompt", "negative_prompt", "prompt_syntax", "num_images"}


def test_novel_ai_and_comfy_ui():
    values = {"steps": 28, "scale": 11.0, "seed": 3, "sampler": "k_euler_ancestral", "uc": "bad"}
    info = {"Software": "NovelAI", "Description": "a girl", "Comment": json.dumps(values)}
    given, left = parameters.options(parameters.of_info(info))
    assert (given["prompt"], given["negative_prompt"], given["solver"]) == (
        ("a girl",), "bad", "euler_ancestral",
    )  # fmt: skip
    assert (given["eta_noise_seed_delta"], left) == (31337, [])
    graph = {
        "3": {"inputs": {"seed": 8, "steps": 20, "cfg": 8, "sampler_name": "euler",
                         "scheduler": "karras", "denoise": 1, "positive": ["6", 0],
                         "negative": ["7", 0]}},
        "6": {"inputs": {"text": "a hill"}}, "7": {"inputs": {"text": "fog"}},
    }  # fmt: skip
    known = parameters.of_info({"prompt": json.dumps(graph)})
    assert (known.prompt, known.negative_prompt) == ("a hill", "fog")
    assert known.fields["Seed"] == "8"
    assert parameters.of_info({"prompt": "[1]"}) is None
    with pytest.raises(ValueError, match=r"x\.png: its comment is no object"):
        parameters.of_info(info | {"Comment": "[]"}, "x.png")


def test_the_comment_of_a_jpeg(tmp_path):
    exif = Image.Exif()
    folder, tag = images.USER_COMMENT
    exif.get_ifd(folder)[tag] = b"UNICODE\0" + WEBUI.encode("utf-16-be")
    path, buffer = tmp_path / "a.jpg", io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "JPEG", exif=exif)
    path.write_bytes(buffer.getvalue())
    assert parameters.of_info(images.read_info(path)) == parameters.parse(WEBUI)
