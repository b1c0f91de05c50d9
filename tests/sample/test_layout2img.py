"""`ldm-sample layout2img`: boxes of a file reach the text transformer as the reference's tokens."""

import json

import numpy as np
import pytest
import task_models

from ldm_jax import schema
from ldm_jax.data import boxes
from ldm_jax.runtime import images
from ldm_jax.sample import layout2img

ENCODER = schema.BERTTextConfig(
    vocab_size=100, max_length=8, width=32, num_layers=1, num_heads=2, head_width=16
)
SCENE = {
    "size": [16, 32],
    "objects": [{"class": "dog", "box": [0, 16, 16, 32]}, {"class": 0, "box": [8, 0, 16, 32]}],
}


TYPO = {"objects": [{"class": "dgo", "box": [0, 0, 1, 1]}]}
# a grid of 10 x 10: (class, upper left, lower right) of both, and the whole picture
TOKENS = [[1, 40, 99, 0, 4, 99, 0, 99]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model = task_models.make(schema.LayoutCondConfig(ENCODER), **task_models.CONTEXT)
    return task_models.save(model, tmp_path_factory.mktemp("layout"))


@pytest.fixture
def files(tmp_path):
    """Flags with a scene and the names of its classes."""
    (tmp_path / "scene.json").write_text(json.dumps(SCENE))
    (tmp_path / "names.json").write_text('["cat", "dog"]')
    return ["--boxes", tmp_path / "scene.json", "--class-names", tmp_path / "names.json"]


def test_tokens_of_a_layout(files):
    names = boxes.read_names(files[3])
    batch = layout2img.tokenize(ENCODER, files[1:2], [boxes.read_layout(files[1], names)], 2)
    np.testing.assert_array_equal(batch["tokens"], np.repeat(TOKENS, 2, axis=0))
    np.testing.assert_array_equal(batch["null_tokens"], [[99, 99, 99, 99, 99, 99, 0, 99]] * 2)


def test_images_of_a_layout(run, files, tmp_path):
    flags = ["--model", run, "--out", tmp_path / "out", *files, "--guidance-scale", 2]
    assert task_models.sample("layout2img", *flags, "--num-images", 2) == 0
    made = [task_models.pixels(tmp_path / "out" / f"0000{i}_scene_seed0.png") for i in range(2)]
    assert made[0].shape == (16, 16, 3)
    assert np.abs(made[0] - made[1]).max() > 1
    kept = images.read_settings(tmp_path / "out" / "00001_scene_seed0.png")
    assert (kept["layout"], kept["index"]) == (str(files[1]), 1)


@pytest.mark.parametrize(
    ("scene", "flags", "message"),
    [
        (SCENE, [], "scene.json: object 1: class 'dog': without class names give the id"),
        (SCENE, ["--class-names", "coco", "--model", "{none}"], "does not exist"),
        ([[0, 0, 1, 1]] * 3, [], "scene.json: 3 objects, but the model takes at most 2"),
        ([[0, 0, 1, 2]], [], "scene.json: object 1: box [0, 0, 1, 2] lies outside the picture"),
        ([[0, 0, 1, 1]], ["--height", "15"], "--height 15 is not a multiple of 2"),
        (TYPO, ["--class-names", "coco"], "scene.json: object 1: unknown class 'dgo'"),
        (None, [], "give --boxes FILE.json"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_bad_input_is_one_line(run, tmp_path, capsys, scene, flags, message):
    if isinstance(scene, list):
        scene = {"objects": [{"class": 0, "box": box} for box in scene]}
    (tmp_path / "scene.json").write_text(json.dumps(scene))
    given = ["--boxes", tmp_path / "scene.json"] if scene else []
    flags = [flag.format(none=tmp_path / "none") for flag in flags]
    common = ["--model", run, "--out", tmp_path / "out", *given]
    task_models.assert_one_line("layout2img", capsys, message, *common, *flags)
