"""The BERT-style encoder equals the reference's and diffusers', from the names of either."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from reference import case, filled

from ldm_jax import schema
from ldm_jax.convert import table, text_tables
from ldm_jax.models import bert

KEY = jax.random.key(0)
TINY = schema.BERTTextConfig(
    vocab_size=99, max_length=13, width=24, num_layers=2, num_heads=2, head_width=20
)
IDS = np.random.default_rng(0).integers(0, 99, (3, 13))


def shapes(config):
    init = bert.from_config(config).init
    return jax.eval_shape(init, KEY, jnp.zeros((1, 1), jnp.int32))["params"]


def run(config, params, ids, **execution):
    model = bert.from_config(config, precision="highest", **execution)
    return jax.jit(model.apply)({"params": params}, ids)


def test_equals_the_reference():
    about, state_dict, arrays = case("bert_text")
    config = schema.BERTTextConfig(
        vocab_size=about["vocab"],
        max_length=about["max_len"],
        width=about["dim"],
        num_layers=about["depth"],
    )
    rows = text_tables.bert(config)
    params = table.from_torch(rows, state_dict, shapes(config))
    got = run(config, params, arrays["ids"])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, arrays["out"], rtol=0, atol=2e-5)
    back = table.to_torch(rows, params)
    assert {name: x.shape for name, x in back.items()} == {
        name: tuple(shape) for name, shape in about["parameters"].items()
    }


def test_every_token_sees_every_other():
    other = IDS.copy()
    other[:, 8] = (other[:, 8] + 1) % 99
    params = filled(shapes(TINY))
    difference = np.abs(run(TINY, params, IDS) - run(TINY, params, other))
    assert (difference.max((0, 2)) > 1e-4).all()


def test_recomputing_layers_changes_no_gradient():
    params = filled(shapes(TINY))

    def gradient(remat):
        model = bert.from_config(TINY, remat=remat, precision="highest")
        return jax.jit(jax.grad(lambda p: jnp.sin(model.apply({"params": p}, IDS)).sum()))(params)

    kept, recomputed = gradient(False), gradient(True)
    assert float(jnp.abs(kept["model"]["embed_tokens"]["embedding"]).max()) > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), kept, recomputed)
    head = traverse_util.flatten_dict(kept["to_logits"])  # takes no part
    assert all(not np.any(x) for x in head.values())


def test_initial_weights():
    config = schema.BERTTextConfig(
        vocab_size=64, max_length=64, width=128, num_layers=1, head_width=16
    )
    params = jax.jit(bert.from_config(config).init)(KEY, IDS)["params"]
    layer = params["model"]["layers_0"]
    for name in ("embed_tokens", "embed_positions"):
        assert float(params["model"][name]["embedding"].std()) == pytest.approx(0.02, rel=0.1)
    for part, fan_in in ((layer["fc1"], 128), (layer["fc2"], 512), (params["to_logits"], 128)):
        bound = fan_in**-0.5  # torch's Linear: uniform, weights and biases alike
        for x in part.values():
            assert 0.9 * bound < float(jnp.abs(x).max()) <= bound
    assert "bias" not in layer["self_attn"]["q_proj"]


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="14 tokens are more than the 13"):
        run(TINY, {}, np.zeros((1, 14), int))
