"""Conditions of batches: shapes, null rows, and the reference's mask and map resizing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import conditioning, diffusion, schema
from ldm_jax.conditioning import Cond, superres
from ldm_jax.models import bert, clip

RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
MASK = (RNG.uniform(size=(2, 8, 8, 1)) > 0.5).astype(np.float32)
MAP = RNG.integers(0, 5, (2, 8, 8)).astype(np.int32)
DROPPED = jnp.array([True, False])
TOKENS = {
    "tokens": RNG.integers(1, 20, (2, 5)).astype(np.int32),
    "null_tokens": np.zeros((2, 5), np.int32),
}
UPSCALE = {
    "low_res": IMAGE[:, ::2, ::2],
    "low_res_noise": RNG.normal(size=(2, 4, 4, 3)).astype(np.float32),
    "noise_level": np.array([0, 300]),
}
TextCond = schema.TextCondConfig
BERT = schema.BERTTextConfig(
    vocab_size=20, max_length=5, width=32, num_layers=1, num_heads=2, head_width=16
)
CLIP = schema.CLIPTextConfig(
    vocab_size=20, max_length=5, width=32, num_layers=1, num_heads=2, mlp_width=64
)
LAYOUT = schema.LayoutCondConfig(encoder=BERT)


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


def test_a_model_without_a_null_class_has_no_null_condition():
    config = schema.ClassCondConfig(num_classes=4, embed_dim=6, dropout=0.0, null_class=False)
    cond, module, params = made(config, {"label": jnp.array([1, 3])})
    assert params["embedding"]["embedding"].shape == (4, 6)
    assert cond.context.shape == (2, 1, 6)
    with pytest.raises(ValueError, match="no null class: sample with guidance scale 1"):
        conditioning.null_like(config, module, params, {"label": jnp.array([1, 3])})


@pytest.mark.parametrize("config", [TextCond(encoder=CLIP), TextCond(encoder=BERT), LAYOUT])
def test_tokens(config):
    cond, module, params = made(config, TOKENS, DROPPED)
    assert (cond.concat, cond.label) == (None, None)
    assert cond.context.shape == (2, 5, 32)
    ids = np.stack([TOKENS["null_tokens"][0], TOKENS["tokens"][1]])
    expected = module.apply({"params": params}, ids)
    np.testing.assert_allclose(cond.context, expected, atol=1e-5)

    # each side alone needs the other's tokens not
    kept = conditioning.from_batch(config, module, params, {"tokens": TOKENS["tokens"]})
    np.testing.assert_allclose(kept.context[1], expected[1], atol=1e-5)
    null = {"null_tokens": TOKENS["null_tokens"]}
    null = conditioning.null_like(config, module, params, null)
    np.testing.assert_allclose(null.context[0], expected[0], atol=1e-5)
    assert float(jnp.abs(kept.context[0] - null.context[0]).max()) > 0.01


def test_given_vectors():
    config = schema.EmbeddingCondConfig(width=6)
    batch = {"embedding": RNG.normal(size=(2, 3, 6)).astype(np.float32)}
    cond, module, _ = made(config, batch, DROPPED)
    assert module is None
    assert not cond.context[0].any()
    np.testing.assert_array_equal(cond.context[1], batch["embedding"][1])
    null = conditioning.null_like(config, None, {}, batch)
    assert (null.context.shape, bool(null.context.any())) == ((2, 3, 6), False)


def test_depth_is_scaled_per_image():
    depth = RNG.normal(5, 3, (3, 4, 4, 1)).astype(np.float32)
    depth[2] = 7  # a wall
    cond, _, _ = made(schema.DepthCondConfig(), {"depth": depth})
    low, high = (f(depth, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
    expected = 2 * (depth[:2] - low[:2]) / (high - low)[:2] - 1
    np.testing.assert_allclose(cond.concat[:2], expected, atol=1e-6)
    np.testing.assert_array_equal(cond.concat[2], np.full((4, 4, 1), -1))
    assert cond.concat.shape[-1] == conditioning.concat_channels(schema.DepthCondConfig(), 4, 3)


def test_upscaling_noises_the_low_resolution_image_to_its_label():
    config = schema.UpscaleCondConfig()
    cond, _, _ = made(config, UPSCALE)
    schedule = diffusion.make_schedule("scaled_linear", 1000, 1e-4, 0.02)
    expected = diffusion.q_sample(
        schedule, UPSCALE["low_res"], UPSCALE["noise_level"], UPSCALE["low_res_noise"]
    )
    np.testing.assert_allclose(cond.concat, expected, atol=1e-6)
    # by hand: level 0 is almost the image
    np.testing.assert_allclose(cond.concat[0], UPSCALE["low_res"][0], atol=0.05)
    alpha = np.sqrt(np.prod(1 - np.linspace(1e-2, np.sqrt(0.02), 1000)[:301] ** 2))
    by_hand = alpha * UPSCALE["low_res"][1]
    by_hand += np.sqrt(1 - alpha**2) * UPSCALE["low_res_noise"][1]
    np.testing.assert_allclose(cond.concat[1], by_hand, atol=1e-5)
    assert cond.label.tolist() == [0, 300]
    assert conditioning.concat_channels(config, 4, 3) == 3


@pytest.mark.parametrize(
    "concat",
    [schema.InpaintCondConfig(), schema.DepthCondConfig(), schema.UpscaleCondConfig(factor=2)],
)
def test_hybrid_is_text_beside_an_image_that_is_never_dropped(concat):
    text = TextCond(encoder=BERT)
    config = schema.HybridCondConfig(text, concat)
    batch = {"image": IMAGE, "mask": MASK, "depth": MASK, **TOKENS, **UPSCALE}
    cond, module, params = made(config, batch, DROPPED)
    words = conditioning.from_batch(text, module, params, batch, dropped=DROPPED)
    beside, _, _ = made(concat, batch)
    np.testing.assert_array_equal(cond.context, words.context)
    np.testing.assert_array_equal(cond.concat, beside.concat)
    assert (cond.label is None) == (beside.label is None)
    null = conditioning.null_like(config, module, params, batch, encode)
    assert jax.tree.structure(null) == jax.tree.structure(cond)  # guidance joins them
    np.testing.assert_array_equal(null.concat, cond.concat)
    np.testing.assert_allclose(null.context[0], cond.context[0], atol=1e-5)
    assert conditioning.concat_channels(config, 4, 3) == conditioning.concat_channels(concat, 4, 3)
    assert conditioning.context_width(config) == ("cond.text.encoder.width", 32)


def test_the_encoder_is_that_of_the_config():
    assert isinstance(conditioning.build(TextCond(encoder=CLIP)), clip.CLIPText)
    built = conditioning.build(TextCond(encoder=BERT), jnp.bfloat16, remat=True)
    assert (type(built), built.dtype, built.remat) == (bert.BERTText, jnp.bfloat16, True)
    assert conditioning.build(schema.EmbeddingCondConfig()) is None


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


def test_super_resolution():
    config = schema.SuperResCondConfig(factor=2)
    cond, _, _ = made(config, {"image": jnp.ones((2, 8, 8, 3))}, DROPPED)
    assert cond.concat.shape == (2, 4, 4, conditioning.concat_channels(config, 4, 3))
    np.testing.assert_allclose(cond.concat[1], 1, atol=1e-6)
    assert not cond.concat[0].any()
    edge = jnp.where(jnp.arange(8) < 4, -1.0, 1.0)[None, :, None, None] * jnp.ones((1, 8, 8, 3))
    assert float(jnp.abs(superres.downsample(edge, 2)).max()) == 1  # bicubic overshoots


@pytest.mark.parametrize(("channels", "stages"), [(None, 1), (2, 1), (None, 2)])
def test_semantic_map(channels, stages):
    """Each halving is the mean of four, as torch's bilinear interpolation to half the side."""
    config = schema.SemanticCondConfig(num_classes=5, out_channels=channels, stages=stages)
    cond, _, params = made(config, {"segmentation": MAP})
    side = 8 // 2**stages
    expected = np.eye(5)[MAP].reshape(2, side, 2**stages, side, 2**stages, 5).mean((2, 4))
    if channels:
        assert params["channel_mapper"]["kernel"].shape == (1, 1, 5, 2)
        expected = expected @ np.asarray(params["channel_mapper"]["kernel"])[0, 0]
    np.testing.assert_allclose(cond.concat, expected, atol=1e-5)
    assert cond.concat.shape[-1] == conditioning.concat_channels(config, 4, 3)


def test_classes_that_a_map_may_not_hold_are_refused():
    """One-hot they are all zero."""
    config = schema.SemanticCondConfig(num_classes=int(MAP.max()), stages=1)
    with pytest.raises(ValueError, match=rf"holds class {MAP.max()}, but the model's classes are"):
        conditioning.check_batch(config, {"segmentation": MAP})
    with pytest.raises(ValueError, match="holds class -1, but"):
        conditioning.check_batch(config, {"segmentation": np.full((1, 8, 8), -1)})
    with pytest.raises(ValueError, match="is of type float32: give integers"):
        conditioning.check_batch(config, {"segmentation": np.zeros((1, 8, 8), np.float32)})


@pytest.mark.parametrize(
    "config",
    [
        schema.InpaintCondConfig(),
        schema.SuperResCondConfig(factor=2),
        schema.SemanticCondConfig(num_classes=5, stages=1),
        schema.DepthCondConfig(),
        schema.UpscaleCondConfig(),
    ],
)
def test_dropped_rows_are_the_null_condition(config):
    batch = {"image": IMAGE, "mask": MASK, "segmentation": MAP, "depth": 1 + MASK, **UPSCALE}
    cond, module, params = made(config, batch, DROPPED)
    kept = conditioning.from_batch(config, module, params, batch, encode)
    null = conditioning.null_like(config, module, params, batch, encode)
    assert not null.concat.any()
    np.testing.assert_array_equal(cond.concat[0], null.concat[0])
    np.testing.assert_array_equal(cond.concat[1], kept.concat[1])
    assert jnp.abs(kept.concat).max() > 0
