"""CLIP's text and image transformers equal those of transformers, from its names and OpenAI's."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import draw, filled, weight

from ldm_jax import schema
from ldm_jax.convert import table, text_tables
from ldm_jax.models import clip, self_attention

KEY = jax.random.key(0)
V1 = schema.CLIPTextConfig(
    vocab_size=99, max_length=13, width=32, num_layers=3, num_heads=4, mlp_width=48
)
V2 = dataclasses.replace(V1, activation="gelu", layer="penultimate")
VISION = schema.CLIPVisionConfig(
    image_size=12, patch_size=4, width=32, num_layers=2, num_heads=4, mlp_width=48, projection_dim=7
)
IDS = np.random.default_rng(0).integers(0, 99, (3, 13))


def text_shapes(config):
    model = clip.text_from_config(config)
    return jax.eval_shape(model.init, KEY, jnp.zeros((1, 1), jnp.int32))["params"]


def vision_shapes(config):
    model = clip.vision_from_config(config)
    images = jnp.zeros((1, config.image_size, config.image_size, 3))
    return jax.eval_shape(model.init, KEY, images)["params"]


def run(model, params, x):
    return jax.jit(model.apply)({"params": params}, x)


def text(config, ids, dtype=jnp.float32):
    model = clip.text_from_config(config, dtype=dtype, precision="highest")
    return run(model, filled(text_shapes(config)), ids)


def set_weights(module, prefix):
    """Fills a torch module by formula; its state dict, as a file has it with `prefix`."""
    import torch

    made = {name: weight(name, tuple(x.shape)) for name, x in module.state_dict().items()}
    module.load_state_dict({name: torch.tensor(x) for name, x in made.items()})
    return {prefix + name: x for name, x in made.items()}


def open_clip_names(state_dict, renamed):
    """transformers' names and tensors as OpenAI and OpenCLIP write them."""
    out = {}
    for name, x in state_dict.items():
        name = name.removeprefix("text_model.").replace("encoder.layers", "transformer.resblocks")
        for theirs, ours in (
            ("layer_norm", "ln_"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("self_attn.out_proj", "attn.out_proj"),
            *renamed,
        ):
            name = name.replace(theirs, ours)
        out[name] = x
    for name in [name for name in out if "q_proj" in name]:
        parts = [out.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        stacked = name.replace("self_attn.q_proj.", "attn.in_proj_")
        out[stacked] = np.concatenate(parts)
    return out


def check_both_ways(rows, state_dict, shapes, expected):
    """The table gives `expected` from the tensors, and the tensors back from that."""
    params = table.from_torch(rows, state_dict, shapes)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    back = table.to_torch(rows, params)
    assert back.keys() == state_dict.keys()
    for name, x in state_dict.items():
        np.testing.assert_array_equal(back[name], x)


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="torch is the reference here")
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module", params=[V1, V2], ids=["v1", "v2"])
def text_pair(request, transformers):
    """(config, theirs, its state dict by formula)."""
    config = request.param
    theirs = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=config.vocab_size, hidden_size=config.width,
            intermediate_size=config.mlp_width, num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads, max_position_embeddings=config.max_length,
            hidden_act=config.activation,
        )
    ).eval()  # fmt: skip
    return config, theirs, set_weights(theirs, "text_model.")


@pytest.mark.torch
def test_text_equals_transformers(text_pair):
    import torch

    config, theirs, state_dict = text_pair
    params = table.from_torch(text_tables.clip_text(config), state_dict, text_shapes(config))
    model = clip.text_from_config(config, precision="highest")
    for ids in (IDS[:1], IDS[:, :7]):
        with torch.no_grad():
            states = theirs(torch.tensor(ids), output_hidden_states=True).hidden_states
            state = states[-1 if config.layer == "last" else -2]
            expected = theirs.final_layer_norm(state).numpy()
        got = run(model, params, ids)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.torch
def test_text_from_the_stacked_tensors_of_open_clip(text_pair):
    config, _, state_dict = text_pair
    expected = table.from_torch(text_tables.clip_text(config), state_dict, text_shapes(config))
    renamed = (
        ("embeddings.token_embedding", "token_embedding"),
        ("embeddings.position_embedding.weight", "positional_embedding"),
        ("final_ln_", "ln_final"),
    )
    theirs = open_clip_names(state_dict, renamed)
    assert theirs["transformer.resblocks.2.attn.in_proj_weight"].shape == (96, 32)
    assert {"positional_embedding", "ln_final.bias", "transformer.resblocks.0.ln_1.weight"} < set(
        theirs
    )
    check_both_ways(text_tables.open_clip_text(config), theirs, text_shapes(config), expected)


def test_no_token_sees_a_later_one():
    before, after = IDS, IDS.copy()
    after[:, 8] = (after[:, 8] + 1) % 99
    a, b = text(V1, before), text(V1, after)
    np.testing.assert_allclose(a[:, :8], b[:, :8], rtol=0, atol=1e-6)
    assert (np.abs(a - b)[:, 8:].max((0, 2)) > 1e-3).all()  # and each later one sees the change


def test_activations():
    x = np.array([1.0, -2.0], np.float32)
    exact = [0.8413447, -0.0455003]  # x Phi(x)
    np.testing.assert_allclose(clip.ACTIVATIONS["gelu"](x), exact, atol=1e-6)
    quick = [1 / (1 + np.exp(-1.702)), -2 / (1 + np.exp(3.404))]
    np.testing.assert_allclose(clip.ACTIVATIONS["quick_gelu"](x), quick, atol=1e-6)


def test_bfloat16_stays_close():
    exact, low = text(V1, IDS), text(V1, IDS, dtype=jnp.bfloat16)
    assert low.dtype == jnp.float32
    assert 1e-4 < float(np.abs(exact - low).max()) < 0.1


def test_softmax_is_in_float32_whatever_the_compute_type():
    a = jnp.ones((1, 3, 2, 4), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda a: self_attention.attend(a, a, a, causal=True))(a)
    assert re.findall(r"(\w+)\[[\d,]+\] = exp ", str(jaxpr)) == ["f32"]
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16


def test_norm_is_exact_far_from_zero():
    norm, x = self_attention.layer_norm("norm", jnp.float32), 1000 + draw(4, 64)
    got, _ = norm.init_with_output(KEY, x)
    wide = x.astype(np.float64)
    expected = wide - wide.mean(-1, keepdims=True)
    expected /= np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_sizes_of_the_published_encoders():
    def count(shapes):
        return sum(x.size for x in jax.tree.leaves(shapes))

    assert count(text_shapes(schema.CLIPTextConfig())) == 123_060_480
    assert count(vision_shapes(schema.CLIPVisionConfig())) == 303_966_208


def test_initial_weights():
    config = dataclasses.replace(V1, width=128, num_layers=2, mlp_width=512)
    model = clip.text_from_config(config)
    params = jax.jit(model.init)(KEY, IDS)["params"]["text_model"]
    block = params["encoder"]["layers"]["1"]
    for kernel, std in (
        (block["self_attn"]["q_proj"]["kernel"], 128**-0.5),
        (block["self_attn"]["out_proj"]["kernel"], 128**-0.5 / 2),
        (block["mlp"]["fc1"]["kernel"], 256**-0.5),
        (block["mlp"]["fc2"]["kernel"], 128**-0.5 / 2),
        (params["embeddings"]["token_embedding"]["embedding"], 0.02),
        (params["embeddings"]["position_embedding"]["embedding"], 0.01),
    ):
        assert float(kernel.std()) == pytest.approx(std, rel=0.1)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="14 tokens are more than the 13"):
        text(V1, np.zeros((1, 14), int))
    with pytest.raises(ValueError, match="width 32 is not a multiple of num_heads 5"):
        clip.text_from_config(dataclasses.replace(V1, num_heads=5))
    with pytest.raises(ValueError, match="1 layers have no penultimate one"):
        clip.text_from_config(dataclasses.replace(V2, num_layers=1))
    with pytest.raises(ValueError, match="image_size 12 is not a multiple of patch_size 5"):
        clip.vision_from_config(dataclasses.replace(VISION, patch_size=5))
    model = clip.vision_from_config(VISION)
    with pytest.raises(ValueError, match=r"\(16, 12, 3\), CLIP's are \(12, 12, 3\)"):
        jax.eval_shape(model.init, KEY, jnp.zeros((1, 16, 12, 3)))
