"""The stream of rows: determinism, epochs, augmentation, undecodable records."""

import dataclasses
import errno
import logging
import pickle
import re

import numpy as np
import pytest
from PIL import Image

from ldm_jax import data, schema
from ldm_jax.data import examples, tokens
from ldm_jax.runtime import reading, storage

SYNTHETIC = schema.SyntheticConfig(num_images=13, size=16)
CONFIG = schema.DataConfig(
    source=SYNTHETIC, size=8, crop="random", crop_range=(0.5, 0.9), flip=True
)
PLAIN = schema.DataConfig(source=SYNTHETIC, size=16)


def open_stream(config=CONFIG, batch_size=4, seed=5, split="train"):
    return data.stream(config, batch_size=batch_size, seed=seed, split=split)


def records_of(stream, indices):
    """The record of each row, by its (uncropped) image."""
    known = {stream.source[i]["image"].tobytes(): i for i in range(len(stream.source))}
    images = [np.round((stream[i]["image"] + 1) * 127.5).astype(np.uint8) for i in indices]
    return [known[image.tobytes()] for image in images]


def assert_equal_rows(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_rows_are_as_specified():
    stream = open_stream()
    assert (stream.batch_size, stream.num_records, stream.bad_records) == (4, 13, 0)
    row = stream[3]
    assert {name: (value.shape, value.dtype) for name, value in row.items()} == stream.spec
    assert stream.spec == {
        "image": ((8, 8, 3), np.float32),
        "label": ((), np.int32),
        "segmentation": ((8, 8), np.int32),
        "mask": ((8, 8, 1), np.float32),
    }


class Letters:
    """Code points of at most 12 letters, filled up with zeros."""

    def encode(self, texts):
        return np.array([[*map(ord, t[:12].ljust(12, "\0"))] for t in texts], np.int32)


def test_captions_become_tokens():
    stream = data.stream(PLAIN, batch_size=4, seed=5, tokenizer=Letters())
    assert stream.spec["tokens"] == stream.spec["null_tokens"] == ((12,), np.int32)
    plain = open_stream(PLAIN)
    for i, record in enumerate(records_of(stream, range(20))):
        row, caption = stream[i], stream.source[record]["caption"]
        assert stream.caption(i) == caption
        np.testing.assert_array_equal(row.pop("tokens"), Letters().encode([caption])[0])
        np.testing.assert_array_equal(row.pop("null_tokens"), np.zeros(12))
        assert_equal_rows(row, plain[i])


def test_row_is_a_function_of_seed_and_index():
    one, other = open_stream(), open_stream(batch_size=7)
    forwards = [one[i] for i in range(40)]
    for i in reversed(range(40)):
        assert_equal_rows(other[i], forwards[i])
    seeded = open_stream(seed=6)
    assert any(not np.array_equal(seeded[i]["image"], forwards[i]["image"]) for i in range(3))


def test_every_epoch_has_every_record_once_in_a_new_order():
    stream = open_stream(PLAIN)
    epochs = [records_of(stream, range(13 * e, 13 * (e + 1))) for e in range(6)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_neighbouring_seeds_share_no_epoch():
    orders = [
        tuple(records_of(open_stream(PLAIN, seed=seed), range(13 * e, 13 * (e + 1))))
        for seed in range(4)
        for e in range(4)
    ]
    assert len(set(orders)) == 16


def test_a_record_is_augmented_anew_in_every_epoch():
    stream = open_stream(dataclasses.replace(CONFIG, shuffle=False))
    assert not np.array_equal(stream[2]["image"], stream[2 + 13]["image"])


def test_eval_is_in_order_and_not_augmented():
    stream = open_stream(split="eval")
    assert stream.num_records == 3
    other = open_stream(split="eval", seed=6)
    for i in range(6):
        assert_equal_rows(stream[i], other[i % 3])
        square = Image.fromarray(stream.source[i % 3]["image"]).resize((8, 8), Image.BICUBIC)
        np.testing.assert_allclose(stream[i]["image"], np.asarray(square) / 127.5 - 1, atol=1e-6)


def test_label_and_maps_belong_to_the_image():
    stream = open_stream()
    for i in range(30):
        row = stream[i]
        assert set(np.unique(row["segmentation"])) <= {0, row["label"] + 1}
        shape = row["segmentation"] > 0
        bright = row["image"][shape].mean() - row["image"][~shape].mean() if shape.any() else 1
        assert bright > 0.2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, but must be at least 1"),
        ({"seed": -1}, "seed -1 is not in 0..2**64 - 1"),
        ({"config": dataclasses.replace(CONFIG, read_ahead=0)}, "data.read_ahead is 0"),
        ({"config": dataclasses.replace(CONFIG, workers=-2)}, "data.workers is -2"),
        ({"config": dataclasses.replace(CONFIG, keep_mib=-1)}, "data.keep_mib is -1"),
        ({"config": dataclasses.replace(CONFIG, crop_range=(0.0, 1.0))}, "crop_range is 0.0 1.0"),
        ({"config": dataclasses.replace(CONFIG, crop_range=(0.9, 0.5))}, "crop_range is 0.9 0.5"),
    ],
)
def test_values_out_of_range(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        open_stream(**fields)


# --- decoded records in memory ----------------------------------------------------------------


def counted(config, **options):
    """A stream, and the list of the records that are read from now on."""
    stream, read = open_stream(config, **options), []
    getitem = type(stream.source).__getitem__

    class Counting(type(stream.source)):
        def __getitem__(self, index):
            read.append(index)
            return getitem(self, index)

    stream.source.__class__ = Counting
    return stream, read


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize(
    "config", [CONFIG, PLAIN, dataclasses.replace(CONFIG, crop="center", size=8)]
)
def test_kept_records_give_the_same_rows_and_are_read_once(config, split):
    stream, read = counted(config, split=split)
    plain, read_again = counted(dataclasses.replace(config, keep_mib=0), split=split)
    for i in range(40):
        assert_equal_rows(stream[i], plain[i])
    assert sorted(read) == list(range(stream.num_records))
    assert len(read_again) == 40


def test_rows_of_a_kept_record_are_separate():
    stream = open_stream(dataclasses.replace(PLAIN, shuffle=False))
    expected = {name: value.copy() for name, value in stream[2].items()}
    for value in (stream[2]["image"], stream[2]["segmentation"], stream[2]["mask"]):
        value[...] = 7
    assert_equal_rows(stream[2], expected)


def test_no_more_is_kept_than_allowed(tmp_path):
    for i in range(8):
        Image.fromarray(np.full((512, 512), 10 * i, np.uint8)).save(tmp_path / f"{i}.png")
    source = schema.FolderConfig(path=str(tmp_path), eval_path=str(tmp_path))
    grey = schema.DataConfig(source=source, size=512, channels=1, keep_mib=1, shuffle=False)
    stream, read = counted(grey)  # a quarter of a MiB each, and a little for the objects
    for i in range(24):
        assert stream[i]["image"][0, 0, 0] == np.float32(10 * (i % 8)) / np.float32(127.5) - 1
    assert [read.count(i) for i in range(8)] == [1, 1, 1, 3, 3, 3, 3, 3]
    colour, read = counted(dataclasses.replace(grey, channels=3))
    for i in range(24):
        colour[i]
    assert [read.count(i) for i in range(8)] == [3] * 8  # PIL holds 1 MiB for each


def test_only_what_is_cropped_stays_where_nothing_is_drawn(tmp_path):
    for i in range(3):
        Image.new("L", (700, 600), 10 * i).save(tmp_path / f"{i}.png")
    source = schema.FolderConfig(path=str(tmp_path), eval_path=str(tmp_path))
    config = schema.DataConfig(source=source, size=64, channels=1, keep_mib=1)
    stream, read = counted(config)
    for i in range(9):
        stream[i]
    assert sorted(read) == [0, 1, 2]
    stream, read = counted(dataclasses.replace(config, crop="random"))
    for i in range(9):
        stream[i]
    assert len(read) == 3 + 2  # 0.4 MiB each: the third does not fit beside two


def test_workers_share_the_room_and_begin_empty():
    config = dataclasses.replace(PLAIN, keep_mib=2, workers=3)
    make = examples.MakeExample(open_stream(config).source, config, True)
    make(0, np.random.default_rng(0))
    assert len(make.kept) == 1
    sent = pickle.loads(pickle.dumps(make))
    assert len(sent.kept) == 0
    for kept in (make.kept, sent.kept):
        kept.put(1, "fits", 2**20 // 2)
        kept.put(2, "is too much", 2**20 // 2)
        assert (kept.get(1), kept.get(2)) == ("fits", None)


# --- undecodable records ----------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """Ten images of one grey each; numbers 3, 4 and 9 are cut short."""
    for i in range(10):
        path = tmp_path / f"{i}.png"
        Image.new("L", (16, 16), 10 * i).save(path)
        if i in (3, 4, 9):
            path.write_bytes(path.read_bytes()[:40])
    return tmp_path


def folder(path, **fields):
    source = schema.FolderConfig(path=str(path), eval_path=str(path))
    return schema.DataConfig(source=source, size=16, channels=1, **fields)


def greys(stream, count):
    return [round(float(stream[i]["image"][0, 0, 0] + 1) * 12.75) for i in range(count)]


def test_the_caption_is_that_of_the_record_that_replaces(damaged):
    for i in range(10):
        (damaged / f"{i}.txt").write_text(f"grey {i}\n")
    config = folder(damaged, shuffle=False)
    source = dataclasses.replace(config.source, captions="sidecar")
    config = dataclasses.replace(config, source=source)
    stream = data.stream(config, batch_size=4, seed=5, tokenizer=Letters())
    for i, number in enumerate([0, 1, 2, 5, 5, 5, 6, 7, 8, 0]):
        assert stream.caption(i) == f"grey {number}"
        np.testing.assert_array_equal(stream[i]["tokens"], Letters().encode([f"grey {number}"])[0])


def test_a_tokenizer_without_captions_is_refused(damaged):
    with pytest.raises(ValueError, match=r"needs captions, .* set data\.source\.captions"):
        data.stream(folder(damaged), batch_size=2, seed=0, tokenizer=Letters())


def test_replacement_depends_on_the_index_alone(damaged):
    shuffled, whole = open_stream(folder(damaged)), open_stream(folder(damaged))
    expected = greys(whole, 30)
    for i in reversed(range(30)):
        assert round(float(shuffled[i]["image"][0, 0, 0] + 1) * 12.75) == expected[i]
    assert set(expected) == {0, 1, 2, 5, 6, 7, 8}


def test_each_is_reported_and_counted_once(damaged, caplog):
    stream = open_stream(folder(damaged))
    assert stream.bad_records == 0
    with caplog.at_level(logging.WARNING):
        greys(stream, 60)
    assert stream.bad_records == 3
    assert len(caplog.messages) == 3
    for name in ("3.png", "4.png", "9.png"):
        (message,) = (m for m in caplog.messages if str(damaged / name) in m)
        assert "cannot be used; the next one replaces it" in message


def test_limit(damaged):
    stream = open_stream(folder(damaged, shuffle=False, max_bad_records=2))
    greys(stream, 9)
    with pytest.raises(
        RuntimeError, match=r"3 records cannot be used, the last: .*9.png .*; repair .* \(2\)"
    ):
        stream[9]
    with pytest.raises(RuntimeError, match=r"1 records cannot be used, the last: .*3.png"):
        greys(open_stream(folder(damaged, shuffle=False, max_bad_records=0)), 10)


def test_nothing_can_be_decoded(damaged):
    for path in damaged.iterdir():
        path.write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"not one record can be used; the last: .*6.png"):
        open_stream(folder(damaged, shuffle=False))[7]


def faulty(path):
    """Seven images with captions and maps, of which the first is as it should be."""
    for i in range(7):
        Image.new("L", (16, 16), 10 * i).save(path / f"{i}.png")
        Image.new("L", (16, 16), i).save(path / f"{i}_seg.png")
        (path / f"{i}.txt").write_text(f"caption {i}")
    (path / "1.png").write_bytes(b"no image")
    Image.new("L", (12, 30)).save(path / "2.png")
    (path / "3.txt").write_bytes(b"\xff\xfe caption")
    Image.new("RGB", (16, 16)).save(path / "4_seg.png")
    Image.new("L", (8, 8)).save(path / "5_seg.png")
    (path / "6_seg.png").write_bytes(b"")
    source = schema.FolderConfig(
        str(path), eval_path=str(path), captions="sidecar", segmentation_suffix="_seg"
    )
    return schema.DataConfig(source=source, size=16, channels=1, shuffle=False)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_every_fault_of_a_record_is_met_alike(tmp_path, caplog, crop):
    """Broken, too small, a caption that is not UTF-8, a map of three channels or another size."""
    config = dataclasses.replace(faulty(tmp_path), crop=crop, crop_range=(1.0, 1.0))
    with caplog.at_level(logging.WARNING):
        stream = data.stream(config, batch_size=1, seed=0, tokenizer=Letters())
        assert greys(stream, 7) == [0] * 7
    assert stream.bad_records == 6
    reasons = ("", "12x30", "not UTF-8", "one channel", "segmentation is 8x8", "")
    for i, reason in enumerate(reasons, 1):
        (line,) = (m for m in caplog.messages if f"{i}.png cannot be used" in m)
        assert reason in line
    limited = dataclasses.replace(config, max_bad_records=2)
    with pytest.raises(data.BadDataError, match=r"3 records cannot be used, .*3\.png .*not UTF-8"):
        data.stream(limited, batch_size=1, seed=0, tokenizer=Letters())[1]


def test_storage_that_fails_for_a_while_costs_no_record(damaged, monkeypatch, caplog):
    stream = open_stream(folder(damaged, shuffle=False))
    read, left = reading.read_bytes, [2]

    def fails(path):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(reading, "read_bytes", fails)
    monkeypatch.setattr(storage, "WAIT", 0.0)
    assert greys(stream, 1) == [0]
    assert stream.bad_records == 0
    assert "0.png: Input/output error; attempt 3 of 4 follows" in caplog.messages[-1]
    left[0] = 99
    with pytest.raises(OSError, match="Input/output error"):
        stream[1]


def test_what_any_process_has_met_counts_on_all(damaged, monkeypatch):
    stream = open_stream(folder(damaged, max_bad_records=3))
    greys(stream, 10)
    monkeypatch.setattr(examples.jax, "process_count", lambda: 2)
    monkeypatch.setattr(examples.processes, "union", lambda mine: mine | {0})
    assert stream.bad_records == 0  # as of the last time that they agreed
    with pytest.raises(RuntimeError, match=r"4 records cannot be used, the last: .*9.png"):
        stream.agree()
    monkeypatch.setattr(examples.processes, "union", lambda mine: mine)
    stream.agree()
    assert stream.bad_records == 3


def test_a_file_that_vanished_is_an_error_not_a_bad_record(damaged):
    stream = open_stream(folder(damaged, shuffle=False))
    (damaged / "6.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"6.png"):
        stream[6]


def test_label_out_of_range():
    source = open_stream(PLAIN).source
    source.num_classes = 3

    class Mislabelled:
        features = source.features
        num_classes = 3
        describe = source.describe

        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            return {**source[index], "label": index}

    config = dataclasses.replace(PLAIN, shuffle=False, max_bad_records=5)
    stream = examples.Stream(Mislabelled(), config, 4, 0, True)
    stream[2]
    with pytest.raises(
        ValueError, match=r"6 records .* \(label 8 is not in 0\.\.2: does the split"
    ):
        stream[3]


def test_a_map_with_more_classes_than_the_model_is_refused():
    """Their one-hot vectors would be all zero."""
    config = dataclasses.replace(PLAIN, shuffle=False)
    whole = data.stream(config, batch_size=4, seed=0, num_ids=5)  # background and four shapes
    assert max(whole[i]["segmentation"].max() for i in range(4)) == 4
    stream = data.stream(config, batch_size=4, seed=0, num_ids=4)
    stream[2]
    with pytest.raises(ValueError, match=r"record 3: the segmentation holds class 4, but"):
        stream[3]


def test_captions_that_the_text_encoder_cuts_are_said(caplog):
    """The first one, with what is lost, and then fewer and fewer, each record once."""
    source = dataclasses.replace(SYNTHETIC, num_images=40)
    config = dataclasses.replace(PLAIN, source=source, shuffle=False)
    tokenizer = tokens.load_tokenizer("bytes", 8)
    stream = data.stream(config, batch_size=4, seed=0, tokenizer=tokenizer)
    for i in (*range(40), *range(40)):
        np.testing.assert_array_equal(
            stream[i]["tokens"], tokenizer.encode([stream.source[i % 40]["caption"]])[0]
        )
    assert len(caplog.messages) == 2
    captions = [stream.source[i]["caption"] for i in range(40)]
    first = next(i for i, caption in enumerate(captions) if len(caption) > 8)
    assert caplog.messages[0] == (
        f"synthetic train record {first}: the caption is longer than the text encoder's tokens;"
        f" left out: {captions[first][8:]!r}"
    )
    assert caplog.messages[1].endswith(" (10 captions so far)")
    caplog.clear()
    data.stream(config, batch_size=4, seed=0, tokenizer=tokens.load_tokenizer("bytes", 60))[0]
    assert not caplog.messages
