"""Images in a folder and the files beside them."""

import json
import os
import pickle

import pytest
from PIL import Image

from ldm_jax import schema
from ldm_jax.data.folder import FolderSource, find_files


def write(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes and a nested one: six images."""
    for name in ("cat/2.png", "cat/1.jpg", "dog/a/x.png", "dog/b.PNG", "ant/c.webp", "ant/d.png"):
        write(tmp_path / name)
    (tmp_path / "notes.md").write_text("not an image")
    (tmp_path / "cat/._2.png").write_bytes(b"what macOS leaves behind")
    return tmp_path


def open_folder(path, split="train", **fields):
    fields = {"eval_path": str(path), **fields}
    return FolderSource(schema.FolderConfig(path=str(path), **fields), split)


def names(source, root):
    return [os.path.relpath(source.describe(i), root) for i in range(len(source))]


def test_images_are_found_below_and_sorted(folder):
    source = open_folder(folder)
    expected = ["ant/c.webp", "ant/d.png", "cat/1.jpg", "cat/2.png", "dog/a/x.png", "dog/b.PNG"]
    assert names(source, folder) == expected
    assert source[3] == {"image": (folder / "cat/2.png").read_bytes()}
    assert source.num_classes is None
    assert source.features == {"image"}


def test_links_are_followed_once(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write(other / "e.png")
    (folder / "linked").symlink_to(other)
    (folder / "loop").symlink_to(folder)
    assert "linked/e.png" in find_files(str(folder))
    assert len(open_folder(folder)) == 7


def test_every_nth_image_is_held_out(folder):
    options = {"eval_path": None, "eval_every": 4}
    held_out = names(open_folder(folder, "eval", **options), folder)
    train = names(open_folder(folder, "train", **options), folder)
    assert held_out == ["ant/c.webp", "dog/a/x.png"]
    assert sorted(held_out + train) == names(open_folder(folder), folder)


def test_class_is_the_folder(folder):
    source = open_folder(folder, class_from_folder=True)
    assert source.num_classes == 4  # "a", "ant", "cat", "dog"
    assert [source[i]["label"] for i in range(6)] == [1, 1, 2, 2, 0, 3]
    again = pickle.loads(pickle.dumps(source))
    assert [again[i] for i in range(6)] == [source[i] for i in range(6)]


def test_held_out_images_have_the_classes_of_training(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write(other / "dog/z.png")
    source = open_folder(folder, "eval", eval_path=str(other), class_from_folder=True)
    assert source[0]["label"] == 3
    assert source.num_classes == 4
    write(other / "emu/z.png")
    with pytest.raises(ValueError, match=r"emu/z.png: no training image has class 'emu'"):
        open_folder(folder, "eval", eval_path=str(other), class_from_folder=True)


def test_image_in_no_class_folder(folder):
    write(folder / "stray.png")
    with pytest.raises(ValueError, match=r"stray.png is in no class folder: move it"):
        open_folder(folder, class_from_folder=True)


def test_sidecar_captions(folder):
    for image in names(open_folder(folder), folder):
        (folder / image).with_suffix(".txt").write_text(f"Ein Bild: {image} äöü\n", "utf-8")
    source = open_folder(folder, captions="sidecar")
    assert source[0]["caption"] == "Ein Bild: ant/c.webp äöü"
    assert source.features == {"image", "caption"}
    (folder / "cat/1.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"cat/1.txt is missing \(1 of 6 images"):
        open_folder(folder, captions="sidecar")


def test_metadata_captions(folder):
    def table(path, entries):
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in entries]
        path.write_text("\n".join(lines) + "\n\n")

    table(folder / "metadata.jsonl", [("ant/c.webp", "c"), ("./ant/d.png", "d")])
    table(folder / "cat/metadata.jsonl", [("1.jpg", "1"), ("2.png", "2")])
    with pytest.raises(ValueError, match=r"dog/a/x.png is in no metadata.jsonl"):
        open_folder(folder, captions="metadata")
    table(folder / "dog/metadata.jsonl", [("a/x.png", "x"), ("b.PNG", "b")])
    source = open_folder(folder, captions="metadata")
    assert [source[i]["caption"] for i in range(6)] == ["c", "d", "1", "2", "x", "b"]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"file_name": "1.jpg"}', '{"file_name": "1.jpg", "text": 3}', "3"]
)
def test_broken_metadata_names_file_and_line(folder, line):
    (folder / "metadata.jsonl").write_text(f'{{"file_name": "a", "text": "b"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metadata.jsonl:2: each line"):
        open_folder(folder, captions="metadata")


def test_no_metadata(folder):
    with pytest.raises(FileNotFoundError, match=r"no metadata.jsonl in .*: add one"):
        open_folder(folder, captions="metadata")


def test_maps_and_masks_beside_the_images(tmp_path):
    for name in ("a.jpg", "b.png", "sub/c.png"):
        write(tmp_path / name)
        write((tmp_path / name).with_suffix("").with_name(name[-5:-4] + "_seg.png"), "black")
    write(tmp_path / "a_mask.png", "white")
    for name in ("b", "sub/c"):
        write(tmp_path / f"{name}_mask.png", "white")
    for seg in ("a", "b", "sub/c"):
        write(tmp_path / f"{seg}_seg.png", "black")
    source = open_folder(tmp_path, segmentation_suffix="_seg", mask_suffix="_mask")
    assert names(source, tmp_path) == ["a.jpg", "b.png", "sub/c.png"]
    assert source.features == {"image", "segmentation", "mask"}
    assert source[2]["segmentation"] == (tmp_path / "sub/c_seg.png").read_bytes()
    assert source[2]["mask"] == (tmp_path / "sub/c_mask.png").read_bytes()
    (tmp_path / "b_mask.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"b_mask.png is missing \(1 of 3.*no mask"):
        open_folder(tmp_path, segmentation_suffix="_seg", mask_suffix="_mask")


def test_missing_and_empty_folders(tmp_path):
    for path in ("", "nowhere"):
        message = f"data folder '{path}' is not a folder here: give"
        with pytest.raises(FileNotFoundError, match=message):
            open_folder(path)
    with pytest.raises(FileNotFoundError, match=r"no image in .* \(looked for .bmp .jpeg"):
        open_folder(tmp_path)


def test_unreadable_folder(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # chmod does not stop a test that runs as root
    with pytest.raises(OSError, match=r"cannot read data folder .*cat: Permission denied; check"):
        open_folder(folder)


def test_no_image_left_for_a_split(tmp_path):
    write(tmp_path / "only.png")
    with pytest.raises(ValueError, match="has 1 image, which is held out: add images or set"):
        open_folder(tmp_path, eval_path=None)
    assert len(open_folder(tmp_path, "eval", eval_path=None)) == 1
    with pytest.raises(ValueError, match="eval_every 1 leaves no image to train"):
        open_folder(tmp_path, eval_path=None, eval_every=1)
