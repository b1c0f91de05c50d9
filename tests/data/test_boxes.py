"""Boxes into tokens as the reference lays them out, and files whose errors say where."""

import json

import numpy as np
import pytest

from ldm_jax.data import boxes
from ldm_jax.data.boxes import Box

NAMES = {"cat": 0, "dog": 1, "traffic light": 2}


def test_tokens_of_the_published_model():
    """8192 tokens: a grid of 90 x 90; 30 objects and the part of the picture in 92."""
    tokens = boxes.tokenize([Box(7, 0.0, 0.0, 1.0, 1.0), Box(300, 0.5, 0.25, 0.75, 0.4)])
    assert (tokens.shape, tokens.dtype) == ((92,), np.int32)
    assert tokens[:3].tolist() == [7, 0, 89 * 90 + 89]
    # round(0.5 * 89) = round(44.5) = 44, round(22.25) = 22, round(66.75) = 67, round(35.6) = 36
    assert tokens[3:6].tolist() == [300, 22 * 90 + 44, 36 * 90 + 67]
    assert set(tokens[6:90].tolist()) == {8191}
    assert tokens[90:].tolist() == [0, 8099]
    part = boxes.tokenize([], part=(0.25, 0.0, 1.0, 0.5))
    assert part[90:].tolist() == [22, 44 * 90 + 89]
    assert boxes.tokenize([], max_length=90).tolist() == [8191] * 90  # no part of the picture


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="31 objects, but the model takes at most 30"):
        boxes.tokenize([Box(0, 0, 0, 1, 1)] * 31)
    with pytest.raises(ValueError, match=r"class 8191 is not in 0\.\.8190"):
        boxes.tokenize([Box(8191, 0, 0, 1, 1)])
    with pytest.raises(ValueError, match="79 tokens takes no layouts"):
        boxes.tokenize([], max_length=79)


def write(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_layout_in_fractions_in_pixels_and_with_modifiers(tmp_path):
    box = {"class": "Traffic Light", "box": [0.25, 0, 0.5, 1]}
    fractions = write(tmp_path / "a.json", {"objects": [box]})
    assert boxes.read_layout(fractions, NAMES) == [Box(2, 0.25, 0, 0.5, 1)]
    one = {"class": 1, "box": [160, 0, 320, 480], "group": True, "inside": True, "occluded": False}
    pixels = write(tmp_path / "b.json", {"size": [640, 480], "objects": [one]})
    assert boxes.read_layout(pixels, NAMES) == [Box(1 + 3 * (1 + 8), 0.25, 0, 0.5, 1)]


@pytest.mark.parametrize(
    ("data", "names", "message"),
    [
        ("{", NAMES, "bad.json: is not JSON (Expecting property name"),
        ([], NAMES, 'bad.json: is not {"objects": '),
        ({"objects": [3]}, NAMES, 'bad.json: is not {"objects": '),
        ({"size": [0, 4], "objects": []}, NAMES, "size [0, 4] is not [width, height]"),
        ([{"class": "cat"}], NAMES, "object 1: box None is not [left, top, right, bottom]"),
        ([{"class": "cat", "box": [0, 0, 1, "1"]}], NAMES, "is not [left, top, right, bottom]"),
        ([{"class": "cat", "box": [0.5, 0, 1.2, 1]}], NAMES, "lies outside the picture (in frac"),
        ([{"class": "cat", "box": [5, 0, 90, 80]}], NAMES, 'boxes in pixels need "size"'),
        ([{"class": "cat", "box": [-0.1, 0, 1, 1]}], NAMES, "lies outside the picture"),
        ([{"class": "cat", "box": [0.5, 0, 0.5, 1]}], NAMES, "is empty"),
        ([{"class": "dgo", "box": [0, 0, 1, 1]}], NAMES, "unknown class 'dgo', none of the 3"),
        ([{"class": "dgo", "box": [0, 0, 1, 1]}], NAMES, "near are 'dog'"),
        ([{"class": "dog", "box": [0, 0, 1, 1]}], None, "without class names give the id"),
        ([{"class": 3, "box": [0, 0, 1, 1]}], NAMES, "class 3 is none of the 3 known ids"),
        ([{"class": -1, "box": [0, 0, 1, 1]}], NAMES, "class -1 is none of the 3 known ids"),
        ([{"class": 1.5, "box": [0, 0, 1, 1]}], NAMES, "class 1.5 is neither a name nor an id"),
        ([{"class": 1, "box": [0, 0, 1, 1], "group": True}], None, '"group" needs the class names'),
    ],
)  # fmt: skip
def test_bad_layouts_are_named(tmp_path, data, names, message):
    data = {"objects": data} if isinstance(data, list) and data else data
    with pytest.raises(ValueError) as caught:
        boxes.read_layout(write(tmp_path / "bad.json", data), names)
    assert "bad.json: " in str(caught.value)
    assert message in str(caught.value)


def test_class_names(tmp_path):
    coco = boxes.read_names("coco")
    assert len(coco) == 80
    assert (coco["person"], coco["traffic light"], coco["toothbrush"]) == (0, 9, 79)
    listed = write(tmp_path / "list.json", ["Cat", "Dog"])
    assert boxes.read_names(listed) == {"cat": 0, "dog": 1}
    numbered = write(tmp_path / "ids.json", {"Dog": 17, "Cat": 3})
    assert boxes.read_names(numbered) == {"dog": 17, "cat": 3}
    # OpenImages' own file; the reference numbers the ids in their order, Suitcase last
    rows = write(tmp_path / "rows.csv", '/m/0c,Cat\n/m/01s55n,Suitcase\n/m/0a,"Bat (Animal)"\n')
    assert boxes.read_names(rows) == {"bat (animal)": 0, "cat": 1, "suitcase": 2}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "holds no class names"),
        (3, "give a list of class names"),
        (["cat", 5], "5: 1 is not a name and an id"),
        ({"cat": "0"}, "'cat': '0' is not a name and an id"),
        (["cat", "Cat"], "the class 'Cat' stands there twice"),
    ],
)
def test_bad_class_names_are_named(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        boxes.read_names(write(tmp_path / "names.json", data))
