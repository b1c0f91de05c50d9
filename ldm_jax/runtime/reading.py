"""Reading files of the user: only regular files, and one line for whatever is wrong with one.

A name may lead to a pipe or an endless device (`/dev/zero`), and a file may hold anything. Files
are read here, or inside `refusals`, so that every error of a reader becomes
`PATH: the fault, its place; the remedy`.
"""

import contextlib
import json
import math
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from etils import epath

MAX_DEPTH = 100
"""Most levels of lists and objects in a JSON file: its readers are recursive."""
DAMAGE = (
    *(LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError),
    *(EOFError, NotImplementedError, struct.error, zlib.error, zipfile.BadZipFile),
)
"""Errors of readers for malformed content, beside ValueError."""


@contextlib.contextmanager
def refusals(path: os.PathLike | str, remedy: str = "") -> Iterator[None]:
    """Turn any error of a reader for a damaged file into a ValueError that begins with its path.

    remedy: ends the message.
    """
    path, end = os.fspath(path), f"; {remedy}" if remedy else ""
    try:
        yield
    except OSError:
        raise  # names the file itself
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(path) else f"{path}: {text}{end}") from error
    except DAMAGE as error:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ValueError(f"{path}: damaged ({text}){end}") from error


def opened(path: epath.PathLike) -> Any:
    """A binary handle of a regular file. OSError if there is none, ValueError if it is another."""
    path = os.fspath(path)
    if "://" in path:
        return epath.Path(path).open("rb")
    # O_NONBLOCK: opening a pipe would otherwise wait for its writer
    handle = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
            raise ValueError(f"{path}: is no regular file")
    except BaseException:
        handle.close()
        raise
    return handle


def read_bytes(path: epath.PathLike) -> bytes:
    """The content of a regular file. OSError and ValueError as of `opened`."""
    with opened(path) as file:
        return file.read()


def read_text(path: epath.PathLike) -> str:
    """UTF-8 text without its byte-order mark. ValueError names the file and the first bad byte."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{os.fspath(path)}: is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error


def lines(text: str) -> list[str]:
    """The lines of a file's text, as editors count them.

    `str.splitlines` also cuts at U+2028 and NEL, which stand inside captions and JSON texts.
    """
    return re.split(r"\r\n|\n|\r", text)


def read_json(path: epath.PathLike, remedy: str = "") -> Any:
    """Plain values of a JSON file. ValueError names the file, the place in it and the remedy."""
    return parse_json(read_text(path), os.fspath(path), remedy)


def read_object(path: epath.PathLike, remedy: str = "") -> dict[str, Any]:
    """As `read_json`, where the file must hold an object."""
    with refusals(path, remedy):
        values = read_json(path, remedy)
        if not isinstance(values, dict):
            raise ValueError(f"holds {_kind(values)}, not an object of names and values")
        return values


def parse_json(text: str | bytes, where: str, remedy: str = "") -> Any:
    """JSON text as plain values; `where` begins the message of a ValueError."""
    end = f"; {remedy}" if remedy else ""
    try:
        values = json.loads(text)
        deep = _is_deeper(values, MAX_DEPTH)
    except RecursionError:
        deep = True
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: is not JSON ({error.msg} in line {error.lineno}, column {error.colno}){end}"
        ) from error
    except ValueError as error:  # not UTF-8, or a number of thousands of digits
        raise ValueError(f"{where}: is not JSON ({error}){end}") from error
    if deep:
        raise ValueError(f"{where}: is nested deeper than {MAX_DEPTH} levels{end}")
    return values


def _is_deeper(values: Any, levels: int) -> bool:
    """True if lists and objects are nested in more than so many levels."""
    here = [values] if isinstance(values, dict | list) else []
    for _ in range(levels + 1):
        if not here:
            return False
        inner = (x.values() if isinstance(x, dict) else x for x in here)
        here = [x for one in inner for x in one if isinstance(x, dict | list)]
    return True


def _kind(value: Any) -> str:
    names = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def check_format(version: Any, newest: int, where: str) -> None:
    """ValueError unless the `format` of a file is a number that this version knows."""
    if type(version) is not int:
        raise ValueError(f"{where}: format {version!r:.40} is no number: is it one of ldm_jax?")
    if version > newest:
        raise ValueError(
            f"{where}: format {version} is newer than {newest}; install a newer ldm_jax"
        )


# --- arrays of NumPy ------------------------------------------------------------------------------

DEFLATED = 1100
"""Upper bound of the compression ratio of deflate, which is 1032 at most."""


def read_npy(path: epath.PathLike) -> np.ndarray:
    """The array of an .npy file. ValueError names the file if it holds less, or Python objects."""
    with refusals(path, "give an .npy of numbers, as np.save writes it"), opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        return _array(file, size)


def read_npz(
    path: epath.PathLike, remedy: str = "", names: Collection[str] | None = None
) -> dict[str, np.ndarray]:
    """{name: array} of an .npz, of all its arrays or of those `names` that it has.

    ValueError as from `read_npy`.
    """
    arrays = {}
    with refusals(path, remedy), npz(path) as archive:
        for name in array_names(archive):
            if names is None or name in names:
                with npz_entry(archive, name) as (entry, size):
                    arrays[name] = _array(entry, size)
    return arrays


@contextlib.contextmanager
def npz(path: epath.PathLike) -> Iterator[zipfile.ZipFile]:
    """Open an .npz as a ZIP archive."""
    with opened(path) as file:
        try:
            archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(f"is no .npz archive ({error})") from error
        with archive:
            yield archive


def array_names(archive: zipfile.ZipFile) -> list[str]:
    """Names of the arrays of an .npz, as given to np.savez."""
    return [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]


@contextlib.contextmanager
def npz_entry(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[Any, int]]:
    """(handle, bytes) of an array in an .npz. ValueError if its size is beyond deflate's ratio."""
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > DEFLATED * (info.compress_size + 1):
        raise ValueError(f"{name} says {info.file_size} bytes, packed in {info.compress_size}")
    try:
        with archive.open(info) as entry:
            yield entry, info.file_size
    except RuntimeError as error:  # encrypted
        raise ValueError(f"{name}: {error}") from error


def npy_header(entry: Any, size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, True for Fortran order, dtype) of an .npy of `size` bytes; leaves its values to read.

    ValueError unless the values are as many as the header says.
    """
    version = np.lib.format.read_magic(entry)
    readers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    if version[0] not in readers:
        raise ValueError(f"an array of .npy version {version[0]}; known are 1 and 2")
    shape, by_columns, dtype = readers[version[0]](entry)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which only a pickle could be")
    held = size - entry.tell()
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != held:
        raise ValueError(f"an array said to be {dtype} {shape} has {held} bytes")
    return shape, by_columns, dtype


def _array(entry: Any, size: int) -> np.ndarray:
    shape, by_columns, dtype = npy_header(entry, size)
    data = bytearray(size - entry.tell())
    if entry.readinto(data) != len(data):
        raise ValueError(f"an array of {dtype} {shape} ends early")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if by_columns else "C")
