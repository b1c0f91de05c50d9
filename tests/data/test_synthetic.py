"""Drawn shapes."""

import numpy as np
import pytest

from ldm_jax import schema
from ldm_jax.data.synthetic import SyntheticSource


def open_synthetic(split="train", **fields):
    return SyntheticSource(schema.SyntheticConfig(**fields), split)


def test_record():
    source = open_synthetic(num_images=10, size=24, num_classes=3)
    assert len(source) == 10
    for i in range(10):
        record = source[i]
        assert set(record) == source.features
        assert record["image"].shape == (24, 24, 3)
        assert record["image"].dtype == np.uint8
        assert record["label"] == i % 3
        assert set(np.unique(record["segmentation"])) == {0, record["label"] + 1}
        assert set(np.unique(record["mask"])) == {0, 1}
        inside = record["segmentation"] > 0
        assert record["image"][inside].min() > record["image"][~inside].max()
    assert source.describe(3) == "synthetic train record 3"


def test_captions_name_colour_and_shape():
    source = open_synthetic(num_images=300, num_classes=7, size=16)
    shapes = ("disc", "triangle", "square", "pentagon", "hexagon")
    shapes += ("shape with 7 corners", "shape with 8 corners")
    seen = set()
    for i in range(300):
        record = source[i]
        article, colour, shape = record["caption"].split(maxsplit=2)
        assert (article, shape) == ("a", shapes[i % 7])
        r, g, b = (int(x) for x in record["image"][record["segmentation"] > 0][0])
        if colour == "red":
            assert r > max(g, b)
        elif colour == "yellow":
            assert b < min(r, g)
        seen.add(colour)
    assert seen >= {"red", "yellow", "green", "cyan", "blue", "magenta"}
    assert len(seen) <= 7


def test_a_record_is_a_function_of_its_index_and_split():
    one, other, held_out = open_synthetic(), open_synthetic(), open_synthetic("eval")
    np.testing.assert_array_equal(one[7]["image"], other[7]["image"])
    assert not np.array_equal(one[7]["image"], one[11]["image"])
    assert not np.array_equal(one[7]["image"], held_out[7]["image"])
    assert len(held_out) == len(one) // 4


def test_more_corners_fill_more_of_the_circle():
    source = open_synthetic(num_images=2000, num_classes=5, size=32)
    filled = [[] for _ in range(5)]
    for i in range(1000):
        filled[i % 5].append(np.count_nonzero(source[i]["segmentation"]))
    disc, *polygons = (np.mean(pixels) for pixels in filled)
    assert polygons == sorted(polygons)
    assert disc > polygons[-1]


@pytest.mark.parametrize("fields", [{"num_images": 0}, {"num_classes": 0}])
def test_nothing_to_draw(fields):
    with pytest.raises(ValueError, match=r"0.*: use 1 or more"):
        open_synthetic(**fields)
