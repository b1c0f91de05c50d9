"""Crops of the photos: what is held out is never trained on."""

import importlib.util
import pickle

import numpy as np
import pytest

from ldm_jax import data, schema
from ldm_jax.data import photos

pytest.importorskip("skimage", reason="scikit-image is in the extra [demo]")


def source(split, **fields):
    return photos.PhotosSource(schema.PhotosConfig(**fields), split)


def test_no_pixel_is_trained_on_and_held_out():
    train, held_out = (source(split, crop=32, stride=5) for split in ("train", "eval"))
    seen = [np.zeros(photos.pixels(*photo).shape[:2], int) for photo in photos.PHOTOS]
    for crop in train._crops:
        seen[crop.photo][crop.top : crop.top + 32, crop.left : crop.left + 32] = 1
    for crop in held_out._crops:
        box = seen[crop.photo][crop.top : crop.top + 32, crop.left : crop.left + 32]
        assert box.max() <= 0  # neither trained on nor held out twice
        box[:] = -1
    for array in seen:  # both take part in every photo
        assert 0.15 < (array == -1).mean() < 0.45
        assert (array == 1).mean() > 0.45


def test_crops_are_those_of_the_photos_and_survive_pickling():
    train = pickle.loads(pickle.dumps(source("train")))
    assert len(pickle.dumps(train)) < 10**6  # no pixels
    image = train[1]["image"]
    assert image.shape == (64, 64, 3)
    np.testing.assert_array_equal(image, photos.pixels(*photos.PHOTOS[0])[:64, 8:72])
    assert train.describe(1) == "datasets/images/china.jpg crop at 8,0"


def test_the_first_held_out_crops_are_of_many_photos():
    crops = source("eval")._crops
    assert len(crops) > 100
    assert len({crop.photo for crop in crops[:16]}) > 6
    assert crops == source("eval")._crops


def test_rows_of_a_stream():
    config = schema.DataConfig(source=schema.PhotosConfig(), size=64, crop="none", flip=True)
    train, held_out = (
        data.stream(config, batch_size=4, seed=0, split=split) for split in ("train", "eval")
    )
    assert train[0]["image"].shape == (64, 64, 3)
    assert not np.array_equal(train[0]["image"], train[1]["image"])
    first = held_out.source[0]["image"]
    np.testing.assert_allclose(held_out[0]["image"], first / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("fields", [{"crop": 129}, {"crop": 0}, {"stride": 0}])
def test_crops_that_do_not_fit_are_refused(fields):
    with pytest.raises(ValueError, match=r"data\.source\.crop \d+, data\.source\.stride \d+: "):
        source("train", **fields)


def test_a_missing_package_or_photo_is_named(monkeypatch):
    monkeypatch.setattr(photos, "PHOTOS", (("skimage", "data/nothing.png"),))
    with pytest.raises(FileNotFoundError, match=r"nothing\.png: is not there; install the skimage"):
        source("train")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"\(skimage is missing\): pip install 'ldm-jax\[demo\]'"):
        source("train")
