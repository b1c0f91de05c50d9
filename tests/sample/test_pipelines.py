"""Pipelines of torch diffusers against ours: the same folder, initial latents and prompt.

Those that begin with images: test_pipelines_editing.py.
"""

import shutil

import numpy as np
import pytest
import reference
from PIL import Image

from ldm_jax import loading, sampling
from ldm_jax.runtime import cli
from ldm_jax.sample import main

torch = pytest.importorskip("torch", reason="torch is the reference here")
import pipelines  # noqa: E402

pytestmark = pytest.mark.torch

STEPS, SCALE = 20, 7.5
PROMPTS = ["a red square", "blue"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(kind): (folder, torch pipeline), once for each kind."""
    root, known = tmp_path_factory.mktemp("pipelines"), {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of tiny layers, more only wait for each other

    def make(kind):
        if kind not in known:
            folder = root / kind
            new = pipelines.latent_diffusion if kind == "ldm" else pipelines.stable_diffusion
            known[kind] = folder, new(folder, *([] if kind == "ldm" else [kind]))
        return known[kind]

    yield make
    torch.set_num_threads(threads)


def start(height=8, width=8):
    """Initial latents [2, h, w, 4]."""
    return reference.draw(2, height, width, 4, seed=5)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def drawn(folder, tmp_path, x_T, *flags):
    """What `ldm-sample text2img` draws: uint8 [2, H, W, 3] as int; x_T: None, or the noise."""
    flags = ["--steps", STEPS, "--guidance-scale", SCALE, "--num-images", 1, *flags]
    if x_T is not None:
        np.save(tmp_path / "x_T.npy", x_T)
        flags += ["--init-latents", tmp_path / "x_T.npy"]
    flags += ["--prompt", *PROMPTS, "--model", folder, "--out", tmp_path / "out"]
    assert cli.run("ldm-sample", main.sample, ["text2img", *map(str, flags)]) == 0
    singles = sorted((tmp_path / "out").glob("0*.png"))
    return np.stack([np.asarray(Image.open(single)) for single in singles]).astype(int)


def same(ours, theirs):
    """Largest difference in grey levels, after looking that there is something to see."""
    theirs = np.stack([np.asarray(image) for image in theirs]).astype(int)
    assert theirs.shape == ours.shape
    assert np.abs(theirs[0] - theirs[1]).max() > 20
    return np.abs(ours - theirs).max()


@pytest.mark.parametrize(
    ("kind", "negative"),
    [
        ("v1", "a disc"),
        pytest.param("v1", "", marks=pytest.mark.slow),
        pytest.param("v", "", marks=pytest.mark.slow),
    ],
)
def test_stable_diffusion(made, tmp_path, record_property, kind, negative):
    folder, pipe = made(kind)
    x_T, size = start(12, 8), {"height": 24, "width": 16}
    theirs = pipe(
        PROMPTS, negative_prompt=[negative] * 2 if negative else None, latents=nchw(x_T),
        num_inference_steps=STEPS, guidance_scale=SCALE, **size,
    ).images  # fmt: skip
    flags = ["--negative-prompt", negative] if negative else []
    ours = drawn(folder, tmp_path, x_T, *flags, "--height", 24, "--width", 16)
    record_property("grey_levels", int(same(ours, theirs)))
    assert same(ours, theirs) <= 1


def test_noise_of_torchs_generators(made, tmp_path):
    folder, pipe = made("v1")
    theirs = pipe(
        PROMPTS, generator=[torch.Generator("cpu").manual_seed(seed) for seed in (7, 8)],
        num_inference_steps=STEPS, guidance_scale=SCALE, height=24, width=16,
    ).images  # fmt: skip
    flags = ["--noise-source", "cpu", "--seed", 7, "--height", 24, "--width", 16]
    assert same(drawn(folder, tmp_path, None, *flags), theirs) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheduler", "options", "flags"),
    [
        ("DDIMScheduler", {}, ["--solver", "ddim", "--eta", 1]),
        ("EulerAncestralDiscreteScheduler", {}, ["--solver", "euler_ancestral"]),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++"},
            ["--solver", "dpmpp_2m_sde"],
        ),
    ],
)
def test_steps_draw_from_torchs_generators(made, tmp_path, scheduler, options, flags):
    import diffusers

    folder, pipe = made("v1")
    own = pipe.scheduler
    pipe.scheduler = getattr(diffusers, scheduler).from_config(own.config, **options)
    shutil.copytree(folder, tmp_path / "model")
    pipe.scheduler.save_pretrained(tmp_path / "model" / "scheduler")
    try:
        theirs = pipe(
            PROMPTS, generator=[torch.Generator("cpu").manual_seed(seed) for seed in (7, 8)],
            num_inference_steps=STEPS, guidance_scale=SCALE, height=24, width=16,
            eta=float(scheduler == "DDIMScheduler"),
        ).images  # fmt: skip
    finally:
        pipe.scheduler = own
    flags = ["--noise-source", "cpu", "--seed", 7, "--height", 24, "--width", 16, *flags]
    assert same(drawn(tmp_path / "model", tmp_path, None, *flags), theirs) <= 1


@pytest.mark.slow
def test_a_second_pass_over_enlarged_latents(made, tmp_path):
    """Hires fix: 20 steps, then the last 10 of 20 on latents of half as many rows more."""
    from diffusers import StableDiffusionImg2ImgPipeline

    folder, pipe = made("v1")
    common = {"num_inference_steps": STEPS, "guidance_scale": SCALE}

    def generators():
        return [torch.Generator("cpu").manual_seed(seed) for seed in (7, 8)]

    small = pipe(
        PROMPTS, generator=generators(), height=16, width=24, output_type="latent", **common
    ).images
    # covers 12x12, and is cut to it
    large = torch.nn.functional.interpolate(small, (12, 18), mode="bicubic", antialias=True)
    large = large[..., 3:15]
    again = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    # a tensor of four channels is taken for latents
    theirs = again(PROMPTS, image=large, strength=0.5, generator=generators(), **common).images
    flags = ["--noise-source", "cpu", "--seed", 7, "--height", 16, "--width", 24]
    flags += ["--hires-size", 24, 24, "--hires-upscaler", "latent-bicubic-antialiased"]
    flags += ["--hires-steps", 10, "--hires-strength", 0.5]
    assert same(drawn(folder, tmp_path, None, *flags), theirs) <= 1


def test_latent_diffusion(made, tmp_path):
    folder, pipe = made("ldm")
    x_T = start()
    theirs = pipe(
        PROMPTS, latents=nchw(x_T), num_inference_steps=STEPS, guidance_scale=SCALE,
        height=64, width=64,
    ).images  # fmt: skip
    assert same(drawn(folder, tmp_path, x_T), theirs) <= 1


@pytest.mark.parametrize("kind", ["v1", "v", "inpaint", "ldm"])
def test_levels(made, kind):
    """A timestep beside the right one changes these images by less than a grey level."""
    folder, pipe = made(kind)
    pipe.scheduler.set_timesteps(STEPS)
    model = loading.load(folder, shapes_only=True)
    levels = sampling.levels_of(model, STEPS, None)
    np.testing.assert_array_equal(levels.t, pipe.scheduler.timesteps.numpy())
    end = float(pipe.scheduler.final_alpha_cumprod)
    assert (end == 1) == (kind == "ldm")
    np.testing.assert_allclose(levels.alpha_next[-1] ** 2, end, rtol=1e-6)
    table = pipe.scheduler.alphas_cumprod.numpy()
    np.testing.assert_allclose(model.schedule.alphas_cumprod, table, rtol=1e-5)
