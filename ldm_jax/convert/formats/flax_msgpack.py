"""`flax.serialization.msgpack_serialize`'s files, read so that the arrays stay in the file."""

import io
import math
import os
import struct
from typing import Any

import numpy as np

from ldm_jax.convert.formats import tensors
from ldm_jax.convert.formats.tensors import DTYPES, File, LazyTensor

# Bounds on what a small file can make the recursive reader do; a UNet has a depth of about 8 and a
# thousand arrays.
MAX_DEPTH = 64
MAX_NODES = 1_000_000
MAX_TEXT = 2**16  # bytes of a name or of a plain value

NDARRAY, COMPLEX, SCALAR = 1, 2, 3  # Flax's extension types
CHUNKED = "__msgpack_chunked_array__"

# First byte -> struct format of the next bytes: a number itself, or the length of a value.
NUMBERS = dict(zip(range(0xCA, 0xD4), (">f", ">d", ">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q")))
TEXTS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
BINARIES = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
LISTS = {0xDC: ">H", 0xDD: ">I"}
MAPS = {0xDE: ">H", 0xDF: ">I"}
EXTENSIONS = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def read(path: str | os.PathLike) -> Any:
    """The saved tree: nested dict and list of `LazyTensor`, numbers and text.

    Raises ValueError that names the file if it is damaged, or holds values that Flax does not
    write.
    """
    file = tensors.file(path)
    with tensors.refusals(file.path), io.BufferedReader(file.open()) as handle:
        reader = _Reader(file, handle)
        tree = reader.value(MAX_DEPTH)
        if handle.tell() != file.size:
            raise ValueError(f"its data end at byte {handle.tell()} of {file.size}")
    return tree


class _Reader:
    """A position in the file, and the number of values that may still follow."""

    def __init__(self, file: File, handle: io.BufferedReader):
        self.file = file
        self.handle = handle
        self.nodes = MAX_NODES

    def take(self, count: int) -> bytes:
        if count > MAX_TEXT:
            raise ValueError(f"a value of {count} bytes that is no array")
        self.file.span(self.handle.tell(), count)
        return self.handle.read(count)

    def number(self, form: str):
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self, depth: int) -> Any:
        """The next value, of any type."""
        self.nodes -= 1
        if depth == 0 or self.nodes < 0:
            raise ValueError(f"more than {MAX_DEPTH} levels or {MAX_NODES} values")
        head = self.number(">B")
        if head < 0x80:
            return head
        if head >= 0xE0:
            return head - 0x100
        if head in CONSTANTS:
            return CONSTANTS[head]
        if head in NUMBERS:
            return self.number(NUMBERS[head])
        if head < 0x90 or head in MAPS:
            return self.map(head & 0x0F if head < 0x90 else self.number(MAPS[head]), depth)
        if head < 0xA0 or head in LISTS:
            count = head & 0x0F if head < 0xA0 else self.number(LISTS[head])
            return [self.value(depth - 1) for _ in range(self.checked(count))]
        if head < 0xC0 or head in TEXTS:
            count = head & 0x1F if head < 0xC0 else self.number(TEXTS[head])
            return self.take(count).decode("utf-8")
        if head in BINARIES:
            return self.take(self.number(BINARIES[head]))
        if head in EXTENSIONS or 0xD4 <= head <= 0xD8:
            count = self.number(EXTENSIONS[head]) if head in EXTENSIONS else 1 << (head - 0xD4)
            return self.extension(count, depth)
        raise ValueError(f"byte 0x{head:02x}, which msgpack does not use")

    def checked(self, count: int) -> int:
        """`count`. ValueError if so many values cannot follow."""
        self.file.span(self.handle.tell(), count)
        return count

    def map(self, count: int, depth: int) -> Any:
        entries: dict[Any, Any] = {}
        for _ in range(self.checked(count)):
            key = self.value(depth - 1)
            if type(key) not in (str, int):
                raise ValueError(f"a name of type {type(key).__name__}")
            if key in entries:
                raise ValueError(f"{str(key)[:200]!r} stands there twice")
            entries[key] = self.value(depth - 1)
        return _joined(entries) if CHUNKED in entries else entries

    def extension(self, count: int, depth: int) -> Any:
        kind = self.number(">b")
        end = self.handle.tell() + self.file.span(self.handle.tell(), count)
        if kind == COMPLEX:
            self.handle.seek(end)
            return None  # no parameter is a complex number
        if kind not in (NDARRAY, SCALAR):
            raise ValueError(f"an extension of type {kind}, which Flax does not write")
        array = self.array(depth - 1)
        self.handle.seek(array.spans[0][0] + array.nbytes)
        if self.handle.tell() != end:
            raise ValueError(f"an array of {array.nbytes} bytes in {count}")
        return np.asarray(array)[()] if kind == SCALAR and array.ndim == 0 else array

    def array(self, depth: int) -> LazyTensor:
        """[shape, name of the dtype, data]; the data stay in the file."""
        if self.number(">B") != 0x93:
            raise ValueError("an array that is no triple")
        shape, name = self.value(depth), self.value(depth)
        if type(name) is not str or name not in DTYPES:
            raise ValueError(f"an array of dtype {str(name)[:40]!r}; known are {', '.join(DTYPES)}")
        head = self.number(">B")
        if head not in BINARIES:
            raise ValueError("an array without data")
        count = self.number(BINARIES[head])
        array = tensors.contiguous(self.file, DTYPES[name], shape, self.handle.tell())
        if array.nbytes != count:
            raise ValueError(f"an array of shape {array.shape} and {name} in {count} bytes")
        return array


def _joined(parts: dict[Any, Any]) -> LazyTensor:
    """The array from the chunks into which Flax cuts it: msgpack has no value of 2 GiB or more."""
    shape = tuple(parts["shape"][str(i)] for i in range(len(parts["shape"])))
    chunks = [parts["chunks"][str(i)] for i in range(len(parts["chunks"]))]
    first = chunks[0]
    if any(type(chunk) is not LazyTensor or chunk.dtype != first.dtype for chunk in chunks):
        raise ValueError("a chunked array of what are no arrays of one dtype")
    shape = tensors.checked_shape(shape, first.dtype)
    if math.prod(shape) != sum(chunk.size for chunk in chunks):
        raise ValueError(f"a chunked array of shape {shape} with too few or too many numbers")
    spans = tuple(span for chunk in chunks for span in chunk.spans)
    return LazyTensor(first.file, first.dtype, shape, spans)
