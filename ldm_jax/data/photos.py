"""Crops of the photos that come with scikit-learn and scikit-image: data without a download.

A band along one edge of every photo is held out: training crops and held-out ones share no pixel.
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_jax import schema
from ldm_jax.runtime import images

PHOTOS = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/brick.png"),  # grey, as the next two: textures
    ("skimage", "data/grass.png"),
    ("skimage", "data/gravel.png"),
)
BAND = 128  # pixels held out along an edge: at least the largest crop
SHARE = 5  # or this part of the longer side, if that is more


class Crop(NamedTuple):
    """A square of a photo."""

    photo: int
    left: int
    top: int


class PhotosSource:
    """Training: every crop on a grid of `stride` pixels. Held out: crops side by side, of the band.

    ImportError if a package is missing, FileNotFoundError if its photos are, ValueError for a crop
    that does not fit.
    """

    features = frozenset({"image"})
    num_classes = classes = None

    def __init__(self, config: schema.PhotosConfig, split: str):
        if not 1 <= config.crop <= BAND or config.stride < 1:
            raise ValueError(
                f"data.source.crop {config.crop}, data.source.stride {config.stride}: a crop has 1"
                f" to {BAND} pixels a side, and a stride is at least 1"
            )
        self._split, self._side = split, config.crop
        stride = config.stride if split == "train" else config.crop
        self._crops = [
            Crop(photo, left, top)
            for photo, path in enumerate(PHOTOS)
            for left, top in _corners(region(photo, *_size(*path), split), config.crop, stride)
        ]
        # not shuffled later: mixed here, so that any part of them shows every photo
        if split != "train":
            order = np.random.default_rng(0).permutation(len(self._crops))
            self._crops = [self._crops[i] for i in order]

    def __len__(self) -> int:
        return len(self._crops)

    def __getitem__(self, index: int) -> dict[str, Any]:
        photo, left, top = self._crops[index]
        whole = pixels(*PHOTOS[photo])
        return {"image": whole[top : top + self._side, left : left + self._side]}

    def describe(self, index: int) -> str:
        """Photo and corner, for messages."""
        photo, left, top = self._crops[index]
        return f"{PHOTOS[photo][1]} crop at {left},{top}"


def region(photo: int, height: int, width: int, split: str) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the part of a photo that belongs to a split.

    The band lies across the longer side, by turns at its end and at its start.
    """
    longer = max(height, width)
    band = max(BAND, longer // SHARE)
    cut = longer - band if photo % 2 == 0 else band
    first = (split == "train") == (photo % 2 == 0)  # this split's part starts at 0
    low, high = (0, cut) if first else (cut, longer)
    return (low, 0, high, height) if width >= height else (0, low, width, high)


def _corners(box: tuple[int, int, int, int], side: int, stride: int) -> list[tuple[int, int]]:
    left, top, right, bottom = box
    return [
        (x, y)
        for y in range(top, bottom - side + 1, stride)
        for x in range(left, right - side + 1, stride)
    ]


@functools.cache
def pixels(package: str, name: str) -> np.ndarray:
    """uint8 [h, w, 3] of a photo, kept for the life of the process: read once, cropped often."""
    with images.open_picture(_file(package, name).read_bytes()) as image:
        array = np.asarray(image.convert("RGB"))
    array.setflags(write=False)
    return array


def _size(package: str, name: str) -> tuple[int, int]:
    """(height, width)."""
    return pixels(package, name).shape[:2]


def _file(package: str, name: str) -> Path:
    """The photo's file, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(
            f"the photos need scikit-learn and scikit-image ({package} is missing):"
            " pip install 'ldm-jax[demo]'"
        )
    path = Path(spec.origin).parent / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: is not there; install the {package} of ldm-jax[demo], which has it"
        )
    return path
