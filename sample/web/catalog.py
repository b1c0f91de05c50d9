"""The models that a server offers, and the folders of files beside them."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from ldm_jax import bundle, loading, schema
from ldm_jax.runtime import storage
from ldm_jax.sample import options
from ldm_jax.sample.web.limits import RefusedError

ADAPTERS = (".safetensors", ".pt", ".ckpt", ".bin")
"""Endings of files of LoRA and of embeddings."""


class Entry(NamedTuple):
    """A model of the server."""

    name: str
    """Of its file or folder, without ending; unique."""
    path: str
    step: int | None
    """Training step of a run, the newest when the server started."""
    digest: str
    """sha256 of a checkpoint file, or of a folder's JSON files and the step, hexadecimal."""
    kind: str
    """text, class, unconditional, inpaint, superres, or the name of another condition."""
    size: int
    """Pixels of a side, as it was trained."""
    channels: int
    spacing: str
    """Of its own sampler."""
    classes: tuple[str, ...] | None
    """Names or ids of its classes; None for another model."""

    @property
    def title(self) -> str:
        """`NAME [first ten digits of the digest]`, as webui shows it."""
        return f"{self.name} [{self.digest[:10]}]"


def entries(paths: Sequence[str]) -> list[Entry]:
    """The models at some paths. ValueError, naming the path, for what is none that samples."""
    found: list[Entry] = []
    for path in paths:
        one = _entry(path)
        while one.name in {other.name for other in found}:
            one = one._replace(name=f"{one.name}_2")
        found.append(one)
    return found


def _entry(path: str) -> Entry:
    where, kind = loading.recognise(path)
    model = loading.load(path, shapes_only=True)
    if model.unet is None:
        raise ValueError(f"{path}: is a first stage alone, which cannot sample: leave it out")
    step = options.newest_step(options.Options(model=path, out=""))
    return Entry(
        name=where.name if where.is_dir() else where.stem,
        path=path,
        step=step,
        digest=_digest(where, kind, step),
        kind=kind_of(model.config.cond),
        size=model.config.size,
        channels=getattr(model.config.first_stage, "in_channels", 3),
        spacing=model.config.sampling.spacing,
        classes=_classes(model),
    )


def _digest(path: epath.Path, kind: str, step: int | None) -> str:
    if kind == "checkpoint":
        return storage.sha256(path)
    told = hashlib.sha256(f"{step}".encode())
    for file in sorted(path.glob("*.json")):
        told.update(file.read_bytes())
    return told.hexdigest()


def kind_of(cond: schema.CondConfig | None) -> str:
    """See `Entry.kind`."""
    beside = cond.concat if isinstance(cond, schema.HybridCondConfig) else cond
    kinds: dict[Any, str] = {
        type(None): "unconditional",
        schema.TextCondConfig: "text",
        schema.ClassCondConfig: "class",
        schema.InpaintCondConfig: "inpaint",
        schema.SuperResCondConfig: "superres",
        schema.UpscaleCondConfig: "superres",
        schema.DepthCondConfig: "depth",
        schema.SemanticCondConfig: "semantic",
        schema.LayoutCondConfig: "layout",
        schema.EmbeddingCondConfig: "embedding",
    }
    return kinds[type(beside)]


def _classes(model: bundle.LatentDiffusion) -> tuple[str, ...] | None:
    cond = model.config.cond
    if not isinstance(cond, schema.ClassCondConfig):
        return None
    return model.classes or tuple(str(i) for i in range(cond.num_classes))


def named(known: Sequence[Entry], text: str) -> Entry:
    """The model of a title, name, digest or its first ten digits. RefusedError if there is none."""
    for entry in known:
        if text in (entry.title, entry.name, entry.digest, entry.digest[:10]):
            return entry
    titles = ", ".join(entry.title for entry in known)
    raise RefusedError(
        422, f"sd_model_checkpoint {text!r:.200}: there is no such model, but {titles}"
    )


class File(NamedTuple):
    """A file of a LoRA or an embedding."""

    name: str
    path: str


def files_in(folder: str | None) -> list[File]:
    """Files of adapters in a folder, by name."""
    if folder is None:
        return []
    found = sorted(epath.Path(folder).iterdir(), key=lambda path: path.name)
    return [File(path.stem, str(path)) for path in found if path.suffix in ADAPTERS]


class Folders(NamedTuple):
    """Folders of the server."""

    out: str | None = None
    loras: str | None = None
    embeddings: str | None = None
    styles: str | None = None
    """A .csv file."""


def embeddings(folders: Folders) -> list[File]:
    """Files of embeddings whose names can be words of a prompt."""
    return [file for file in files_in(folders.embeddings) if re.fullmatch(r"[^<>\s]+", file.name)]
