"""Training on captions: an encoder that trains, a frozen one, and text beside an image."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
from PIL import Image

from ldm_jax import conditioning, loading, schema, sharding, train_state
from ldm_jax.configs import tiny
from ldm_jax.convert import table, text_tables
from ldm_jax.convert.formats import safetensors_file
from ldm_jax.data import tokens
from ldm_jax.data.synthetic import SyntheticSource
from ldm_jax.models import clip
from ldm_jax.runtime import checkpoint, cli
from ldm_jax.train import ldm, main

# --- the step -----------------------------------------------------------------------------------


def loss_of(config, mesh, key, *, grad):
    """Loss of batch 0, or (loss, gradient of the conditioning stage's parameters)."""
    fixed = recipes.frozen(mesh, config.cond)
    loss = ldm.make_loss(config, fixed, mesh)
    state = recipes.start(config, mesh)

    def run(cond_stage, params, frozen_params, batch, key):
        keys = train_state.step_keys(key, 0, ldm.DRAWS)
        keys = {n: train_state.example_keys(k, config.batch_size) for n, k in keys.items()}
        params = {**params, **cond_stage}
        return loss(frozen_params, params, {"batch": batch, "keys": keys}, True)[0]

    trains = {n: tree for n, tree in state.params.items() if n == "cond_stage"}
    run = jax.value_and_grad(run) if grad else run
    run = jax.jit(run, out_shardings=sharding.replicated(mesh))
    return run(trains, state.params, fixed.arguments, recipes.batch_of(config, mesh, 0), key)


MESH = {"fsdp": 2, "tensor": 2}


@pytest.mark.slow
def test_text_beside_an_image_reaches_every_parameter_alike_on_every_mesh(record_property):
    config, key = recipes.ldm_config("hybrid"), jax.random.key(0)
    loss, gradient = loss_of(config, recipes.mesh_of(), key, grad=True)
    other = loss_of(config, recipes.mesh_of(**MESH), key, grad=True)
    assert float(other[0]) == pytest.approx(float(loss), rel=1e-5)
    found = recipes.largest_difference(other[1], gradient)
    record_property("largest_difference", found)
    flat, _ = jax.tree_util.tree_flatten_with_path(gradient)
    sizes = {jax.tree_util.keystr(path): float(jnp.max(jnp.abs(x))) for path, x in flat}
    assert found < 1e-5 * max(sizes.values())
    assert {n for n, size in sizes.items() if size == 0} == {
        f"['cond_stage']['to_logits']['{n}']" for n in ("bias", "kernel")
    }  # which nothing reads


@pytest.mark.slow
def test_a_frozen_encoder_gives_the_same_loss_on_every_mesh():
    config = recipes.ldm_config("clip")
    one = [
        float(loss_of(config, recipes.mesh_of(), jax.random.key(seed), grad=False))
        for seed in (0, 1)
    ]
    other = loss_of(config, recipes.mesh_of(**MESH), jax.random.key(0), grad=False)
    assert float(other) == pytest.approx(one[0], rel=1e-5)
    assert one[1] != pytest.approx(one[0], rel=1e-3)


def test_a_frozen_encoder_is_never_made(monkeypatch):
    monkeypatch.setattr(conditioning, "init", None)
    shapes = jax.eval_shape(
        lambda key: ldm.init_params(recipes.ldm_config("clip"), key), jax.random.key(0)
    )
    assert sorted(shapes) == ["unet"]


@pytest.mark.parametrize("name", ["text", "clip"])
def test_captions_are_dropped_by_row_at_the_rate_of_the_config(name, monkeypatch):
    config = recipes.ldm_config(name, batch_size=64)
    config = dataclasses.replace(config, cond=dataclasses.replace(config.cond, dropout=0.3))
    mesh, seen = recipes.mesh_of(), {}
    fixed, params = recipes.frozen(mesh, config.cond), recipes.start(config, mesh).params
    from_batch = conditioning.from_batch

    def spy(*arguments):
        seen["dropped"], seen["cond"] = arguments[-1], from_batch(*arguments)
        return seen["cond"]

    monkeypatch.setattr(conditioning, "from_batch", spy)
    loss = ldm.make_loss(config, fixed, mesh)
    batch = recipes.batch_of(config, mesh, 0)

    @jax.jit
    def run(params, batch, frozen_params):
        keys = train_state.step_keys(jax.random.key(0), 0, ldm.DRAWS)
        keys = {n: train_state.example_keys(k, 64) for n, k in keys.items()}
        loss(frozen_params, params, {"batch": batch, "keys": keys}, True)
        return jnp.broadcast_to(jnp.asarray(seen["dropped"]), (64,)), seen["cond"].context

    dropped, context = jax.device_get(run(params, batch, fixed.arguments))
    assert 8 < dropped.sum() < 32
    ids = np.where(dropped[:, None], batch["null_tokens"], batch["tokens"])
    encoder = conditioning.build(config.cond)
    weights = fixed.cond_stage if name == "clip" else params["cond_stage"]
    expected = jax.jit(encoder.apply)({"params": weights}, ids)
    np.testing.assert_allclose(context, expected, atol=1e-5)
    gap = np.abs(context[dropped][:1] - context[~dropped]).max()
    assert gap > 0.1


# --- from the command line ----------------------------------------------------------------------

FLAGS = """--first-stage.scale-images 16 --unet.channel-mult 1 --unet.dropout 0.1 --steps 4
    --intervals.save 2 --intervals.snapshot 0"""
FLAGS = FLAGS.split()


def train(run, config, *more):
    """The exit code of `ldm-train`."""
    arguments = [config, "--workdir", str(run), *FLAGS, *map(str, more)]
    return cli.run("ldm-train", main.train, arguments)


@pytest.fixture
def captioned(tmp_path):
    """(config file, folder): tiny:text on 24 pictures with NAME.txt beside NAME.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    source = SyntheticSource(schema.SyntheticConfig(num_images=24, size=16), "train")
    for i in range(24):
        Image.fromarray(source[i]["image"]).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(source[i]["caption"] + "\n")
    file = tmp_path / "mine.py"
    file.write_text(f"""
import dataclasses
import json
import shutil
from ldm_jax import schema
from ldm_jax.configs import tiny

def get_config(stage="text"):
    config = tiny.get_config(stage)
    source = schema.FolderConfig(path={str(folder)!r}, captions="sidecar", eval_every=4)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=source))
""")
    return str(file), source


PARTS = ("params", "ema_params", "opt_state")


def back_to(step, run, moved):
    """The run as it was at `step`, elsewhere."""
    shutil.copytree(run, moved)
    for later in checkpoint.saved_steps(moved):
        if later > step:
            shutil.rmtree(moved / "checkpoints" / str(later))
    return moved


@pytest.mark.slow
def test_text_from_a_folder_trains_and_resumes_elsewhere(tmp_path, captioned, first_stage_run):
    config, source = captioned
    run = tmp_path / "run"
    path = ("--first-stage.path", first_stage_run)
    assert train(run, config, *path, "--intervals.sample", 4) == 0
    lines = (run / "samples/000004.txt").read_text().splitlines()
    assert lines == [source[i]["caption"] for i in (0, 4, 8, 12)]  # held out: every fourth
    assert (run / "samples/000004.png").exists()

    moved = back_to(2, run, tmp_path / "elsewhere")
    half, whole = (checkpoint.restore_parts(r, None, PARTS) for r in (moved, run))
    for part in ("params", "ema_params"):
        assert sorted(half[part]) == ["cond_stage", "unet"]
        for name in half[part]:
            assert recipes.largest_difference(half[part][name], whole[part][name]) > 1e-5
    assert train(moved, config, "--cond.tokenizer", "") == 0  # the run has its own
    recipes.assert_same_bits(checkpoint.restore_parts(moved, 4, PARTS), whole)

    model = loading.load(moved)
    np.testing.assert_array_equal(
        model.tokenizer.encode(lines), tokens.load_tokenizer("bytes", 20).encode(lines)
    )
    assert sorted(model.params["cond_stage"]) == ["model", "to_logits"]


ENCODER = dataclasses.replace(tiny.get_config("clip").cond.encoder, vocab_size=514)


def write_clip(folder, seed):
    """A Stable Diffusion of which only the text encoder and its tokenizer are there: its weights.

    The encoder is that of tiny:clip; the tokenizer knows single letters.
    """
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0"}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"]}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"]}
    options = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    options |= {"vocab_size": 514, "max_position_embeddings": 20, "hidden_size": 32}
    options |= {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    options |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    letters = [*map(chr, [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)])]
    vocab = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    files = {
        "model_index.json": json.dumps(index),
        "text_encoder/config.json": json.dumps(options),
        "tokenizer/vocab.json": json.dumps({token: i for i, token in enumerate(vocab)}),
        "tokenizer/merges.txt": "#version: 0.2\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    module = clip.text_from_config(ENCODER)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 20), np.int32))["params"]
    params = jax.tree.map(lambda x: (1 + 0.01 * seed) * x, recipes.filled(shapes))
    tensors = table.to_torch(text_tables.clip_text(ENCODER), params)
    tensors = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    safetensors_file.write(folder / "text_encoder/model.safetensors", tensors)
    return params


@pytest.mark.slow
def test_a_frozen_clip_comes_from_a_folder_and_stays_with_the_run(
    tmp_path, first_stage_run, capsys
):
    params = write_clip(tmp_path / "sd", 0)
    flags = ("--cond.encoder.vocab-size", 514, "--cond.tokenizer", "")
    paths = ("--first-stage.path", first_stage_run, "--cond.path", tmp_path / "sd")
    run = tmp_path / "run"
    assert train(run, "tiny:clip", *flags, *paths, "--cond.encoder.num-layers", 1) == 1
    assert "its text encoder is not that of the config" in capsys.readouterr().err
    assert not run.exists()
    assert train(run, "tiny:clip", *flags, *paths) == 0
    moved = back_to(2, run, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "sd")

    write_clip(tmp_path / "other", 1)
    assert train(moved, "tiny:clip", *flags, "--cond.path", tmp_path / "other") == 1
    assert "is not the text encoder in" in capsys.readouterr().err
    assert train(moved, "tiny:clip", *flags) == 0
    ends = [checkpoint.restore_parts(r, 4, PARTS) for r in (run, moved)]
    recipes.assert_same_bits(*ends)
    for part in ("params", "ema_params"):
        assert sorted(ends[0][part]) == ["unet"]

    model = loading.load(moved)
    recipes.assert_same_bits(model.params["cond_stage"], params)
    ids = model.tokenizer.encode(["ab"])[0]
    assert ids[:4].tolist() == [512, ord("a") - 33, 256 + ord("b") - 33, 513]


def test_errors_name_the_remedy(tmp_path, first_stage_run, capsys):
    def error(*arguments):
        assert train(run, *arguments, "--first-stage.path", first_stage_run) == 1
        (line,) = [e for e in capsys.readouterr().err.splitlines() if "error:" in e]
        return line

    run = tmp_path / "run"
    found = error("tiny:text", "--cond.tokenizer", "")
    assert 'no tokenizer: give --cond.tokenizer, a folder with tokenizer files or "bytes"' in found
    found = error("tiny:text", "--cond.encoder.vocab-size", 100)
    assert "tokenizer has 257 tokens, but the text encoder only 100: set" in found
    assert "--cond.encoder.vocab-size 257" in found
    found = error("tiny:hybrid", "--cond.text.encoder.vocab-size", 100)
    assert "set --cond.text.encoder.vocab-size 257" in found
    found = error("tiny:text", "--unet.context-dim", 16)
    assert "unet.context_dim is 16, but" in found
    assert "32" in found
    found = error("tiny:clip")
    assert "no text encoder: it does not train" in found
    assert "give --cond.path" in found
    assert not run.exists()
