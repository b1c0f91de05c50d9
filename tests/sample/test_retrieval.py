"""`ldm-sample retrieval`: the model sees the text or image, and its nearest images in a folder."""

import clip_model
import jax
import numpy as np
import pytest
import task_models

from ldm_jax import neighbours, sampling, schema
from ldm_jax.conditioning import Cond
from ldm_jax.convert import clip_folder
from ldm_jax.runtime import images


@pytest.fixture(scope="module")
def model():
    return task_models.make(schema.EmbeddingCondConfig(width=32), **task_models.CONTEXT)


@pytest.fixture(scope="module")
def flags(model, tmp_path_factory):
    """--model and --clip."""
    run = task_models.save(model, tmp_path_factory.mktemp("model"))
    return ["--model", run, "--clip", clip_model.save(tmp_path_factory.mktemp("clip"))]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five images of one colour, which CLIP's normalization keeps apart."""
    folder = tmp_path_factory.mktemp("photos")
    values = np.random.default_rng(0).integers(0, 256, (5, 1, 1, 3))
    for name, colour in zip("abcde", values, strict=True):
        task_models.write_png(folder / f"{name}.png", np.broadcast_to(colour, (14, 12, 3)))
    return folder


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_context_is_the_query_and_its_neighbours(model, flags, photos, tmp_path, capsys):
    asked = ["--prompt", "red", "--query-image", photos / "c.png", "--database", photos]
    asked += ["--neighbours", 2, "--num-images", 2, "--save-latents"]
    assert task_models.sample("retrieval", *flags, "--out", tmp_path, *asked) == 0
    assert "embedding 5 images" in capsys.readouterr().err
    assert (photos / ".ldm_jax_clip.npz").exists()

    towers = clip_folder.load(flags[3])
    paths = [photos / f"{name}.png" for name in "abcde"]
    known = unit(neighbours.embed_images(towers, paths)[0].astype(np.float64))
    query = unit(neighbours.embed_texts(towers, ["red"]).astype(np.float64))
    query = np.concatenate([query, known[2:3]])
    order = np.argsort(-query @ known.T, axis=1)[:, :2]
    assert order[1, 0] == 2  # the image itself
    context = np.concatenate([query[:, None], known[order]], axis=1).astype(np.float32)
    sample = sampling.make_sampler(model, shape=(8, 8, 4), steps=2, decode=False)
    draw = jax.jit(sample)
    cond = Cond(context=np.repeat(context, 2, axis=0))
    null = Cond(context=np.zeros_like(cond.context))
    keys = sampling.keys_of(0, range(4))
    expected = draw(model.params, cond, keys, null, 5.0)
    latents = model.latent_scale * np.load(tmp_path / "latents.npy")
    np.testing.assert_allclose(latents, expected, atol=1e-4)

    kept = images.read_settings(tmp_path / "00002_c_seed0.png")
    assert kept["asked"] == "c.png"
    assert [x["file"] for x in kept["nearest"]] == [str(paths[i]) for i in order[1]]
    assert kept["nearest"][0]["cosine"] == pytest.approx(1, abs=1e-3)
    assert (tmp_path / "00001_red_seed0.png").exists()
    # white for the text, the image asked for, then two neighbours and two images in a row
    sheet = task_models.pixels(tmp_path / "grid.png")
    scale = 3
    step = 16 * scale + 2
    assert sheet.shape[1] == 8 + 7 * len("c.png") + 5 * step
    left = sheet.shape[1] - 5 * step
    assert (sheet[2 : 2 + 48, left : left + 48] == 255).all()
    colour = task_models.pixels(paths[2])[0, 0]
    for column in (0, 1):
        at = left + column * step + 24
        np.testing.assert_allclose(sheet[2 + step + 24, at], colour, atol=1)


@pytest.mark.slow
def test_again_repeats_an_image(flags, photos, tmp_path, capsys):
    asked = ["--prompt", "red", "--query-image", photos / "c.png", "--database", photos]
    asked += ["--neighbours", 2, "--num-images", 1, "--index-file", tmp_path / "index.npz"]
    assert task_models.sample("retrieval", *flags, "--out", tmp_path / "out", *asked) == 0
    path = str(tmp_path / "out" / "00001_c_seed0.png")
    assert task_models.again(path, "--out", tmp_path / "again") == 0
    said = capsys.readouterr().err
    assert "pixel for pixel" in said or "by up to 1 of 255" in said


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("", 'give --prompt "..." or --query-image FILE'),
        ("--prompt x --neighbours 3", "--neighbours 3: give --database FOLDER"),
        ("--prompt x --neighbours -1", "--neighbours -1: give 0 or more"),
        ("--prompt x --no-include-query", "--no-include-query with no neighbours"),
        ("--prompt x --database {photos} --neighbours 6", "has 5 images; give at most as many"),
        ("--prompt x --database {photos}/none", "none' is not a folder here"),
        ("--query-image {photos}/none.png", "none.png: does not exist"),
        ("--prompt x --database {photos} --index-file {text}", "text.txt: is no index of images"),
        ("--prompt x --height 15", "--height 15 is not a multiple of 2"),
    ],
)
def test_bad_input_is_one_line(flags, photos, tmp_path, capsys, asked, message):
    (tmp_path / "text.txt").write_text("no index")
    asked = asked.format(photos=photos, text=tmp_path / "text.txt").split()
    if "--database" in asked and "--index-file" not in asked:
        asked += ["--index-file", tmp_path / "index.npz"]
    assert task_models.sample("retrieval", *flags, "--out", tmp_path / "out", *asked) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("ldm-sample: error: ")
    assert message in said[-1]
    assert not (tmp_path / "out").exists()


def test_models_that_do_not_fit(flags, tmp_path, capsys):
    run = task_models.save(task_models.make(None), tmp_path)
    asked = ["--out", tmp_path / "out", "--prompt", "x"]
    message = "run: is trained with no condition, not with CLIP embeddings"
    task_models.assert_one_line("retrieval", capsys, message, "--model", run, *flags[2:], *asked)
    other = {**task_models.CONTEXT, "context_dim": 16}
    narrow = task_models.make(schema.EmbeddingCondConfig(width=16), **other)
    run = task_models.save(narrow, tmp_path / "narrow")
    message = "its embeddings have 32 numbers, and those that"
    task_models.assert_one_line("retrieval", capsys, message, "--model", run, *flags[2:], *asked)
    message = "give --clip FOLDER"
    task_models.assert_one_line("retrieval", capsys, message, "--model", run, *asked)
