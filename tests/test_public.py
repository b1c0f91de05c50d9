"""The public surface, as people hold it: names, signatures, one sentence for each mistake."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recipes
import task_models
import text_model

import ldm_jax
from ldm_jax import conditioning, data, diffusion, loading, schema, sharding, solvers, train_state
from ldm_jax.conditioning import Cond
from ldm_jax.models import AutoencoderKL, AutoencoderVQ, UNet
from ldm_jax.train import frozen, ldm, step

NAMES = ("Cond", "keys", "load", "make_sampler", "prompts", "save")


@pytest.fixture(scope="module")
def model():
    """Four classes, latents of 8x8x4."""
    cond = schema.ClassCondConfig(num_classes=4, embed_dim=32)
    return task_models.make(cond, **task_models.CONTEXT)


@pytest.fixture(scope="module")
def text():
    return text_model.make()


def test_public_names_are_no_modules():
    for name in NAMES:
        assert not inspect.ismodule(getattr(ldm_jax, name))
        assert name in dir(ldm_jax)
    assert ldm_jax.Cond is Cond
    assert {UNet.__name__, AutoencoderKL.__name__, AutoencoderVQ.__name__} == {
        *("UNet", "AutoencoderKL", "AutoencoderVQ")
    }


def test_signatures_are_those_of_the_design(model):
    def names(function):
        return list(inspect.signature(function).parameters)

    assert names(ldm_jax.load)[:5] == ["path", "step", "ema", "mesh", "dtype"]
    assert names(ldm_jax.save)[:3] == ["model", "path", "params"]
    assert names(ldm_jax.prompts) == ["model", "texts", "negative"]
    assert names(ldm_jax.keys) == ["seed", "n", "first"]
    assert names(ldm_jax.make_sampler)[:5] == ["model", "steps", "shape", "solver", "spacing"]
    assert names(ldm_jax.make_sampler(model)) == [
        *("params", "cond", "keys", "null", "guidance_scale", "eta", "x_T", "start", "init"),
        "mask",
        "step_noise",
    ]
    assert names(model.encode) == ["batch", "params"]
    assert names(model.encode_image) == ["images", "params", "key"]
    assert names(model.decode) == ["latent", "params"]
    assert names(ldm.make_loss) == ["config", "frozen", "mesh"]
    assert names(step.make_step)[:4] == ["loss", "tx", "config", "mesh"]
    assert names(frozen.prepare)[:4] == ["config", "workdir", "mesh", "stream"]


def test_repr_is_a_line_for_each_part(model, text):
    lines = repr(model).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:4]] == [
        *("unet", "first_stage", "cond_stage")
    ]
    assert len(lines) == 5
    assert "condition: class label" in lines[4]
    assert "ByteTokenizer" in repr(text)
    assert len(repr(model)) < 500


# --- keys ---------------------------------------------------------------------------------------


def test_keys_of_small_seeds_are_as_before():
    for seed in (0, 7, 2**31, 2**32 - 1):
        expected = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(3))
        assert (ldm_jax.keys(seed, 3) == expected).all()
    assert (ldm_jax.keys(7, 2, first=1) == ldm_jax.keys(7, 3)[1:]).all()


def test_all_64_bits_of_a_seed_count():
    seeds = (5, 2**32 + 5, 2**33 + 5, 2**63 + 5, 2**64 - 1)
    found = {np.asarray(jax.random.key_data(ldm_jax.keys(seed, 1))).tobytes() for seed in seeds}
    assert len(found) == len(seeds)
    last = ldm_jax.keys(5, 3, first=2**32 - 3)
    assert len({np.asarray(key).tobytes() for key in jax.random.key_data(last)}) == 3
    assert (last[2:] == ldm_jax.keys(5, 1, first=2**32 - 1)).all()
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=r"is not in 0\.\.2\*\*64 - 1"):
            ldm_jax.keys(seed, 1)
    with pytest.raises(ValueError, match="the range for one seed"):
        ldm_jax.keys(5, 2, first=2**32 - 1)


# --- conditions ---------------------------------------------------------------------------------


def test_encode_gives_the_condition_and_its_null(model):
    batch = {"label": np.array([1, 3])}
    cond, null = model.encode(batch)
    given = (model.config.cond, model.cond_stage, model.params["cond_stage"], batch)
    np.testing.assert_array_equal(cond.context, conditioning.from_batch(*given).context)
    np.testing.assert_array_equal(null.context, conditioning.null_like(*given).context)
    doubled = jax.tree.map(lambda x: 2 * x, model.params)
    other, _ = jax.jit(model.encode)(batch, doubled)  # parameters are arguments
    np.testing.assert_allclose(other.context, 2 * cond.context, rtol=1e-6)


def test_models_without_a_null_have_none():
    without = schema.ClassCondConfig(num_classes=4, embed_dim=32, null_class=False, dropout=0.0)
    for cond, changes in ((None, {}), (without, task_models.CONTEXT)):
        made = task_models.make(cond, **changes)
        assert made.encode({"label": np.array([0])})[1] is None


def test_prompts_and_their_negatives(text):
    batch = ldm_jax.prompts(text, ["a red square", "a disc"], negative="blurry")
    tokens = text.tokenizer.encode(["a red square", "a disc", "blurry"])
    np.testing.assert_array_equal(batch["tokens"], tokens[:2])
    np.testing.assert_array_equal(batch["null_tokens"], tokens[[2, 2]])
    cond, null = text.encode(batch)
    assert cond.context.shape == null.context.shape
    assert np.abs(cond.context - null.context).max() > 1e-3


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"label": [1, 3]}, r"batch\['label'\] is a list: give an array"),
        ({"lable": np.array([1])}, r"no 'label', .* class label needs; is 'lable' meant as that"),
        ({}, r"no 'label', .*\(it has nothing\)"),
        ({"label": np.array([1, 5])}, r"holds 5, but the model's classes are 0\.\.3, and 4 for"),
        ({"label": np.array([-1])}, r"holds -1, but the model's classes are 0\.\.3"),
        ({"label": np.array([1.0])}, r"of type float64: give integers"),
        ({"label": np.array(1)}, r"is one number: give an array with one for each image"),
    ],
)
def test_a_wrong_batch_is_one_sentence(model, batch, message):
    with pytest.raises(ValueError, match=message):
        model.encode(batch)


def test_wrong_prompts_are_one_sentence(model, text):
    with pytest.raises(ValueError, match="not conditioned on text"):
        ldm_jax.prompts(model, ["a disc"])
    with pytest.raises(TypeError, match="prompts 'a disc': give a list of texts"):
        ldm_jax.prompts(text, "a disc")
    with pytest.raises(ValueError, match="2 prompts and 1 negative ones"):
        ldm_jax.prompts(text, ["a", "b"], negative=["c"])
    batch = ldm_jax.prompts(text, ["a", "b"])
    with pytest.raises(ValueError, match="2 of 'tokens', 1 of 'null_tokens'"):
        text.encode(batch | {"null_tokens": batch["null_tokens"][:1]})


# --- sampling -----------------------------------------------------------------------------------


def test_guidance_runs_if_and_only_if_null_is_given(model):
    sample = jax.jit(ldm_jax.make_sampler(model, steps=2))
    cond, null = model.encode({"label": np.array([1, 3])})
    keys = ldm_jax.keys(0, 2)
    plain = sample(model.params, cond, keys)
    np.testing.assert_allclose(
        sample(model.params, cond, keys, null, guidance_scale=1.0), plain, atol=1e-4
    )
    guided = sample(model.params, cond, keys, null, guidance_scale=4.0)
    assert np.abs(guided - plain).max() > 1e-3
    assert plain.shape == (2, 16, 16, 3)


def test_latents_and_images_lead_to_each_other(model):
    cond, _ = model.encode({"label": np.array([1, 3])})
    keys = ldm_jax.keys(0, 2)
    images = jax.jit(ldm_jax.make_sampler(model, steps=2))(model.params, cond, keys)
    latents = jax.jit(ldm_jax.make_sampler(model, steps=2, decode=False))(model.params, cond, keys)
    np.testing.assert_allclose(model.decode(latents), images, atol=1e-5)
    assert model.encode_image(images).shape == latents.shape == (2, *model.latent_shape)
    drawn = model.encode_image(images, key=jax.random.key(0))
    assert np.abs(drawn - model.encode_image(images)).max() > 0
    again = model.encode_image(images[1:], key=jax.random.fold_in(jax.random.key(0), 1)[None])
    np.testing.assert_allclose(again, drawn[1:], atol=1e-5)  # one key for each image


def test_a_solver_of_ones_own_is_taken(model):
    def halve(denoise, carry, x, level, keys):
        denoised = denoise(x, level)
        return carry, level.alpha_next * denoised.x0 + level.sigma_next * denoised.eps, denoised

    own = solvers.Solver(init=lambda x: (), step=halve)
    cond, _ = model.encode({"label": np.array([1])})
    given = (model.params, cond, ldm_jax.keys(0, 1))
    found = jax.jit(ldm_jax.make_sampler(model, steps=4, solver=own))(*given)
    np.testing.assert_allclose(
        found, jax.jit(ldm_jax.make_sampler(model, steps=4))(*given), atol=1e-4
    )


def test_a_wrong_call_is_one_sentence(model):
    sample = ldm_jax.make_sampler(model, steps=2)
    cond, null = model.encode({"label": np.array([1, 3, 0, 2])})
    keys = ldm_jax.keys(0, 4)
    with pytest.raises(TypeError, match=r"keys must be .* is Cond: the call is .*cond, keys, null"):
        sample(model.params, cond, null, keys, 1.5)
    with pytest.raises(TypeError, match=r"keys must be .* is NoneType: the call is"):
        sample(model.params, cond, None, keys, 1.0)
    with pytest.raises(TypeError, match=r"no option 'guided'; it is now make_sampler\(model"):
        ldm_jax.make_sampler(model, steps=2, guided=True)
    with pytest.raises(TypeError, match=r"no option 'stepz'$"):
        ldm_jax.make_sampler(model, stepz=2)
    with pytest.raises(ValueError, match=r"cond is of 4 images, and there are 1 keys: give"):
        sample(model.params, cond, keys[:1])
    with pytest.raises(ValueError, match=r"null is of 1 images, and there are 4 keys"):
        sample(model.params, cond, keys, jax.tree.map(lambda x: x[:1], null))
    with pytest.raises(ValueError, match=r"keys has the shape \(\)"):
        sample(model.params, cond, keys[0])
    with pytest.raises(ValueError, match=r"guidance_scale=7.5, but null is not given"):
        sample(model.params, cond, keys, guidance_scale=7.5)
    with pytest.raises(TypeError, match=r"cond and null are Cond, .* one is dict"):
        sample(model.params, {"label": 1}, keys)


# --- saving and loading -------------------------------------------------------------------------


def test_saved_parameters_come_back(model, tmp_path):
    doubled = jax.tree.map(lambda x: 2 * x, model.params)
    ldm_jax.save(model, tmp_path / "run", doubled)
    recipes.assert_same_bits(ldm_jax.load(tmp_path / "run").params, doubled)


def test_parameters_that_are_not_the_models_are_refused(model, tmp_path):
    missing = {**model.params, "unet": {}}
    with pytest.raises(ValueError, match="params are not those of the model: unet/"):
        ldm_jax.save(model, tmp_path / "run", missing)
    poisoned = jax.tree.map(lambda x: np.full_like(x, np.nan), model.params)
    with pytest.raises(ValueError, match="not finite; nothing is saved"):
        ldm_jax.save(model, tmp_path / "run", poisoned)
    assert not (tmp_path / "run").exists()


def test_a_first_stage_alone_encodes_and_decodes(model, tmp_path):
    ldm_jax.save(task_models.make(None), tmp_path / "pipeline", to="diffusers")
    whole = ldm_jax.load(tmp_path / "pipeline")
    folder = next(p for p in (tmp_path / "pipeline").iterdir() if p.name in ("vae", "vqvae"))
    alone = ldm_jax.load(folder)
    assert alone.unet is None
    assert "unet: none" in repr(alone)
    images = np.asarray(reference_images(2))
    np.testing.assert_array_equal(alone.encode_image(images), whole.encode_image(images))
    latents = whole.encode_image(images)
    np.testing.assert_array_equal(alone.decode(latents), whole.decode(latents))
    with pytest.raises(ValueError, match="a first stage alone"):
        ldm_jax.make_sampler(alone)


def reference_images(n):
    return np.random.default_rng(0).uniform(-1, 1, (n, 16, 16, 3)).astype(np.float32)


# --- training -----------------------------------------------------------------------------------


def test_a_loss_and_an_optimizer_of_ones_own_train(tmp_path):
    """A regression on labels, by SGD: named as a part that the rules know."""
    config = recipes.ldm_config("class", accumulate=2)
    mesh = recipes.mesh_of(data=2)

    def loss(frozen_params, params, examples, train):
        assert frozen_params == {}
        noise = diffusion.rowwise_normal(examples["keys"]["noise"], ())
        wanted = examples["batch"]["label"] + 0 * noise
        error = jnp.mean((params["logvar"][0] - wanted) ** 2)
        return error, {"loss": error}

    tx = optax.sgd(0.25)
    state = train_state.create({"logvar": jnp.zeros(1)}, tx, schema.EMAConfig(decay=0.5))
    train_step = step.make_step(loss, tx, config, mesh)
    stream = data.stream(config.data, batch_size=config.batch_size, seed=0)
    batch = data.global_batch(stream, 0, sharding.batch_sharding(mesh))
    mean = float(np.mean(batch["label"]))
    state, metrics = train_step(state, batch, jax.random.key(0))
    assert float(state.params["logvar"][0]) == pytest.approx(mean / 2)  # lr x 2 x error
    assert float(metrics["loss"]) == pytest.approx(float(np.mean(np.square(batch["label"]))))
    assert int(state.step) == 1
    assert int(state.bad_steps) == 0


def test_the_recipes_loss_trains_under_another_optimizer(tmp_path, first_stage_run):
    config = recipes.ldm_config("class")
    place = schema.FirstStageConfig(path=str(first_stage_run), scale_images=16)
    config = recipes.dataclasses.replace(config, first_stage=place)
    mesh = recipes.mesh_of()
    stream = data.stream(config.data, batch_size=config.batch_size, seed=0)
    fixed = frozen.prepare(config, tmp_path / "run", mesh, stream)
    shapes = jax.eval_shape(lambda key: ldm.init_params(config, key), jax.random.key(0))
    tx = optax.sgd(1e-2)
    state = train_state.create(recipes.filled(shapes), tx, config.ema)
    before = np.asarray(state.params["unet"]["conv_out"]["bias"])
    train_step = step.make_step(ldm.make_loss(config, fixed, mesh), tx, config, mesh)
    batch = data.global_batch(stream, 0, sharding.batch_sharding(mesh))
    state, metrics = train_step(state, batch, jax.random.key(0))
    assert 0.5 < float(metrics["loss"]) < 5
    assert np.abs(np.asarray(state.params["unet"]["conv_out"]["bias"]) - before).max() > 1e-5


def test_recognised_kinds_have_names():
    assert set(loading.KINDS) == {"run", "diffusers", "first_stage", "checkpoint"}
