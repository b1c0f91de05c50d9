"""Global batches: the same ordered rows on every mesh, read ahead in threads, in workers or not."""

import dataclasses
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from ldm_jax import data, schema
from ldm_jax.data import pipeline
from ldm_jax.data.synthetic import SyntheticSource

CONFIG = schema.DataConfig(
    source=schema.SyntheticConfig(num_images=13, size=16),
    size=8,
    crop="random",
    flip=True,
    threads=3,
    read_ahead=2,
)
BATCH = 8
MESHES = [(1, 1, 1), (4, 1, 1), (1, 4, 1), (2, 2, 1), (1, 1, 4), (2, 1, 2), (1, 2, 2)]


def batch_sharding(data_, fsdp, tensor):
    how = {"devices": jax.devices()[: data_ * fsdp * tensor], "axis_types": (AxisType.Auto,) * 3}
    mesh = jax.make_mesh((data_, fsdp, tensor), ("data", "fsdp", "tensor"), **how)
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def open_stream(config=CONFIG, batch_size=BATCH, seed=5):
    return data.stream(config, batch_size=batch_size, seed=seed)


def expected(stream, step):
    rows = [stream[step * stream.batch_size + r] for r in range(stream.batch_size)]
    return {name: np.stack([row[name] for row in rows]) for name in stream.spec}


def assert_equal_batches(batch, want):
    assert batch.keys() == want.keys()
    for name in want:
        assert batch[name].dtype == want[name].dtype
        np.testing.assert_array_equal(np.asarray(batch[name]), want[name])


@pytest.mark.parametrize("mesh", MESHES)
def test_the_same_ordered_batch_on_every_mesh(mesh):
    stream, sharding = open_stream(), batch_sharding(*mesh)
    for step in (0, 3):  # batches straddle epochs: 13 records
        batch = data.global_batch(stream, step, sharding)
        assert_equal_batches(batch, expected(stream, step))
        assert all(array.sharding == sharding for array in batch.values())


def test_a_row_is_decoded_once_however_many_devices_hold_it(monkeypatch):
    stream = open_stream()
    decoded = []
    accept = stream.accept
    monkeypatch.setattr(stream, "accept", lambda made: decoded.append(1) or accept(made))
    data.global_batch(stream, 0, batch_sharding(1, 1, 4))
    assert len(decoded) == BATCH


class PartOfASharding:
    """A sharding of which this process addresses some devices."""

    def __init__(self, sharding, devices):
        self._sharding, self._devices = sharding, devices
        self.num_devices = 1

    def addressable_devices_indices_map(self, shape):
        everything = self._sharding.devices_indices_map(shape)
        return {d: everything[d] for d in self._devices}


def test_a_process_reads_the_rows_of_its_devices_and_no_others():
    devices = jax.devices()
    split = batch_sharding(2, 2, 1)
    assert pipeline.local_examples(8, PartOfASharding(split, devices[:2])) == [0, 1, 2, 3]
    assert pipeline.local_examples(8, PartOfASharding(split, devices[2:])) == [4, 5, 6, 7]
    # `tensor` spans two processes of two devices when its neighbours are one apart:
    # both then hold replicas of the whole batch.
    replicas = batch_sharding(2, 1, 2)
    for process in ([devices[0], devices[2]], [devices[1], devices[3]]):
        assert pipeline.local_examples(8, PartOfASharding(replicas, process)) == list(range(8))
    ends = PartOfASharding(split, [devices[3], devices[0]])
    assert pipeline.local_examples(8, ends) == [0, 1, 6, 7]


def test_reading_ahead_takes_the_rows_of_this_process_only():
    stream = open_stream()
    pieces = [[0, 1], [6], [7]]
    ahead = pipeline._LocalExamples(stream.made, BATCH, 2, pieces)
    for step in (2, 3):
        for i, rows in enumerate(pieces):
            made = ahead[(step - 2) * len(pieces) + i]
            assert len(made) == len(rows)
            for got, row in zip(made, rows):
                expected = stream[step * BATCH + row]
                np.testing.assert_array_equal(got.example["image"], expected["image"])


@pytest.mark.parametrize(
    ("number", "pieces"),
    [
        (1, [[2, 3, 4, 8, 9]]),
        (2, [[2, 3, 4], [8, 9]]),
        (4, [[2, 3], [4], [8], [9]]),
        (9, [[2], [3], [4], [8], [9]]),
    ],
)
def test_pieces_are_in_order_and_nearly_equal(number, pieces):
    assert pipeline.pieces([2, 3, 4, 8, 9], number) == pieces


@pytest.mark.parametrize("readers", [{"threads": n} for n in (0, 1, 3)] + [{"workers": 3}])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 2)])
def test_threads_and_workers_read_what_global_batch_reads(readers, mesh):
    sharding = batch_sharding(*mesh)
    stream = open_stream(dataclasses.replace(CONFIG, **readers))
    with data.prefetch(stream, 5, sharding) as batches:
        for step in range(5, 10):
            got, batch = next(batches)
            assert got == step
            assert_equal_batches(batch, data.global_batch(stream, step, sharding))


def test_starts_anywhere_without_replaying(monkeypatch):
    stream = open_stream(dataclasses.replace(CONFIG, threads=0))
    made = []
    accept = stream.accept
    monkeypatch.setattr(stream, "accept", lambda row: made.append(1) or accept(row))
    step = 10**9
    with data.prefetch(stream, step, batch_sharding(4, 1, 1)) as batches:
        got, batch = next(batches)
    assert got == step
    assert len(made) == BATCH
    assert_equal_batches(batch, expected(stream, step))


def until(condition):
    deadline = time.time() + 20
    while not condition() and time.time() < deadline:
        time.sleep(0.01)
    return condition()


def test_reads_ahead_as_far_as_asked_and_no_further(monkeypatch):
    stream = open_stream(dataclasses.replace(CONFIG, keep_mib=0))
    read = []
    getitem = SyntheticSource.__getitem__
    monkeypatch.setattr(
        SyntheticSource, "__getitem__", lambda self, i: read.append(i) or getitem(self, i)
    )
    with data.prefetch(stream, 0, batch_sharding(1, 1, 1)) as batches:
        next(batches)
        assert until(lambda: len(read) == (1 + CONFIG.read_ahead) * BATCH)
        time.sleep(0.1)
        assert len(read) == (1 + CONFIG.read_ahead) * BATCH


def test_close_stops_the_threads():
    def decoding():
        return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]

    assert until(lambda: not decoding())  # those of other tests are gone
    batches = data.prefetch(open_stream(), 0, batch_sharding(1, 1, 1))
    next(batches)
    assert len(decoding()) == CONFIG.threads
    batches.close()
    batches.close()
    assert until(lambda: not decoding())
    with pytest.raises(ValueError, match="these batches were closed"):
        next(batches)


@pytest.mark.parametrize("mesh", [(4, 1, 1), (2, 2, 1)])
def test_batch_that_the_devices_do_not_divide(mesh):
    stream = open_stream(batch_size=6)
    message = "batch 6 is not a multiple of 4 devices that split it: use 4, or another mesh"
    with pytest.raises(ValueError, match=message):
        data.global_batch(stream, 0, batch_sharding(*mesh))
    with pytest.raises(ValueError, match=message):
        data.prefetch(stream, 0, batch_sharding(*mesh))
    data.global_batch(stream, 0, batch_sharding(2, 1, 2))


@pytest.fixture
def damaged(tmp_path):
    for i in range(12):
        path = tmp_path / f"{i:02}.jpg"
        Image.new("L", (8, 8), 20 * i).save(path)
        if i in (5, 9):
            path.write_bytes(path.read_bytes()[:200])
    source = schema.FolderConfig(path=str(tmp_path), eval_path=str(tmp_path))
    return schema.DataConfig(source=source, size=8, channels=1, shuffle=False, threads=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_undecodable_records_read_ahead_are_counted_where_they_are_used(damaged, workers, caplog):
    stream = open_stream(dataclasses.replace(damaged, workers=workers), batch_size=4)
    sharding = batch_sharding(1, 1, 1)
    counts = []
    with data.prefetch(stream, 0, sharding) as batches:
        for step in range(6):
            _, batch = next(batches)
            counts.append(stream.bad_records)
            assert_equal_batches(batch, data.global_batch(open_stream(damaged, 4), step, sharding))
    assert counts == [0, 1, 2, 2, 2, 2]
    assert sum("05.jpg cannot be used" in m for m in caplog.messages) >= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_limit_reaches_the_consumer_at_its_batch(damaged, workers):
    config = dataclasses.replace(damaged, workers=workers, max_bad_records=1)
    batches = data.prefetch(open_stream(config, 4), 0, batch_sharding(1, 1, 1))
    assert [next(batches)[0], next(batches)[0]] == [0, 1]
    with pytest.raises(RuntimeError, match=r"2 records cannot be used, the last: .*09.jpg"):
        next(batches)
    with pytest.raises(ValueError, match="closed"):  # never a shifted batch
        next(batches)


def test_errors_in_reading_ahead_reach_the_consumer(damaged):
    config = dataclasses.replace(damaged, size=9)
    message = r"not one record can be used; the last: .*\.jpg \(the image is 8x8 and its"
    batches = data.prefetch(open_stream(config, 4), 0, batch_sharding(1, 1, 1))
    with batches, pytest.raises(ValueError, match=message):
        next(batches)


def test_a_program_ends_without_a_word(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import jax\n"
        "from ldm_jax import data, schema\n"
        "if __name__ == '__main__':\n"
        "    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])\n"
        "    source = schema.SyntheticConfig(size=8)\n"
        "    for workers in (0, 1):\n"
        "        config = schema.DataConfig(source=source, size=8, workers=workers, threads=2)\n"
        "        stream = data.stream(config, batch_size=2, seed=0)\n"
        "        with data.prefetch(stream, 0, sharding) as batches:\n"
        "            next(batches)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
