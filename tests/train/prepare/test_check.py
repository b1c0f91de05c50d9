"""`ldm-train check`: every record once, what is wrong with it, and how many there are."""

import pytest
from PIL import Image

from ldm_jax.runtime import cli
from ldm_jax.train import main


@pytest.fixture
def images(tmp_path):
    """Twenty-one images with captions; two are held out, three cannot be used."""
    for i in range(21):
        Image.new("RGB", (16, 16), (10 * i, 0, 0)).save(tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_text("caption")
    return tmp_path


def run(images, capsys, *flags):
    """(exit code, lines)"""
    captions = ["--data.source.captions", "sidecar", "--data.size", "16", "--data.threads", "2"]
    command = ["check", "folder:first_stage", "--data.source.path", str(images)]
    code = cli.run("ldm-train", main.train, [*command, *captions, *flags])
    return code, capsys.readouterr().err.splitlines()


def test_faults_are_named_and_counted(images, capsys, shown):
    (images / "01.png").write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(images / "02.png")
    (images / "20.txt").write_bytes(b"\xff")  # held out
    code, lines = run(images, capsys)
    assert code == 1
    (broken,) = (line for line in lines if "01.png" in line)
    assert broken.startswith("broken: ")
    (small,) = (line for line in lines if "02.png" in line)
    assert "too small: " in small
    assert "8x8" in small
    (caption,) = (line for line in lines if "20.txt" in line)
    assert caption.startswith("unfit: ")
    assert "train: 19 records, 17 can be used; of the others: 1 broken, 1 too small" in lines
    assert "eval: 2 records, 1 can be used; of the others: 1 unfit" in lines
    assert not any("would stop" in line for line in lines)
    _, lines = run(images, capsys, "--data.max-bad-records", "1")
    assert any("train: training would stop at 2 such records" in line for line in lines)


def test_nothing_is_wrong(images, capsys, shown):
    code, lines = run(images, capsys)
    assert code == 0
    assert lines[-2:] == ["train: 19 records, 19 can be used", "eval: 2 records, 2 can be used"]


def test_files_that_are_missing_are_named(images, capsys):
    (images / "03.txt").unlink()
    (images / "05.txt").unlink()
    code, lines = run(images, capsys)
    assert code == 1
    assert "03.txt is missing (2 of 19 images have no caption: 03.txt, 05.txt)" in lines[-1]
