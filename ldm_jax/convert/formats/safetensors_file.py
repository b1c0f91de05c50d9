"""The safetensors format: an 8-byte length, a JSON header, then the tensors one after another."""

import contextlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ldm_jax.convert.formats import shards, tensors
from ldm_jax.convert.formats.tensors import DTYPES, File, LazyTensor

MAX_HEADER = 16 * 2**20  # bytes; 1000 tensors take about 100 kB

NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16",
    "U32": "uint32", "I32": "int32", "F32": "float32",
    "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64",
}  # fmt: skip
OURS = {DTYPES[ours]: theirs for theirs, ours in NAMES.items()}


def read(path: str | os.PathLike) -> dict[str, LazyTensor]:
    """Name -> tensor. ValueError that names the file if its header does not fit its data."""
    file = tensors.file(path)
    with tensors.refusals(file.path):
        header, start = _header(file)
        header.pop("__metadata__", None)
        by_name = {name: _tensor(file, start, name, entry) for name, entry in header.items()}
        _check_tiling(file, by_name, start)
    return by_name


def metadata(path: str | os.PathLike) -> dict[str, str]:
    """`__metadata__` of the file; empty without."""
    file = tensors.file(path)
    with tensors.refusals(file.path):
        entries = _header(file)[0].get("__metadata__", {})
        if type(entries) is not dict or any(type(value) is not str for value in entries.values()):
            raise ValueError("its __metadata__ is not text by name")
    return entries


def _header(file: File) -> tuple[dict[str, Any], int]:
    """The header, and the first byte of the data."""
    if file.size < 8:
        raise ValueError("too short for a safetensors file: it is truncated")
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if length > min(MAX_HEADER, file.size - 8):
        raise ValueError(
            f"a safetensors header of {length} bytes in a file of {file.size}: it is truncated,"
            " or no safetensors file"
        )
    header = json.loads(file.read(8, length).decode("utf-8"), object_pairs_hook=shards.unique)
    if type(header) is not dict:
        raise ValueError("a safetensors header that is no object")
    return header, 8 + length


def _tensor(file: File, start: int, name: str, entry: Any) -> LazyTensor:
    if type(entry) is not dict or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:200]!r} has other fields than dtype, shape and data_offsets")
    if entry["dtype"] not in NAMES:
        known = ", ".join(NAMES)
        raise ValueError(f"{name[:200]!r} has dtype {entry['dtype']!r:.40}; known are {known}")
    begin, end = entry["data_offsets"]
    if type(begin) is not int or type(end) is not int or begin < 0:
        raise ValueError(f"{name[:200]!r} has data offsets that are no sizes")
    dtype = DTYPES[NAMES[entry["dtype"]]]
    count = math.prod(tensors.checked_shape(entry["shape"], dtype)) * dtype.itemsize
    if end - begin != count:
        raise ValueError(f"{name[:200]!r} takes {end - begin} bytes, not the {count} of its shape")
    return tensors.contiguous(file, dtype, tuple(entry["shape"]), start + begin)


def _check_tiling(file: File, by_name: dict[str, LazyTensor], start: int) -> None:
    """ValueError unless the tensors lie one after another, up to the end of the file.

    The format demands it: a file with gaps or overlaps is damaged, or hides data.
    """
    spans = sorted((*x.spans[0], name) for name, x in by_name.items())
    for begin, count, name in spans:
        if begin != start:
            how = "overlaps the one before" if begin < start else "follows a gap"
            raise ValueError(f"the data of {name[:200]!r} {how}")
        start += count
    if start != file.size:
        raise ValueError(f"its tensors end at byte {start} of {file.size}")


# --- writing --------------------------------------------------------------------------------------


def write(
    path: str | os.PathLike, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays by name; each is fetched by `np.asarray` when its turn comes, then dropped.

    arrays: NumPy or JAX arrays, or `LazyTensor`.
    The file appears whole or not at all. ValueError as in `write_stream`.
    """
    write_stream(path, arrays, arrays.items(), metadata)


def write_stream(
    path: str | os.PathLike,
    specs: Mapping[str, Any],
    arrays: Iterable[tuple[str, Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`write` of arrays that are made one after another.

    specs: name -> anything with `shape` and `dtype`, known beforehand.
    arrays: (name, array) of every spec, in any order.
    Raises ValueError for a dtype that the format lacks, and for arrays that do not fit the specs;
    then there is no file, and an older one stays.
    """
    path = os.fspath(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, end = {}, 0
    for name in sorted(specs, key=lambda name: (-np.dtype(specs[name].dtype).itemsize, name)):
        dtype, shape = np.dtype(specs[name].dtype), list(map(int, specs[name].shape))
        if dtype not in OURS:
            raise ValueError(f"{name}: safetensors has no dtype {dtype}")
        begins[name], end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": OURS[dtype], "shape": shape, "data_offsets": [begins[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    with _replacing(path) as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for name, array in arrays:
            if name not in begins:
                raise ValueError(f"{path}: {name} is not announced, or comes twice")
            handle.seek(8 + len(text) + begins.pop(name))
            handle.write(_checked(name, array, specs[name]))
            del array  # before the next is made
        if begins:
            raise ValueError(f"{path}: {', '.join(list(begins)[:5])} never came")


def _checked(name: str, array: Any, spec: Any) -> memoryview:
    """Bytes of an array in row-major order. ValueError if it differs from its spec."""
    x = np.asarray(array)
    if x.shape != tuple(spec.shape) or x.dtype != spec.dtype:
        raise ValueError(f"{name} is {x.dtype}{x.shape}, announced {spec.dtype}{spec.shape}")
    return memoryview(np.ascontiguousarray(x).reshape(-1).view(np.uint8))


@contextlib.contextmanager
def _replacing(path: str):
    """A handle to write to; the file takes its name at the end, and only if nothing failed."""
    draft = f"{path}.{os.getpid()}.tmp"
    try:
        with open(draft, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(draft)
        raise
