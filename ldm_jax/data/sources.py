"""Sources of records: `open_source` turns a config into indexed records.

A record is a dict of
  image         encoded bytes, or uint8 [h, w, 3 or 1]
  label         int, the class id                                       (optional, as all below)
  caption       str, or a list of several, of which each example draws one
  segmentation  encoded bytes or integers [h, w]: the class of each pixel
  mask          encoded bytes (see `transforms.decode_mask`) or 0/1 [h, w] (1 = masked)
or of a latent cache, see `cache.CacheSource`.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np

from ldm_jax import schema
from ldm_jax.data import packed, transforms
from ldm_jax.data.emoji import EmojiSource
from ldm_jax.data.folder import FolderSource
from ldm_jax.data.photos import PhotosSource
from ldm_jax.data.synthetic import SyntheticSource


class Source(Protocol):
    """Records by index. Picklable (for worker processes): it holds paths, not files or pixels."""

    features: frozenset[str]
    """Keys of every record."""
    num_classes: int | None
    """Labels are below this; None without labels."""
    classes: tuple[str, ...] | None
    """Names of the classes by label; None if the data have none."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def describe(self, index: int) -> str:
        """Path or name of a record, for messages."""

    # Optional: `stamp(first, last) -> str`, which changes when records first..last - 1 change; it
    # does not read them.


def stamp(source: Source, first: int, last: int) -> str:
    """The source's `stamp`; "" for a source whose records never change under one name."""
    own = getattr(source, "stamp", None)
    return "" if own is None else own(first, last)


class Captioned:
    """A source whose records all have the same captions, one of which is drawn for an example."""

    def __init__(self, source: Source, captions: Sequence[str]) -> None:
        self._source, self._captions = source, list(captions)
        self.features = source.features | {"caption"}
        self.num_classes, self.classes = source.num_classes, source.classes
        self.latent_shape = getattr(source, "latent_shape", None)  # of a latent cache

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._source[index], "caption": self._captions}

    def describe(self, index: int) -> str:
        """Path or name of a record, for messages."""
        return self._source.describe(index)

    def stamp(self, first: int, last: int) -> str:
        """See `Source`."""
        return stamp(self._source, first, last)


def open_source(config: schema.DataConfig, split: Literal["train", "eval"]) -> Source:
    """Records that train, or that are held out.

    ValueError and OSError name the folder, file or dataset that is wrong, and the remedy.
    """
    match config.source:
        case schema.TFDSConfig() as source:
            from ldm_jax.data.tfds import TFDSSource  # here: TFDS takes half a second to import

            return TFDSSource(source, source.split if split == "train" else source.eval_split)
        case schema.FolderConfig() as source:
            known = packed.is_packed(source.path)
            return packed.PackedSource(source, split) if known else FolderSource(source, split)
        case schema.SyntheticConfig() as source:
            return SyntheticSource(source, split)
        case schema.PhotosConfig() as source:
            return PhotosSource(source, split)
        case schema.EmojiConfig() as source:
            return EmojiSource(source, split)


def arrays(source: Source, channels: Literal[1, 3] = 3) -> tuple[np.ndarray, np.ndarray]:
    """Images (uint8 [N, h, w, channels]) and labels (int32 [N]) of a small labelled source.

    All its images must have one size.
    """
    records = [source[i] for i in range(len(source))]
    images = [transforms.decode_image(record["image"], channels) for record in records]
    pixels = np.stack(
        [np.asarray(image).reshape(image.height, image.width, channels) for image in images]
    )
    return pixels, np.array([record["label"] for record in records], np.int32)
