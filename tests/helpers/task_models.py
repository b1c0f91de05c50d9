"""Tiny models with random weights for the sampling tasks: images of 16x16, latents of 8x8."""

import dataclasses
import pathlib

import jax
import numpy as np
import reference
import text_model
from PIL import Image

from ldm_jax import bundle, conditioning, saving, schema
from ldm_jax.data import tokens
from ldm_jax.models import autoencoder, unet
from ldm_jax.runtime import cli
from ldm_jax.sample import main

FIRST_STAGE = schema.AutoencoderKLConfig(
    channels=32, channel_mult=(1, 1), num_res_blocks=0, mid_attention=False
)
# with one channel in every group, GroupNorm would take out an added embedding
UNET = schema.UNetConfig(
    model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_downsample=(),
    num_heads=2, spatial_transformer=False, context_dim=None, scale_shift_norm=True,
)  # fmt: skip
CONTEXT = {"attention_downsample": (1,), "spatial_transformer": True, "context_dim": 32}


def make(cond, tokenizer=None, **changes) -> bundle.LatentDiffusion:
    """A model conditioned in one way; `changes` are of its UNet."""
    net = dataclasses.replace(UNET, **changes)
    config = schema.LatentDiffusionConfig(FIRST_STAGE, net, cond, size=16)
    bundle.check(config)
    empty = bundle.build(config, {}, 0.5)
    shapes = {
        "unet": text_model.shapes_of(empty.unet, unet),
        "first_stage": text_model.shapes_of(empty.first_stage, autoencoder),
        "cond_stage": jax.eval_shape(
            lambda: conditioning.init(cond, empty.cond_stage, jax.random.key(0))
        ),
    }
    text = schema.text_of(cond)
    known = tokens.load_tokenizer(tokenizer, text.encoder.max_length) if tokenizer else None
    return dataclasses.replace(empty, params=reference.filled(shapes), tokenizer=known)


def save(model, folder):
    """The model as a run directory in a folder of pytest's."""
    saving.save(model, folder / "run", to="ldm_jax")
    return folder / "run"


def sample(task, *flags):
    """Exit code of `ldm-sample TASK` with two steps."""
    return cli.run("ldm-sample", main.sample, [task, "--steps", "2", *map(str, flags)])


def again(image, *flags):
    """Exit code of `ldm-sample again`."""
    return cli.run("ldm-sample", main.sample, ["again", *map(str, (image, *flags))])


def assert_one_line(task, capsys, message, *flags):
    """The command fails, says so in one line on stderr that holds `message`, and writes nothing."""
    assert sample(task, *flags) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ldm-sample: error: ")
    assert message in line
    assert "--out" not in flags or not pathlib.Path(flags[flags.index("--out") + 1]).exists()


def write_png(path, values):
    """A PNG of uint8 [H, W] or [H, W, 3]; returns its path."""
    Image.fromarray(np.asarray(values, np.uint8)).save(path)
    return path


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)
