"""From a config to a source."""

import numpy as np
import pytest
from PIL import Image

from ldm_jax import schema
from ldm_jax.data import sources


def test_each_config_opens_its_source(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    synthetic = schema.DataConfig(source=schema.SyntheticConfig(num_images=40))
    folder = schema.DataConfig(source=schema.FolderConfig(path=str(tmp_path), eval_every=2))
    assert len(sources.open_source(synthetic, "train")) == 40
    assert len(sources.open_source(synthetic, "eval")) == 10
    assert sources.open_source(folder, "train").describe(0) == str(tmp_path / "b.png")
    assert sources.open_source(folder, "eval").describe(0) == str(tmp_path / "a.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays(channels):
    config = schema.DataConfig(source=schema.SyntheticConfig(num_images=12, size=8))
    source = sources.open_source(config, "train")
    images, labels = sources.arrays(source, channels)
    assert images.shape == (12, 8, 8, channels)
    assert images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 3] * 3
    if channels == 3:
        np.testing.assert_array_equal(images[5], source[5]["image"])
