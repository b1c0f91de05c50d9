"""Conditions of batches: shapes, null rows, and the reference's mask and map resizing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import conditioning, schema
from ldm_jax.conditioning import Cond

RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
MASK = (RNG.uniform(size=(2, 8, 8, 1)) > 0.5).astype(np.float32)
MAP = RNG.integers(0, 5, (2, 8, 8)).astype(np.int32)
DROPPED = jnp.array([True, False])


def encode(image):
    """A first stage f2 that tests can follow: pixels of every second row and column."""
    return 2 * image[:, ::2, ::2]


def made(config, batch, dropped=False):
    """(condition, module, parameters)."""
    module = conditioning.build(config)
    params = conditioning.init(config, module, jax.random.key(0))
    return conditioning.from_batch(config, module, params, batch, encode, dropped), module, params


def test_no_condition_is_empty():
    assert conditioning.build(None) is None
    assert conditioning.from_batch(None, None, {}, {}) == Cond()
    assert conditioning.null_like(None, None, {}, {}) == Cond()


def test_class_as_token():
    config = schema.ClassCondConfig(num_classes=4, embed_dim=6)
    cond, _, params = made(config, {"label": jnp.array([1, 3])}, DROPPED)
    table = params["embedding"]["embedding"]
    assert table.shape == (5, 6)
    assert (cond.concat, cond.label) == (None, None)
    np.testing.assert_array_equal(cond.context, table[jnp.array([4, 3])][:, None])


def test_class_as_label():
    config = schema.ClassCondConfig(num_classes=4, via="label")
    cond, module, params = made(config, {"label": jnp.array([1, 3])}, DROPPED)
    assert (module, params) == (None, {})
    assert (cond.context, cond.concat) == (None, None)
    assert cond.label.tolist() == [4, 3]


@pytest.mark.parametrize("order", ["image_mask", "mask_image"])
def test_inpainting(order):
    config = schema.InpaintCondConfig(order=order, mask_range=(0.0, 1.0), fill=0.25)
    cond, _, _ = made(config, {"image": IMAGE, "mask": MASK})
    latent = encode(np.where(MASK > 0.5, 0.25, IMAGE))
    small = MASK[:, ::2, ::2]  # what torch's nearest interpolation to half the side takes
    parts = (latent, small) if order == "image_mask" else (small, latent)
    np.testing.assert_allclose(cond.concat, np.concatenate(parts, -1), atol=1e-6)
    assert cond.concat.shape[-1] == conditioning.concat_channels(config, 3, 3)


def test_default_mask_is_that_of_ldm():
    cond, _, _ = made(schema.InpaintCondConfig(), {"image": IMAGE, "mask": MASK})
    np.testing.assert_array_equal(cond.concat[..., 3:], 2 * MASK[:, ::2, ::2] - 1)


@pytest.mark.torch
def test_mask_is_resized_as_by_torch():
    torch = pytest.importorskip("torch", reason="torch is the reference here")
    cond, _, _ = made(
        schema.InpaintCondConfig(mask_range=(0.0, 1.0)), {"image": IMAGE, "mask": MASK}
    )
    mask = torch.tensor(MASK).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(mask, (4, 4)).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(cond.concat[..., 3:], expected.numpy())


def test_super_resolution():
    config = schema.SuperResCondConfig(factor=2)
    cond, _, _ = made(config, {"image": jnp.ones((2, 8, 8, 3))}, DROPPED)
    assert cond.concat.shape == (2, 4, 4, conditioning.concat_channels(config, 4, 3))
    np.testing.assert_allclose(cond.concat[1], 1, atol=1e-6)
    assert not cond.concat[0].any()
    edge = jnp.where(jnp.arange(8) < 4, -1.0, 1.0)[None, :, None, None] * jnp.ones((1, 8, 8, 3))
    assert float(jnp.abs(conditioning.downsample(edge, 2)).max()) == 1  # bicubic overshoots


@pytest.mark.parametrize("channels", [None, 2])
def test_semantic_map(channels):
    config = schema.SemanticCondConfig(num_classes=5, out_channels=channels, stages=1)
    cond, _, params = made(config, {"segmentation": MAP})
    expected = np.eye(5)[MAP].reshape(2, 4, 2, 4, 2, 5).mean((2, 4))
    if channels:
        assert params["channel_mapper"]["kernel"].shape == (1, 1, 5, 2)
        expected = expected @ np.asarray(params["channel_mapper"]["kernel"])[0, 0]
    np.testing.assert_allclose(cond.concat, expected, atol=1e-5)
    assert cond.concat.shape[-1] == conditioning.concat_channels(config, 4, 3)


@pytest.mark.torch
def test_semantic_map_is_halved_as_by_the_reference():
    torch = pytest.importorskip("torch", reason="torch is the reference here")
    config = schema.SemanticCondConfig(num_classes=5, out_channels=None, stages=2)
    cond, _, _ = made(config, {"segmentation": MAP})
    x = torch.tensor(np.eye(5, dtype=np.float32)[MAP]).permute(0, 3, 1, 2)
    for _ in range(2):
        x = torch.nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear")
    np.testing.assert_allclose(cond.concat, x.permute(0, 2, 3, 1).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        schema.InpaintCondConfig(),
        schema.SuperResCondConfig(factor=2),
        schema.SemanticCondConfig(num_classes=5, stages=1),
    ],
)
def test_dropped_rows_are_the_null_condition(config):
    batch = {"image": IMAGE, "mask": MASK, "segmentation": MAP}
    cond, module, params = made(config, batch, DROPPED)
    kept = conditioning.from_batch(config, module, params, batch, encode)
    null = conditioning.null_like(config, module, params, batch, encode)
    assert not null.concat.any()
    np.testing.assert_array_equal(cond.concat[0], null.concat[0])
    np.testing.assert_array_equal(cond.concat[1], kept.concat[1])
    assert jnp.abs(kept.concat).max() > 0
