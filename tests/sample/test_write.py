"""The output folder: never a training set, a run, or anybody else's pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from ldm_jax.runtime import images
from ldm_jax.sample import write
from ldm_jax.sample.evaluate import extraction
from ldm_jax.sample.options import Options


def out_of(folder, **options):
    return write.open_out(Options(model="", out=str(folder), **options))


def foreign(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def own(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    images.save_png(path, np.zeros((4, 4, 3), np.uint8), {"task": "class2img"})


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.TIF", "cat/1.webp", "train/cat/1.bmp"])
@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_a_folder_of_training_images_is_refused(tmp_path, name, options):
    foreign(tmp_path / name)
    with pytest.raises(ValueError, match=rf"pictures that no command wrote \({name}\)"):
        out_of(tmp_path, **options)
    assert [f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*.*")] == [name]


def test_own_pictures_are_no_others(tmp_path):
    for name in ("00000_class3_seed0.png", "grid.png", "again/00000_class3_seed0.png"):
        own(tmp_path / name)
    foreign(tmp_path / "previews" / "00000_class3_seed0.png")
    (tmp_path / "latents.npy").write_bytes(b"")
    assert out_of(tmp_path, overwrite=True) == tmp_path
    with pytest.raises(ValueError, match="already holds images; --resume goes on with them"):
        out_of(tmp_path)


def test_a_run_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "config": {}}))
    with pytest.raises(ValueError, match="is a run; give another folder"):
        out_of(tmp_path)


def test_files_that_are_no_pictures_do_not_matter(tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "deep" / "a" / "b").mkdir(parents=True)
    assert out_of(tmp_path / "new" / "folder").is_dir()
    assert out_of(tmp_path) == tmp_path


def test_figures_are_not_written_among_training_images(tmp_path):
    """Their grids would be trained on; what `ldm-eval` itself wrote is no obstacle."""
    options = extraction.Options(out=str(tmp_path))
    own(tmp_path / "00000_class3_seed0.png")
    foreign(tmp_path / "grid.png")
    foreign(tmp_path / "data" / "0.png")
    assert extraction.out_folder(options) == tmp_path
    foreign(tmp_path / "photo.jpg")
    with pytest.raises(ValueError, match=r"pictures that no command wrote \(photo\.jpg\)"):
        extraction.out_folder(options)
