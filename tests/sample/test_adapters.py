"""`--lora FILE[:UNET[:TEXT]]`, `--embedding FILE[=<TOKEN>]`, `--clip-skip` on the command line."""

import dataclasses

import numpy as np
import pytest
import task_models
import text_model

from ldm_jax import prompts, schema
from ldm_jax.adapters import textual_inversion
from ldm_jax.prompting.clip_skip import with_clip_skip
from ldm_jax.runtime import images
from ldm_jax.sample import adapters, text2img


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("x.safetensors", ("x.safetensors", (1.0, 1.0))),
        ("x.safetensors:0.7", ("x.safetensors", (0.7, 0.7))),
        ("x.safetensors:0.7:-0.2", ("x.safetensors", (0.7, -0.2))),
        ("gs://b/x:1:y.safetensors:1e-1", ("gs://b/x:1:y.safetensors", (0.1, 0.1))),
        ("C:2:3:4", ("C:2", (3.0, 4.0))),
        ("0.5", ("0.5", (1.0, 1.0))),
    ],
)
def test_the_last_numbers_are_scales(text, wanted):
    assert adapters.file_and_scales(text) == wanted


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_a_scale_that_is_not_finite_is_refused(number):
    with pytest.raises(ValueError, match=f"--lora x:{number}: the scale {number} is not"):
        adapters.file_and_scales(f"x:{number}")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a=b/x.pt", ("a=b/x.pt", None)),
        ("x.pt=<cat>", ("x.pt", "<cat>")),
        ("a=<b>/x.pt=<my cat>", ("a=<b>/x.pt", "<my cat>")),
        ("<cat>.pt", ("<cat>.pt", None)),
    ],
)
def test_a_token_follows_the_last_equals_sign(text, wanted):
    assert adapters.file_and_token(text) == wanted


@pytest.fixture
def word(tmp_path):
    """A file of two vectors."""
    vectors = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    path = tmp_path / "cat.pt"
    textual_inversion.write(path, textual_inversion.Embedding("<cat>", vectors), "webui")
    return path


def test_options_reach_model_and_prompts(word, tmp_path):
    run = str(task_models.save(text_model.make(), tmp_path))
    given = {"prompt": ("a <cat>",), "negative_prompt": "<CAT>", "embedding": (str(word),)}
    what = text2img.request(text2img.Options(run, "out", **given, clip_skip=2))
    for name, start in (("tokens", 2), ("null_tokens", 0)):
        assert what.batch[name][0, start : start + 2].tolist() == [600, 601]
    assert what.model.cond_stage.num_layers == 1


@pytest.mark.slow
def test_words_and_layers_are_recorded_and_repeated(word, tmp_path, capsys):
    run, out = task_models.save(text_model.make(), tmp_path), tmp_path / "out"
    flags = ["--model", run, "--prompt", "a <dog>", "--steps", 2, "--num-images", 1]
    flags += ["--batch-size", 4, "--embedding", f"{word}=<dog>", "--clip-skip", 2]
    assert task_models.sample("text2img", *flags, "--out", out) == 0
    (path,) = out.glob("0*.png")
    kept = images.read_settings(path)
    assert (kept["embedding"], kept["clip_skip"]) == ([f"{word}=<dog>"], 2)
    assert kept["files"].keys() == {str(word)}
    capsys.readouterr()
    assert task_models.again(path, "--out", tmp_path / "again") == 0
    assert capsys.readouterr().err.endswith("pixel for pixel\n")
    word.write_bytes(word.read_bytes() + b"x")
    assert task_models.again(path, "--out", tmp_path / "other") == 1
    assert f"was made from {word}, which has changed since" in capsys.readouterr().err


def test_words_of_one_name_and_models_without_text_are_refused(word):
    model = text_model.make()
    with pytest.raises(ValueError, match=r"cat.pt and .*cat.pt are both <CAT>; give one"):
        adapters.with_embeddings(model, [str(word), f"{word}=<CAT>"])
    classes = schema.ClassCondConfig(num_classes=5, embed_dim=32)
    model = task_models.make(classes, None, **task_models.CONTEXT)
    with pytest.raises(ValueError, match=r"cat.pt: the model is not conditioned on text"):
        adapters.with_embeddings(model, [str(word)])
    with pytest.raises(ValueError, match="clip skip 2: the model has no text encoder of CLIP"):
        with_clip_skip(model, 2)


@pytest.mark.parametrize(("layer", "most"), [("last", 3), ("penultimate", 2)])
def test_layers_are_counted_from_the_models_own(layer, most):
    def model(layer):
        encoder = dataclasses.replace(text_model.ENCODER, layer=layer, num_layers=3)
        return text_model.make(encoder=encoder)

    own, batch = model(layer), prompts(model(layer), ["a disc"])
    assert with_clip_skip(own, 1) is own
    other = model("penultimate") if layer == "last" else with_clip_skip(model("last"), 3)
    context = [np.asarray(m.encode(batch)[0].context) for m in (with_clip_skip(own, 2), other, own)]
    np.testing.assert_array_equal(*context[:2])
    assert np.abs(context[0] - context[2]).max() > 0.01
    with pytest.raises(ValueError, match=rf"clip skip {most + 1} is not in 1..{most}"):
        with_clip_skip(own, most + 1)
