"""The builder in docs/data_at_scale.md runs as it is."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ldm_jax import schema
from ldm_jax.data.tfds import TFDSSource

PAGE = Path(__file__).parents[2] / "docs" / "data_at_scale.md"


def test_the_builder_prepares_without_tensorflow_and_is_read(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    folder = tmp_path / "images"
    for i in range(4):
        path = folder / ("finch", "owl")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 9, 3), 50 * i, np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"bird {i}\n")
    (tmp_path / "birds.py").write_text(
        code + "import sys\nassert 'tensorflow' not in sys.modules\n"
    )
    command = [sys.executable, "birds.py", str(folder), str(tmp_path / "tfds")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

    config = schema.TFDSConfig(name="birds", data_dir=str(tmp_path / "tfds"), caption_key="caption")
    train, held_out = TFDSSource(config, "train"), TFDSSource(config, "test")
    assert (len(train), len(held_out), train.num_classes) == (3, 1, 2)
    assert held_out[0]["image"] == (folder / "finch" / "0.jpg").read_bytes()
    assert (held_out[0]["label"], held_out[0]["caption"]) == (0, "bird 0")
    assert {train[i]["caption"] for i in range(3)} == {"bird 1", "bird 2", "bird 3"}
