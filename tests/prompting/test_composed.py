"""Prompts in webui's syntax against the rules written out again, on a tiny model."""

import functools

import jax
import numpy as np
import pytest
import text_model

from ldm_jax import diffusion, sampling
from ldm_jax.adapters import textual_inversion
from ldm_jax.conditioning import Cond, at_step
from ldm_jax.prompting import composed
from ldm_jax.runtime import images

STEPS, SIZE = 4, 10  # tokens of a chunk
SPACING = {"spacing": "trailing"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return text_model.make(text_model.clip_tokenizer(tmp_path_factory.mktemp("words") / "clip"))


def read(model, texts, negatives=None, **options):
    negatives = [""] * len(texts) if negatives is None else negatives
    given = {"steps": STEPS, "syntax": "webui", **options}
    return composed.batch(model, texts, negatives, **given)


def contexts(model, texts, chunks=None, keep=True):
    """[texts, n l, c] of the schedule of one prompt: texts are lists of pieces in chunks."""
    start, end = model.tokenizer.encode([""])[0, :2]
    most = max(map(len, texts))
    z = np.zeros((len(texts), most, SIZE + 2, 32))
    weighted = np.zeros_like(z)
    for v, text in enumerate(texts):
        for n, pieces in enumerate(text + [[]] * (most - len(text))):
            ids = [i for piece, _ in pieces for i in model.tokenizer.ids(piece)]
            weights = [w for piece, w in pieces for _ in model.tokenizer.ids(piece)]
            row = np.asarray([[start, *ids, *[end] * (SIZE + 1 - len(ids))]])
            z[v, n] = model.cond_stage.apply({"params": model.params["cond_stage"]}, row)[0]
            weighted[v, n] = (
                z[v, n] * np.asarray([1, *weights, *[1] * (SIZE + 1 - len(ids))])[:, None]
            )
    if keep:
        for n in range(most):
            weighted[:, n] *= z[:, n].mean() / weighted[:, n].mean()
    out = weighted.reshape(len(texts), -1, 32)
    if chunks is not None:
        rest = chunks * (SIZE + 2) - out.shape[1]
        out = np.concatenate([out, np.repeat(out[:, -1:], rest, axis=1)], axis=1)
    return out


CASES = {
    "weights": (
        "red (disc:1.4) [blue]",
        [[[("red ", 1), ("disc", 1.4), (" ", 1), ("blue", 1 / 1.1)]]],
    ),
    "break": ("red BREAK (blue:2)", [[[("red", 1)], [("blue", 2)]]]),
    "schedule": ("[red:(blue:1.5):0.5] sq", [[[("red sq", 1)]], [[("blue", 1.5), (" sq", 1)]]]),
}


@pytest.mark.parametrize("mode", ["original", "no-norm"])
@pytest.mark.parametrize("name", CASES)
def test_contexts_are_those_of_the_rules(model, name, mode):
    prompt, texts = CASES[name]
    cond, null = model.encode(read(model, [prompt], mode=mode))
    expected = contexts(model, texts, keep=mode == "original")
    found = np.asarray(cond.context)[0, 0, : len(texts)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    padded = contexts(model, [[[]]], chunks=len(texts[0]))
    np.testing.assert_allclose(null.context[0, 0, 0], padded[0], rtol=1e-4, atol=1e-5)


def test_modes_without_weights(model):
    arrays = {mode: read(model, ["red (blue:2)"], mode=mode) for mode in ("ignore", "none")}
    assert (arrays["ignore"]["token_weights"] == 1).all()
    plain = read(model, ["red (blue:2)"], syntax="plain")
    np.testing.assert_array_equal(arrays["none"]["tokens"], plain["tokens"])


def test_a_step_reads_the_first_text_whose_last_step_is_not_before_it(model):
    batch = read(model, ["[red:blue:2]", "[red|blue]"])
    assert batch["steps"][:, 0].tolist() == [[0, 0, 0, 1], [0, 0, 1, 0]]
    assert batch["text_counts"][:, 0].tolist() == [[1, 1], [2, 2]]
    cond, _ = model.encode(batch)
    for step, text in enumerate(batch["steps"][0, 0]):
        np.testing.assert_array_equal(at_step(cond, step).context[0, 0], cond.context[0, 0, text])


@pytest.mark.parametrize("solver", ["ddim", pytest.param("heun", marks=pytest.mark.slow)])
def test_images_are_those_of_a_loop_over_the_steps(model, solver):
    """Each step of a solver without memory, alone, on the context that the rules give it."""
    cond, null = model.encode(read(model, ["[red:(blue:1.5):2] AND disc:0.5"]))
    keys, options = sampling.keys(0, 1), {"solver": solver, "decode": False}
    sample = jax.jit(sampling.make_sampler(model, STEPS, **options, **SPACING))
    found = sample(model.params, cond, keys, null, 3.0)
    first = contexts(model, [[[("red ", 1)]], [[("blue", 1.5), (" ", 1)]]])
    second, away = contexts(model, [[[(" disc", 1)]]])[0], contexts(model, [[[]]])[0]
    levels = sampling.levels_of(model, STEPS, "trailing", solver)
    x = diffusion.rowwise_normal(jax.vmap(jax.random.split)(keys)[:, 0], model.latent_shape)
    nothing = Cond(context=np.zeros((1, SIZE + 2, 32), np.float32))
    for step in range(STEPS):
        words = (first[int(step > 2)], second, away)
        alone = sampling.make_sampler(
            model,
            levels=jax.tree.map(lambda column, i=step: column[i : i + 1], levels),
            wrap_model=functools.partial(guided, words=words),
            **options,
        )
        x = alone(model.params, nothing, keys, x_T=x)
    np.testing.assert_allclose(found, x, atol=2e-4)
    pictures = [images.to_uint8(model.decode(z)).astype(int) for z in (found, x)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def guided(net, words):
    """model(x, t, _): towards the first of `words`, and half as much to the second."""

    def model_of(x, t, _):
        conds = (Cond(context=np.asarray(word, np.float32)[None]) for word in words)
        one, two, null = (net(x, t, cond) for cond in conds)
        return null + 3.0 * ((one - null) + 0.5 * (two - null))

    return model_of


def test_new_words_are_other_arrays_of_one_program(model):
    traced = []

    def run(params, batch, keys):
        traced.append(1)
        return sample(params, *encode(params, batch), keys)

    sampler = sampling.make_sampler(model, STEPS, **SPACING)
    encode = lambda params, batch: model.encode(batch, params)  # noqa: E731
    sample = lambda params, cond, null, keys: sampler(params, cond, keys, null, 2.0)  # noqa: E731
    jitted = jax.jit(run)
    for prompt in ("[red:blue:0.5]", "[(disc:1.3)|sq]", "[a:0.5]"):
        jitted(model.params, read(model, [prompt]), sampling.keys(0, 1))
    assert len(traced) == 1


def test_a_long_text_is_read_in_chunks(model):
    batch = read(model, ["red " * 23, "a"], syntax="plain")
    assert batch["tokens"].shape == (2, 1, 1, 3, SIZE + 2)
    assert batch["chunk_counts"].ravel().tolist() == [3, 1]


def test_learned_words_stand_bare(model):
    width = model.config.cond.encoder.width
    word = textual_inversion.Embedding("<cat>", np.ones((3, width), np.float32))
    known = textual_inversion.added(model, [word])
    batch = read(known, ["red Cat concatenate"])
    first = known.tokenizer.vocab_size - 3
    ids = batch["tokens"][0, 0, 0, 0].tolist()
    assert ids[2:5] == [first, first + 1, first + 2]
    assert sum(i >= first for i in ids) == 3


def test_what_cannot_be_read_is_refused(model):
    with pytest.raises(ValueError, match="has 20001 characters, 20000 at most"):
        read(model, ["a" * 20_001])
    with pytest.raises(ValueError, match="chunks of 10 tokens, 64 at most"):
        read(model, ["a " * 700])
    texts = "[" + "|".join(f"{'a ' * 40}{i}" for i in range(4)) + "]"
    with pytest.raises(ValueError, match="has 320 chunks in its 16 parts of up to 4 texts"):
        read(model, [" AND ".join([texts] * 16)])
    with pytest.raises(ValueError, match="has no start and end tokens"):
        read(text_model.make(), ["a"])
