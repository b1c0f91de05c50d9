"""Sets of images: finite, every image once, one rule for what lies in a folder."""

import jax
import numpy as np
import pytest

from ldm_jax import schema
from ldm_jax.runtime import images
from ldm_jax.sample.evaluate import image_sets

HOW = image_sets.Preparation(size=8)
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def picture(number):
    return np.full((8, 8, 3), number, np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Six images in three formats, of which two lie deeper, and what our commands write beside."""
    root = tmp_path / "set"
    for i, name in enumerate(("a.png", "b.jpg", "c.tif", "d.webp", "e/f.PNG", "e/g/h.bmp")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        images.Image.fromarray(picture(40 * i)).save(root / name)
    for name in ("grid.png", "previews/a.png", "e/grid.png", "reconstructions.png", ".hidden.png"):
        (root / name).parent.mkdir(exist_ok=True)
        images.Image.fromarray(picture(255)).save(root / name)
    (root / "notes.txt").write_text("not an image")
    return root


def as_given(path, limit=None):
    return image_sets.images_from_folder(str(path), limit)


def as_trained(path, limit=None, **more):
    return image_sets.opened(str(path), "train", None, HOW, limit=limit, flag="--data", **more)


def means(image_set, size=4):
    """Mean of every image that is meant, on a scale of 0 to 255."""
    found = []
    for batch, count in image_set.batches(size, 0, DEVICE):
        image = np.asarray(batch["image"])[:count]
        scaled = image if image.dtype == np.uint8 else (image + 1) * 127.5
        found += np.rint(scaled.mean(axis=(1, 2, 3))).tolist()
    return found


@pytest.mark.parametrize("read", [as_given, as_trained])
def test_one_rule_for_the_images_of_a_folder(folder, read, shown, capsys):
    image_set = read(folder)
    assert image_set.count == 6
    assert image_set.about["images"] == 6
    assert image_set.about["left_out"] == 4
    assert means(image_set) == pytest.approx([0, 40, 80, 120, 160, 200], abs=2)
    assert "4 images are left out" in capsys.readouterr().err


@pytest.mark.parametrize("read", [as_given, as_trained])
def test_no_image_is_counted_twice(folder, read):
    for limit in (1, 5, 6):
        assert len(means(read(folder, limit))) == limit
    for limit in (0, -1, 7, 500):
        with pytest.raises(ValueError, match=rf"set: holds 6 images, and the first {limit} are"):
            read(folder, limit)


def test_no_image_of_an_archive_is_counted_twice(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.stack([picture(i) for i in range(5)]))
    path = str(tmp_path / "a.npz")
    assert means(image_sets.images_from_npz(path, 3)) == [0, 1, 2]
    for limit in (0, 6):
        with pytest.raises(ValueError, match=rf"a\.npz: holds 5 images, and the first {limit} are"):
            image_sets.images_from_npz(path, limit)


@pytest.mark.parametrize("read", [as_given, as_trained])
def test_a_broken_image_is_named_and_not_replaced(folder, read):
    (folder / "d.webp").write_bytes(b"no image")
    with pytest.raises((ValueError, RuntimeError), match=r"d\.webp") as error:
        means(read(folder))
    assert "max_bad_records" not in str(error.value)
    assert len(means(read(folder, 3))) == 3  # it is none of them


def test_conditions_of_samples_begin_anew(folder):
    (folder / "d.webp").write_bytes(b"no image")
    image_set = as_trained(folder, 14, repeat=True)
    assert image_set.count == len(means(image_set)) == 14


def test_a_run_is_measured_by_what_it_trains_on(folder):
    """Also by an image that is called as a grid is."""
    source = schema.FolderConfig(str(folder), eval_path=str(folder))
    config = schema.DataConfig(source=source, size=8)
    assert image_sets.images_from_data(config, "train").count == 10


@pytest.mark.parametrize("read", [as_given, as_trained])
def test_a_folder_without_images_is_refused(tmp_path, read):
    (tmp_path / "previews").mkdir()
    for name in ("grid.png", "previews/a.png"):
        images.save_png(tmp_path / name, picture(3))
    with pytest.raises(ValueError, match="holds no images"):
        read(tmp_path)


@pytest.mark.parametrize("read", [as_given, as_trained])
def test_features_of_a_set_are_not_those_of_a_replaced_image(folder, read):
    """What `extraction.kept` compares before it goes on with the features that it finds."""
    before = [read(folder).about, read(folder, 2).about]
    assert before == [read(folder).about, read(folder, 2).about]
    images.Image.fromarray(picture(7)).save(folder / "d.webp")
    assert read(folder).about != before[0]
    assert read(folder, 2).about == before[1]  # the first two are still the same
    (folder / "a.png").rename(folder / "aa.png")
    assert read(folder, 2).about != before[1]


def test_features_of_an_archive_are_not_those_of_another_under_its_name(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, arr_0=np.full((2, 4, 4, 3), 200, np.uint8))
    before = image_sets.images_from_npz(str(path)).about
    assert image_sets.images_from_npz(str(path)).about == before
    np.savez(path, arr_0=np.full((2, 4, 4, 3), 100, np.uint8))
    assert image_sets.images_from_npz(str(path)).about != before


def test_maps_with_more_classes_than_the_model_are_refused():
    config = schema.DataConfig(source=schema.SyntheticConfig(num_images=8, size=8), size=8)
    for num_ids, message in ((5, None), (3, "the segmentation holds class 3, but")):
        image_set = image_sets.images_from_data(config, "train", 8, num_ids=num_ids)
        if message is None:
            assert len(means(image_set)) == 8
        else:
            with pytest.raises(ValueError, match=message):
                means(image_set)
