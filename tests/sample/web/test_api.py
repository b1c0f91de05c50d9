"""The API on tiny models: what it draws, what it tells, and what it refuses."""

import json
import pathlib

import numpy as np
import pytest
import task_models
import web
from PIL import Image

from ldm_jax import schema
from ldm_jax.runtime import images
from ldm_jax.sample.web import asked, settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("web")


@pytest.fixture(scope="module")
def words(folder):
    return web.text_run(folder)


@pytest.fixture(scope="module")
def client(folder, words, ldm_run):
    cond = schema.SuperResCondConfig(factor=2)
    large = task_models.save(task_models.make(cond, in_channels=7), folder)
    table = folder / "styles.csv"
    table.write_text('name,prompt,negative_prompt\nneat,"(red:1.2) {prompt}",sea\n')
    folders = {"loras": str(folder / "loras"), "embeddings": str(folder / "embeddings")}
    web.adapters(words, folder)
    made = web.service(words, ldm_run, large, out=str(folder / "out"), styles=str(table), **folders)
    yield web.Client(made)
    made.queue.close()


def by_command(folder, task, *flags):
    """uint8 pictures by `ldm-sample`."""
    out = folder / f"{task}_{abs(hash(flags))}"
    assert task_models.sample(task, "--out", out, *flags) == 0
    paths = sorted(path for path in out.glob("*.png") if path.stem != "grid")
    return [np.asarray(Image.open(path)) for path in paths]


WEBUI = ("--prompt-syntax", "webui", "--noise-source", "nv")


def test_a_request_is_the_command_pixel_for_pixel(client, folder, words):
    prompt = "[red:blue:0.5] (square:1.3) BREAK AND blue :0.5"
    pictures, info = client.drawn(prompt=prompt, negative_prompt="sea", batch_size=4, cfg_scale=3)
    flags = ("--model", words, *WEBUI, "--guidance-scale", 3, "--negative-prompt", "sea")
    for i in (0, 3):  # picture i is the first one of seed + i
        more = ("--prompt", prompt, "--seed", 5 + i, "--num-images", 1)
        (wanted,) = by_command(folder, "text2img", *flags, *more)
        assert np.array_equal(pictures[i], wanted)
    assert info["all_seeds"] == [5, 6, 7, 8]
    assert info["infotexts"][1].splitlines() == [
        prompt,
        "Negative prompt: sea",
        "Steps: 2, Sampler: DDIM, CFG scale: 3, Seed: 6, Size: 16x16, Model: words, RNG: NV,"
        " Version: ldm_jax 0.1.0",
    ]
    assert pictures[1].info["parameters"] == info["infotexts"][1]
    assert json.loads(pictures[1].info["ldm_jax"])["seed"] == 6


def test_steps_and_words_do_not_recompile(client):
    client.drawn(prompt="red")
    before = dict(client.service.engine._programs._values)
    client.drawn(prompt="a blue square [red:sea:1]", steps=7, seed=9, cfg_scale=5)
    client.drawn(prompt="[red|blue]", steps=7)  # two texts, as the one before
    assert len(client.service.engine._programs._values) == len(before) + 1


@pytest.mark.slow
def test_variations_and_other_noise(client, folder, words):
    given = {"prompt": "red", "subseed": 3, "subseed_strength": 0.4, "batch_size": 2}
    given["override_settings"] = {"randn_source": "CPU", "CLIP_stop_at_last_layers": 2}
    pictures, info = client.drawn(**given)
    assert (info["all_seeds"], info["all_subseeds"]) == ([5, 5], [3, 4])
    flags = ("--subseed", 3, "--subseed-strength", 0.4, "--seed", 5, "--num-images", 2)
    flags += ("--prompt-syntax", "webui", "--noise-source", "cpu", "--clip-skip", 2)
    flags += ("--guidance-scale", 7)
    wanted = by_command(folder, "text2img", "--model", words, "--prompt", "red", *flags)
    assert all(np.array_equal(a, b) for a, b in zip(pictures, wanted, strict=True))
    assert client.get("options")["CLIP_stop_at_last_layers"] == 1


def test_hires_fix(client, folder, words):
    given = {"prompt": "red", "enable_hr": True, "hr_upscaler": "Latent (bicubic)"}
    (picture,), info = client.drawn(**given, hr_second_pass_steps=1, denoising_strength=0.5)
    assert (picture.size, info["width"], info["height"]) == ((32, 32), 32, 32)
    flags = ("--hires-scale", 2, "--hires-upscaler", "latent-bicubic", "--hires-steps", 1)
    flags += ("--hires-strength", 0.5, "--seed", 5, "--num-images", 1, "--guidance-scale", 7)
    flags = (*WEBUI, "--prompt", "red", *flags)
    assert np.array_equal(picture, by_command(folder, "text2img", "--model", words, *flags)[0])
    assert "Hires upscaler: Latent (bicubic)" in info["infotexts"][0]
    (other,), info = client.drawn(**(given | {"hr_upscaler": "LDSR"}), denoising_strength=0.5)
    assert other.size == (32, 32)
    assert not np.array_equal(other, picture)
    assert "Hires upscaler: LDSR" in info["infotexts"][0]


def test_loras_and_embeddings(client, folder, words):
    (picture,), info = client.drawn(prompt="a cat <lora:sky:0.5>")
    flags = ("--model", words, *WEBUI, "--prompt", "a <cat> <lora:sky:0.5>", "--seed", 5)
    flags += ("--lora-dir", folder / "loras", "--embedding", folder / "embeddings" / "cat.pt")
    flags += ("--guidance-scale", 7, "--num-images", 1)
    assert np.array_equal(picture, by_command(folder, "text2img", *flags)[0])
    assert "Loras: sky" in info["infotexts"][0]
    (plain,), _ = client.drawn(prompt="a cat")
    assert not np.array_equal(picture, plain)
    told = client.refused("txt2img", {"prompt": "a cat <lora:other:1>", "steps": 2})
    assert "other.safetensors" in told  # of another base: it names both widths
    assert "48" in told
    assert "32" in told


def test_classes(client, folder, ldm_run):
    title = client.get("sd-models")[1]["title"]
    given = {"override_settings": {"sd_model_checkpoint": title}, "cfg_scale": 2}
    (picture,), info = client.drawn(prompt="3", **given)
    flags = ("--labels", 3, "--seed", 5, "--num-images", 1, "--guidance-scale", 2)
    flags += ("--noise-source", "nv")
    assert np.array_equal(picture, by_command(folder, "class2img", "--model", ldm_run, *flags)[0])
    assert info["infotexts"][0].startswith("pentagon\nSteps: 2")
    told = client.refused("txt2img", {"prompt": "elephant", **given})
    assert told.startswith("prompt elephant: ")
    assert "negative_prompt" in client.refused(
        "txt2img", {"prompt": "3", "negative_prompt": "4", **given}
    )
    (nothing,), _ = client.drawn(prompt="", **given)
    assert not np.array_equal(nothing, picture)


def test_pictures_of_pictures(client, folder, words):
    start, mask = web.noise(), np.zeros((16, 16))
    mask[4:12, 4:12] = 255
    (folder / "start.png").write_bytes(images.png(np.uint8(start)))
    (folder / "mask.png").write_bytes(images.png(np.uint8(mask)[..., None]))
    given = {"init_images": [web.encoded(start)], "prompt": "red", "denoising_strength": 0.6}
    flags = ("--model", words, *WEBUI, "--images", folder / "start.png", "--prompt", "red")
    flags += ("--seed", 5, "--guidance-scale", 7, "--strength", 0.6)
    pictures, info = client.drawn("img2img", **given)
    assert np.array_equal(pictures[0], by_command(folder, "img2img", *flags)[0])
    assert "Denoising strength: 0.6" in info["infotexts"][0]

    given |= {"mask": f"data:image/png;base64,{web.encoded(mask)}", "inpainting_fill": 2}
    given |= {"inpaint_full_res": False, "mask_blur": 0}
    flags += ("--masks", folder / "mask.png", "--content", "noise")
    (picture,), _ = client.drawn("img2img", **given)
    assert np.array_equal(picture, by_command(folder, "inpaint", *flags)[0])
    assert np.array_equal(np.asarray(picture)[mask == 0], start[mask == 0])
    kept = json.loads(picture.info["ldm_jax"])
    assert kept["files"].keys() == {"init_0.png", "mask.png"}  # no folder of the server

    blank = web.encoded(np.zeros((16, 16)))
    again, _ = client.drawn("img2img", **(given | {"mask": blank}))
    assert np.array_equal(again[0], pictures[0])


def test_what_is_drawn_is_kept_where_it_is_asked_for(client, folder, capsys):
    client.drawn(prompt="red", save_images=True, batch_size=2)
    (day,) = (folder / "out").iterdir()
    assert sorted(path.name for path in day.iterdir()) == ["00000-5.png", "00001-6.png"]
    client.drawn(prompt="red", save_images=True)
    assert (day / "00002-5.png").exists()
    assert images.read_settings(day / "00001-6.png")["prompt"] == "red"
    capsys.readouterr()
    assert task_models.again(day / "00001-6.png", "--out", folder / "again") == 0
    assert capsys.readouterr().err.endswith("pixel for pixel\n")


def test_enlarging(client):
    assert [one["name"] for one in client.get("upscalers")] == [
        "None",
        "Lanczos",
        "Nearest",
        "LDSR",
    ]
    given = {"image": web.encoded(web.noise()), "upscaling_resize": 2}
    told = client.post("extra-single-image", given | {"upscaler_1": "Nearest"})
    assert np.array_equal(web.opened(told["image"]), web.noise().repeat(2, 0).repeat(2, 1))
    small = {"imageList": [{"data": web.encoded(web.noise(size=8)), "name": "a"}] * 2}
    size = {"resize_mode": 1, "upscaling_resize_w": 16, "upscaling_resize_h": 12}
    told = client.post("extra-batch-images", small | size | {"upscaler_1": "LDSR"})
    assert [web.opened(text).size for text in told["images"]] == [(16, 12)] * 2
    assert "is not one of" in client.refused(
        "extra-single-image", given | {"upscaler_1": "ESRGAN"}, 400
    )


def test_the_text_of_a_picture(client):
    (picture,), _ = client.drawn(prompt="red (square)")
    text = web.encoded(picture)
    assert client.post("png-info", {"image": text})["info"] == ""
    text = client.post("txt2img", {"prompt": "red", "steps": 2})["images"][0]
    told = client.post("png-info", {"image": text})
    assert told["info"].startswith("red\nSteps: 2, Sampler: Euler, ")
    assert told["parameters"]["Prompt"] == "red"
    assert told["parameters"]["Size-1"] == "16"
    assert "ldm_jax" in told["items"]


def test_lists(client):
    assert [one["model_name"] for one in client.get("sd-models")] == ["words", "ldm", "run"]
    assert {"name": "Euler a", "aliases": ["k_euler_a", "k_euler_ancestral"], "options": {}} in (
        client.get("samplers")
    )
    assert "karras" in {one["name"] for one in client.get("schedulers")}
    assert len(client.get("latent-upscale-modes")) == 6
    assert [one["name"] for one in client.get("loras")] == ["other", "sky"]
    told = client.get("embeddings")
    assert told["loaded"]["cat"]["vectors"] == 2
    assert told["skipped"].keys() == {"wide"}
    assert client.get("scripts") == {"txt2img": [], "img2img": []}
    for name in ("sd-vae", "hypernetworks", "face-restorers", "realesrgan-models"):
        assert client.get(name) == []
    assert [one["name"] for one in client.get("prompt-styles")] == ["neat"]
    assert client.post("refresh-checkpoints") is None
    assert client.get("memory")["ram"]["used"] > 0
    assert client.get("cmd-flags")["api"]
    page = client.http.get("/docs").text
    assert "/sdapi/v1/txt2img" in page
    assert "http" not in page.replace("http-equiv", "")


def test_settings(client):
    first, second, _ = (one["title"] for one in client.get("sd-models"))
    assert client.get("options")["sd_model_checkpoint"] == first
    client.post("options", {"sd_model_checkpoint": "ldm", "sd_vae": "Automatic"})
    assert client.get("options")["sd_model_checkpoint"] == second
    client.post("options", {"sd_model_checkpoint": first})
    for given in (
        {"sd_model_checkpoint": "other"},
        {"randn_source": "TPU"},
        {"CLIP_stop_at_last_layers": 0},
        {"sd_vae": "other.pt"},
        {"outdir_samples": "/etc"},
    ):
        (name,) = given
        assert name in client.refused("options", given)
        if name != "sd_model_checkpoint":
            assert name in client.refused("txt2img", {"override_settings": given})
    assert client.get("options") == settings.FIXED | {
        "sd_model_checkpoint": first,
        "sd_checkpoint_hash": client.service.current.digest,
        "CLIP_stop_at_last_layers": 1,
        "randn_source": "NV",
        "emphasis": "Original",
        "eta_noise_seed_delta": 0,
    }


def test_styles(client):
    (styled,), _ = client.drawn(prompt="square", styles=["neat"])
    (plain,), _ = client.drawn(prompt="(red:1.2) square", negative_prompt="sea")
    assert np.array_equal(styled, plain)
    assert "there is no such style" in client.refused("txt2img", {"styles": ["odd"]})


REFUSED = [
    ({"sampler_name": "Fast"}, 400, "Sampler not found: 'Fast' is not one of DDIM, "),
    ({"scheduler": "never"}, 400, "Scheduler not found"),
    ({"width": 10**6}, 422, "more than the 4,096 pixels of --max-pixels"),
    ({"width": 0}, 422, "width 0"),
    ({"width": 17}, 422, "17 is not a multiple of"),
    ({"batch_size": 10**4}, 422, "batch_size 10000 is not in 1..4"),
    ({"n_iter": 9}, 422, "n_iter 9 is not in 1..8"),
    ({"steps": 151}, 422, "steps 151 is not in 1..150"),
    ({"seed": 2**64}, 422, "seed"),
    ({"prompt": "x" * 20_001}, 422, "prompt has 20001 characters"),
    ({"prompt": "red " * 4000}, 422, "chunks"),
    ({"prompt": "<lora:style:1>"}, 422, "lora"),
    ({"cfg_scale": float("1e30")}, 422, "cfg_scale"),
    ({"prompt": 3}, 422, "prompt"),
    ({"script_name": "x/y/z"}, 422, "Script"),
    ({"alwayson_scripts": {"adetailer": {}}}, 422, "always on script"),
    ({"restore_faces": True}, 422, "restore_faces"),
    ({"enable_hr": True, "hr_scale": 8}, 422, "the enlarged picture"),
    ({"enable_hr": True, "hr_upscaler": "ESRGAN"}, 400, "hr_upscaler"),
    ({"enable_hr": True, "hr_prompt": "other"}, 422, "hr_prompt"),
]


@pytest.mark.parametrize(("given", "status", "message"), REFUSED)
def test_refusals(client, given, status, message):
    assert message in client.refused("txt2img", {"prompt": "red", "steps": 2, **given}, status)


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        ({}, 404, "Init image not found"),
        ({"init_images": ["http://127.0.0.1/a.png"]}, 422, "is an address"),
        ({"init_images": ["%%%"]}, 422, "no base64"),
        ({"init_images": ["aGVsbG8="]}, 422, "no picture"),
        ({"init_images": [web.encoded(web.noise(size=65))]}, 422, "--max-pixels"),
        ({"mask": web.encoded(np.ones((8, 8)) * 255)}, 422, "the mask is 8x8"),
        ({"latent_mask": "x"}, 422, "latent_mask"),
    ],
)
def test_refusals_of_pictures(client, given, status, message):
    start = {"init_images": [web.encoded(web.noise())]} if given else {}
    told = client.refused("img2img", {"prompt": "red", "steps": 2, **start, **given}, status)
    assert message in told


def test_a_seed_is_drawn_and_told(client):
    _, info = client.drawn(prompt="red", seed=-1)
    _, other = client.drawn(prompt="red", seed=-1)
    assert info["seed"] != other["seed"]
    assert f"Seed: {info['seed']}" in info["infotexts"][0]


@pytest.mark.parametrize(
    "image",
    [
        np.uint8(web.noise()[..., 0]),
        np.dstack([np.uint8(web.noise()), np.full((16, 16), 99, np.uint8)]),
        web.noise()[..., 0] > 99,
        np.uint16(web.noise()[..., 0] * 257),
    ],
    ids=["grey", "alpha", "bits", "sixteen"],
)
def test_pictures_of_every_mode(client, image):
    buffer = pathlib.Path(client.service.folders.out).parent / "mode.png"
    Image.fromarray(image).save(buffer)
    text = web.base64.b64encode(buffer.read_bytes()).decode()
    (picture,), _ = client.drawn("img2img", init_images=[text], prompt="red")
    assert picture.size == (16, 16)


def test_defaults_are_those_of_webui():
    given = asked.Txt2Img()
    told = {name: getattr(given, name) for name in ("steps", "cfg_scale", "seed", "batch_size")}
    assert told == {"steps": 50, "cfg_scale": 7.0, "seed": -1, "batch_size": 1}
    given = asked.Img2Img()
    told = (given.denoising_strength, given.inpainting_fill, given.inpaint_full_res)
    assert told == (0.75, 0, True)
    assert (given.inpaint_full_res_padding, given.mask_blur_x) == (0, 4)
