"""Captions of real folders: several of an image, names as macOS writes them, odd line ends."""

import json
import unicodedata

import numpy as np
import pytest
from flax import serialization
from PIL import Image

from ldm_jax import data, schema
from ldm_jax.data import examples
from ldm_jax.data.folder import FolderSource

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def folder(path, lines, *names, **fields):
    """A folder with a metadata.jsonl of these lines and images of these names."""
    for name in names:
        (path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(path / name)
    if lines is not None:
        texts = [x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines]
        (path / "metadata.jsonl").write_text("\n".join(texts), encoding="utf-8")
    options = {"captions": "sidecar" if lines is None else "metadata", **fields}
    return schema.FolderConfig(path=str(path), eval_path=str(path), **options)


def captions(config):
    source = FolderSource(config, "train")
    return [source[i]["caption"] for i in range(len(source))]


def entry(name, text):
    return {"file_name": name, "text": text}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_line_ends_end_a_line(tmp_path, separator):
    """What `str.splitlines` takes for one stands in captions; JSON writes some of it as it is."""
    text = f"a{separator}b"
    line = entry("1.png", text)
    if separator < " ":
        line = json.dumps(line)
    assert captions(folder(tmp_path, [line, entry("2.png", "c")], "1.png", "2.png")) == [text, "c"]


def test_marks_of_utf8_and_ends_of_windows(tmp_path):
    config = folder(tmp_path, [], "1.png", "2.png")
    text = "\r\n".join(json.dumps(entry(f"{i}.png", f"text {i}")) for i in (1, 2))
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    assert captions(config) == ["text 1", "text 2"]
    for i in (1, 2):
        (tmp_path / f"{i}.txt").write_bytes(b"\xef\xbb\xbfcaption\r\n")
    assert captions(folder(tmp_path, None)) == ["caption"] * 2


@pytest.mark.parametrize(("on_disk", "in_table"), [(NFD, NFC), (NFC, NFD)])
def test_names_as_they_look(tmp_path, on_disk, in_table):
    (tmp_path / "t").mkdir()
    config = folder(tmp_path / "t", [entry(f"{in_table}.png", "text")], f"{on_disk}.png")
    assert captions(config) == ["text"]
    (tmp_path / "s").mkdir()
    config = folder(tmp_path / "s", None, f"{on_disk}.png", mask_suffix="_mask")
    (tmp_path / "s" / f"{in_table}.txt").write_text("beside")
    Image.new("L", (8, 8)).save(tmp_path / "s" / f"{in_table}_mask.png")
    assert captions(config) == ["beside"]


def test_the_exact_name_goes_first(tmp_path):
    lines = [entry(f"{NFC}.png", "one"), entry(f"{NFD}.png", "two")]
    config = folder(tmp_path, lines, f"{NFC}.png", f"{NFD}.png")
    found = dict(zip([f.name for f in sorted(tmp_path.glob("*.png"))], captions(config)))
    assert found == {f"{NFC}.png": "one", f"{NFD}.png": "two"}


def test_classes_of_held_out_images_as_they_look(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "eval").mkdir()
    folder(tmp_path / "train", None, f"{NFC}/1.png", "dog/1.png")
    folder(tmp_path / "eval", None, f"{NFD}/1.png")
    config = schema.FolderConfig(
        path=str(tmp_path / "train"), eval_path=str(tmp_path / "eval"), class_from_folder=True
    )
    assert FolderSource(config, "eval")[0]["label"] == FolderSource(config, "train")[0]["label"]


class Lengths:
    """A tokenizer that tells captions of different lengths apart."""

    max_length = 1

    def encode(self, texts):
        return np.array([[len(text)] for text in texts], np.int32)


def test_an_image_with_several_captions(tmp_path):
    """In a list, or on several lines: none is lost, and the same one is not counted twice."""
    lines = [entry("1.png", ["a", "bb"]), entry("2.png", "c"), entry("1.png", "ccc")]
    lines += [entry("1.png", "a"), entry("2.png", "c")]
    config = folder(tmp_path, lines, "1.png", "2.png")
    assert captions(config) == [["a", "bb", "ccc"], "c"]
    record = FolderSource(config, "train")[0]
    packed = serialization.msgpack_restore(serialization.msgpack_serialize(record))
    assert packed["caption"] == ["a", "bb", "ccc"]

    options = schema.DataConfig(source=config, size=8, channels=1, shuffle=False)
    stream = data.stream(options, batch_size=1, seed=0, tokenizer=Lengths())
    drawn = [int(stream[i]["tokens"][0]) for i in range(0, 40, 2)]
    assert set(drawn) == {1, 2, 3}
    assert drawn == [int(stream[i]["tokens"][0]) for i in range(0, 40, 2)]
    assert stream.caption(0) == "a"
    held_out = data.stream(options, batch_size=1, seed=0, split="eval", tokenizer=Lengths())
    assert {int(held_out[i]["tokens"][0]) for i in (0, 2, 4)} == {1}
    with pytest.raises(ValueError, match="has no caption"):
        examples.caption_of({"caption": []}, None)


@pytest.mark.parametrize("text", [[], [1], 3, None, {"a": "b"}])
def test_texts_that_are_none(tmp_path, text):
    with pytest.raises(
        ValueError, match=r"metadata.jsonl:1: each line is an object with file_name"
    ):
        captions(folder(tmp_path, [entry("1.png", text)], "1.png"))


def test_images_without_a_line_are_counted_and_named(tmp_path):
    config = folder(tmp_path, [entry("1.png", "x")], *(f"{i}.png" for i in range(1, 10)))
    with pytest.raises(ValueError, match=r"2\.png is in no .*8 of 9 .*: 2\.png, .*6\.png, \.\.\."):
        captions(config)
    with pytest.raises(FileNotFoundError, match=r"1\.txt is missing \(9 of 9 .*no caption: 1\.txt"):
        captions(folder(tmp_path, None))
