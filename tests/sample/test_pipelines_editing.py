"""Editing pipelines of torch diffusers against ours: image against image, with the same noise.

What differs by design, and is the same in both here:

- Noise: diffusers draws it from a generator of torch; it is given ours.
- Strength 1: img2img of diffusers noises the image to the first level, ours starts from noise alone
  (as its inpainting does, whose known part is noise alone at that level too, where ours blends).
  Below 1 both noise the image to the level that runs first.
- Known pixels under a model of four channels: diffusers blends after each step with one noise, ours
  before each call with fresh noise, as the reference; ours is given one noise.
- Posterior: its sample comes from two generators; the first stage here has next to no variance.
- Known pixels of the result: the command puts back the image's own.
- Dynamic thresholding: ours always derives the noise again from the thresholded x0, DDIM of
  diffusers if asked; ours has no upper bound on the quantile, theirs is set far away.
"""

import functools

import jax
import numpy as np
import pytest
import reference
from PIL import Image

from ldm_jax import conditioning, latents, loading, sampling, solvers
from ldm_jax.runtime import cli, images
from ldm_jax.sample import main

torch = pytest.importorskip("torch", reason="torch is the reference here")
import pipelines  # noqa: E402

pytestmark = pytest.mark.torch

STEPS, SCALE, SIDE = 10, 7.5, 24
STRONG = 40.0  # guidance, of a random model that hardly reads its prompt
PROMPTS = ["a red square", "blue"]
MODULES = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of tiny layers, more only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, torch pipeline) of text, whose posterior has next to no variance."""
    folder = tmp_path_factory.mktemp("editing") / "v1"
    pipe = pipelines.stable_diffusion(folder, "v1")
    pipe.vae = pipelines.autoencoder(quiet=True)
    pipe.vae.save_pretrained(folder / "vae")
    return folder, pipe


@pytest.fixture(scope="module")
def model(made):
    return loading.load(made[0])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two image files, two mask files whose holes are whole pixels of the latent, and x_T."""
    root = tmp_path_factory.mktemp("photos")
    pictures = images.to_uint8(reference.draw(2, SIDE, SIDE, 3, seed=1))
    holes = np.zeros((2, SIDE, SIDE, 1), np.uint8)
    holes[0, 4:16, 6:] = holes[1, :10, :14] = 255
    for i in range(2):
        images.save_png(root / f"photo{i}.png", pictures[i])
        images.save_png(root / f"hole{i}.png", holes[i])
    np.save(root / "x_T.npy", noise())
    return root


def noise():
    return reference.draw(2, SIDE // 2, SIDE // 2, 4, seed=5)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.transpose(x, (0, 3, 1, 2))))


def opened(root, name):
    return [Image.open(root / f"{name}{i}.png") for i in range(2)]


def pixels(given):
    return np.stack([np.asarray(image) for image in given]).astype(int)


def command(tmp_path, photos, task, folder, *flags):
    """What `ldm-sample` draws of the two photos: uint8 [2, H, W, 3] as int."""
    flags = ["--steps", STEPS, "--guidance-scale", SCALE, *flags, "--prompt", *PROMPTS]
    flags += ["--images", photos / "photo0.png", photos / "photo1.png"]
    flags += ["--init-latents", photos / "x_T.npy", "--model", folder, "--out", tmp_path / "out"]
    assert cli.run("ldm-sample", main.sample, [task, *map(str, flags)]) == 0
    return pixels(Image.open(single) for single in sorted((tmp_path / "out").glob("0*.png")))


def differ(ours, theirs, record_property):
    """Largest difference in grey levels, after looking that there is something to see."""
    assert theirs.shape == ours.shape
    assert np.abs(theirs[0] - theirs[1]).max() > 20
    found = int(np.abs(ours - theirs).max())
    record_property("grey_levels", found)
    return found


@pytest.mark.slow
def test_img2img(made, photos, tmp_path, monkeypatch, record_property):
    from diffusers import StableDiffusionImg2ImgPipeline

    folder, pipe = made
    theirs = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    monkeypatch.setattr(f"{MODULES}img2img.randn_tensor", lambda *args, **given: nchw(noise()))
    expected = theirs(
        PROMPTS, image=opened(photos, "photo"), strength=0.65, num_inference_steps=STEPS,
        guidance_scale=SCALE,
    ).images  # fmt: skip
    ours = command(tmp_path, photos, "img2img", folder, "--strength", 0.65)
    assert differ(ours, pixels(expected), record_property) <= 1


@pytest.mark.parametrize("steps", [STEPS, 50, 100])
def test_levels_that_run(made, model, steps):
    """For every strength in hundredths, the timesteps from the first that runs on."""
    from diffusers import StableDiffusionImg2ImgPipeline

    theirs = StableDiffusionImg2ImgPipeline(**made[1].components, requires_safety_checker=False)
    theirs.scheduler.set_timesteps(steps)
    t = sampling.levels_of(model, steps, None).t
    for hundredths in range(101):
        strength = hundredths / 100
        expected, count = theirs.get_timesteps(steps, strength, "cpu")
        if abs(steps * strength - round(steps * strength)) < 1e-6 and count != round(
            steps * strength
        ):
            continue  # 0.29 * 100 is below 29: they run 28 steps
        np.testing.assert_array_equal(t[sampling.start_of(strength, steps) :], expected)


def test_inpainting_with_nine_channels(photos, tmp_path, record_property):
    folder = tmp_path / "inpaint"
    pipe = pipelines.stable_diffusion(folder, "inpaint")
    expected = pipe(
        PROMPTS, image=opened(photos, "photo"), mask_image=opened(photos, "hole"),
        latents=nchw(noise()), num_inference_steps=STEPS, guidance_scale=SCALE, strength=1.0,
        height=SIDE, width=SIDE,
    ).images  # fmt: skip
    masks = ["--masks", photos / "hole0.png", photos / "hole1.png"]
    ours = command(tmp_path, photos, "inpaint", folder, *masks)
    hole, photo = pixels(opened(photos, "hole"))[..., None] > 0, pixels(opened(photos, "photo"))
    np.testing.assert_array_equal(np.where(hole, 0, ours), np.where(hole, 0, photo))
    theirs = np.where(hole, pixels(expected), photo)
    assert differ(ours, theirs, record_property) <= 1


def request(model):
    """(cond, null) of the prompts."""
    batch = {"tokens": model.tokenizer.encode(PROMPTS), "null_tokens": model.tokenizer.encode([""])}
    batch["null_tokens"] = np.repeat(batch["null_tokens"], 2, axis=0)
    given = (model.config.cond, model.cond_stage, model.params["cond_stage"], batch)
    return conditioning.from_batch(*given), conditioning.null_like(*given)


def drawn(model, start=0, init=None, mask=None, scale=SCALE, **options):
    """Pixels of `make_sampler` with these options."""
    shape = (SIDE // 2, SIDE // 2, 4)
    sample = sampling.make_sampler(model, shape=shape, steps=STEPS, **options)
    keys = sampling.keys_of(0, np.arange(2))
    cond, null = request(model)

    @jax.jit
    def run(start):
        return sample(model.params, cond, keys, null, scale, 0.0, noise(), start, init, mask)

    return images.to_uint8(run(start)).astype(int)


@pytest.mark.slow
def test_inpainting_with_four_channels(made, model, photos, monkeypatch, record_property):
    from diffusers import StableDiffusionInpaintPipeline

    theirs = StableDiffusionInpaintPipeline(**made[1].components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    monkeypatch.setattr(f"{MODULES}inpaint.randn_tensor", lambda *args, **given: nchw(noise()))
    expected = theirs(
        PROMPTS, image=opened(photos, "photo"), mask_image=opened(photos, "hole"),
        num_inference_steps=STEPS, guidance_scale=SCALE, strength=0.8, height=SIDE, width=SIDE,
    ).images  # fmt: skip
    monkeypatch.setattr(solvers, "fresh_noise", lambda keys, shape: lambda level: noise())
    photo = (pixels(opened(photos, "photo")) / 127.5 - 1).astype(np.float32)
    hole = (pixels(opened(photos, "hole"))[:, ::2, ::2, None] > 0).astype(np.float32)
    stage = model.first_stage, model.params["first_stage"]
    init = latents.encode(*stage, photo, model.latent_scale)
    ours = drawn(model, start=sampling.start_of(0.8, STEPS), init=init, mask=hole)
    assert differ(ours, pixels(expected), record_property) <= 1


def text_to_image(pipe, scheduler, **options):
    """Pixels of StableDiffusionPipeline."""
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline(
        **{**pipe.components, "scheduler": scheduler}, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    given = {"latents": nchw(noise()), "num_inference_steps": STEPS, "guidance_scale": STRONG}
    return pixels(theirs(PROMPTS, height=SIDE, width=SIDE, **given, **options).images)


THRESHOLD = {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1e6}


def test_thresholding_and_guidance_rescale(made, model, record_property):
    from diffusers import DDIMScheduler

    pipe = made[1]

    def theirs(phi, **options):
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **options)
        scheduler.step = functools.partial(scheduler.step, use_clipped_model_output=True)
        return text_to_image(pipe, scheduler, guidance_rescale=phi)

    expected = theirs(0.7, **THRESHOLD)
    for without in (theirs(0.0, **THRESHOLD), theirs(0.7)):
        assert np.abs(without - expected).max() > 10
    ours = drawn(model, scale=STRONG, guidance_rescale=0.7, dynamic_threshold=80.0)
    assert differ(ours, expected, record_property) <= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_thresholding_of_dpm_solver(made, model, record_property):
    from diffusers import DPMSolverMultistepScheduler

    pipe = made[1]
    config = {k: v for k, v in pipe.scheduler.config.items() if k != "set_alpha_to_one"}
    # as an argument: in the config it is noted as a default, and theirs is another
    scheduler = functools.partial(
        DPMSolverMultistepScheduler.from_config, config, timestep_spacing="trailing"
    )
    expected, without = (text_to_image(pipe, scheduler(**options)) for options in (THRESHOLD, {}))
    assert np.abs(without - expected).max() > 10
    table = solvers.levels(model.schedule, STEPS, "trailing", "one")
    options = {"solver": "dpmpp_2m", "levels": table, "dynamic_threshold": 80.0}
    ours = drawn(model, scale=STRONG, **options)
    assert differ(ours, expected, record_property) <= 1
