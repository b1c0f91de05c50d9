"""What stands in the compiled sampler: prompt projections before the loop, one call per step."""

import collections
import dataclasses
import logging
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import task_models
from reference import draw, max_difference

from ldm_jax import bundle, sampling, schema
from ldm_jax.conditioning import Cond
from ldm_jax.cost import flops
from ldm_jax.large import windows

SHAPE, ROWS, TOKENS = (4, 4, 4), 2, 3
KEYS = jax.random.split(jax.random.key(0), ROWS)
COND, NULL = Cond(context=draw(ROWS, TOKENS, 32)), Cond(context=draw(ROWS, TOKENS, 32, seed=2))
INIT, HOLE = draw(ROWS, *SHAPE, seed=3), np.float32(draw(ROWS, 4, 4, 1, seed=4) > 0)


@pytest.fixture(scope="module")
def model():
    return task_models.make(
        schema.ClassCondConfig(num_classes=4, embed_dim=32),
        **{**task_models.CONTEXT, "attention_downsample": ()},  # in the middle block alone
    )


def made(model, steps=4, **options):
    return sampling.make_sampler(model, shape=SHAPE, steps=steps, decode=False, **options)


# --- cross-attention ----------------------------------------------------------------------------


def loops(program):
    """(lines within loops, other lines) of an optimized program."""
    lines, name = collections.defaultdict(list), None
    for line in program.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line)
        if header:
            name = header[1]
        elif name is not None:
            lines[name].append(line)
    refers = {n: {*re.findall(r"[\w.-]+", "\n".join(lines[n]))} & lines.keys() for n in lines}
    inside, found = set(), {*re.findall(r"body=%?([\w.-]+)", program)}
    while found:
        inside |= found
        found = {other for name in found for other in refers[name]} - inside
    return tuple(
        "\n".join(line for n in lines if (n in inside) == within for line in lines[n])
        for within in (True, False)
    )


WAYS = {
    "plain": {},
    "guided": {},
    "interval, start and mask": {"guidance_interval": (100, 700)},
    "windows": {"wrap_model": lambda net: windows.windowed(net, window=(4, 2), stride=(4, 2))},
    "recomputed": {"remat": True},
}
QUICK = ("interval, start and mask",)  # in the others the compiler hoists by itself, on a CPU


@pytest.mark.parametrize(
    "way", [w if w in QUICK else pytest.param(w, marks=pytest.mark.slow) for w in WAYS]
)
def test_keys_and_values_of_a_prompt_stand_outside_the_loop(model, way):
    sample = made(model, **WAYS[way])
    guides = None if way == "plain" else NULL

    def run(params, cond, keys, null, start, init, mask):
        given = (start, init, mask) if "start" in way else ()
        return sample(params, cond, keys, null, 3.0, 0.0, None, *given)

    arguments = (model.params, COND, KEYS, guides, 1, INIT, HOLE)
    program = jax.jit(run).lower(*arguments).compile().as_text()
    inside, outside = loops(program)
    for part in ("to_k", "to_v"):
        assert f"attn2/{part}/" in outside
        assert f"attn2/{part}/" not in inside
        assert f"attn1/{part}/" in inside  # of the image: made at every level
    assert "attn2/to_q/" in inside


def test_projected_conditions_give_the_same_prediction(model):
    x, t = draw(ROWS, *SHAPE), np.array([3, 700])

    @jax.jit
    def predictions(params):
        predict, given = (
            bundle.bind(model.unet, params),
            bundle.with_kv_cache(model.unet, params, COND),
        )
        # the context itself is not read any more
        conditions = (COND, given, given._replace(context=NULL.context), NULL)
        return [predict(x, t, cond) for cond in conditions]

    plain, kv_cache, elsewhere, other = predictions(model.params["unet"])
    np.testing.assert_array_equal(kv_cache, plain)
    np.testing.assert_array_equal(elsewhere, plain)
    assert np.abs(other - plain).max() > 1e-3
    assert bundle.with_kv_cache(model.unet, model.params["unet"], Cond()) == Cond()


def test_a_self_attention_that_reads_the_context_is_projected_too():
    """`only_cross_attention`, as in the x4 upscaler."""
    upscaler = task_models.make(
        schema.ClassCondConfig(num_classes=4, embed_dim=32),
        **task_models.CONTEXT,
        only_cross_attention=(True,),
    )
    params = upscaler.params["unet"]
    given = jax.eval_shape(lambda: bundle.with_kv_cache(upscaler.unet, params, COND)).kv_cache
    for kind, names in (("down_blocks_0", {"attn1", "attn2"}), ("mid_block", {"attn2"})):
        block = given[kind]["attentions_0"]["transformer_blocks_0"]
        assert block.keys() == names
        for k, v in (block[name]["keys_values"] for name in names):
            assert k.shape == v.shape == (ROWS, TOKENS, 2, 16)


# --- cost ---------------------------------------------------------------------------------------


def test_a_step_costs_one_call_and_guidance_one_of_twice_the_context(model):
    net, params = model.unet, model.params["unet"]

    def one_call(rows, contexts):
        x, cond = jnp.zeros((rows, *SHAPE)), Cond(context=jnp.zeros((contexts, TOKENS, 32)))
        kv_cache = jax.eval_shape(lambda cond: bundle.with_kv_cache(net, params, cond), cond)
        call = lambda x, cond: bundle.bind(net, params)(x, jnp.zeros(rows), cond)  # noqa: E731
        return flops.count(jax.make_jaxpr(call)(x, kv_cache))

    def one_step(null=NULL, **options):
        def cost(steps):
            sample = made(model, steps, **options)
            scale = jnp.float32(3)
            return flops.count(jax.make_jaxpr(sample)(model.params, COND, KEYS, null, scale))

        return cost(5) - cost(4)

    assert one_step(null=None) == one_call(ROWS, ROWS)
    assert one_step() == one_call(ROWS, 2 * ROWS)
    # windows get every row: what is before the context is then computed for each
    assert one_step(wrap_model=lambda net: net) == one_call(2 * ROWS, 2 * ROWS)
    assert one_call(ROWS, 2 * ROWS) < one_call(2 * ROWS, 2 * ROWS)


def test_guidance_sends_nothing_between_devices_that_hold_rows(model):
    rows = jax.sharding.NamedSharding(
        jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
        jax.sharding.PartitionSpec("data"),
    )
    sample = jax.jit(made(model), in_shardings=(None, rows, rows, rows, None))
    cond = Cond(context=draw(4, TOKENS, 32))
    keys = jax.random.split(KEYS[0], 4)
    program = sample.lower(model.params, cond, keys, cond, 3.0).compile()
    assert program.output_shardings.is_equivalent_to(rows, 4)
    sent = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    assert re.findall(rf"= .*\b(?:{sent})(?:-start)?\(.*", program.as_text()) == []


# --- compilations -------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_one_compilation_for_every_request(model, guided, caplog):
    sample, null = made(model), NULL if guided else None

    @jax.jit
    def sampler(params, context, keys, scale, eta, start, init, mask):
        return sample(
            params, Cond(context=context), keys, null, scale, eta, None, start, init, mask
        )

    first = [COND.context, KEYS, 3.0, 0.0, 1, INIT, HOLE]
    names = ("prompt", "seed", "scale", "eta", "start", "init", "mask")
    others = [NULL.context, jax.random.split(jax.random.key(1), ROWS), 7.5, 0.6, 2, -INIT, 1 - HOLE]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        expected = np.asarray(sampler(model.params, *first))
        for i, name in enumerate(names):
            request = [*first[:i], others[i], *first[i + 1 :]]
            found = np.asarray(sampler(model.params, *request))
            if guided or name != "scale":
                assert np.abs(found - expected).max() > 1e-4, name
        repeated = np.asarray(sampler(model.params, *first))
    np.testing.assert_array_equal(repeated, expected)
    compiled = [r for r in caplog.messages if re.match(r"Compiling (jit\()?sampler\b", r)]
    assert len(compiled) == 1, compiled


# --- memory and numbers -------------------------------------------------------------------------


def test_the_latent_takes_the_place_of_a_donated_buffer(model):
    sample, x_T = made(model), jnp.array(INIT)

    def run(name, params, given):
        return sample(params, COND, KEYS, NULL, 3.0, **{"start": 1, name: given})

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Some donated buffers were not usable"
        for name in ("x_T", "init"):
            jitted = jax.jit(run, static_argnums=0, donate_argnums=2)
            program = jitted.lower(name, model.params, x_T)
            assert program.as_text().count("tf.aliasing_output") == 1
    compiled = program.compile()
    assert compiled.memory_analysis().alias_size_in_bytes == x_T.nbytes
    assert np.isfinite(compiled(model.params, x_T)).all()
    assert x_T.is_deleted()


def in_bfloat16(model):
    return dataclasses.replace(model, unet=model.unet.clone(dtype=jnp.bfloat16))


def test_bfloat16_is_what_the_network_computes_in(model):
    arguments = (model.params, COND, KEYS, NULL, 3.0)
    program = jax.make_jaxpr(made(in_bfloat16(model)))(*arguments)
    assert [x.dtype for x in program.out_avals] == [jnp.float32]
    assert {*re.findall(r":(\w+)\[[\d,]*\] = conv_general_dilated", str(program))} == {"bf16"}


@pytest.mark.slow
def test_bfloat16_draws_nearly_the_same_latents(model):
    arguments, low = (model.params, COND, KEYS, NULL, 3.0), in_bfloat16(model)
    found, expected = jax.jit(lambda *a: (made(low)(*a), made(model)(*a)))(*arguments)
    error = max_difference(found, expected) / float(np.abs(expected).max())
    assert 0 < error < 0.03
