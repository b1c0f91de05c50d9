"""A real client, webuiapi, drives a real server: `ldm-web` in a process of its own."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import web
import webuiapi
from PIL import Image


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(process, port, folder of pictures) of `ldm-web --api-only` with a model of text."""
    folder = tmp_path_factory.mktemp("server")
    run = web.text_run(folder)
    command = [sys.executable, "-m", "ldm_jax.sample.web.main", "--model", run, "--port", "0"]
    command += ["--api-only", "--out", folder / "out"]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    with subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        for line in process.stderr:
            found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
            if found:
                break
        else:
            pytest.fail("the server ended")
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        yield process, int(found[1]), folder / "out"
        process.kill()


def test_webuiapi(server):
    process, port, _ = server
    api = webuiapi.WebUIApi(host="127.0.0.1", port=port)
    small = {"steps": 3, "width": 16, "height": 16}

    drawn = api.txt2img(prompt="red square", negative_prompt="sea", seed=7, cfg_scale=5, **small)
    assert drawn.image.size == (16, 16)
    assert drawn.info["seed"] == 7
    more = api.txt2img(prompt="red", seed=7, sampler_name="Euler a", batch_size=2, **small)
    assert [image.size for image in more.images] == [(16, 16)] * 2

    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 4:9] = 255
    for more in ({}, {"mask_image": Image.fromarray(mask), "inpainting_fill": 1}):
        changed = api.img2img(images=[drawn.image], prompt="blue", seed=1, **small, **more)
        assert changed.image.size == (16, 16)
        assert not np.array_equal(changed.image, drawn.image)

    large = api.extra_single_image(drawn.image, upscaler_1="Lanczos", upscaling_resize=3)
    assert large.image.size == (48, 48)
    both = api.extra_batch_images([drawn.image] * 2, upscaler_1="Nearest", upscaling_resize=2)
    assert [image.size for image in both.images] == [(32, 32)] * 2
    assert api.png_info(drawn.image).info.startswith("red square\nNegative prompt: sea\nSteps: 3")

    options = api.get_options()
    api.set_options({"CLIP_stop_at_last_layers": 2, "sd_vae": options["sd_vae"]})
    assert api.get_options()["CLIP_stop_at_last_layers"] == 2
    assert "DPM++ 2M" in {one["name"] for one in api.get_samplers()}
    assert api.get_sd_models()[0]["model_name"] == "words"
    assert api.util_get_current_model() == api.get_sd_models()[0]["title"]
    api.util_set_model("words")
    assert api.get_progress()["progress"] == 0
    for ask in (api.get_cmd_flags, api.get_upscalers, api.get_loras, api.get_embeddings):
        ask()
    for ask in (api.get_hypernetworks, api.get_face_restorers, api.get_realesrgan_models):
        assert ask() == []
    assert api.get_prompt_styles() == []
    assert api.get_memory()["ram"]["used"] > 0
    api.refresh_checkpoints()
    with pytest.raises(RuntimeError, match="Sampler not found"):
        api.txt2img(prompt="red", sampler_name="Fast", **small)
    assert process.poll() is None


def asked(port, **given):
    """The result of a request in a thread; {} until it is there."""
    result = {}

    def ask():
        api = webuiapi.WebUIApi(host="127.0.0.1", port=port)
        try:
            result["drawn"] = api.txt2img(prompt="red", width=16, height=16, **given)
        except RuntimeError as error:
            result["refused"] = str(error)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, result


def until(api, holds):
    """The first progress that `holds`."""
    for _ in range(2000):
        told = api.get_progress()
        if holds(told):
            return told
        time.sleep(0.01)
    raise AssertionError(f"after 20 s: {told}")


def test_progress_interrupt_and_the_end(server):
    process, port, out = server
    api = webuiapi.WebUIApi(host="127.0.0.1", port=port)
    long = {"steps": 150, "n_iter": 16, "batch_size": 4}  # 2400 levels
    thread, result = asked(port, **long)
    told = until(api, lambda told: told["current_image"])
    assert 0 < told["progress"] < 1
    assert told["state"]["sampling_steps"] == 2400
    assert told["eta_relative"] > 0
    assert Image.open(io.BytesIO(web.base64.b64decode(told["current_image"]))).height >= 16
    api.interrupt()
    thread.join(20)
    assert 0 < len(result["drawn"].images) < 64

    # a running batch is whole, and nothing else is written
    thread, result = asked(port, **long, save_images=True)
    until(api, lambda told: told["state"]["sampling_step"] > 0)
    waiting, refused = asked(port, **long)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    thread.join(10)
    waiting.join(10)
    assert len(result["drawn"].images) in (4, 8)
    assert "stopping" in json.dumps(refused)
    (folder,) = out.iterdir()
    names = [path.name for path in folder.iterdir()]
    assert len(names) == len(result["drawn"].images)
    assert all(Image.open(folder / name).info["parameters"] for name in names)
