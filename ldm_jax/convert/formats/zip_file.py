"""Positions of the entries of a zip archive in its file.

Python's zipfile builds an object per entry before any limit holds, and reads through handles; the
tensors here are read by their position in the file.
"""

import struct
from typing import NamedTuple

from ldm_jax.convert.formats.tensors import File

MAX_ENTRIES = 200_000  # a checkpoint has one entry a tensor, some thousands
MAX_DIRECTORY = 64 * 2**20  # bytes

END = struct.Struct("<4s4H2IH")
END64_LOCATOR = struct.Struct("<4sIQI")
END64 = struct.Struct("<4sQ2H2I4Q")
ENTRY = struct.Struct("<4s6H3I5H2I")
LOCAL = struct.Struct("<4s5H3I2H")
UNKNOWN16, UNKNOWN32 = 0xFFFF, 0xFFFFFFFF  # the value is in the zip64 fields


class Entry(NamedTuple):
    start: int  # of its data
    size: int  # in the file
    crc: int  # of the unpacked data
    stored: bool  # without compression


def entries(file: File) -> dict[str, Entry]:
    """Name -> entry. ValueError unless it is a plain archive in one file."""
    count, size, start = _directory(file)
    if count > MAX_ENTRIES or size > MAX_DIRECTORY:
        raise ValueError(f"a zip archive of {count} entries; {MAX_ENTRIES} are the most")
    by_name = {}
    with file.open() as handle:
        directory, position = file.read(start, size), 0
        for _ in range(count):
            name, entry, position = _entry(file, handle, directory, position)
            if name in by_name:
                raise ValueError(f"a duplicate entry {name!r} in the zip archive")
            by_name[name] = entry
    if position != size:
        raise ValueError("the zip archive's directory has another size than it says")
    return by_name


def _directory(file: File) -> tuple[int, int, int]:
    """Number of entries, bytes and first byte of the central directory."""
    tail_start = max(0, file.size - END.size - UNKNOWN16)
    tail = file.read(tail_start, file.size - tail_start)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + END.size > len(tail):
        raise ValueError("a zip archive without its end: the file is truncated")
    _, disk, first_disk, here, count, size, start, _ = END.unpack_from(tail, at)
    end = tail_start + at
    if UNKNOWN16 in (here, count) or UNKNOWN32 in (size, start):
        locator = END64_LOCATOR.unpack(file.read(end - END64_LOCATOR.size, END64_LOCATOR.size))
        if locator[0] != b"PK\6\7":
            raise ValueError("a zip64 archive without its locator")
        end = locator[2]
        signature, *_, disk, first_disk, here, count, size, start = END64.unpack(
            file.read(end, END64.size)
        )
        if signature != b"PK\6\6":
            raise ValueError("a zip64 archive without its end")
    if disk or first_disk or here != count:
        raise ValueError("a zip archive in several files")
    if start + size > end:
        raise ValueError("a zip archive whose directory lies outside of the file: truncated?")
    return count, size, start


def _entry(file: File, handle, directory: bytes, position: int) -> tuple[str, Entry, int]:
    """Name and place of the entry at `position` of the directory, and the next position."""
    if position + ENTRY.size > len(directory):
        raise ValueError("a zip archive with fewer entries than it says")
    fields = ENTRY.unpack_from(directory, position)
    signature, _, _, flags, method, _, _, crc, packed, size, *lengths = fields[:13]
    start = fields[-1]
    position += ENTRY.size
    raw_name = directory[position : position + lengths[0]]
    name = raw_name.decode("utf-8", "surrogateescape")
    extra = directory[position + lengths[0] : position + lengths[0] + lengths[1]]
    if signature != b"PK\1\2":
        raise ValueError("a damaged directory of a zip archive")
    if flags & 1:
        raise ValueError(f"entry {name!r} of the zip archive is encrypted")
    size, packed, start = _zip64(extra, size, packed, start)
    if method == 0 and size != packed:
        raise ValueError(f"entry {name!r} of the zip archive lies about its size")
    file.span(start, LOCAL.size)
    handle.seek(start)
    local = LOCAL.unpack(handle.read(LOCAL.size))
    if local[0] != b"PK\3\4" or local[3] != method or local[-2] != len(raw_name):
        raise ValueError(f"entry {name!r} of the zip archive is not where the directory says")
    if handle.read(len(raw_name)) != raw_name:
        raise ValueError(f"entry {name!r} of the zip archive is not where the directory says")
    start += LOCAL.size + local[-2] + local[-1]
    file.span(start, packed)
    return name, Entry(start, packed, crc, method == 0), position + sum(lengths[:3])


def _zip64(extra: bytes, *values: int) -> list[int]:
    """The values (size, packed size, start); those marked unknown are in the extra field."""
    large = []
    at = 0  # an offset, as copying the rest would be quadratic: there may be 16 000 empty fields
    while len(extra) - at >= 4:
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + length // 8 * 8]
            large = [n for (n,) in struct.iter_unpack("<Q", field)][:4]
        at += 4 + length
    if sum(value == UNKNOWN32 for value in values) > len(large):
        raise ValueError("a zip64 entry without its sizes")
    return [large.pop(0) if value == UNKNOWN32 else value for value in values]
