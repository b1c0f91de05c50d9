"""Images in a folder, with classes, captions, segmentation maps or masks in files beside them.

The folder may lie in a bucket (`gs://`, `s3://`), as `etils.epath` reads them.
"""

import hashlib
import json
import os
import posixpath
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from ldm_jax import schema
from ldm_jax.data import metadata
from ldm_jax.runtime import reading

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})


class FolderSource:
    """Every image below a folder, sorted by path; files beside them are listed once, at the start.

    is_output: tells which images, by their paths below the folder, are no records, as what a
    command wrote beside them; those are in `left_out`.
    FileNotFoundError and ValueError name the folder or file and the remedy.
    """

    def __init__(
        self,
        config: schema.FolderConfig,
        split: str,
        is_output: Callable[[str], bool] = lambda name: False,
    ):
        root, files = config.path, find_files(config.path)
        left_out = {name for name in files if is_image(name) and is_output(name)}
        self.left_out, files = sorted(left_out), files - left_out
        images = _images(root, files, config)
        self.folders = sorted({posixpath.basename(posixpath.dirname(f)) for f in images} - {""})
        classes = None
        if config.class_from_folder:  # of all images of `path`: both splits use the same ids
            classes = sorted({_class_name(root, image) for image in images})
        if config.eval_path is None:
            images = _part(images, config, split)
        elif split == "eval":
            root, files = config.eval_path, find_files(config.eval_path)
            files = {name for name in files if not (is_image(name) and is_output(name))}
            images = _images(root, files, config)

        self._root = _path(root)
        self.classes = None if classes is None else tuple(classes)
        self._images = images
        self._labels = None if classes is None else _labels(root, images, classes)
        self._captions = (
            metadata.captions(root, images, files) if config.captions == "metadata" else None
        )
        suffixes = {
            "caption": ".txt" if config.captions == "sidecar" else None,
            "segmentation": _png(config.segmentation_suffix),
            "mask": _png(config.mask_suffix),
        }
        self._beside = {
            name: _beside(root, images, files, name, suffix)
            for name, suffix in suffixes.items()
            if suffix is not None
        }
        self.num_classes = None if classes is None else len(classes)
        given = {"label": self._labels, "caption": self._captions}
        given = {name for name, values in given.items() if values is not None}
        self.features = frozenset({"image"} | given | self._beside.keys())

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record: dict[str, Any] = {"image": reading.read_bytes(self._root / self._images[index])}
        if self._labels is not None:
            record["label"] = self._labels[index]
        if self._captions is not None:
            record["caption"] = self._captions[index]
        for name, paths in self._beside.items():
            path = self._root / paths[index]
            record[name] = (
                reading.read_text(path).strip() if name == "caption" else reading.read_bytes(path)
            )
        return record

    def stamp(self, first: int, last: int) -> str:
        """See `sources.Source`: a hash of file names, sizes, times of change, and texts."""
        digest = hashlib.sha256()
        for i in range(first, last):
            files = [self._images[i], *(paths[i] for paths in self._beside.values())]
            known: list[Any] = [[name, *file_stamp(self._root / name)] for name in files]
            known.append(None if self._labels is None else self._labels[i])
            known.append(None if self._captions is None else self._captions[i])
            digest.update(json.dumps(known).encode())
        return digest.hexdigest()

    def describe(self, index: int) -> str:
        """The path of the image."""
        return str(self._root / self._images[index])


def file_stamp(path: epath.PathLike) -> tuple[int, int]:
    """(bytes, time of the last change), which differ after a file was edited or replaced."""
    if "://" in os.fspath(path):
        status = epath.Path(path).stat()
        return status.length, status.mtime
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def find_files(root: str) -> set[str]:
    """Every file below `root` that is not hidden, as paths relative to it with forward slashes."""
    if "://" in root:
        return _find_in_bucket(root)
    if not os.path.isdir(root):
        raise FileNotFoundError(
            f"data folder {root!r} is not a folder here: give that of the images with"
            " --data.source.path"
        )
    files, seen = set(), set()

    def stop(error: OSError) -> None:
        raise OSError(
            f"cannot read data folder {error.filename}: {error.strerror}; check its permissions"
        ) from error

    for folder, subfolders, names in os.walk(root, onerror=stop, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a symbolic link to a folder above
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        files |= {posixpath.normpath(f"{relative}/{n}") for n in names if not n.startswith(".")}
    return files


def _find_in_bucket(root: str) -> set[str]:
    """As `find_files`; a bucket has no folders, and no links."""
    try:
        bucket, path = fsspec.core.url_to_fs(root)  # epath lists folder by folder
        names = bucket.find(path)
    except (ImportError, ValueError, OSError) as error:  # no library for it; a bad name; no access
        raise OSError(f"cannot read data folder {root}: {error}") from error
    files = {name.removeprefix(path.rstrip("/") + "/") for name in names}
    return {f for f in files if not any(part.startswith(".") for part in f.split("/"))}


def _path(root: str) -> Path | epath.Path:
    """A local path as `Path`: epath's own take longer to read a file."""
    return epath.Path(root) if "://" in root else Path(root)


def _images(root: str, files: set[str], config: schema.FolderConfig) -> list[str]:
    """The images among `files`, sorted, without segmentation maps and masks."""
    maps = tuple(s for s in (_png(config.segmentation_suffix), _png(config.mask_suffix)) if s)
    images = sorted(f for f in files if is_image(f) and not f.endswith(maps))
    if not images:
        raise FileNotFoundError(
            f"no image in {root} (looked for {' '.join(sorted(SUFFIXES))}):"
            " add some, or give another --data.source.path"
        )
    return images


def is_image(name: str) -> bool:
    """True for a file that counts as an image, by its name."""
    return posixpath.splitext(name)[1].lower() in SUFFIXES


def _part(images: list[str], config: schema.FolderConfig, split: str) -> list[str]:
    if config.eval_every == 0:
        return images
    if config.eval_every < 2:
        raise ValueError(
            f"eval_every {config.eval_every} leaves no image to train: use 2 or more, or 0"
        )
    held_out = split == "eval"
    part = [image for i, image in enumerate(images) if (i % config.eval_every == 0) == held_out]
    if not part:
        raise ValueError(
            f"{config.path} has {len(images)} image, which is held out: add images or set eval_path"
        )
    return part


def _class_name(root: str, image: str) -> str:
    folder = posixpath.dirname(image)
    if not folder:
        raise ValueError(
            f"{os.path.join(root, image)} is in no class folder: move it into one, or turn "
            "class_from_folder off"
        )
    return posixpath.basename(folder)


def _labels(root: str, images: list[str], classes: list[str]) -> list[int]:
    ids, names = {name: i for i, name in enumerate(classes)}, metadata.Names(classes)
    labels = []
    for image in images:
        name = names.find(_class_name(root, image))
        if name is None:
            name = _class_name(root, image)
            raise ValueError(f"{os.path.join(root, image)}: no training image has class {name!r}")
        labels.append(ids[name])
    return labels


def _png(suffix: str | None) -> str | None:
    return None if suffix is None else f"{suffix}.png"


def _beside(root: str, images: list[str], files: set[str], name: str, suffix: str) -> list[str]:
    """IMAGE + suffix of each image."""
    names = metadata.Names(files)
    wanted = [posixpath.splitext(image)[0] + suffix for image in images]
    paths = [names.find(path) for path in wanted]
    missing = [path for path, there in zip(wanted, paths) if there is None]
    if missing:
        raise FileNotFoundError(
            f"{os.path.join(root, missing[0])} is missing ({len(missing)} of {len(images)} images"
            f" have no {name}{metadata.listed(missing)}): add it, or turn the {name} off in the"
            " data config"
        )
    return [path for path in paths if path is not None]
