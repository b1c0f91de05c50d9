"""Tensors in several files, listed by an index: `*.safetensors.index.json`, `*.bin.index.json`."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from ldm_jax.convert.formats import tensors
from ldm_jax.convert.formats.tensors import LazyTensor

MAX_INDEX = 16 * 2**20  # bytes


def read(
    index_path: str | os.PathLike, read_file: Callable[[Path], dict[str, LazyTensor]]
) -> dict[str, LazyTensor]:
    """All tensors of the files that the index names, each read by `read_file`.

    Raises ValueError for files outside of the index's folder, and where index and files disagree
    on which tensor lies where; FileNotFoundError for a file that is missing.
    """
    index = tensors.file(index_path)
    with tensors.refusals(index.path):
        if index.size > MAX_INDEX:
            raise ValueError(f"an index of {index.size} bytes; {MAX_INDEX} are the most")
        content = json.loads(index.read(0, index.size).decode("utf-8"), object_pairs_hook=unique)
        places = content["weight_map"] if isinstance(content, dict) else None
        if type(places) is not dict or any(type(name) is not str for name in places.values()):
            raise ValueError("its weight_map is not a file for each tensor")
        files = {name: _inside(Path(index.path).parent, name) for name in set(places.values())}
    by_name: dict[str, LazyTensor] = {}
    listed: dict[str, set[str]] = {name: set() for name in files}
    for tensor, name in places.items():
        listed[name].add(tensor)
    for name, path in sorted(files.items()):
        part = read_file(path)
        _same(path, listed[name], set(part), index.path)
        by_name |= part
    return {name: by_name[name] for name in places}


def _inside(folder: Path, name: str) -> Path:
    """`folder / name`. ValueError if that name leads out of the folder.

    A link in the folder is followed wherever it leads: into the blobs of a Hugging Face cache, or
    onto another disk.
    """
    if name in ("", ".", "..") or any(c in name for c in "/\\\0:"):
        raise ValueError(f"it names the file {name[:200]!r}, which is not one of its folder")
    path = folder / name
    if not path.exists():
        link = f" (a link to {os.readlink(path)})" if path.is_symlink() else ""
        raise FileNotFoundError(f"{path}{link} is missing: the index beside it names it")
    return path


def _same(path: Path, listed: set[str], present: set[str], index: str) -> None:
    """ValueError unless the file holds the tensors of the index; so no tensor is in two files."""
    for what, names in (("lacks", listed - present), ("also holds", present - listed)):
        if names:
            some = ", ".join(name[:200] for name in sorted(names)[:5])
            raise ValueError(f"{path} {what} {some} ({len(names)} in all), other than {index} says")


def unique(pairs: list) -> dict:
    """A JSON object; ValueError if it has a name twice."""
    entries: dict = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f"{name[:200]!r} stands there twice")
        entries[name] = value
    return entries
