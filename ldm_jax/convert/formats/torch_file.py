"""Read files of `torch.save` without torch: zip archives, and the format before torch 1.6."""

import functools
import io
import math
import os
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.convert.formats import tensors, unpickle, zip_file
from ldm_jax.convert.formats.tensors import DTYPES, File, LazyTensor

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

STORAGES = {
    "BFloat16Storage": "bfloat16",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ShortStorage": "int16",
    "UntypedStorage": "uint8",
}
STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")


class Storage(NamedTuple):
    """Elements in the file, which any number of tensors may view."""

    dtype: np.dtype
    numel: int
    start: int  # first byte in the file
    crc: int | None = None


def read(path: str | os.PathLike) -> Any:
    """The saved object: nested dict, list, tuple and set of plain values and `LazyTensor`.

    Objects of other classes are `unpickle.Opaque`. No code of the file runs, no tensor is read.
    Raises ValueError that names the file if it calls functions, is damaged, or is no such file.
    """
    file = tensors.file(path)
    with tensors.refusals(file.path):
        if file.read(0, min(4, file.size)) == b"PK\3\4":
            return _read_zip(file)
        with io.BufferedReader(file.open()) as handle:
            return _read_legacy(file, unpickle.Pickles(handle, file.size))


# --- zip ------------------------------------------------------------------------------------------


def _read_zip(file: File) -> Any:
    entries = zip_file.entries(file)
    roots = [name.removesuffix("data.pkl") for name in entries if _is_root(name)]
    if any(name.endswith("constants.pkl") for name in entries):
        raise ValueError("a TorchScript archive; save its state_dict with torch.save instead")
    if len(roots) != 1:
        raise ValueError(
            f"a zip archive with {len(roots)} data.pkl, so not one by torch.save;"
            f" unpack it if the checkpoint is in it: it holds {', '.join(sorted(entries)[:3])}"
        )
    root = roots[0]
    if not all(entry.stored for name, entry in entries.items() if name.startswith(root)):
        raise ValueError(
            "a zip archive with compression, which torch.save never uses:"
            " unpack it and pack it again with `zip -0 -r`"
        )
    swapped = False  # little-endian in files of older versions of torch, which do not say it
    if f"{root}byteorder" in entries:
        order = _content(file, entries[f"{root}byteorder"], 16)
        swapped = tensors.is_swapped(order.decode("ascii").strip())

    def storage(identity: tuple) -> Storage:
        dtype, key, numel, _ = _identity(identity)
        entry = entries.get(f"{root}data/{key}")
        if entry is None:
            raise ValueError(f"storage {key!r} is missing from the zip archive")
        if numel * dtype.itemsize > entry.size:
            raise ValueError(f"storage {key!r} has {entry.size} bytes, too few for its {numel}")
        whole = numel * dtype.itemsize == entry.size  # else the CRC covers more than the storage
        return Storage(dtype, numel, entry.start, entry.crc if whole and entry.crc else None)

    pickled = io.BytesIO(_content(file, entries[f"{root}data.pkl"], unpickle.MAX_BYTES))
    return unpickle.load(pickled, _functions(file, swapped), storage)


def _is_root(name: str) -> bool:
    return name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)


def _content(file: File, entry: zip_file.Entry, limit: int) -> bytes:
    if entry.size > limit:
        raise ValueError(f"an entry of {entry.size} bytes where {limit} are the most")
    data = file.read(entry.start, entry.size)
    if entry.crc and zlib.crc32(data) != entry.crc:  # 0: written without CRCs, an option of torch
        raise ValueError("its data.pkl or byteorder is damaged (CRC-32)")
    return data


# --- legacy ---------------------------------------------------------------------------------------


def _read_legacy(file: File, stream: unpickle.Pickles) -> Any:
    """Four pickles, the last of them the object; then storage keys, then each storage's data.

    The positions of storages follow the object, which is therefore unpickled twice. The
    data are little-endian on every machine.
    """
    _check_legacy(stream, file)
    begin = stream.tell()
    sizes: dict[str, tuple[int, int]] = {}  # storage -> elements, bytes of one
    starts: dict[str, int] = {}

    def storage(identity: tuple) -> Any:
        if identity[0] == "module":  # a class with its source code, of a module saved whole
            return identity[1]
        dtype, key, numel, view = _identity(identity)
        file.span(0, numel * dtype.itemsize)
        if sizes.setdefault(key, (numel, dtype.itemsize)) != (numel, dtype.itemsize):
            raise ValueError(f"storage {key!r} has two sizes")
        start = starts.get(key, 0)
        if view is None:
            return Storage(dtype, numel, start)
        _, offset, count = view
        if not 0 <= offset <= offset + count <= numel:
            raise ValueError(f"a view beyond storage {key!r}")
        return Storage(dtype, count, start + offset * dtype.itemsize)

    functions = _functions(file, swapped=False)
    unpickle.load(stream, functions, storage)
    keys = unpickle.load(stream, {}, storage)
    texts = type(keys) is list and all(type(key) is str for key in keys)
    if not texts or sorted(keys) != sorted(sizes):
        raise ValueError("its list of storages does not fit its tensors")
    position = stream.tell()
    for key in keys:
        numel, itemsize = sizes[key]
        (length,) = struct.unpack("<q", file.read(position, 8))
        if length != numel:
            raise ValueError(f"storage {key!r} has {length} elements instead of {numel}")
        starts[key] = position + 8
        position += 8 + file.span(position + 8, numel * itemsize)
    stream.seek(begin)
    return unpickle.load(stream, functions, storage)


def _check_legacy(stream: unpickle.Pickles, file: File) -> None:
    """ValueError unless a file of `torch.save` begins here."""
    if file.size > 262 and file.read(257, 5) == b"ustar":
        raise ValueError(
            "a tar archive of torch before 0.1.10, which is not supported:"
            " load it with torch and save it again"
        )

    def none(identity: tuple) -> Any:  # never hashed: nested tuples may take for ever
        raise ValueError("a persistent id before the object")

    try:
        magic = unpickle.load(stream, {}, none)
    except (ValueError, *tensors.DAMAGE):
        raise ValueError("neither a zip archive nor a legacy file of torch.save") from None
    if magic != LEGACY_MAGIC:
        raise ValueError("a pickle that torch.save did not write; only PyTorch files are read")
    if unpickle.load(stream, {}, none) != LEGACY_PROTOCOL:
        raise ValueError(f"a legacy PyTorch file of another protocol than {LEGACY_PROTOCOL}")
    unpickle.load(stream, {}, none)  # sizes of C types on the machine that wrote it


# --- tensors --------------------------------------------------------------------------------------


def _identity(identity: Any) -> tuple[np.dtype, str, int, Any]:
    """dtype, key, number of elements and view of the storage of a persistent id."""
    kind, storage_type, key, _, numel, *view = identity
    module, _, name = storage_type.name.rpartition(".")
    if kind != "storage" or type(key) is not str or type(numel) is not int:
        raise ValueError("a persistent id that is no storage")
    tensors.sizes((numel,))
    if module not in STORAGE_MODULES or name not in STORAGES:
        raise ValueError(f"storages of type {storage_type.name} are not supported")
    return DTYPES[STORAGES[name]], key, numel, view[0] if view else None


def _functions(file: File, swapped: bool) -> dict[str, Callable[..., Any]]:
    """torch's functions that assemble tensors, by name."""
    build = functools.partial(_tensor, file, swapped)

    def v2(storage, offset, size, stride, requires_grad, hooks, metadata=None):
        if metadata and any(metadata.values()):
            raise ValueError(f"a tensor with {sorted(map(str, metadata))}: not supported")
        return build(storage, offset, size, stride)

    def v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
        name = dtype.name.removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"tensors of dtype {dtype.name} are not supported")
        tensor = v2(_retyped(storage, DTYPES[name]), offset, size, stride, False, hooks, metadata)
        return tensor

    def parameter(data, *ignored):
        if type(data) is not LazyTensor:
            raise ValueError("a parameter that is no tensor")
        return data

    def subclass(function, kind, args, state):
        if function.name not in known or known[function.name] is subclass:
            raise ValueError(f"a tensor made by {function.name} is not supported")
        return known[function.name](*args)

    def size(values=()):
        return tensors.sizes(values)

    known = {
        "torch._utils._rebuild_tensor": build,
        "torch._utils._rebuild_tensor_v2": v2,
        "torch._utils._rebuild_tensor_v3": v3,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": parameter,
        "torch._tensor._rebuild_from_type_v2": subclass,
        "torch.Size": size,
    }
    return known


def _retyped(storage: Storage, dtype: np.dtype) -> Storage:
    numel = storage.numel * storage.dtype.itemsize // dtype.itemsize
    return storage._replace(dtype=dtype, numel=numel)


def _tensor(file: File, swapped: bool, storage: Any, offset: Any, size: Any, stride: Any):
    """LazyTensor of a view of a storage. ValueError where the view exceeds it."""
    if type(storage) is not Storage or type(offset) is not int or offset < 0:
        raise ValueError("a tensor without a storage or with a negative offset")
    dtype = storage.dtype
    shape = tensors.checked_shape(size, dtype)
    stride = tensors.sizes(stride)
    if len(stride) != len(shape):
        raise ValueError(f"a tensor of {len(shape)} axes and {len(stride)} strides")
    # the stride of an axis of one element is arbitrary
    stride = tuple(step if n > 1 else 0 for n, step in zip(shape, stride))
    swapped = swapped and dtype.itemsize > 1
    numel = math.prod(shape)
    if numel == 0:
        return tensors.contiguous(file, dtype, shape, storage.start)
    steps = sum((n - 1) * step for n, step in zip(shape, stride)) + 1
    if offset + steps > storage.numel or numel > storage.numel:
        raise ValueError(
            f"a tensor of shape {shape} and strides {stride} from {offset} on does not fit into"
            f" its storage of {storage.numel}; save expanded tensors with .contiguous()"
        )
    start = storage.start + offset * dtype.itemsize
    if _is_contiguous(shape, stride):
        crc = storage.crc if numel == storage.numel else None
        return tensors.contiguous(file, dtype, shape, start, swapped=swapped, crc=crc)
    span = (start, file.span(start, steps * dtype.itemsize))
    return LazyTensor(file, dtype, shape, (span,), strides=stride, swapped=swapped)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    step = 1
    for n, actual in zip(reversed(shape), reversed(stride)):
        if n != 1 and actual != step:
            return False
        step *= n
    return True
