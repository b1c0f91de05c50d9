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
    """Writes {"state_dict": arrays}; each is fetched by `np.asarray` when its turn comes.

    arrays: name -> anything with `shape`, `dtype` and `__array__`.
    `torch.load` takes the file with `weights_only=True`. It appears whole or not at all; ValueError
    for a dtype that is not listed in `STORAGES`.
    """
    path = os.fspath(path)
    index = _pickle(arrays)
    draft = f"{path}.{os.getpid()}.tmp"
    try:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", index)
            archive.writestr("archive/byteorder", "little")
            for number, x in enumerate(arrays.values()):
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


def _pickle(arrays: Mapping[str, Any]) -> bytes:
    """Protocol 2: a dict of tensors, whose storages are the numbered files."""
    tensors = b"".join(
        _text(name) + _tensor(name, number, x) for number, (name, x) in enumerate(arrays.items())
    )
    state_dict = b"}(" + tensors + b"u"
    return b"\x80\x02}(" + _text("state_dict") + state_dict + b"u."


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
