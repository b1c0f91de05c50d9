"""The UNet computes what the reference does, has its names and sizes, refuses what does not fit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from reference import case, draw, filled, max_difference

from ldm_jax import schema
from ldm_jax.convert import compvis
from ldm_jax.models import attention, unet

KEY = jax.random.key(0)
CASES = ("adm_class", "celeba", "churches", "cin", "layout", "semantic", "txt2img")

TINY = schema.UNetConfig(
    in_channels=4, out_channels=3, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
    attention_downsample=(2,), num_heads=2, context_dim=24,
)  # fmt: skip
PLAIN = dataclasses.replace(TINY, spatial_transformer=False)


@functools.cache
def model_and_params(config):
    model = unet.from_config(config, precision="highest")
    shapes = jax.eval_shape(model.init, KEY, *unet.example_inputs(model))
    return model, filled(shapes["params"])


def inputs(config, batch=2):
    return {
        "x": draw(batch, 8, 8, config.in_channels),
        "t_b": np.arange(batch) * 300 + 17,
        "context_blc": draw(batch, 5, 24) if config.spatial_transformer else None,
    }


@functools.cache
def forward(model):
    return jax.jit(lambda params, given: model.apply({"params": params}, **given))


def run(model, params, **given):
    return forward(model)(params, given)


@functools.cache
def tiny_output():
    return run(*model_and_params(TINY), **inputs(TINY))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    about, state_dict, arrays = case(f"unet_{name}")
    model, params = compvis.load_unet(about["config"], state_dict)
    got = run(
        model.clone(precision="highest"), params, x=arrays["x"], t_b=arrays["t"],
        context_blc=arrays.get("context"), label=arrays.get("y"),
    )  # fmt: skip
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, arrays["out"], rtol=0, atol=2e-5)


def test_names_that_flax_diffusers_lacks():
    config = dataclasses.replace(PLAIN, resblock_updown=True, num_classes=10)
    _, params = model_and_params(config)
    flat = traverse_util.flatten_dict(params, sep="/")
    for name in (
        "class_embedding/embedding",
        "down_blocks_0/downsamplers_0/norm1/scale",
        "up_blocks_0/upsamplers_0/time_emb_proj/kernel",
        "down_blocks_1/attentions_0/group_norm/scale",
        "mid_block/attentions_0/to_q/bias",
        "mid_block/attentions_0/to_out_0/kernel",
    ):
        assert name in flat


def test_starts_by_predicting_zero():
    model = unet.from_config(TINY)
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles faster
    args = (*unet.example_inputs(model)[:2], draw(1, 1, 24))
    variables = jax.jit(lambda key: model.init(key, *args))(key)  # the rest is dead code
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    assert not flat["conv_out/bias"].any()
    kernels = {name: np.asarray(x) for name, x in flat.items() if name.endswith("kernel")}
    zero = {name for name, x in kernels.items() if not x.any()}
    ends = ("conv_out/kernel", "proj_out/kernel", "conv2/kernel")
    assert zero == {name for name in kernels if name.endswith(ends)}


def test_class_embedding_starts_as_unit_normal():
    config = dataclasses.replace(PLAIN, num_classes=50)
    model = unet.from_config(config)
    args = unet.example_inputs(model)
    only = jax.jit(lambda key: model.init(key, *args)["params"]["class_embedding"])  # the rest
    embedding = np.asarray(only(KEY)["embedding"])  # of the model is dead code
    assert embedding.shape == (50, 128)
    assert embedding.std() == pytest.approx(1, abs=0.05)


# with transformers as slow: that they are recomputed, and the same, stands in test_ldm.py too
@pytest.mark.parametrize("config", [PLAIN, pytest.param(TINY, marks=pytest.mark.slow)])
def test_remat_recomputes_the_same(config):
    # one level: 1 resnet down, 2 in the middle, 2 up; as many attentions, less one in the middle
    config = dataclasses.replace(config, channel_mult=(1,), attention_downsample=(1,))
    model, params = model_and_params(config)
    given = inputs(config)

    def gradient(model):
        def loss(p):
            rngs = {"dropout": jax.random.key(1)}
            return jnp.mean(model.apply({"params": p}, **given, train=True, rngs=rngs) ** 2)

        return jax.grad(loss)

    model = model.clone(dropout=0.2)  # the recomputed masks must be the same
    again = model.clone(remat=True)
    shapes = jax.eval_shape(again.init, KEY, *unet.example_inputs(again))["params"]
    assert jax.tree.structure(shapes) == jax.tree.structure(params)
    want, got = jax.jit(gradient(model))(params), jax.jit(gradient(again))(params)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(want))
    assert max_difference(got, want) < 1e-5 * largest

    def recomputed(model):
        return str(jax.make_jaxpr(gradient(model))(params)).count("remat")

    assert recomputed(model) == 0
    assert recomputed(again) >= 9


def test_bfloat16_computes_low_and_stays_close():
    model, params = model_and_params(TINY)
    got = run(model.clone(dtype=jnp.bfloat16), params, **inputs(TINY))
    assert got.dtype == jnp.float32
    difference = np.abs(got - tiny_output()).max() / np.abs(tiny_output()).max()
    assert 1e-4 < difference < 0.05


def test_attention_functions_agree(monkeypatch):
    monkeypatch.setattr(attention, "CHUNK_LOGITS", 32)
    model, params = model_and_params(TINY)
    got = run(model.clone(attention=attention.chunked), params, **inputs(TINY))
    np.testing.assert_allclose(got, tiny_output(), atol=1e-5)


def test_an_image_does_not_see_its_batch():
    model, params = model_and_params(TINY)
    alone = {name: x[1:] for name, x in inputs(TINY).items()}
    np.testing.assert_allclose(run(model, params, **alone), tiny_output()[1:], atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"attention_downsample": (1, 2)}, marks=pytest.mark.slow),
        {"attention_downsample": (1, 2), "only_cross_attention": (True, False)},
        {"attention_downsample": (), "scale_shift_norm": True, "resblock_updown": True},
    ],
    ids=str,
)
def test_rows_that_differ_in_context_alone_share_what_is_before_it(changes):
    model, params = model_and_params(dataclasses.replace(TINY, **changes))
    given = inputs(TINY) | {"context_blc": draw(6, 5, 24)}
    repeated = {name: np.repeat(given[name], 3, axis=0) for name in ("x", "t_b")}
    expected = run(model, params, **given | repeated)
    np.testing.assert_allclose(run(model, params, **given), expected, atol=1e-5)


def test_what_is_before_the_context_is_computed_once():
    model, params = model_and_params(dataclasses.replace(TINY, attention_downsample=(1, 2)))
    given = inputs(TINY) | {"context_blc": draw(6, 5, 24)}
    made = jax.eval_shape(
        lambda: model.apply({"params": params}, **given, capture_intermediates=True)
    )[1]["intermediates"]
    first = made["down_blocks_0"]["attentions_0"]["transformer_blocks_0"]

    def rows(module):
        return module["__call__"][0].shape[0]

    assert rows(made["down_blocks_0"]["resnets_0"]) == 2
    assert rows(first["attn1"]) == 2
    assert rows(first["attn2"]) == rows(made["down_blocks_1"]["resnets_0"]) == 6


def test_time_may_be_a_float():
    model, params = model_and_params(TINY)
    given = inputs(TINY)
    whole = run(model, params, **given | {"t_b": given["t_b"].astype(np.float32)})
    np.testing.assert_allclose(whole, tiny_output(), atol=1e-6)
    between = run(model, params, **given | {"t_b": given["t_b"] + np.float32(0.5)})
    assert 1e-4 < np.abs(between - whole).max() < 1


def test_no_context_dim_attends_to_the_image():
    config = dataclasses.replace(TINY, context_dim=None)
    model, params = model_and_params(config)
    kernel = params["mid_block"]["attentions_0"]["transformer_blocks_0"]["attn2"]["to_k"]["kernel"]
    assert kernel.shape == (64, 64)
    out = run(model, params, **inputs(config) | {"context_blc": None})
    assert out.shape == (2, 8, 8, 3)


def test_heads_of_each_level():
    both = dataclasses.replace(TINY, attention_downsample=(1, 2))
    by_width = dataclasses.replace(both, num_heads=None, num_head_channels=16)
    by_level = dataclasses.replace(both, num_heads=(2, 4))
    assert [unet.from_config(by_level).heads(level) for level in (0, 1, None)] == [2, 4, 4]

    def program(config):
        model = unet.from_config(config)
        init = functools.partial(model.init_with_output, KEY)
        return str(jax.make_jaxpr(init)(**inputs(TINY)))

    assert program(by_level) == program(by_width)
    assert program(by_level) != program(dataclasses.replace(both, num_heads=(4, 2)))


def test_cross_attention_alone_at_the_levels_that_say_so():
    config = dataclasses.replace(
        TINY, attention_downsample=(1, 2), only_cross_attention=(True, False)
    )
    flat = traverse_util.flatten_dict(model_and_params(config)[1], sep="/")
    widths = {
        name.partition("/attentions_")[0]: x.shape[0]
        for name, x in flat.items()
        if name.endswith("attn1/to_k/kernel")
    }
    assert widths == {
        "down_blocks_0": 24,
        "down_blocks_1": 64,
        "mid_block": 64,  # is no level
        "up_blocks_0": 64,
        "up_blocks_1": 24,
    }


@pytest.mark.parametrize(
    ("field", "label", "other"),
    [
        ("num_classes", np.array([3, 7]), np.array([3, 8])),
        ("vector_dim", draw(2, 10), np.concatenate([draw(2, 10)[:1], draw(1, 10, seed=5)])),
    ],
)
def test_label_moves_its_own_row(field, label, other):
    config = dataclasses.replace(PLAIN, **{field: 10})
    model, params = model_and_params(config)
    first = run(model, params, **inputs(config), label=label)
    second = run(model, params, **inputs(config), label=other)
    np.testing.assert_allclose(second[0], first[0], atol=1e-6)
    assert float(np.abs(second[1] - first[1]).max()) > 1e-3


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({"num_head_channels": 32}, {}, "num_heads=2 and num_head_channels=32: give one"),
        ({"num_heads": None}, {}, "num_heads=None and num_head_channels=None: give one"),
        ({"num_classes": 3, "vector_dim": 3}, {}, "num_classes=3 and vector_dim=3"),
        ({"num_heads": (2, 4, 4)}, {}, r"num_heads=\(2, 4, 4\): give one value .* 2 levels"),
        ({"only_cross_attention": (True,)}, {}, r"only_cross_attention=\(True,\): give one value"),
        ({"model_channels": 48}, {}, "48 channels cannot be normalized"),
        ({}, {"x": draw(2, 8, 8, 3)}, r"x of shape \(2, 8, 8, 3\).*width, 4\]"),
        ({}, {"x": draw(2, 8, 7, 4)}, "multiples of 2"),
        ({}, {"context_blc": None}, "context of width None: the UNet takes width 24"),
        ({}, {"context_blc": draw(2, 5, 32)}, "context of width 32: the UNet takes width 24"),
        ({"spatial_transformer": False}, {}, "context of width 24: the UNet takes width None"),
        ({}, {"context_blc": draw(3, 5, 24)}, "context of batch 3 for x of batch 2: give as many"),
        ({}, {"label": np.zeros(2, int)}, "takes no label"),
        ({"num_classes": 3}, {}, r"needs a label \(num_classes=3"),
    ],
)
def test_refuses_what_does_not_fit(changes, given, message):
    model = unet.from_config(dataclasses.replace(TINY, **changes))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda g: model.init(KEY, **g), inputs(TINY) | given)


def test_example_inputs_fit_and_are_small():
    for changes in ({}, {"num_classes": 3}, {"vector_dim": 3}, {"context_dim": None}):
        model = unet.from_config(dataclasses.replace(TINY, **changes))
        out, _ = jax.eval_shape(model.init_with_output, KEY, *unet.example_inputs(model))
        assert out.shape == (1, 2, 2, 3)


def test_from_config_passes_every_field():
    model = unet.from_config(TINY, dtype=jnp.bfloat16, attention=attention.chunked, remat=True)
    for field in dataclasses.fields(TINY):
        assert getattr(model, field.name) == getattr(TINY, field.name)
    assert (model.dtype, model.attention, model.remat) == (jnp.bfloat16, attention.chunked, True)
