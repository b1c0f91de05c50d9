"""The recogniser reads what emoji scenes show."""

import os

import numpy as np
import pytest

from ldm_jax import schema
from ldm_jax.data import emoji
from ldm_jax.metrics import icons

pytestmark = pytest.mark.skipif(
    not os.path.isfile(schema.EmojiConfig.font), reason=f"needs Debian's {emoji.PACKAGE}"
)


@pytest.mark.parametrize(
    ("count", "size", "noise", "least"),
    [(1, 32, 0, 0.98), (2, 32, 0, 0.98), (2, 32, 50, 0.98), (2, 16, 0, 0.9), (2, 64, 10, 0.98)],
)
def test_real_scenes_are_read(count, size, noise, least):
    rng = np.random.default_rng(size + noise)
    asked = [tuple(rng.choice(emoji.NAMES, count, replace=False)) for _ in range(60)]
    pictures = np.stack([emoji.scene(names, rng, size=size) for names in asked])
    noisy = np.clip(pictures + rng.normal(0, noise, pictures.shape), 0, 255).astype(np.uint8)
    assert np.mean([a == b for a, b in zip(icons.read(noisy), asked)]) >= least


def test_order_and_ground_count():
    rng = np.random.default_rng(0)
    picture = emoji.scene(("cow", "robot"), rng)
    assert icons.read(np.stack([picture, picture[:, ::-1]]))[0] == ("cow", "robot")
    swapped = np.roll(picture, 16, axis=1)
    dark = np.where(picture == picture[0, 0], 60, picture).astype(np.uint8)
    assert icons.read(np.stack([swapped, dark])) == [("robot", "cow"), ("cow", "robot")]
