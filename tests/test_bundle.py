"""Parts of a model that do not fit each other are named with both numbers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import bundle, schema
from ldm_jax.conditioning import Cond
from ldm_jax.configs import tiny

BERT = schema.BERTTextConfig(vocab_size=9, max_length=4, width=24, num_layers=1)


def hybrid(concat) -> schema.HybridCondConfig:
    return schema.HybridCondConfig(schema.TextCondConfig(encoder=BERT), concat)


def of(cond, **unet) -> schema.LatentDiffusionConfig:
    """A model of this conditioning, which reads context of width 24."""
    config = section("class", **{"context_dim": 24, **unet})
    return dataclasses.replace(config, cond=cond)


def section(
    stage: str, cond: dict | None = None, size: int = 16, **unet
) -> schema.LatentDiffusionConfig:
    """The model of tiny:STAGE with some fields replaced."""
    config = tiny.get_config(stage)
    return schema.LatentDiffusionConfig(
        first_stage=tiny.get_config("first_stage").model,
        unet=dataclasses.replace(config.unet, **unet),
        cond=dataclasses.replace(config.cond, **cond) if cond else config.cond,
        size=size,
    )


@pytest.mark.parametrize("stage", tiny.CONDITIONS)
def test_parts_that_fit(stage):
    bundle.check(section(stage))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (section("class", in_channels=5),
         r"unet\.in_channels is 5, .* 4 channels .* adds 0: set it"),
        (section("inpaint", in_channels=4), r"in_channels is 4, .* adds 5: set it to 9"),
        (section("class", out_channels=8), r"unet\.out_channels is 8, but the latent has 4"),
        (section("label", num_classes=4), r"unet\.num_classes is 4: .* it must be 5"),
        (section("class", context_dim=16), r"unet\.context_dim is 16, but cond\.embed_dim is 32"),
        (section("superres", {"factor": 4}), r"cond\.factor is 4, .* downsamples by 2"),
        (section("semantic", {"stages": 2}), r"cond\.stages is 2 \(divides by 4\), .* by 2"),
        (of(schema.TextCondConfig(encoder=BERT), context_dim=16),
         r"unet\.context_dim is 16, but cond\.encoder\.width is 24"),
        (of(schema.LayoutCondConfig(encoder=BERT), context_dim=None),
         r"unet\.context_dim is None, but cond\.encoder\.width is 24"),
        (of(schema.EmbeddingCondConfig(width=24), spatial_transformer=False),
         r"unet\.spatial_transformer is False, but cond\.width is 24"),
        (of(hybrid(schema.DepthCondConfig()), in_channels=5, context_dim=8),
         r"unet\.context_dim is 8, but cond\.text\.encoder\.width is 24"),
        (of(None), r"unet\.context_dim is 24, but the conditioning gives no context"),
        (of(hybrid(schema.DepthCondConfig())), r"in_channels is 4, .* adds 1: set it to 5"),
        (of(hybrid(schema.UpscaleCondConfig(factor=2)), in_channels=7, num_classes=350),
         r"unet\.num_classes is 350: .* cond\.concat\.max_noise_level is 350"),
        (of(hybrid(schema.UpscaleCondConfig()), in_channels=7, num_classes=1000),
         r"cond\.concat\.factor is 4, .* downsamples by 2"),
        (of(schema.TextCondConfig(encoder=BERT), num_classes=3),
         r"unet\.num_classes is 3, but the conditioning gives no label"),
        (section("class", {"null_class": False}),
         r"cond\.dropout is 0\.1, but cond\.null_class is False"),
        (section("class", size=17), r"data\.size 17 is not a multiple of the downsampling 2"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_named(config, complaint):
    with pytest.raises(ValueError, match=complaint):
        bundle.check(config)


@pytest.mark.parametrize(
    "config",
    [
        of(schema.TextCondConfig(encoder=BERT)),
        of(schema.LayoutCondConfig(encoder=BERT)),
        of(schema.EmbeddingCondConfig(width=24)),
        of(hybrid(schema.InpaintCondConfig()), in_channels=9),
        of(hybrid(schema.DepthCondConfig()), in_channels=5),
        of(hybrid(schema.UpscaleCondConfig(factor=2)), in_channels=7, num_classes=351),
        section("label", {"null_class": False, "dropout": 0.0}, num_classes=4),
    ],
)
def test_kinds_that_fit(config):
    bundle.check(config)


def test_pixels_are_latents_without_a_first_stage():
    config = dataclasses.replace(
        section("unconditional", in_channels=3, out_channels=3),
        first_stage=schema.IdentityFirstStageConfig(),
    )
    bundle.check(config)
    model = bundle.build(config, {"unet": {}}, 1.0)
    assert model.latent_shape == (16, 16, 3)
    assert model.tokenizer is None


def test_the_latent_of_a_quantized_stage():
    stage = schema.AutoencoderVQConfig(channel_mult=(1, 2), embed_dim=4, num_codes=8)
    config = dataclasses.replace(section("unconditional"), first_stage=stage)
    bundle.check(config)
    model = bundle.build(config, {"unet": {}}, 1.0, dtype=jnp.bfloat16)
    assert (model.latent_shape, model.first_stage.dtype) == ((8, 8, 4), jnp.bfloat16)


def test_grey_low_resolution_images_add_one_channel():
    bundle.check(section("superres", in_channels=5), image_channels=1)


def test_build_follows_the_config():
    config = section("label")
    model = bundle.build(config, {"unet": {}}, 0.5, dtype=jnp.bfloat16)
    assert model.latent_shape == (8, 8, 4)
    assert (model.latent_scale, model.prediction, model.cond_stage) == (0.5, "eps", None)
    assert model.unet.dtype == model.first_stage.dtype == jnp.bfloat16
    assert model.config is config
    assert len(model.schedule.betas) == 1000


class Recorder:
    """Stands for a UNet: returns what it was called with."""

    def apply(self, variables, x, t, context, label):
        self.seen = (variables["params"], t, context, label)
        return x.astype(jnp.bfloat16)


def test_bind_joins_concat_and_returns_float32():
    net = Recorder()
    x, concat = np.ones((2, 4, 4, 3), np.float32), np.zeros((2, 4, 4, 2), np.float32)
    out = bundle.bind(net, "weights")(x, 7, Cond(context="tokens", concat=concat, label="ids"))
    assert net.seen == ("weights", 7, "tokens", "ids")
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, np.concatenate([x, concat], -1))
    np.testing.assert_array_equal(bundle.bind(net, "weights")(x, 7, Cond()), x)
