"""Tensors read lazily from their file, and the refusal of damaged files."""

import dataclasses
import math
import os
import stat
import sys
import zlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ldm_jax.runtime.reading import DAMAGE as DAMAGE
from ldm_jax.runtime.reading import refusals as refusals

MAX_RANK = 32  # NumPy's limit before version 2
MAX_SIZE = 2**62

# The names of NumPy and ml_dtypes; torch's, safetensors' and Flax's are mapped to them.
DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e5m2"),
    )
}


class File(NamedTuple):
    """A regular file as it was when it was opened."""

    path: str
    size: int
    inode: int
    changed: int  # nanoseconds

    def read(self, start: int, count: int) -> bytes:
        """Exactly these bytes. ValueError where the file has no such range."""
        buffer = bytearray(self.span(start, count))
        with self.open() as handle:
            _fill(handle, start, memoryview(buffer))
        return bytes(buffer)

    def span(self, start: int, count: int) -> int:
        """`count`. ValueError where the file ends before `start + count`."""
        if not 0 <= start <= start + count <= self.size:
            end = start + count
            raise ValueError(f"bytes {start} to {end} of a file of {self.size}: it is truncated")
        return count

    def open(self):
        """An unbuffered handle. ValueError if the file was replaced since."""
        handle = open(self.path, "rb", buffering=0)  # noqa: SIM115
        if _stamp(os.fstat(handle.fileno())) != self[1:]:
            handle.close()
            raise ValueError("the file changed while it was being read")
        return handle


def file(path: str | os.PathLike) -> File:
    """The `File` of a path. OSError if there is none, ValueError if it is no regular file."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(f"{path} is a folder, not a checkpoint file")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no regular file")
    return File(os.fspath(path), *_stamp(status))


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_ino, status.st_mtime_ns


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LazyTensor:
    """A tensor in a file. `np.asarray(tensor)` reads it into new memory; nothing of it is kept.

    dtype: NumPy's, or ml_dtypes' bfloat16 and float8.
    spans: (first byte, bytes) of its data in the file, in order.
    strides: in elements, where the data does not lie in row-major order; None otherwise.
    swapped: True if the file has the other byte order.
    crc: of the data, if the file says it.
    Reading raises ValueError that names the file if it changed, or its data do not fit `crc`.
    """

    file: File
    dtype: np.dtype
    shape: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    strides: tuple[int, ...] | None = None
    swapped: bool = False
    crc: int | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if copy is False:
            raise ValueError("a tensor in a file cannot be had without a copy")
        with refusals(self.file.path):
            raw = self._read()
        if self.swapped:
            part = self.dtype.itemsize // (2 if self.dtype.kind == "c" else 1)
            raw = raw.view(f"u{part}").byteswap(inplace=True).view(np.uint8)
        x = raw.view(self.dtype)
        if self.strides is not None:
            steps = [n * self.dtype.itemsize for n in self.strides]
            x = np.ascontiguousarray(np.lib.stride_tricks.as_strided(x, self.shape, steps))
        x = x.reshape(self.shape)
        return x if dtype is None else x.astype(dtype, copy=False)

    def _read(self) -> np.ndarray:
        """The tensor's elements in the order of the file."""
        raw = np.empty(sum(self.file.span(*span) for span in self.spans), np.uint8)
        position = 0
        with self.file.open() as handle:
            for start, count in self.spans:
                _fill(handle, start, memoryview(raw)[position : position + count])
                position += count
        if self.crc is not None and zlib.crc32(raw) != self.crc:
            raise ValueError(f"the data of a tensor of shape {self.shape} are damaged (CRC-32)")
        return raw


def contiguous(file: File, dtype: np.dtype, shape: tuple[int, ...], start: int, **more):
    """The LazyTensor whose elements follow each other from byte `start` on."""
    count = math.prod(checked_shape(shape, dtype)) * dtype.itemsize
    return LazyTensor(file, dtype, shape, ((start, file.span(start, count)),), **more)


def checked_shape(shape: Any, dtype: np.dtype) -> tuple[int, ...]:
    """`shape` as a tuple. ValueError unless NumPy could hold such an array."""
    if math.prod(max(n, 1) for n in sizes(shape)) * dtype.itemsize >= 2**62:
        raise ValueError("a tensor's shape is absurdly large")
    return tuple(shape)


def sizes(values: Any) -> tuple[int, ...]:
    """A shape or strides as a tuple. ValueError unless it is a short list of whole numbers >= 0."""
    if not isinstance(values, (list, tuple)):
        raise ValueError("a tensor's shape or strides are no list of sizes")
    if len(values) > MAX_RANK:  # before the loops over millions of axes below
        raise ValueError(f"a tensor of {len(values)} axes; {MAX_RANK} are the most")
    if any(type(n) is not int or not 0 <= n < MAX_SIZE for n in values):
        raise ValueError("a tensor's shape or strides are no sizes from 0 to 2**62")
    return tuple(values)


def _fill(handle, start: int, out: memoryview) -> None:
    """Reads `out` full from byte `start` on."""
    handle.seek(start)
    while out:
        count = handle.readinto(out)
        if not count:
            raise ValueError(f"the file ends {len(out)} bytes early")
        out = out[count:]


def is_swapped(order: str) -> bool:
    """True if data of this byte order ("little" or "big") need swapping on this machine."""
    if order not in ("little", "big"):
        raise ValueError(f"byte order {order[:20]!r} is neither little nor big")
    return order != sys.byteorder
