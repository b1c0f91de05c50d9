"""What loading a model takes of memory: at most 1.3 times its parameters, whatever the file."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
import text_model

from ldm_jax import bundle, schema
from ldm_jax.convert import compvis, diffusers
from ldm_jax.data import tokens

FACTOR = 1.3
CONFIG = schema.LatentDiffusionConfig(
    first_stage=schema.AutoencoderKLConfig(channels=32, channel_mult=(1, 1), num_res_blocks=1),
    unet=schema.UNetConfig(
        model_channels=192,
        channel_mult=(1, 2),
        num_res_blocks=2,
        attention_downsample=(2, 1),
        num_heads=4,
        context_dim=32,
    ),
    cond=schema.TextCondConfig(encoder=text_model.ENCODER, trainable=False),
    size=16,
)

# All models stay, so that none is put where an earlier one was.
LOAD_ALL = """
import sys
import jax
from ldm_jax import loading
def memory(what):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(what))
models = [loading.load(sys.argv[1], shapes_only=True)]  # whose tracing takes 70 MB
for path in sys.argv[1:]:
    for dtype in ("float32", "bfloat16"):
        before = memory("VmRSS")
        models.append(loading.load(path, param_dtype=dtype))
        taken = memory("VmHWM") - before
        print(dtype, sum(x.nbytes for x in jax.tree.leaves(models[-1].params)), taken, path)
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """The same model of 200 MB in every format of others."""
    root = tmp_path_factory.mktemp("memory")
    model = bundle.build(CONFIG, {}, 0.5)
    model = dataclasses.replace(
        model,
        params=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), compvis.model_shapes(model)),
        tokenizer=tokens.load_tokenizer(text_model.clip_tokenizer(root / "tokenizer"), 12),
    )
    compvis.save(model, root / "model.safetensors")
    compvis.save(model, root / "model.ckpt")
    diffusers.save(model, root / "folder")
    return [str(root / name) for name in ("model.safetensors", "model.ckpt", "folder")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
def test_a_model_takes_little_more_than_its_parameters(paths):
    command = [sys.executable, "-c", LOAD_ALL, *paths]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 2 * len(paths)
    for line in lines:
        dtype, size, taken, _ = line.split(maxsplit=3)
        factor = int(taken) / int(size)
        assert int(size) > 2**20 * (200 if dtype == "float32" else 100)
        assert 0.9 < factor < FACTOR, line
