"""Embeddings and clip skip against diffusers and transformers with the same weights."""

import numpy as np
import pytest

from ldm_jax import loading, prompts, saving
from ldm_jax.adapters import textual_inversion
from ldm_jax.prompting.clip_skip import with_clip_skip

torch = pytest.importorskip("torch", reason="torch is the reference here")
import pipelines  # noqa: E402

pytestmark = pytest.mark.torch

TEXTS = ["a <cat>, red", "<CAT> and (<cat>) a blue square and all the rest of it", "red", ""]


@pytest.fixture(scope="module", params=["v1", "v"])
def base(request, tmp_path_factory):
    """A diffusers folder like Stable Diffusion 1, or 2."""
    folder = tmp_path_factory.mktemp(request.param) / "base"
    pipelines.stable_diffusion(folder, request.param)
    return folder


def pipeline(folder):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def vectors(count):
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(count))


def original(x):
    """The dict of the paper's code, whose ids are tensors too."""
    held = torch.nn.ParameterDict({"*": torch.nn.Parameter(x)})
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": held}


def webui(x):
    about = {"name": "cat", "step": 5, "sd_checkpoint": None, "sd_checkpoint_name": None}
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": x}, **about}


def legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


FILES = {
    "diffusers": ("x.bin", lambda x: {"<cat>": x}, torch.save),
    "one vector": ("x.bin", lambda x: {"<cat>": x[0]}, torch.save),
    "webui": ("cat.pt", webui, torch.save),
    "original": ("cat.pt", original, torch.save),
    "before torch 1.6": ("cat.pt", original, legacy),
}


@pytest.mark.parametrize("kind", FILES)
def test_pickled_files(base, tmp_path, kind):
    name, content, save = FILES[kind]
    x = vectors(1 if kind == "one vector" else 3)
    save(content(x), tmp_path / name)
    got = textual_inversion.read(tmp_path / name, loading.load(base))
    assert got.token == "<cat>"
    np.testing.assert_array_equal(got.vectors, x.numpy())


def close(model, pipe):
    """Equal ids and contexts of all texts."""
    size = model.tokenizer.max_length
    # diffusers finds <CAT> too, but then leaves out all vectors but the first
    texts = [pipe.maybe_convert_prompt(text.lower(), pipe.tokenizer) for text in TEXTS]
    theirs = pipe.tokenizer(
        texts, padding="max_length", truncation=True, max_length=size, return_tensors="pt"
    ).input_ids
    batch = prompts(model, TEXTS, negative=TEXTS[0])
    np.testing.assert_array_equal(batch["tokens"], theirs.numpy())
    with torch.no_grad():
        wanted = pipe.text_encoder(theirs)[0].numpy()
    cond, null = model.encode(batch)
    np.testing.assert_allclose(cond.context, wanted, atol=1e-5)
    np.testing.assert_allclose(null.context, wanted[[0] * len(TEXTS)], atol=1e-5)


@pytest.mark.parametrize("to", ["diffusers", "webui"])
@pytest.mark.parametrize("count", [1, 3])
def test_texts_are_encoded_as_by_diffusers(base, tmp_path, to, count):
    """Also those of the folders that each program saves with the word in it."""
    path = tmp_path / f"cat{textual_inversion.embedding_files.SUFFIXES[to]}"
    made = textual_inversion.Embedding("<cat>", vectors(count).numpy())
    textual_inversion.write(path, made, to)
    pipe, model = pipeline(base), loading.load(base)
    pipe.load_textual_inversion(path, token="<cat>")
    model = textual_inversion.added(model, [textual_inversion.read(path, model)])
    close(model, pipe)
    pipe.save_pretrained(tmp_path / "theirs")
    close(loading.load(tmp_path / "theirs"), pipe)
    saving.save(model, tmp_path / "ours", to="diffusers")
    close(model, pipeline(tmp_path / "ours"))


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip_is_the_hidden_state_with_the_final_norm(base, skip):
    pipe, model = pipeline(base), loading.load(base)
    batch = prompts(model, TEXTS[2:])
    encoder = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
    with torch.no_grad():
        ids = torch.from_numpy(batch["tokens"]).long()
        states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
        wanted = encoder.final_layer_norm(states[-skip]).numpy()
    cond, null = with_clip_skip(model, skip).encode(batch)
    np.testing.assert_allclose(cond.context, wanted, atol=1e-5)
    np.testing.assert_allclose(null.context[1], wanted[1], atol=1e-5)
