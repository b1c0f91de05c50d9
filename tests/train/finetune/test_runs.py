"""Runs of the finetuning recipes, from the options to the model that is loaded from them."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import recipes
from PIL import Image
from two_processes import MIXED, assert_losses_as, codes, logs, two

from ldm_jax import bundle, loading, saving, schema
from ldm_jax.adapters import lora, runs, textual_inversion
from ldm_jax.data import tokens
from ldm_jax.runtime import checkpoint, rundir
from ldm_jax.train import ldm, main
from ldm_jax.train.finetune import dreambooth, full, inversion, loop


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A converted run of a tiny model of text, with weights by formula."""
    config = recipes.ldm_config("text")
    frozen = recipes.frozen(recipes.mesh_of())
    params = jax.eval_shape(lambda: ldm.init_params(config, jax.random.key(0)))
    params = {**recipes.filled(params), "first_stage": jax.device_get(frozen.params)}
    model = bundle.build(bundle.model_config(config, frozen.config), params, 0.7)
    tokenizer = tokens.load_tokenizer("bytes", config.cond.encoder.max_length)
    model = dataclasses.replace(model, tokenizer=tokenizer)
    run = tmp_path_factory.mktemp("base") / "run"
    saving.save(model, run)
    return run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a disc {i}")
    return folder


WORD = ("--token", "<x>", "--init-word", "o", "--vectors", "2")
CLASS = ("--class-prompt", "a disc", "--num-class-images", "3", "--sample-steps", "2")
SUBJECT = ("--instance-prompt", "a sks disc", *CLASS)
QUIET = (*("--intervals.sample", "0", "--intervals.evaluate", "0"), "--dtype", "float32")


def config_of(stage, workdir, images, *options):
    argv = ["--workdir", str(workdir), "--data.source.path", str(images), *QUIET, *options]
    config = main.load_config(f"finetune:{stage}", argv)
    return main.parse(config, argv, "ldm-train")[1]


def train(stage, workdir, images, *options):
    config = config_of(stage, workdir, images, *options)
    assert (full if stage == "full" else loop).train(config, workdir) == 0
    return config


LORA = ("--lora.rank", "2", "--lora.alpha", "1", "--lora.text-encoder", "--lora.dropout", "0.2")
CASES = {
    "lora": ("lora", LORA, {"lora"}),
    "dreambooth": ("dreambooth", (*SUBJECT, "--train-text-encoder"), {"unet", "cond_stage"}),
    "dreambooth_lora": ("dreambooth", (*SUBJECT, "--lora.rank", "2"), {"lora"}),
    "textual_inversion": ("textual_inversion", WORD, {"embedding"}),
}


SLOW = ("dreambooth", "lora")  # two trees of gradients, twice; dreambooth_lora has the latter too


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "dreambooth"])
def test_two_processes_train_as_one(name, base, images, tmp_path):
    stage, options, _ = CASES[name]
    options = ("--init-from", str(base), *options, "--batch-size", "4", "--steps", "4")
    options = (*options, "--intervals.log", "1", *MIXED.split())
    train(stage, tmp_path / "one", images, *options)
    command = ["-m", "ldm_jax.train.main", f"finetune:{stage}", *QUIET, *options]
    command += ["--workdir", str(tmp_path / "two"), "--data.source.path", str(images)]
    with two(tmp_path, lambda address: [*command, "--distributed", address]) as processes:
        assert codes(tmp_path, processes) == [0, 0], logs(tmp_path)
    assert_losses_as(tmp_path / "two", tmp_path / "one", 4)
    parts = [loading.load(tmp_path / run).params for run in ("one", "two")]
    for one, other in zip(*map(jax.tree.leaves, parts), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES]
)
def test_a_run_resumes_bit_for_bit_from_itself_alone(name, base, images, tmp_path):
    """Without `--init-from`, moved, and with the base gone."""
    stage, options, parts = CASES[name]
    gone = shutil.copytree(base, tmp_path / "base")
    shared = ("--batch-size", "4", "--intervals.save", "2", *options)
    train(stage, tmp_path / "run", images, *shared, "--init-from", str(gone), "--steps", "4")
    straight = checkpoint.restore_parts(tmp_path / "run", 4, ("params", "opt_state"))
    assert set(straight["params"]) == parts
    shutil.rmtree(gone)
    moved = recipes.copy_until(tmp_path / "run", 2, tmp_path / "moved")
    before = checkpoint.restore_parts(moved, 2, ("params",))["params"]
    train(stage, moved, images, *shared, "--steps", "4")
    again = checkpoint.restore_parts(moved, 4, ("params", "opt_state"))
    recipes.assert_same_bits(again, straight)
    assert any(
        np.any(np.asarray(a) != np.asarray(b))
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(again["params"]), strict=True)
    )


def test_the_model_of_a_run_is_the_base_with_its_lora(base, images, tmp_path):
    options = ("--init-from", str(base), "--steps", "1", "--batch-size", "4", *LORA)
    train("lora", tmp_path / "run", images, *options, "--no-keep-base")
    model, given = loading.load(tmp_path / "run"), loading.load(base)
    update = lora.read(tmp_path / "run", given)
    recipes.assert_same_bits(
        jax.device_get(model.params), jax.device_get(lora.merged(given.params, [(update, 1.0)]))
    )
    assert {u.scale for u in update.unet.values()} == {0.5}
    # the file that the run wrote says the same
    written = lora.read(tmp_path / "run" / "lora.safetensors", given)
    recipes.assert_same_bits(lora.to_tree(written), lora.to_tree(update))
    path = tmp_path / "run" / "frozen" / "base.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"hash": "0"}))
    with pytest.raises(ValueError, match=f"{base}: is not the model that .* was trained beside"):
        loading.load(tmp_path / "run")


def test_the_model_of_an_inversion_knows_its_word(base, images, tmp_path):
    options = ("--init-from", str(base), "--steps", "1", "--batch-size", "4", *WORD)
    config = train("textual_inversion", tmp_path / "run", images, *options)
    model, given = loading.load(tmp_path / "run"), loading.load(base)
    learnt = checkpoint.trained(tmp_path / "run", runs.trained_shapes(config))[0]["embedding"][
        "vectors"
    ]
    word = textual_inversion.Embedding("<x>", learnt)
    wanted = textual_inversion.added(given, [word])
    recipes.assert_same_bits(jax.device_get(model.params), jax.device_get(wanted.params))
    ids = model.tokenizer.encode(["a <x>"])
    np.testing.assert_array_equal(ids, wanted.tokenizer.encode(["a <x>"]))
    start = np.asarray(given.params["cond_stage"]["model"]["embed_tokens"]["embedding"])
    assert np.abs(learnt - start[tokens.load_tokenizer("bytes", 9).ids("o")]).max() > 1e-6
    written = textual_inversion.read(tmp_path / "run" / "x.safetensors", given)
    np.testing.assert_array_equal(written.vectors, learnt)


def test_missing_pictures_of_the_class_are_drawn_and_kept(base, images, tmp_path, caplog):
    config = config_of("dreambooth", tmp_path / "run", images, "--init-from", str(base), *SUBJECT)
    mesh, folder = recipes.mesh_of(), tmp_path / "class"
    dreambooth.draw_missing(config, folder, None, mesh)
    drawn = {f.name: f.read_bytes() for f in folder.iterdir()}
    assert sorted(drawn) == ["00000.png", "00001.png", "00002.png", "class_images.json"]
    (folder / "00001.png").unlink()
    dreambooth.draw_missing(config, folder, None, mesh)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == drawn
    shared = dataclasses.replace(config, class_path=str(folder))
    dreambooth.check(shared)
    for changes, what in (({"class_prompt": "a cat"}, "prompt"), ({"init_from": "b"}, "model")):
        with pytest.raises(ValueError, match=f"class: holds pictures of {what} "):
            dreambooth.check(dataclasses.replace(shared, **changes))
    (folder / "class_images.json").unlink()
    (folder / "00002.png").unlink()
    caplog.set_level("INFO", logger="ldm_jax")
    dreambooth.draw_missing(config, folder, None, mesh)
    assert "2 pictures of your own are the class's" in caplog.text


BAD = {
    "no base": ("lora", (), "--init-from PATH is missing"),
    "rank": ("lora", ("--lora.rank", "0"), "--lora.rank 0: give at least 1"),
    "dropout": ("lora", ("--lora.dropout", "1"), r"--lora.dropout 1.0 is not in \[0, 1\)"),
    "instance": ("dreambooth", (), "--instance-prompt TEXT is missing"),
    "class": ("dreambooth", (*SUBJECT[:2], "--class-path", "x"), "give their text too"),
    "no word": ("textual_inversion", (), "--init-word WORD is missing"),
    "two tokens": ("textual_inversion", ("--init-word", "ab"), "'ab', is 2 tokens"),
    "spelling": (
        "textual_inversion",
        ("--init-word", "a", "--token", "x"),
        "inside of other",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused_before_anything_is_written(name, base, images, tmp_path):
    stage, options, message = BAD[name]
    start = () if name == "no base" else ("--init-from", str(base))
    config = config_of(stage, tmp_path / "run", images, *start, *options)
    with pytest.raises(ValueError, match=message):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_to_the_model_that_it_began_from(base, images, tmp_path):
    run = tmp_path / "run"
    began = dataclasses.replace(
        config_of("full", run, images, "--init-from", str(base)), sample_prompts=("a",)
    )
    rundir.open_run(run, began)
    again = config_of("full", run, images)
    assert dataclasses.replace(again, sample_prompts=("a",)) == began
    with pytest.raises(ValueError, match=f"--init-from other: {run} began from {base}"):
        config_of("full", run, images, "--init-from", "other")


def test_data_without_the_models_condition_are_named(base, images, tmp_path):
    options = ("--init-from", str(base), "--data.source.captions", "none", "--batch-size", "4")
    config = config_of("full", tmp_path / "run", images, *options)
    with pytest.raises(ValueError, match="text conditioning needs captions, but the data have"):
        full.train(config, tmp_path / "run")


def test_texts_of_ones_own_hold_the_word(tmp_path):
    config = schema.TextualInversionTrainConfig(token="<x>", template_file=str(tmp_path / "t"))
    (tmp_path / "t").write_text("my {} here\n\n{}\n")
    assert inversion.texts(config) == ("my <x> here", "<x>")
    (tmp_path / "t").write_text("none\n")
    with pytest.raises(ValueError, match=r"'none' has no \{\} for"):
        inversion.texts(config)
