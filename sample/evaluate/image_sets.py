"""Sets of images that `ldm-eval` compares: a training pipeline's, a folder's, an archive's."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from etils import epath

from ldm_jax import data, schema
from ldm_jax.data import packed
from ldm_jax.data.folder import FolderSource, file_stamp
from ldm_jax.metrics import features
from ldm_jax.runtime import checkpoint, reading, rundir
from ldm_jax.runtime.log import LOG
from ldm_jax.sample import inputs
from ldm_jax.schema import serialize

PIECE = 64
"""Number of images read from an archive at a time."""
OUTPUTS = ("grid.png", "reconstructions.png")
"""Files that ldm-sample and ldm-eval write beside images; see `folder_source`."""


class ImageSet(NamedTuple):
    """Images of one size, in one order.

    batches(size, first, sharding): (batch, count) from batch number `first` on; batch is a dict of
    global arrays [size, ...], "image" among them: uint8, or float32 in [-1, 1]; the last batch is
    filled up, and only the first `count` count.
    about: identity of the images and their preparation; JSON values.
    caption(i): of image number i, or None.
    """

    count: int
    shape: tuple[int, int, int]
    batches: Callable[[int, int, Any], Iterator[tuple[dict[str, jax.Array], int]]]
    about: dict[str, Any]
    caption: Callable[[int], str] | None = None


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Crop and resize of a folder's images; None: as in the training run of the model."""

    size: int | None = None
    crop: Literal["center", "none"] | None = None
    resize: Literal["area", "bicubic"] | None = None


def config_of(path: str) -> schema.DataConfig | None:
    """The data of the run at a path; None if no run is there."""
    folder = checkpoint.absolute(path)
    return rundir.read_config(folder).data if rundir.is_run(folder) else None


def opened(
    path: str,
    split: Literal["train", "eval"],
    base: schema.DataConfig | None,
    how: Preparation,
    *,
    limit: int | None = None,
    tokenizer: Any = None,
    num_ids: int | None = None,
    captions: Literal["none", "sidecar", "metadata"] = "none",
    repeat: bool = False,
    flag: str,
) -> ImageSet:
    """Images at a path: of a run, its data; of a folder, prepared by `base` and `how`; of an .npz,
    as they are. Without a path, the data `base`.

    split: of a run's data; a folder is taken whole. limit: the first so many, of which there must
    be as many; with `repeat`, as for what samples are conditioned on, they begin anew instead, and
    the next record replaces one that cannot be read.
    tokenizer: makes tokens of captions; captions: where a folder has them. num_ids: classes that
    segmentation maps may hold.
    ValueError names `flag` and the kind of path found.
    """
    if path and path.endswith(".npz"):
        return images_from_npz(path, limit)
    config, source = config_of(path) if path else base, None
    if config is None and path:
        folder = checkpoint.absolute(path)
        if not folder.is_dir():
            raise ValueError(f"{flag} {path}: is no run, folder of images or .npz")
        kept = schema.FolderConfig(str(folder), eval_path=str(folder), captions=captions)
        base = base or schema.DataConfig(size=_size(how, path, flag))
        config = dataclasses.replace(base, source=kept)
        source = None if packed.is_packed(str(folder)) else folder_source(kept, split)
    elif config is None or config.source == schema.SyntheticConfig():  # as of a converted model
        raise ValueError(
            f"give {flag}, a run, a folder of images or an .npz: {path or 'the model'} does not say"
            " what it was trained on"
        )
    given = {name: x for name, x in dataclasses.asdict(how).items() if x is not None}
    config = dataclasses.replace(config, **given)
    return images_from_data(config, split, limit, tokenizer, num_ids, source=source, repeat=repeat)


def _size(how: Preparation, path: str, flag: str) -> int:
    if how.size is None:
        raise ValueError(f"{flag} {path}: give --size, the pixels that its images are resized to")
    return how.size


def images_from_data(
    config: schema.DataConfig,
    split: Literal["train", "eval"],
    limit: int | None = None,
    tokenizer: Any = None,
    num_ids: int | None = None,
    *,
    source: Any = None,
    repeat: bool = False,
) -> ImageSet:
    """Records of a split in their order, cut at the centre, resized as in training, not mirrored.

    A FID against images resized in another way measures the filters too. source: default: that of
    the config. limit, repeat: as of `opened`. RuntimeError names a record that cannot be read, when
    its turn comes.
    """
    # a stream is endless, and replaces what cannot be read: here neither is wanted
    strict = config if repeat else dataclasses.replace(config, max_bad_records=0)
    # train=False: in order and without augmentation, also for the training split
    stream = lambda size: data.Stream(  # noqa: E731
        source, strict, size, 0, False, tokenizer, num_ids
    )
    source = data.open_source(config, split) if source is None else source
    if tokenizer is not None and "caption" not in source.features:
        raise ValueError(
            "the model is asked with texts, but the data have no captions: give --captions, or"
            " --data with a run whose data have some"
        )
    facts = left_out(source)
    if repeat:
        count = len(source) if limit is None else limit
    else:
        where = getattr(config.source, "path", "") or getattr(config.source, "name", "the data")
        count = limited(len(source), limit, where)
    stamp = data.stamp(source, 0, min(count, len(source)))  # features of other files are not kept
    facts |= {"stamp": stamp} if stamp else {}
    if not repeat:
        source = First(source, count)
    shape = (config.size, config.size, config.channels)

    def batches(size: int, first: int, sharding: Any) -> Iterator:
        with data.prefetch(stream(size), first, sharding) as ahead:
            for step, batch in itertools.islice(ahead, -(-count // size) - first):
                yield batch, min(size, count - step * size)

    about = {"data": serialize.to_dict(config), "split": split, "images": count}
    about |= facts
    caption = stream(1).caption if "caption" in source.features else None
    return ImageSet(count, shape, batches, about, caption)


class First:
    """The first records of a source, as a source: what fills a batch up comes from them too."""

    def __init__(self, source: data.Source, count: int):
        self._source, self._count = source, count
        self.features, self.num_classes = source.features, source.num_classes

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[index]

    def describe(self, index: int) -> str:
        """Path or name of a record."""
        return self._source.describe(index)


def images_from_folder(path: str, limit: int | None = None) -> ImageSet:
    """Image files below a folder as they are, all of one size; see `folder_source`."""
    folder = checkpoint.absolute(path)
    source = folder_source(schema.FolderConfig(str(folder), eval_path=str(folder)), "eval")
    count = limited(len(source), limit, path)
    first = _pixels(source, 0)

    def read(indices: range) -> np.ndarray:
        pictures = [_pixels(source, i) for i in indices]
        for i, image in zip(indices, pictures):
            if image.shape != first.shape:
                raise ValueError(
                    f"{source.describe(i)}: is {_size_of(image.shape)}, but {source.describe(0)} is"
                    f" {_size_of(first.shape)}: a set has images of one size"
                )
        return np.stack(pictures)

    about = {"folder": str(folder), "images": count, **left_out(source)}
    about["stamp"] = source.stamp(0, count)
    return _images_from_reader(count, first.shape, read, about)


def _pixels(source: FolderSource, index: int) -> np.ndarray:
    return np.asarray(inputs.open_image(source.describe(index), 3))


def folder_source(config: schema.FolderConfig, split: str) -> FolderSource:
    """The images of a folder that is given to be measured: this one rule for every option.

    Those of `folder.SUFFIXES` at any depth, but not what ldm-sample and ldm-eval write beside
    their images: `OUTPUTS`, and what lies in a folder `previews`. ValueError if none is left.
    """
    try:
        source = FolderSource(config, split, is_output)
    except FileNotFoundError as error:
        raise ValueError(f"{config.path}: holds no images: {error}") from error
    if source.left_out:
        LOG.info(
            f"{config.path}: {len(source.left_out)} images are left out, as ldm-sample and ldm-eval"
            f" write them beside others: {', '.join(source.left_out[:3])}"
            + ", ..."
            * (len(source.left_out) > 3)
        )
    return source


def is_output(name: str) -> bool:
    """Tell whether a path below a folder is that of a grid or a preview."""
    *folders, last = name.split("/")
    return last in OUTPUTS or "previews" in folders


def left_out(source: Any) -> dict[str, int]:
    """{"left_out": number} of the images that `folder_source` left out; {} where there are none."""
    count = len(getattr(source, "left_out", ()))
    return {"left_out": count} if count else {}


def limited(count: int, limit: int | None, path: str) -> int:
    """Number of images taken from a finite set: the first `limit`, or all.

    ValueError if there are fewer: an image that is counted twice makes every figure wrong.
    """
    if limit is None:
        return count
    if not 1 <= limit <= count:
        raise ValueError(f"{path}: holds {count} images, and the first {limit} are asked for")
    return limit


def images_from_npz(path: str, limit: int | None = None) -> ImageSet:
    """`arr_0` of an .npz as ldm-sample and the ADM suite write it: uint8 [N, H, W, 3 or 1].

    Read from the file piece by piece. ValueError for other shapes and ranges of values.
    """
    file = checkpoint.absolute(path)
    shape, dtype = _npy_header(file)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not shape[0]:
        raise ValueError(
            f"{path}: arr_0 is {dtype} {shape}; images are uint8 [N, H, W, 3], 0 to 255"
        )
    count = limited(shape[0], limit, path)
    pieces = (range(i, min(i + PIECE, shape[0])) for i in range(0, shape[0], PIECE))
    if all(_npy_slice(file, shape, rows).max() <= 1 for rows in pieces):  # mostly the first tells
        raise ValueError(
            f"{path}: its {shape[0]} images hold nothing above 1, on a scale of 0 to 255: they were"
            " saved in 0..1; multiply them by 255"
        )

    def read(indices: range) -> np.ndarray:
        return _npy_slice(file, shape, indices)

    about = {"npz": str(file), "images": count, "stamp": file_stamp(file)}
    return _images_from_reader(count, shape[1:], read, about)


def images_from_array(images: np.ndarray, about: dict[str, Any]) -> ImageSet:
    """A set of the images uint8 [N, H, W, c] in memory."""
    read = lambda indices: images[indices.start : indices.stop]  # noqa: E731
    return _images_from_reader(len(images), images.shape[1:], read, about)


def _images_from_reader(count: int, shape: tuple, read: Callable, about: dict) -> ImageSet:
    def batches(size: int, first: int, sharding: Any) -> Iterator:
        for start in range(first * size, count, size):
            images, real = features.padded(read(range(start, min(start + size, count))), size)
            yield {"image": features.place(images, sharding)}, real

    return ImageSet(count, tuple(shape), batches, about)


def _npy_header(path: epath.Path) -> tuple[tuple[int, ...], np.dtype]:
    with reading.refusals(path, "give an .npz of images"), reading.npz(path) as archive:
        names = reading.array_names(archive)
        if "arr_0" not in names:
            raise ValueError(f"holds no arr_0 but {', '.join(names)[:200] or 'nothing'}")
        with reading.npz_entry(archive, "arr_0") as (entry, size):
            shape, by_columns, dtype = reading.npy_header(entry, size)
    if by_columns:
        raise ValueError(
            f"{path}: arr_0 is stored column by column; save it with np.ascontiguousarray"
        )
    return shape, dtype


def _npy_slice(path: epath.Path, shape: tuple[int, ...], indices: range) -> np.ndarray:
    each = int(np.prod(shape[1:]))
    with (
        reading.refusals(path, "give an .npz of images"),
        reading.npz(path) as archive,
        reading.npz_entry(archive, "arr_0") as (entry, size),
    ):
        reading.npy_header(entry, size)
        entry.seek(entry.tell() + indices.start * each)
        raw = entry.read(len(indices) * each)
    return np.frombuffer(raw, np.uint8).reshape(len(indices), *shape[1:])


def check_sizes(a: tuple[int, ...], b: tuple[int, ...], names: tuple[str, str]) -> None:
    """ValueError if two sets have images of different sizes."""
    if tuple(a[:2]) != tuple(b[:2]):
        raise ValueError(
            f"{names[0]} are {_size_of(a)} and {names[1]} are {_size_of(b)}: a network that resizes"
            " both would measure that too; give both at one size (--size resizes a folder's)"
        )


def _size_of(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]}"
