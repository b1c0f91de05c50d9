"""PyTorch files made by hand: what torch.save lays out, around any pickle."""

import pickle
import struct
import zipfile

import numpy as np

from ldm_jax.convert.formats import torch_file


def save(path, content: bytes, storages: dict[str, bytes] | None = None, **more: bytes):
    """A zip archive as torch.save lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for name, data in {**{f"data/{k}": v for k, v in (storages or {}).items()}, **more}.items():
            archive.writestr(f"archive/{name}", data)
    return path


def legacy(path, content: bytes, keys: list, data: bytes = b""):
    """A file as torch before 1.6 lays it out."""
    begin = b"".join(pickle.dumps(x, 2) for x in (torch_file.LEGACY_MAGIC, 1001, {}))
    path.write_bytes(begin + content + pickle.dumps(keys, 2) + data)
    return path


class Pickle:
    """Opcodes in a row: what a hostile writer has."""

    def __init__(self, protocol: int = 2):
        self.out = bytearray(b"\x80" + bytes([protocol]))

    def add(self, *parts) -> "Pickle":
        for part in parts:
            if isinstance(part, bytes):
                self.out += part
            elif isinstance(part, str):
                text = part.encode()
                self.out += b"X" + struct.pack("<I", len(text)) + text
            else:
                self.out += b"\x8a\x08" + struct.pack("<q", part)
        return self

    def tensor(self, shape, stride, offset=0, numel=4, key="0", kind="FloatStorage") -> "Pickle":
        self.add(b"ctorch._utils\n_rebuild_tensor_v2\n((", "storage", f"ctorch\n{kind}\n".encode())
        self.add(key, "cpu", numel, b"tQ", offset, b"(", *shape, b"t(", *stride, b"t\x89N")
        return self.add(b"tR")

    def done(self) -> bytes:
        return bytes(self.out + b".")


NUMBERS = np.arange(4, dtype=np.float32)


def one_tensor(path, *args, data: bytes = NUMBERS.tobytes(), **kwargs):
    return torch_file.read(save(path, Pickle().tensor(*args, **kwargs).done(), {"0": data}))
