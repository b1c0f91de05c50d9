"""Coloured shapes drawn from the record's index: data for tests, and for timing without input."""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ldm_jax import schema

SHAPES = ("disc", "triangle", "square", "pentagon", "hexagon")
COLOURS = {
    (True, False, False): "red",
    (True, True, False): "yellow",
    (False, True, False): "green",
    (False, True, True): "cyan",
    (False, False, True): "blue",
    (True, False, True): "magenta",
}


class SyntheticSource:
    """Record i shows shape i % num_classes on a graded background.

    Class 0 is a disc, class k a regular polygon of k + 2 corners. The caption is "a red disc"; the
    segmentation map is 0 on the background and label + 1 on the shape; the mask is a random square.
    """

    features = frozenset({"image", "label", "segmentation", "mask", "caption"})

    def __init__(self, config: schema.SyntheticConfig, split: str):
        if config.num_images < 1 or config.num_classes < 1:
            raise ValueError(
                f"num_images {config.num_images}, num_classes {config.num_classes}: use 1 or more"
            )
        self._split = split
        self._length = config.num_images if split == "train" else max(1, config.num_images // 4)
        self._size = config.size
        self.num_classes = config.num_classes
        self.classes = tuple(_shape_name(label) for label in range(config.num_classes))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self._split == "train", index))
        size, label = self._size, index % self.num_classes
        dark, light, colour = (
            rng.integers(0, 96, 3),
            rng.integers(96, 160, 3),
            rng.integers(160, 256, 3),
        )
        grade = np.linspace(0, 1, size)[:, None, None]
        background = np.broadcast_to((1 - grade) * dark + grade * light, (size, size, 3))
        shape = self._shape(rng, label)
        box = rng.integers(0, size // 2 + 1, 2)
        mask = np.zeros((size, size), np.uint8)
        mask[box[0] : box[0] + size // 2, box[1] : box[1] + size // 2] = 1
        return {
            "image": np.where(shape[..., None], colour, background).astype(np.uint8),
            "label": label,
            "segmentation": np.where(shape, label + 1, 0).astype(np.uint8),
            "mask": mask,
            "caption": f"a {_colour_name(colour)} {_shape_name(label)}",
        }

    def describe(self, index: int) -> str:
        """For messages."""
        return f"synthetic {self._split} record {index}"

    def _shape(self, rng: np.random.Generator, label: int) -> np.ndarray:
        """Bool [size, size], true inside."""
        radius = rng.uniform(0.2, 0.35) * self._size
        x, y = rng.uniform(radius, self._size - radius, 2)
        canvas = Image.new("1", (self._size, self._size))
        draw = ImageDraw.Draw(canvas)
        if label == 0:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
        else:
            angle = rng.uniform(0, 360)
            draw.regular_polygon((x, y, radius), label + 2, rotation=angle, fill=1)
        return np.asarray(canvas)


def _colour_name(colour: np.ndarray) -> str:
    """The hue: which of red, green and blue are nearer to the largest than to the smallest."""
    bright = 2 * colour > colour.min() + colour.max()
    return COLOURS.get(tuple(bright.tolist()), "grey")  # grey: all three are equal


def _shape_name(label: int) -> str:
    return SHAPES[label] if label < len(SHAPES) else f"shape with {label + 2} corners"
