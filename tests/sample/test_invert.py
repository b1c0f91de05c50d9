"""`ldm-sample invert`: the noise of an image, from which the other tasks sample it again."""

import dataclasses
import json

import gaussian
import jax
import numpy as np
import pytest
import reference
import task_models
from task_models import sample

from ldm_jax import bundle, diffusion, loading, schema, solvers
from ldm_jax.runtime import images
from ldm_jax.sample import invert

SD = diffusion.make_schedule("scaled_linear")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two smooth images of the model's size."""
    folder = tmp_path_factory.mktemp("photos")
    y, x = np.mgrid[:16, :16] / 15
    for name, values in (("a", (y, x, 1 - y)), ("b", (x * y, 1 - x, y))):
        images.save_png(folder / f"{name}.png", np.uint8(255 * np.stack(values, axis=-1)))
    return [folder / "a.png", folder / "b.png"]


@pytest.fixture(scope="module")
def inverted(ldm_run, photos, tmp_path_factory):
    """Folder of the command with 20 steps."""
    out = tmp_path_factory.mktemp("inverted")
    flags = ["--images", *photos, "--labels", 1, 3, "--steps", 20]
    assert sample("invert", "--model", ldm_run, "--out", out, *flags) == 0
    return out


def errors(out):
    return json.loads((out / "inversion.json").read_text())


def test_other_tasks_sample_the_images_from_the_noise(inverted, ldm_run, tmp_path):
    x_T = np.load(inverted / "x_T.npy")
    assert (x_T.shape, x_T.dtype) == ((2, 8, 8, 4), np.float32)
    flags = ["--labels", 1, 3, "--num-images", 1, "--steps", 20, "--guidance-scale", 1]
    flags += ["--init-latents", inverted / "x_T.npy"]
    assert sample("class2img", "--model", ldm_run, "--out", tmp_path, *flags) == 0
    for name, other in (("00000_a_class1", "00000_class1"), ("00001_b_class3", "00001_class3")):
        found = task_models.pixels(tmp_path / f"{other}_seed0.png")
        again = task_models.pixels(inverted / f"{name}_seed0.png")
        assert np.abs(found - again).max() <= 1


def test_errors_say_how_far_it_is(inverted, photos, ldm_run):
    model = loading.load(ldm_run)
    found, paths = errors(inverted), sorted(inverted.glob("0*.png"))
    for path, photo, error in zip(paths, photos, found, strict=True):
        assert (error["image"], error["asked"]) == (str(photo), path.name[-11])
        apart = task_models.pixels(path) - task_models.pixels(photo)
        expected = 10 * np.log10(255**2 / np.mean(apart**2))
        assert error["image_psnr"] == pytest.approx(expected, abs=0.01)
        assert error["latent_psnr"] > 30
        original = task_models.pixels(photo)[None] / np.float32(127.5) - 1
        z = model.first_stage.apply(
            {"params": model.params["first_stage"]}, original, method="encode"
        )[0]
        alone = model.first_stage.apply({"params": model.params["first_stage"]}, z, method="decode")
        apart = images.to_uint8(np.asarray(alone))[0] - task_models.pixels(photo)
        expected = 10 * np.log10(255**2 / np.mean(apart**2))
        assert error["first_stage_psnr"] == pytest.approx(expected, abs=0.1)
    x_T = np.load(inverted / "x_T.npy")
    assert found[1]["noise_std"] == pytest.approx(x_T[1].std())
    assert (inverted / "grid.png").exists()


@pytest.mark.slow
def test_more_steps_come_closer_with_guidance_too(ldm_run, photos, tmp_path):
    reached = []
    for steps in (4, 16, 64):
        out = tmp_path / str(steps)
        flags = ["--images", photos[0], "--labels", 2, "--steps", steps, "--guidance-scale", 3]
        assert sample("invert", "--model", ldm_run, "--out", out, *flags) == 0
        reached.append(errors(out)[0]["latent_psnr"])
    assert reached[0] + 6 < reached[1] < reached[2] - 6, reached


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in solvers.SOLVERS if not solvers.make(n).noisy])
def test_every_solver_without_noise_leads_back(name):
    def errors(steps):
        """Of the noise against the exact flow, and of the image sampled from it."""
        table = solvers.levels(SD, steps, "trailing", "alphas_cumprod_0")
        z, keys = reference.draw(2, 4, 4, 4), jax.random.split(jax.random.key(0), 2)
        image = gaussian.exact(z, table.alpha_next[-1], table.sigma_next[-1])

        @jax.jit
        def there_and_back(image):
            way = (solvers.make(name), gaussian.denoise)
            x_T = solvers.sample(*way, solvers.inverted(table), image, keys)
            return x_T, solvers.sample(*way, table, x_T, keys)

        x_T, again = there_and_back(image)
        exact = gaussian.exact(z, table.alpha[0], table.sigma[0])
        return np.array([np.sqrt(np.mean((a - b) ** 2)) for a, b in ((x_T, exact), (again, image))])

    # 0.27 at order one (ddim, euler), 0.08 to 0.22 for the others
    coarse, fine = errors(25), errors(100)
    assert (fine < 0.35 * coarse).all(), (coarse, fine)


def options(**changes):
    return invert.Options(model="m", out="", **changes)


def with_sampling(model, **changes):
    own = dataclasses.replace(model.config.sampling, **changes)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, sampling=own))


def test_the_way_begins_at_the_noise_of_timestep_0(ldm_run):
    model = loading.load(ldm_run, shapes_only=True)
    first = np.sqrt(model.schedule.alphas_cumprod[0])
    for spacing, steps, count in (
        ("leading", 10, 10),
        ("trailing", 10, 10),  # whose own levels end in no noise
        ("linspace", 10, 9),  # and visit timestep 0
        ("karras", 10, 10),
    ):
        there = model.config.sampling.final if spacing == "leading" else "one"
        changed = with_sampling(model, spacing=spacing, final=there)
        back = invert.levels_back(changed, options(steps=steps, spacing=spacing))
        assert len(back.t) == count, spacing
        assert back.alpha[0] == pytest.approx(first)
        assert (np.diff(back.alpha) < 0).all()
        np.testing.assert_allclose(back.alpha_next[:-1], back.alpha[1:])
        table = solvers.levels(changed.schedule, steps, spacing)
        assert (back.t_next[-1], back.alpha_next[-1]) == (table.t[0], table.alpha[0])


def test_psnr():
    a, b = np.zeros((2, 2, 1)), np.full((2, 2, 1), 0.1)
    assert invert.psnr(a, b, 1.0) == pytest.approx(20)
    assert invert.psnr(a, b, 10.0) == pytest.approx(40)
    assert invert.psnr(b, b, 1.0) == 100


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give --images FILE"),
        ("--images {a} --num-images 2", "--num-images 2: an image has one noise"),
        ("--images {a} --eta 0.5", "--eta 0.5 draws new noise at every step"),
        ("--images {a} --solver ddpm", "--solver ddpm draws new noise at every step"),
        ("--images {a} --solver ddpm", "use one of ddim, plms, "),
        ("--images {a} --init-latents x.npy", "--init-latents has no use here"),
        ("--images {a} --height 15", "height 15 is not a multiple of 2"),
        ("--images {a} --labels 9", "--labels 9 is not in 0..3"),
    ],
)
def test_bad_input_is_one_line(ldm_run, photos, tmp_path, capsys, flags, message):
    flags = flags.format(a=photos[0]).split()
    out = ["--model", ldm_run, "--out", tmp_path / "out"]
    task_models.assert_one_line("invert", capsys, message, *out, *flags)


def test_other_models_and_overflow_are_refused():
    model = task_models.make(schema.SuperResCondConfig(factor=2), in_channels=7)
    assert isinstance(model, bundle.LatentDiffusion)
    with pytest.raises(ValueError, match="m: is trained with low-resolution image; invert takes"):
        invert.check_model(model, options())
    with pytest.raises(ValueError, match="not finite: --solver plms does not lead back here"):
        invert.refuse_overflow(np.array([np.nan, 0]), options(solver="plms"))
    assert isinstance(invert.keep({}, jax.numpy.ones(3)), jax.Array)
