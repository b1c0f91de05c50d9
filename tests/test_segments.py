"""The sampler in segments: the images of the whole one, bit for bit, from three programs."""

import itertools

import jax
import numpy as np
import pytest

from ldm_jax import conditioning, loading, sampling

STEPS = 5
QUICK = {("ddim", True), ("dpmpp_3m_sde", False)}  # of solver and edits; the others are slow
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in itertools.product(
        ("ddim", "euler_ancestral", "plms", "dpmpp_2m", "dpmpp_3m_sde", "unipc", "heun"),
        (False, True),
    )
]


@pytest.fixture(scope="module")
def given(ldm_run):
    """(model, arguments of the sampler without start, init and mask)."""
    model = loading.load(ldm_run)
    batch = {"label": np.array([0, 3], np.int32)}
    arguments = (model.config.cond, model.cond_stage, model.params["cond_stage"], batch)
    cond, null = conditioning.from_batch(*arguments), conditioning.null_like(*arguments)
    return model, (model.params, cond, sampling.keys_of(1, [0, 1]), null, 2.0, 0.0)


@pytest.mark.parametrize(("solver", "edits"), CASES)
def test_segments_are_the_whole_bit_for_bit(given, solver, edits):
    model, arguments = given
    start, more = 0, ()
    if edits:
        rng = np.random.default_rng(0)
        init = np.float32(rng.normal(size=(2, *model.latent_shape)))
        mask = np.float32(rng.random((2, *model.latent_shape[:2], 1)) > 0.5)
        start, more = 1, (None, 1, init, mask)
    options = {"solver": solver, "spacing": "trailing"}
    parts = sampling.make_segments(model, STEPS, **options)
    begin, run, end = (jax.jit(x) for x in parts[:3])
    params, *others = arguments
    for steps, middle in ((STEPS, (2,)), (STEPS, (3, 4)), (STEPS + 2, (4,))):
        whole = jax.jit(sampling.make_sampler(model, steps, **options))(*arguments, *more)
        table = sampling.make_segments(model, steps, **options).table
        assert table.count == steps
        held, state = begin(params, table, *others, *more)
        for first, last in itertools.pairwise((start, *middle, table.count)):
            state = run(model.params, held, state, first, last)
        np.testing.assert_array_equal(end(model.params, held, state), whole)
    assert begin._cache_size() == run._cache_size() == end._cache_size() == 1


def test_what_segments_cannot_do(given):
    with pytest.raises(TypeError, match="make_segments has no option 'trace'"):
        sampling.make_segments(given[0], trace=lambda x, denoised: x)
