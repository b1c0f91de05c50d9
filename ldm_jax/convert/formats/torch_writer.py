"""Write the zip format of `torch.save`, for programs that read only `.ckpt` files."""

import contextlib
import math
import os
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(dtype): name
    for dtype, name in (
        (np.float32, "FloatStorage"),
        (np.float16, "HalfStorage"),
        (ml_dtypes.bfloat16, "BFloat16Storage"),
        (np.float64, "DoubleStorage"),
        (np.int64, "LongStorage"),
        (np.int32, "IntStorage"),
    )
}


def write(path: str | os.PathLike, arrays: Mapping[str, Any]) -> None:
    """Writes {"state_dict": arrays}, as `write_object` does."""
    write_object(path, {"state_dict": arrays})


def write_object(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays, texts, whole numbers and None.

    Arrays are anything with `shape`, `dtype` and `__array__`, by which each is fetched when its
    turn comes. `torch.load` takes the file with `weights_only=True`. It appears whole or not at
    all; ValueError for a dtype that is not listed in `STORAGES`.
    """
    path = os.fspath(path)
    arrays: list[Any] = []
    index = b"\x80\x02" + _value("", content, arrays) + b"."
    draft = f"{path}.{os.getpid()}.tmp"
    try:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", index)
            archive.writestr("archive/byteorder", "little")
            for number, x in enumerate(arrays):
                big = math.prod(x.shape) * np.dtype(x.dtype).itemsize >= 2**31
                with archive.open(f"archive/data/{number}", "w", force_zip64=big) as entry:
                    array = np.asarray(x)
                    little = array.dtype.newbyteorder("<")
                    flat = np.ascontiguousarray(array, little).reshape(-1)
                    entry.write(memoryview(flat.view(np.uint8)))
            archive.writestr("archive/version", "3\n")
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(draft)
        raise


# --- the pickle, opcode by opcode: its globals name classes of torch, which is not here -----------


def _value(name: str, value: Any, arrays: list[Any]) -> bytes:
    """Protocol 2; the storages of tensors are the numbered files, and join `arrays`."""
    if isinstance(value, Mapping):
        items = (_text(key) + _value(key, inner, arrays) for key, inner in value.items())
        return b"}(" + b"".join(items) + b"u"
    if isinstance(value, str):
        return _text(value)
    if value is None:
        return b"N"
    if isinstance(value, int):
        return _int(value)
    arrays.append(value)
    return _tensor(name, len(arrays) - 1, value)


def _tensor(name: str, number: int, x: Any) -> bytes:
    dtype, shape = np.dtype(x.dtype), tuple(map(int, x.shape))
    if dtype not in STORAGES:
        raise ValueError(f"{name}: dtype {dtype} is not one of {', '.join(map(str, STORAGES))}")
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    place = _text("storage") + _global("torch", STORAGES[dtype])
    place += _text(str(number)) + _text("cpu") + _int(math.prod(shape))
    arguments = (
        *(_tuple(place), b"Q"),  # the storage, by its persistent id
        _int(0),
        _tuple(b"".join(map(_int, shape))),
        _tuple(b"".join(map(_int, strides))),
        b"\x89",  # requires no gradient
        *(_global("collections", "OrderedDict"), b")R"),  # hooks
    )
    return _global("torch._utils", "_rebuild_tensor_v2") + _tuple(b"".join(arguments)) + b"R"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _tuple(items: bytes) -> bytes:
    return b"(" + items + b"t"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data
