"""A checkpoint file of any format as one flat state dict."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm_jax.convert.formats import flax_msgpack, safetensors_file, shards, tensors, torch_file
from ldm_jax.convert.formats.tensors import LazyTensor

MAX_NESTING = 8  # of wrappers around a state dict; Lightning has one
MAX_PATH = 4096  # characters of the names of a tree, joined

# Files often given instead of a checkpoint: first bytes, and a message.
MISTAKES = (
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with `git lfs pull`"),
    (b"<!doctype", "a web page: the download went wrong"),
    (b"<html", "a web page: the download went wrong"),
    (b"\x1f\x8b", "packed by gzip: unpack it first"),
    (b"\x89hdf", "an HDF5 file, which is not supported"),
)


class Info(NamedTuple):
    """Format, metadata and other content of a file.

    format: "torch", "safetensors" or "msgpack".
    metadata: of safetensors, or the texts beside the state dict of a PyTorch file.
    left: paths of values that are no tensors of the state dict (optimizer, counters, ...).
    """

    format: str
    metadata: dict[str, str]
    left: tuple[str, ...]


def open_state_dict(path: str | os.PathLike) -> tuple[dict[str, LazyTensor], Info]:
    """Name -> tensor of a file, whose format is recognised by its content.

    Reads PyTorch's zip and legacy files (the innermost `state_dict` of Lightning and other
    wrappers), safetensors, the index of sharded files of these (`*.index.json`), and Flax msgpack
    (names joined with "/"). No tensor is read and no code of the file runs.
    Raises ValueError that names the file if it is damaged, of another format, or has no state dict.
    """
    file = tensors.file(path)
    name = os.path.basename(file.path)
    if _is_index(name):
        return _open_sharded(file.path)
    with tensors.refusals(file.path):
        kind = _format(file)
    if kind == "safetensors":
        state_dict = safetensors_file.read(path)
        return state_dict, Info(kind, safetensors_file.metadata(path), ())
    if kind == "msgpack":
        with tensors.refusals(file.path):
            state_dict, left = _flat(flax_msgpack.read(path))
        return state_dict, Info(kind, {}, left)
    content = torch_file.read(path)
    with tensors.refusals(file.path):
        state_dict, left, texts = _innermost(content)
    return state_dict, Info(kind, texts, left)


def format_of(path: str | os.PathLike) -> str:
    """ "torch", "safetensors" or "msgpack", by the file's content.

    ValueError names the file if it is none of these.
    """
    file = tensors.file(path)
    with tensors.refusals(file.path):
        return _format(file)


def _is_index(name: str) -> bool:
    """True for an index of shards, also NAME.safetensors.index.fp16.json."""
    return ".index." in name and name.endswith(".json")


def _open_sharded(path: str) -> tuple[dict[str, LazyTensor], Info]:
    infos: list[Info] = []

    def read_file(shard) -> dict[str, LazyTensor]:
        if _is_index(shard.name):
            raise ValueError(f"{path}: names {shard.name}, an index, not a file of tensors")
        state_dict, info = open_state_dict(shard)
        infos.append(info)
        return state_dict

    state_dict = shards.read(path, read_file)
    kinds = {info.format for info in infos}
    if len(kinds) != 1:
        raise ValueError(f"{path} names files of the formats {sorted(kinds)}, not of one")
    metadata = {key: value for info in infos for key, value in info.metadata.items()}
    return state_dict, Info(*kinds, metadata, tuple(name for info in infos for name in info.left))


def _format(file: tensors.File) -> str:
    head = file.read(0, min(64, file.size))
    if not head:
        raise ValueError("the file is empty")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < file.size:
        return "safetensors"
    if head[:1] == b"\x80" or head[:2] == b"PK" or _is_tar(file):
        return "torch"
    if 0x81 <= head[0] <= 0x8F or head[0] in flax_msgpack.MAPS:
        return "msgpack"
    for beginning, what in MISTAKES:
        if head.lstrip().lower().startswith(beginning):
            raise ValueError(f"not a checkpoint but {what}")
    if file.path.endswith(".safetensors"):
        return "safetensors"  # its reader then reports the fault
    raise ValueError("neither a PyTorch file, nor safetensors, nor Flax msgpack")


def _is_tar(file: tensors.File) -> bool:
    return file.size > 262 and file.read(257, 5) == b"ustar"


def _innermost(
    content: Any, where: str = ""
) -> tuple[dict[str, LazyTensor], tuple[str, ...], dict[str, str]]:
    """The state dict within wrappers, the paths of other values, and those that are texts."""
    left: list[str] = []
    texts: dict[str, str] = {}
    for _ in range(MAX_NESTING):
        if type(content) is not dict:
            break
        inner = content.get("state_dict")
        if type(inner) is not dict:
            inner = _only_dict(content)
        if inner is None:
            tensors = {k: v for k, v in content.items() if _is_tensor(k, v)}
            left += [f"{where}{_short(k)}" for k in content if k not in tensors]
            if tensors:
                return tensors, tuple(left), texts
            break
        name = next(key for key, value in content.items() if value is inner)
        left += [f"{where}{_short(k)}" for k in content if k is not name]
        texts |= {k: v for k, v in content.items() if type(k) is type(v) is str}
        content, where = inner, f"{where}{_short(name)}."
    kind = type(content).__name__ if type(content) is not dict else f"dict of {_some(content)}"
    kind = getattr(content, "name", kind)
    raise ValueError(
        f"no state dict (names with their tensors) is in it, but a {kind};"
        " save the module's state_dict() instead"
    )


def _only_dict(content: dict) -> dict | None:
    """The one dict of tensors of a wrapper that has no tensors itself, as {"model": ...}."""
    if any(type(value) is LazyTensor for value in content.values()):
        return None
    # each dict once: a file may refer to a large one a million times
    values = {id(value): value for value in content.values() if type(value) is dict}
    inner = [x for x in values.values() if any(_is_tensor(k, v) for k, v in x.items())]
    return inner[0] if len(inner) == 1 else None


def _is_tensor(name: Any, value: Any) -> bool:
    return type(name) is str and type(value) is LazyTensor


def _flat(tree: Any) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """A tree of msgpack, whose depth its reader bounds."""
    if not isinstance(tree, Mapping):
        raise ValueError("a tree of Flax that is no dict")
    tensors: dict[str, LazyTensor] = {}
    left: list[str] = []

    def walk(branch: Mapping, where: str) -> None:
        for key, value in branch.items():
            name = f"{where}{key}"
            if len(name) > MAX_PATH:  # else it would be a prefix of a million names
                raise ValueError(f"a name of more than {MAX_PATH} characters: {name[:200]!r}")
            if isinstance(value, Mapping):
                walk(value, f"{name}/")
            elif name in tensors:
                raise ValueError(f"{name[:200]!r} stands there twice")
            elif type(value) is LazyTensor:
                tensors[name] = value
            else:
                left.append(name)

    walk(tree, "")
    return tensors, tuple(left)


def _short(key: Any) -> str:
    return key[:100] if type(key) is str else f"<{type(key).__name__}>"


def _some(content: dict) -> str:
    return ", ".join(_short(key) for key in list(content)[:5]) or "nothing"
