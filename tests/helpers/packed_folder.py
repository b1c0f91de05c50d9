"""A folder of images to pack."""

import numpy as np
import pytest
from PIL import Image

from ldm_jax import data, schema

IMAGES = 13  # of which 3 are held out


@pytest.fixture
def folder(tmp_path):
    """Images of two classes with captions and masks."""
    for i in range(IMAGES):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        Image.fromarray((pixels[..., 0] > 99).astype(np.uint8) * 255).save(
            path.with_name(f"{i:02d}_mask.png")
        )
        path.with_suffix(".txt").write_text(f"number {i}, é")
    return tmp_path / "images"


def config_of(path, **fields):
    kinds = {"class_from_folder": True, "captions": "sidecar", "mask_suffix": "_mask"}
    source = schema.FolderConfig(path=str(path), **{"eval_every": 5, **kinds, **fields})
    return schema.DataConfig(source=source, size=8, crop="random", flip=True, threads=2)


def source_of(config, split="train"):
    return data.open_source(config, split)
