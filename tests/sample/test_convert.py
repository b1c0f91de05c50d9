"""`ldm-convert` from end to end: between all formats, and what it refuses."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import recipes
import text_model

from ldm_jax import loading, saving
from ldm_jax.convert.formats import files
from ldm_jax.runtime import cli
from ldm_jax.sample import convert


def run(*flags):
    """Exit code of the command."""
    return cli.run("ldm-convert", convert.convert, list(map(str, flags)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of text with CLIP's tokenizer."""
    return text_model.make(text_model.clip_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
    """It as a run."""
    folder = tmp_path_factory.mktemp("convert") / "run"
    saving.save(model, folder, to="ldm_jax")
    return folder


def test_every_format_holds_the_model_bit_for_bit(model, source, tmp_path, capsys):
    """Run -> diffusers -> CompVis -> run."""
    assert run(source, tmp_path / "folder", "--to", "diffusers") == 0
    lines = capsys.readouterr().err.splitlines()
    count = sum(x.size for x in jax.tree.leaves(model.params["unet"]))
    assert any(line.startswith(f"unet: UNet, {count:,} parameters in") for line in lines)
    assert "condition: text; tokenizer FileTokenizer" in lines[-2]
    assert lines[-1] == f"written: {tmp_path / 'folder'} (diffusers, float32)"
    file, tokenizer = tmp_path / "model.safetensors", tmp_path / "folder" / "tokenizer"
    assert run(tmp_path / "folder", file, "--to", "compvis") == 0
    assert (tmp_path / "model.yaml").exists()
    assert run(file, tmp_path / "run", "--to", "ldm_jax", "--tokenizer", tokenizer) == 0
    assert {f.name for f in tmp_path.iterdir()} == {
        "folder", "model.safetensors", "model.yaml", "run",
    }  # fmt: skip
    for path in (tmp_path / "folder", file, tmp_path / "run"):
        again = loading.load(path)
        recipes.assert_same_bits(again.params, model.params)
        assert again.latent_scale == model.latent_scale
        text = again.config.cond.encoder
        assert (again.config.unet, text) == (model.config.unet, model.config.cond.encoder)
        assert again.config.first_stage == model.config.first_stage
    texts = ["a red square", "", "größer"]
    tokens = loading.load(tmp_path / "run").tokenizer.encode(texts)
    np.testing.assert_array_equal(tokens, model.tokenizer.encode(texts))


def test_dtype_is_that_of_the_file(model, source, tmp_path):
    assert run(source, tmp_path / "m.safetensors", "--to", "compvis", "--dtype", "bfloat16") == 0
    tensors, _ = files.open_state_dict(tmp_path / "m.safetensors")
    assert {str(x.dtype) for x in tensors.values()} == {"bfloat16"}
    name = "model.diffusion_model.input_blocks.0.0.weight"
    kernel = model.params["unet"]["conv_in"]["kernel"].transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(np.asarray(tensors[name]), kernel.astype(tensors[name].dtype))


@pytest.mark.parametrize("to", ["ldm_jax", "diffusers", "compvis"])
def test_check_writes_nothing(source, tmp_path, capsys, to):
    assert run(source, tmp_path / "out.safetensors", "--to", to, "--check") == 0
    assert "fits" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_check_reads_no_weights(source, tmp_path, monkeypatch, capsys):
    """Of a file and of a folder; a tensor of another shape is named."""
    from ldm_jax.convert.formats import tensors

    file, folder = tmp_path / "m.safetensors", tmp_path / "folder"
    assert run(source, file, "--to", "compvis") == 0
    assert run(source, folder, "--to", "diffusers") == 0

    def read(self, dtype=None, copy=None):
        raise AssertionError(f"reads {self.shape}")

    monkeypatch.setattr(tensors.LazyTensor, "__array__", read)
    for path in (file, folder):
        assert run(path, tmp_path / "out", "--to", "ldm_jax", "--check") == 0
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    capsys.readouterr()
    assert run(folder, tmp_path / "out", "--to", "ldm_jax", "--check") == 1
    assert "conv_in.weight is (32, 4, 3, 3), not (32, 9, 3, 3)" in capsys.readouterr().err


def test_nothing_is_overwritten_unasked(source, tmp_path, capsys):
    target = tmp_path / "folder"
    assert run(source, target, "--to", "diffusers") == 0
    before = {f: f.stat().st_mtime_ns for f in target.rglob("*")}
    capsys.readouterr()
    assert run(source, target, "--to", "diffusers") == 1
    assert f"{target}: exists; give another target, or --overwrite" in capsys.readouterr().err
    assert run(source, target, "--to", "ldm_jax", "--overwrite") == 1
    assert "--overwrite replaces a run, which this is not" in capsys.readouterr().err
    assert {f: f.stat().st_mtime_ns for f in target.rglob("*")} == before
    (target / "unet" / "junk").write_text("")
    assert run(source, target, "--to", "diffusers", "--overwrite") == 0
    assert not (target / "unet" / "junk").exists()
    assert {f.name for f in tmp_path.iterdir()} == {"folder"}


def test_a_failure_leaves_nothing(source, model, tmp_path, capsys):
    """A run whose tokenizer diffusers has no file for."""
    saving.save(text_model.make(), tmp_path / "bytes", to="ldm_jax")
    assert run(tmp_path / "bytes", tmp_path / "out", "--to", "diffusers") == 1
    assert "a tokenizer of CLIP or BERT is needed" in capsys.readouterr().err
    assert {f.name for f in tmp_path.iterdir()} == {"bytes"}


def test_a_run_in_bfloat16_forgets_where_its_tokenizer_lay(tmp_path):
    model = text_model.make()
    cond = dataclasses.replace(model.config.cond, tokenizer=str(tmp_path / "gone"))
    config = dataclasses.replace(model.config, cond=cond)
    saving.save(dataclasses.replace(model, config=config), tmp_path / "run", dtype="bfloat16")
    said = [f.read_text() for f in (tmp_path / "run").rglob("*.json")]
    assert said
    assert not any(str(tmp_path) in text for text in said)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{source}", "{source}", "--to", "diffusers"], "are the same, or one lies in the other"),
        (["{source}", "{source}/x", "--to", "diffusers"], "are the same, or one lies in the other"),
        (["{source}", "{tmp}/x", "--to", "compvis"], "writes .safetensors or .ckpt: name it so"),
        (["{tmp}/none", "{tmp}/x", "--to", "ldm_jax"], "none: does not exist"),
        (["{tmp}", "{tmp}-x", "--to", "ldm_jax"], "is not a run directory (no config.json), nor a"),
        (["{tmp}/a.yaml", "{tmp}/x", "--to", "ldm_jax"], "is a configuration; give the checkpoint"),
        (["{source}", "{tmp}/x", "--to", "ldm_jax", "--config", "a"],
         "config=a is of a checkpoint"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(source, tmp_path, capsys, flags, message):
    (tmp_path / "a.yaml").write_text("")
    assert run(*(f.format(source=source, tmp=tmp_path) for f in flags)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ldm-convert: error: ")
    assert message in line
    assert {f.name for f in tmp_path.iterdir()} == {"a.yaml"}


def test_a_checkpoint_is_found_in_its_folder(source, tmp_path):
    """As the zips of CompVis have it: model.ckpt and config.yaml."""
    assert run(source, tmp_path / "model.ckpt", "--to", "compvis") == 0
    (tmp_path / "model.yaml").rename(tmp_path / "config.yaml")
    path, kind = loading.recognise(tmp_path)
    assert (path.name, kind) == ("model.ckpt", "checkpoint")
    assert loading.load(tmp_path).tokenizer is None
    (tmp_path / "second.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"nor does it hold one checkpoint .*model.ckpt, second"):
        loading.load(tmp_path)
