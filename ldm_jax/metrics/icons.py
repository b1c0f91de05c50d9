"""Recogniser of the icons in emoji scenes: the nearest of all templates, in squared error."""

from collections.abc import Iterable
from itertools import product

import numpy as np

from ldm_jax import schema
from ldm_jax.data import emoji


def read(images: np.ndarray, *, font: str = schema.EmojiConfig.font) -> list[tuple[str, ...]]:
    """Names of the icons in each scene, from left to right: one, or two.

    images: uint8 [N, S, S, 3]. Of all icons of `emoji.NAMES`, sizes and places (a pixel beyond
    where `emoji.scene` puts them), those are chosen that explain most of the squared difference
    to the ground; the ground is the median of the border.
    """
    cells = emoji.cells(font, images.shape[1] // 2).astype(np.float64)
    return [_read_one(image / 255, cells) for image in images]


def _read_one(image_ssc: np.ndarray, cells: np.ndarray) -> tuple[str, ...]:
    size, side = len(image_ssc), cells.shape[2]
    unit = size / 32
    border = np.concatenate([image_ssc[0], image_ssc[-1], image_ssc[:, 0], image_ssc[:, -1]])
    ground_c = np.median(border, axis=0)
    # what an icon adds to the ground
    templates = (cells[..., :3] - cells[..., 3:] * ground_c).reshape(-1, side * side * 3)
    energy_t = np.sum(templates**2, axis=1)
    residual = image_ssc - ground_c

    def best(columns: Iterable[float]) -> tuple[str, float]:
        """(name, squared error that it removes) of the best template in these columns."""
        rows = np.arange(-4, 5)
        corners = {
            (int(np.floor(side / 2 + y * unit)), int(np.floor(side / 2 + x * unit)))
            for y, x in product(rows, columns)
        }
        inside = [(y, x) for y, x in corners if 0 <= x <= size - side and 0 <= y <= size - side]
        windows = np.stack([residual[y : y + side, x : x + side].ravel() for y, x in inside])
        gain_pt = 2 * windows @ templates.T - energy_t
        _, template = np.unravel_index(np.argmax(gain_pt), gain_pt.shape)
        return emoji.NAMES[template // cells.shape[1]], float(gain_pt.max())

    left, right = best((-8, -7, -6)), best((6, 7, 8))
    alone = best(range(-4, 5))
    if alone[1] > left[1] + right[1]:
        return (alone[0],)
    return left[0], right[0]
