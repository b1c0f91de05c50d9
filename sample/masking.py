"""The part of a picture around a mask: cut out, drawn at another size, and put back."""

from typing import NamedTuple

import numpy as np
import scipy.ndimage
from PIL import Image


class Box(NamedTuple):
    """A part of a picture in pixels, `bottom` and `right` excluded."""

    top: int
    left: int
    bottom: int
    right: int

    def of(self, array: np.ndarray) -> np.ndarray:
        """This part of [H, W, c]."""
        return array[self.top : self.bottom, self.left : self.right]


def around(mask: np.ndarray, padding: int, size: tuple[int, int]) -> Box:
    """The smallest box with all of a mask [H, W, 1] and `padding` pixels, in the shape of a size.

    size: (height, width), whose ratio it has where the picture leaves room.
    """
    ends = []
    for axis in (1, 0):
        hit = np.flatnonzero(mask[..., 0].any(axis=axis))
        length = mask.shape[1 - axis]
        ends.append((max(int(hit[0]) - padding, 0), min(int(hit[-1]) + 1 + padding, length)))
    (top, bottom), (left, right) = ends
    height, width = bottom - top, right - left
    wanted = max(height, round(width * size[0] / size[1]))
    top, bottom = _widened(top, bottom, wanted, mask.shape[0])
    wanted = max(width, round((bottom - top) * size[1] / size[0]))
    left, right = _widened(left, right, wanted, mask.shape[1])
    return Box(top, left, bottom, right)


def _widened(first: int, last: int, wanted: int, most: int) -> tuple[int, int]:
    """A range of `wanted` pixels, or as many as there are, around this one."""
    wanted = min(wanted, most)
    first = min(max(first - (wanted - (last - first)) // 2, 0), most - wanted)
    return first, first + wanted


def resized_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W, 1], 0 or 1, at (height, width): 1 where at least half is."""
    scaled = Image.fromarray(np.uint8(255 * mask[..., 0])).resize(size[::-1], Image.Resampling.BOX)
    return (np.asarray(scaled) >= 128).astype(np.float32)[..., None]


def blurred(mask: np.ndarray, sigma: float) -> np.ndarray:
    """Masks [N, H, W, 1] with soft edges: a Gaussian of `sigma` pixels, cut at 2.5 sigma."""
    if sigma == 0:
        return mask
    return np.stack(
        [scipy.ndimage.gaussian_filter(m, (sigma, sigma, 0), truncate=2.5) for m in mask]
    )
