"""`ldm-sample img2img` and `unconditional`: strength from end to end, nothing compiled twice."""

import dataclasses

import jax
import numpy as np
import pytest
import reference
import text_model
from task_models import assert_one_line, sample

from ldm_jax import latents, loading, resizing, sampling, saving, solvers
from ldm_jax.runtime import images
from ldm_jax.sample import editing, img2img
from ldm_jax.sample.inputs import read_images
from ldm_jax.sample.options import null_batch
from ldm_jax.sample.program import make_run

STEPS = 5


def picture(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two images of the model's size, and one of 15x16."""
    folder = tmp_path_factory.mktemp("photos")
    for i, shape in enumerate(((16, 16), (16, 16), (15, 16))):
        images.save_png(folder / f"{i}.png", picture(i, *shape))
    (folder / "text.png").write_text("no image")
    (folder / "half.png").write_bytes((folder / "0.png").read_bytes()[:300])
    return folder


@pytest.fixture(scope="module")
def model(ldm_run):
    return loading.load(ldm_run)


@pytest.fixture(scope="module")
def run(model):
    """The jitted program of the command."""
    options = img2img.Options(model="", out="", steps=STEPS)
    return jax.jit(make_run(model, options, guided=True, shape=(8, 8, 4)))


@pytest.fixture(scope="module")
def batch():
    image = np.stack([picture(0, 16, 16), picture(1, 16, 16)]) / np.float32(127.5) - 1
    return {"label": np.array([1, 3], np.int32), "init": image.astype(np.float32)}


def test_strength_0_gives_the_image_back_and_1_ignores_it(model, run, batch):
    keys = sampling.keys_of(0, [0, 1])
    start = [sampling.start_of(s, STEPS) for s in (0.0, 0.2, 0.6, 1.0)]
    assert start == [5, 4, 2, 0]
    z = [run(model.params, batch, keys, 2.0, 0.0, s)[1] for s in start]
    draws = jax.vmap(jax.random.fold_in, (0, None))(keys, 2)
    own = latents.encode(
        model.first_stage, model.params["first_stage"], batch["init"], 1.0, keys=draws
    )
    np.testing.assert_allclose(z[0], own, atol=1e-4)
    away = [float(np.sqrt(np.mean((a - own) ** 2))) for a in z]
    assert away == sorted(away)
    assert away[1] > 0.01
    plain = {"label": batch["label"]}
    np.testing.assert_allclose(z[-1], run(model.params, plain, keys, 2.0, 0.0)[1], atol=1e-4)


def test_between_the_image_is_noised_to_the_level_that_runs_first(model):
    levels, (init, noise) = solvers.levels(model.schedule, STEPS), reference.draw(2, 1, 4, 4, 4)
    table = sampling.Table(levels, STEPS)
    at = sampling.noised(init, table, np.int32(2), noise)
    np.testing.assert_allclose(at, levels.alpha[2] * init + levels.sigma[2] * noise, atol=1e-6)
    np.testing.assert_array_equal(sampling.noised(init, table, 0, noise), noise)
    np.testing.assert_array_equal(sampling.noised(init, table, STEPS, noise), init)
    assert [sampling.start_of(0.01 * s, 100) for s in (0, 29, 57, 100)] == [100, 71, 43, 0]


def test_the_latent_of_an_image_is_brought_to_a_size(model, ldm_run, batch, photos, tmp_path):
    options = img2img.Options(model="", out="", steps=STEPS)
    keys = sampling.keys_of(0, [0, 1])
    small, large = (
        jax.jit(make_run(model, options, guided=True, shape=shape))(
            model.params, batch, keys, 2.0, 0.0, STEPS
        )[1]
        for shape in ((8, 8, 4), (16, 10, 4))
    )
    np.testing.assert_allclose(large, resizing.resized(small, (16, 10)), atol=1e-4)
    flags = ["--images", photos / "0.png", "--labels", 3, "--resize-mode", "latent", "--width", 24]
    assert sample("img2img", "--model", ldm_run, "--out", tmp_path, *flags) == 0
    assert read_images([str(tmp_path / "00000_0_class3_seed0.png")]).shape == (1, 16, 24, 3)


def test_files_of_a_model_of_classes(ldm_run, photos, tmp_path):
    flags = ["--images", photos / "0.png", "--labels", 3, 1, "--num-images", 2]
    assert sample("img2img", "--model", ldm_run, "--out", tmp_path, *flags) == 0
    names = ["00000_0_class3", "00001_0_class3", "00002_0_class1", "00003_0_class1"]
    assert {f.name for f in tmp_path.iterdir()} == {*(f"{n}_seed0.png" for n in names), "grid.png"}
    kept = images.read_settings(tmp_path / "00002_0_class1_seed0.png")
    assert (kept["task"], kept["asked"], kept["guidance_scale"]) == ("img2img", "1", 1.5)
    assert (kept["strength"], kept["image"]) == (0.75, str(photos / "0.png"))


def test_all_pictures_of_a_folder_keep_their_names(ldm_run, photos, tmp_path, capsys):
    for folder in ("in", "masks", "empty"):
        (tmp_path / folder).mkdir()
    for i, name in enumerate(("b", "a")):
        images.save_png(tmp_path / "in" / f"{name}.png", picture(i, 16, 16))
        images.save_png(
            tmp_path / "masks" / f"{name}.png", np.uint8(255 * (picture(i, 16, 16)[..., :1] > 99))
        )
    (tmp_path / "in" / "notes.txt").write_text("no image")
    flags = ["--model", ldm_run, "--images", tmp_path / "in", "--out"]
    assert sample("img2img", *flags, tmp_path / "out") == 0
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"a.png", "b.png", "grid.png"}
    kept = images.read_settings(tmp_path / "out" / "b.png")
    assert kept["images"] == [str(tmp_path / "in" / "b.png")]
    more = ["--masks", tmp_path / "masks", "--num-images", 2]
    assert sample("inpaint", *flags, tmp_path / "holes", *more) == 0
    kept = images.read_settings(tmp_path / "holes" / "00002_b_seed0.png")
    assert kept["masks"] == [str(tmp_path / "masks" / "b.png")]
    capsys.readouterr()
    (tmp_path / "masks" / "a.png").unlink()
    flags.append(tmp_path / "no")
    assert_one_line("inpaint", capsys, "has no mask named as a.png", *flags, *more)
    flags[3] = tmp_path / "empty"
    assert_one_line("img2img", capsys, "holds no pictures", *flags)


@pytest.mark.slow
def test_a_model_of_text_takes_prompts_and_sizes(photos, tmp_path):
    saving.save(text_model.make(), tmp_path / "run", to="ldm_jax")
    flags = ["--images", photos / "0.png", photos / "2.png", "--height", 8, "--width", 12]
    flags += ["--prompt", "a disc", "--num-images", 2]
    assert sample("img2img", "--model", tmp_path / "run", "--out", tmp_path / "out", *flags) == 0
    kept = images.read_settings(tmp_path / "out" / "00003_2_a_disc_seed0.png")
    assert (kept["asked"], kept["guidance_scale"]) == ("a disc", 7.5)
    read = read_images([str(tmp_path / "out" / "00003_2_a_disc_seed0.png")])
    assert read.shape == (1, 8, 12, 3)


def test_nothing_in_particular_is_the_null_class_or_the_empty_text(model):
    assert null_batch(model, "run")["label"].tolist() == [4]
    text = text_model.make()
    rows = null_batch(text, "run")
    np.testing.assert_array_equal(rows["tokens"], text.tokenizer.encode([""]))
    with pytest.raises(ValueError, match="mute: comes without a tokenizer; give --tokenizer"):
        null_batch(dataclasses.replace(text, tokenizer=None), "mute")


@pytest.mark.slow
def test_unconditional_is_the_null_class(model, ldm_run, tmp_path):
    flags = ["--num-images", 3, "--save-latents"]
    assert sample("unconditional", "--model", ldm_run, "--out", tmp_path, *flags) == 0
    assert (tmp_path / "grid.png").exists()
    assert len(list(tmp_path.glob("0*.png"))) == 3
    options = img2img.Options(model="", out="", steps=2)
    draw = jax.jit(make_run(model, options, guided=False, shape=(8, 8, 4)))
    batch = {"label": np.full(3, 4, np.int32)}
    z = draw(model.params, batch, sampling.keys_of(0, range(3)), 1.0, 0.0)[1]
    np.testing.assert_allclose(np.load(tmp_path / "latents.npy"), z, atol=1e-4)


def test_images_and_labels_pair_up():
    what = editing.Asked({}, ["class1", "class2"], ["1", "2"], 1.5)
    options = editing.Options(model="", out="", images=("a.png", "b.png"), num_images=2)
    made = editing.pairs(options, what)
    assert (made.image.tolist(), made.asked.tolist()) == ([0, 0, 1, 1], [0, 0, 1, 1])
    assert made.row_labels == ["1", "2"]
    alone = editing.pairs(options, editing.Asked({}, [""], [""], 1.0))
    assert (alone.image.tolist(), alone.asked.tolist()) == ([0, 0, 1, 1], [0, 0, 0, 0])
    assert alone.names[2] == "00002_b_seed0"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--images {p}/0.png --strength 1.1", "--strength 1.1 is not in 0..1"),
        ("--images {p}/0.png --strength -0.1", "--strength -0.1 is not in 0..1"),
        ("", "give --images FILE"),
        ("--images {p}/gone.png", "gone.png: does not exist"),
        ("--images {p}/text.png", "text.png: is not an image, or a broken one"),
        ("--images {p}/half.png", "half.png: is not an image, or a broken one"),
        ("--images {p}/0.png --eta 0.5 --solver unipc", "eta=0.5: solver 'unipc' takes none"),
        ("--images {p}/0.png --steps 1001", "--steps 1001 is not in 1..1000"),
        ("--images {p}/2.png", "2.png: height 15 is not a multiple of 2, by which the first stage"),
        ("--images {p}/2.png", "take 14 or 16"),
        ("--images {p}/0.png --labels 4", "--labels 4 is not in 0..3"),
        ("--images {p}/0.png --prompt x", "is trained with class label, not with text"),
        ("--images {p}/0.png --guidance-scale 2", "--guidance-scale 2.0: nothing is asked for"),
        ("--images {p}/0.png {p}/1.png --labels 1 2 3", "2 --images and 3 of --prompt or --labels"),
        ("--images {p}/0.png --solver abc", "solver 'abc' is not one of ddim, ddpm"),
        ("--images {p}/0.png --spacing abc", "spacing 'abc' is not one of leading, "),
        ("--images {p}/0.png --solver ddpm --eta 1", "eta=1.0: solver 'ddpm' takes none"),
        ("--guidance-scale 2", "nothing to guide; leave it at 1"),  # of unconditional
    ],
)
def test_bad_input_is_one_line(ldm_run, photos, tmp_path, capsys, flags, message):
    flags = flags.format(p=photos).split()
    task = "unconditional" if "nothing to guide" in message else "img2img"
    assert_one_line(task, capsys, message, "--model", ldm_run, "--out", tmp_path / "out", *flags)
