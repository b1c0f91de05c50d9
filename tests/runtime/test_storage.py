"""What is tried again, what is not, and what a disk and a file say of themselves."""

import errno
import hashlib
import logging
import shutil

import pytest

from ldm_jax.runtime import storage


@pytest.fixture
def waits(monkeypatch):
    """Seconds that would have been waited."""
    found = []
    monkeypatch.setattr(storage.time, "sleep", found.append)
    return found


def failing(times, error):
    """A call that raises `error` so many times, and then gives how often it was called."""
    calls = []

    def call():
        calls.append(None)
        if len(calls) <= times:
            raise error
        return len(calls)

    return call


PASSING = [
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    ConnectionResetError("peer"),
    ValueError("UNAVAILABLE: storage.googleapis.com"),
    RuntimeError("HTTP error 503"),
    RuntimeError("Error reading gs://runs/meta: HTTP response code: 500 with no body"),
    RuntimeError("503 GET https://storage/b/runs: Service Unavailable"),
]


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_what_passes_is_tried_again_and_said(waits, caplog, error):
    with caplog.at_level(logging.WARNING):
        assert storage.retried("some/file", failing(3, error)) == 4
    assert waits == [1, 2, 4]
    assert [r.getMessage().split(";")[1] for r in caplog.records] == [
        f" attempt {i} of 4 follows in {wait} s" for i, wait in ((2, 1), (3, 2), (4, 4))
    ]
    assert all(r.getMessage().startswith("some/file: ") for r in caplog.records)


def test_what_does_not_pass_in_four_attempts_is_raised(waits):
    with pytest.raises(OSError, match="Input/output error"):
        storage.retried("file", failing(4, PASSING[0]))
    assert waits == [1, 2, 4]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        PermissionError(errno.EACCES, "denied"),
        ValueError("DATA_LOSS: the checksum differs"),
        FileNotFoundError("_METADATA does not exist at runs/pytest-500/checkpoints/500/params"),
        ValueError("runs/503: error in row 429"),
        KeyError("connection"),
    ],
    ids=str,
)
def test_what_stays_as_it_is_is_raised_at_once(waits, error):
    with pytest.raises(type(error)):
        storage.retried("file", failing(1, error))
    assert waits == []


def test_room_on_the_disk_of_what_is_not_there_yet(tmp_path):
    free = storage.free_bytes(tmp_path / "not" / "there")
    assert abs(free - shutil.disk_usage(tmp_path).free) < 2**30
    assert storage.free_bytes("gs://bucket/run") is None


@pytest.mark.parametrize(
    ("count", "shown"),
    [(999, "999 bytes"), (1000, "1.0 kB"), (2_345_678, "2.3 MB"), (4.2e12, "4200.0 GB")],
)
def test_sizes_for_people(count, shown):
    assert storage.size(count) == shown


def test_a_reason_is_one_short_line():
    long = ValueError(
        'RESOURCE_EXHAUSTED: "/a/b": No space left on device [os_error_code=28]\nmore'
    )
    assert storage.reason(long) == "No space left on device"
    assert storage.reason(ValueError("one\ntwo")) == "one"
    assert storage.reason(OSError(errno.EIO, "Input/output error", "file")) == "Input/output error"
    assert storage.reason(KeyError()) == "KeyError"
    wrapped = ValueError("Encountered error. See full TensorStore details: <bound method>")
    wrapped.__cause__ = ValueError("DATA_LOSS: 12 bytes expected, 6 found")
    assert storage.reason(wrapped) == "DATA_LOSS: 12 bytes expected, 6 found"
    wrapped.__cause__ = ValueError("UNAVAILABLE: later")
    assert storage.is_transient(wrapped)


def test_the_digest_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"content")
    assert storage.sha256(tmp_path / "a") == hashlib.sha256(b"content").hexdigest()
