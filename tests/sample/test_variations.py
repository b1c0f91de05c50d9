"""`ldm-sample variations`: the ends of a path are the images of its stops."""

import dataclasses

import jax
import numpy as np
import pytest
import task_models
import text_model

from ldm_jax import conditioning, diffusion, sampling, schema, sharding
from ldm_jax.runtime import images
from ldm_jax.sample import variations

MESH = sharding.make_mesh(schema.MeshConfig())


@pytest.fixture(scope="module")
def classes():
    cond = schema.ClassCondConfig(num_classes=5, embed_dim=32)
    return task_models.make(cond, **task_models.CONTEXT)


@pytest.fixture(scope="module")
def run(classes, tmp_path_factory):
    return task_models.save(classes, tmp_path_factory.mktemp("classes"))


def test_the_sphere_between_two_vectors():
    a, b = np.float32([[3, 0], [1, 1], [0, 0]]), np.float32([[0, 1], [2, 2], [0, 4]])
    np.testing.assert_array_equal(variations.slerp(a, b, 0.0), a)
    np.testing.assert_array_equal(variations.slerp(a, b, 1.0), b)
    # orthogonal: 45 degrees at the mean norm; parallel, and from nothing: straight
    middle = [[2**0.5, 2**0.5], [1.5, 1.5], [0, 2]]
    np.testing.assert_allclose(variations.slerp(a, b, 0.5)[:2], middle[:2], rtol=1e-6)
    assert np.isfinite(variations.slerp(a, b, 0.5)).all()
    opposite = variations.slerp(a[:1], -a[:1], 0.25)
    np.testing.assert_allclose(opposite, [[1.5, 0]], atol=1e-6)
    noise = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    assert 0.9 < variations.slerp(*noise, 0.5, axis=None).std() < 1.1  # a mean has 0.7


def drawn(model, labels, seeds):
    """First images of seeds and classes, as uint8, without the command."""
    arguments = (model.config.cond, model.cond_stage, model.params["cond_stage"])
    batch = {"label": np.array(labels)}
    cond, null = (
        conditioning.from_batch(*arguments, batch),
        conditioning.null_like(*arguments, batch),
    )
    keys = jax.numpy.concatenate([sampling.keys_of(seed, [0]) for seed in seeds])
    draw = jax.jit(sampling.make_sampler(model, shape=(8, 8, 4), steps=2))
    return images.to_uint8(np.asarray(draw(model.params, cond, keys, null, 1.5))).astype(int)


def test_a_path_between_seeds_and_classes(classes, run, tmp_path):
    flags = ["--model", run, "--out", tmp_path, "--seeds", 1, 9, "--labels", 3, 0]
    assert task_models.sample("variations", *flags, "--num-images", 3) == 0
    made = [task_models.pixels(tmp_path / f"0000{i}_leg0_00{i}.png") for i in range(3)]
    expected = drawn(classes, [3, 0], [1, 9])
    assert np.abs(made[0] - expected[0]).max() <= 1
    assert np.abs(made[2] - expected[1]).max() <= 1
    assert min(np.abs(made[1] - end).max() for end in expected) > 5
    kept = images.read_settings(tmp_path / "00001_leg0_001.png")
    assert (kept["from_to"], kept["position"], kept["index"]) == ("3 > 0", 0.5, 1)
    # far ones differ more than near ones
    near, far = (np.abs(made[0] - other).mean() for other in made[1:])
    assert near < far


def test_variations_lie_near_the_image(classes):
    options = variations.Options(model="", out="", seeds=(4,), labels=(3,), num_images=3)
    noise = {}
    for strength in (0.0, 0.2, 1.0):
        near = dataclasses.replace(options, strength=strength)
        variations.check(near)
        stops, names, null = variations.conditions(classes, MESH, near, guided=False)
        assert null is None
        batch = variations.batch_of(classes, near, variations.legs(near, names), stops, null)
        np.testing.assert_array_equal(batch["embedding"], stops.repeat(3, axis=0))
        noise[strength] = batch["x_T"]
    first = noise[0.0][0]
    np.testing.assert_array_equal(noise[0.0], first[None].repeat(3, axis=0))
    np.testing.assert_array_equal(noise[0.2][0], first)
    assert np.abs(noise[0.2][1:] - first).mean() < 0.3 * np.abs(noise[1.0][1:] - first).mean()
    # at full strength it is that of the seed's next images
    keys = jax.vmap(jax.random.split)(sampling.keys_of(4, [0, 1, 2]))[:, 0]
    np.testing.assert_array_equal(noise[1.0], diffusion.rowwise_normal(keys, (8, 8, 4)))


@pytest.mark.slow
def test_a_path_between_prompts():
    model = text_model.make()
    options = variations.Options(model="", out="", prompt=("a disc", "a square"), seeds=(2,))
    variations.check(options)
    context, names, null = variations.conditions(model, MESH, options, guided=True)
    assert context.shape == (2, 12, 32)
    (leg,) = variations.legs(options, names)
    batch = variations.batch_of(model, options, [leg], context, null)
    assert {name: x.shape for name, x in batch.items()} == {
        "x_T": (8, 8, 8, 4), "embedding": (8, 12, 32), "null_embedding": (8, 12, 32)
    }  # fmt: skip
    np.testing.assert_allclose(batch["embedding"][[0, -1]], context, atol=1e-6)
    np.testing.assert_array_equal(batch["x_T"], batch["x_T"][:1].repeat(8, axis=0))
    config = variations.conditioned_on_embeddings(model).config.cond
    cond = conditioning.from_batch(config, None, {}, batch)
    np.testing.assert_array_equal(cond.context, batch["embedding"])
    none = conditioning.null_like(config, None, {}, batch)
    encoded = model.cond_stage.apply(
        {"params": model.params["cond_stage"]}, model.tokenizer.encode([""])
    )
    np.testing.assert_allclose(none.context[:1], encoded, atol=1e-5)


def test_rows_of_longer_paths():
    def rows(names, **given):
        options = variations.Options(model="", out="", **given)
        return [(leg.seeds, leg.stops, leg.name) for leg in variations.legs(options, names)]

    assert rows(["7"], seeds=(1, 2, 3)) == [((1, 2), (0, 0), "1 > 2"), ((2, 3), (0, 0), "2 > 3")]
    assert rows(["7", "8"], seeds=(5,)) == [((5, 5), (0, 1), "7 > 8")]
    assert rows(["7", "8"], seeds=(5, 6)) == [((5, 6), (0, 1), "7 > 8")]
    assert rows(["7", "8"], seeds=(5,), strength=0.1) == [
        ((5, 5), (0, 0), "7"), ((5, 5), (1, 1), "8")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labels", "3"], "give two or more of --seeds, --labels or --prompt"),
        (["--labels", "3", "--seeds", "1"], "give two or more of --seeds"),
        (["--seeds", "1", "2"], "is trained with class label: give --labels"),
        (["--prompt", "a", "b"], "is trained with class label: give --labels"),
        (["--labels", "3", "5"], "--labels 5 is not in 0..4"),
        (["--labels", "1", "2", "3", "--seeds", "1", "2"], "2 of --seeds and 3 of --labels"),
        (["--labels", "1", "2", "--prompt", "a"], "give --labels or --prompt, not both"),
        (["--labels", "1", "2", "--num-images", "1"], "--num-images 1: a path has at least 2"),
        (["--labels", "1", "2", "--eta", "0.5"], "--eta 0.5 draws new noise at every step"),
        (["--labels", "1", "2", "--solver", "ddpm"], "--solver ddpm draws new noise"),
        (["--labels", "1", "--strength", "1.5"], "--strength 1.5 is not in 0..1"),
        (["--labels", "1", "--strength", "0.5", "--seeds", "1", "2"], "give one of --seeds, not 2"),
        (["--labels", "1", "2", "--init-latents", "x"], "--init-latents has no use here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(run, tmp_path, capsys, flags, message):
    common = ["--model", run, "--out", tmp_path / "out"]
    task_models.assert_one_line("variations", capsys, message, *common, *flags)
