"""Files of the user: regular ones, and one clear line for what is wrong with them."""

import os

import pytest

from ldm_jax.runtime import reading


@pytest.fixture
def pipe(tmp_path):
    """A pipe that nobody writes to: opening it to read waits for ever."""
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_pipes_and_devices_are_no_files(pipe):
    for path in (pipe, "/dev/zero"):
        for read in (reading.read_bytes, reading.read_text, reading.read_json):
            with pytest.raises(ValueError, match=f"{path}: is no regular file"):
                read(path)
    with pytest.raises(IsADirectoryError):
        reading.read_bytes(pipe.parent)
    with pytest.raises(FileNotFoundError):
        reading.read_bytes(pipe.parent / "gone")


def test_text_comes_without_its_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa caf\xc3\xa9")
    assert reading.read_text(path) == "a café"
    path.write_bytes(b"a caf\xe9")
    with pytest.raises(ValueError, match=r"a.txt: is not UTF-8 text \(byte 5\); save it as UTF-8"):
        reading.read_text(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"is not JSON \(Expecting property name .* in line 1, column 2\); mend it"),
        ("[" * 101 + "]" * 101, "is nested deeper than 100 levels; mend it"),
        ("[" * 100_000, "is nested deeper than 100 levels; mend it"),
        ("9" * 5000, r"is not JSON \(Exceeds the limit .*\); mend it"),
    ],
)
def test_json_that_is_none_is_refused(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"a.json: {message}"):
        reading.read_json(path, "mend it")


def test_json_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" * 100 + "]" * 100)
    assert reading.read_json(path)
    path.write_text('{"a": [1, "b"]}')
    assert reading.read_object(path) == {"a": [1, "b"]}
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"a.json: holds a list, not an object .*; mend it"):
        reading.read_object(path, "mend it")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("a hole"), "^/a/b: a hole; mend it$"),
        (ValueError("/a/b: known"), "^/a/b: known$"),
        (KeyError("format"), r"^/a/b: damaged \(KeyError: 'format'\); mend it$"),
        (RecursionError(), r"^/a/b: damaged \(RecursionError\); mend it$"),
        (MemoryError(), r"^/a/b: damaged \(MemoryError\); mend it$"),
    ],
)
def test_errors_of_content_name_the_file(error, message):
    with pytest.raises(ValueError, match=message), reading.refusals("/a/b", "mend it"):
        raise error
