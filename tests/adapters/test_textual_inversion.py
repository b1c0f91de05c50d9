"""Textual inversion as functions on models: tokens, vectors, files, without a reference."""

import base64
import dataclasses
import io
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
import text_model
from PIL import Image, PngImagePlugin

from ldm_jax import conditioning, prompts, schema, sharding
from ldm_jax.adapters import textual_inversion
from ldm_jax.convert.formats import safetensors_file, torch_writer
from ldm_jax.data import tokens

WIDTH, VOCAB = 32, text_model.ENCODER.vocab_size
BERT = schema.BERTTextConfig(
    vocab_size=VOCAB, max_length=12, width=WIDTH, num_layers=1, num_heads=2, head_width=16
)
WORDS = {"bytes": "r", "clip": "red", "bert": "red"}


@pytest.fixture(scope="module", params=WORDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind, tmp_path_factory):
    """A table of more rows than the tokenizer has ids: new ones begin behind the table."""
    folder = tmp_path_factory.mktemp(kind)
    if kind == "bert":
        return text_model.make(text_model.bert_tokenizer(folder), BERT)
    return text_model.make(text_model.clip_tokenizer(folder) if kind == "clip" else None)


def vectors(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def embedding(token="<cat>", count=2, seed=0):
    return textual_inversion.Embedding(token, vectors(count, seed))


def context(model, *texts):
    return np.asarray(model.encode(prompts(model, list(texts)))[0].context)


def test_tokens_stand_for_ids_behind_the_table(kind, model, tmp_path):
    both = textual_inversion.added(model, [embedding(), embedding("<My-Dog>", 1)])
    tokenizer = both.tokenizer
    cat, dog = [VOCAB, VOCAB + 1], [VOCAB + 2]
    a, comma = model.tokenizer.ids("a"), model.tokenizer.ids(",")
    sep = model.tokenizer.ids(" ")
    assert tokenizer.vocab_size == both.config.cond.encoder.vocab_size == VOCAB + 3
    for text, wanted in (
        ("a <cat>,", [*a, *sep, *cat, *comma]),
        ("<CAT> <my-dog>", [*cat, *sep, *dog]),
        ("a", a),
    ):
        assert tokenizer.ids(text) == wanted
    for text in ("x<cat>", "<cat>s", "cat", "<cat"):
        assert not {*cat, *dog} & {*tokenizer.ids(text)}
    texts = ["a <cat> and <my-dog>", "", "<cat> " * 12]
    ids = tokenizer.encode(texts)
    assert ids.shape == (3, 12)
    tokenizer.save(tmp_path)
    for copy in (tokens.load_tokenizer(tmp_path, 12), pickle.loads(pickle.dumps(tokenizer))):
        np.testing.assert_array_equal(copy.encode(texts), ids)
        assert copy.vocab_size == tokenizer.vocab_size
    start = 0 if kind == "bytes" else 1
    assert ids[2, start : start + 2].tolist() == cat
    assert tokenizer.lost(texts[2]).startswith("<cat>")
    assert set(tokenizer.lost(texts[2]).split()) == {"<cat>"}
    assert tokenizer.lost("a <cat>") == ""


def test_text_is_encoded_as_with_the_words_that_vectors_come_from(kind, model):
    word = WORDS[kind]
    new = textual_inversion.added(model, [textual_inversion.init(model, "<x>", word)])
    assert jax.tree.structure(new.params) == jax.tree.structure(model.params)
    plain = f"a {word} disc"
    np.testing.assert_array_equal(context(new, "a <x> disc"), context(model, plain))
    np.testing.assert_array_equal(context(new, plain), context(model, plain))
    other = textual_inversion.added(model, [embedding("<x>", 1)])
    assert np.abs(context(other, "a <x> disc") - context(model, plain)).max() > 0.01


def test_gradients_reach_the_vectors_alone(model):
    new = textual_inversion.added(model, [embedding()])
    batch = prompts(new, ["a <cat>"])

    @jax.jit
    def loss(learnt):
        params = textual_inversion.extended(model.params, learnt)
        return jnp.sum(new.encode(batch, params)[0].context[:, -1] ** 2)

    learnt = jnp.asarray(vectors(2))
    grads = jax.grad(loss)(learnt)
    assert grads.dtype == jnp.float32
    step = 1e-2 * vectors(2, seed=3)
    slope = (loss(learnt + step) - loss(learnt - step)) / 2
    np.testing.assert_allclose(jnp.vdot(grads, step), slope, rtol=0.02)
    assert (np.abs(grads).max(1) > 0).all()


def test_tables_keep_their_dtype_or_take_that_of_the_vectors(model):
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), model.params["cond_stage"])
    for dtype in (jnp.float32, jnp.bfloat16):
        new = textual_inversion.extended(low, jnp.asarray(vectors(2), dtype))
        dtypes = {x.dtype for x in jax.tree.leaves(new)}
        assert dtypes == {jnp.dtype(jnp.bfloat16), jnp.dtype(dtype)}


def test_parameters_are_those_of_the_new_config_where_the_rules_put_them(model):
    mesh = recipes.mesh_of(fsdp=4)
    rules = sharding.by_rules(model.params, sharding.RULES, mesh)
    model = dataclasses.replace(model, params=sharding.place(model.params, rules))
    new = textual_inversion.added(model, [embedding(count=3)])
    wanted = jax.eval_shape(
        lambda: conditioning.init(new.config.cond, new.cond_stage, jax.random.key(0))
    )
    shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (new.params["cond_stage"], wanted)]
    assert shapes[0] == shapes[1]
    table = next(x for x in jax.tree.leaves(new.params) if x.shape == (VOCAB + 3, WIDTH))
    assert table.sharding.spec == jax.P(None, "fsdp")


def test_models_of_text_and_image_and_of_shapes_alone(model):
    hybrid = schema.HybridCondConfig(text=model.config.cond, concat=schema.InpaintCondConfig())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.params)
    config = dataclasses.replace(model.config, cond=hybrid)
    model = dataclasses.replace(model, config=config, params=shapes)
    new = textual_inversion.added(model, [embedding()])
    assert new.config.cond.text.encoder.vocab_size == VOCAB + 2
    assert (VOCAB + 2, WIDTH) in [x.shape for x in jax.tree.leaves(new.params["cond_stage"])]


# --- files ----------------------------------------------------------------------------------------


def webui(x=None, **more):
    x = vectors(2) if x is None else x
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": x}, **more}


def card(path, content):
    """As stable-diffusion-webui writes it: base64 of JSON."""
    text = PngImagePlugin.PngInfo()
    content = json.dumps(content, default=lambda x: {"TORCHTENSOR": x.tolist()})
    text.add_text("sd-ti-embedding", base64.b64encode(content.encode()).decode())
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path, pnginfo=text)


def put(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".safetensors":
        safetensors_file.write(path, content)
    elif path.suffix == ".png":
        card(path, content)
    else:
        torch_writer.write_object(path, content)
    return path


BUNDLED = {f"bundle_emb.{name}.string_to_param.*": vectors(2) for name in ("cat", "dog")}


@pytest.mark.parametrize(
    ("name", "content", "asked", "token"),
    [
        ("x.safetensors", {"<cat>": vectors(2)}, None, "<cat>"),
        ("x.safetensors", {"my cat": vectors(2)}, None, "<my_cat>"),
        ("x.safetensors", {"<cat>": vectors(2)}, "<dog>", "<dog>"),
        ("x.bin", {"<cat>": vectors(2)}, None, "<cat>"),
        ("cat.safetensors", {"emb_params": vectors(2)}, None, "<cat>"),
        ("cat.pt", webui(name="dog", step=3, sd_checkpoint=None), None, "<cat>"),
        ("cat.pt", webui(), None, "<cat>"),
        ("a b.png", webui(name="cat"), None, "<cat>"),
        ("lora.safetensors", BUNDLED, "<dog>", "<dog>"),
        ("lora.safetensors", {k: BUNDLED[k] for k in [*BUNDLED][:1]}, None, "<cat>"),
    ],
)
def test_files_of_every_format(tmp_path, name, content, asked, token):
    got = textual_inversion.read(put(tmp_path / name, content), text_model.make(), token=asked)
    assert got.token == token
    np.testing.assert_array_equal(got.vectors, vectors(2))


@pytest.mark.parametrize("to", ["diffusers", "webui"])
def test_written_files_are_read(tmp_path, to):
    path = tmp_path / f"cat{textual_inversion.embedding_files.SUFFIXES[to]}"
    textual_inversion.write(path, embedding(), to)
    got = textual_inversion.read(path, text_model.make())
    assert got.token == "<cat>"
    np.testing.assert_array_equal(got.vectors, vectors(2))
    with pytest.raises(ValueError, match=f"an embedding for {to} ends in"):
        textual_inversion.write(tmp_path / "cat.xyz", embedding(), to)


NAN = np.full((1, WIDTH), np.nan, np.float32)
WIDE = np.zeros((1, 1024), np.float32)
PICTURE = io.BytesIO()
Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(PICTURE, "WEBP")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.bin", {"<x>": WIDE}, r"width 1024 \(Stable Diffusion 2\).*encoder \(CLIP\) have 32"),
        ("x.bin", {"<x>": NAN}, "<x> is not finite"),
        ("x.bin", {"<x>": NAN[:0]}, r"the shape \[0, 32\], not vectors"),
        ("x.bin", {"<x>": np.zeros((13, WIDTH), np.float32)}, "has 13 vectors, and a text has 12"),
        ("x.bin", {"<x>": WIDE, "<y>": WIDE}, "holds 2 tensors, as <x>, <y>, where"),
        ("x.bin", {"<cat>": vectors(1)}, "<cat> is a token of the model already"),
        ("x.pt", {"string_to_param": {}}, "holds 0 tensors"),
        ("x.pt", {"string_to_param": 3}, "its string_to_param is no dict"),
        ("x.safetensors", {"clip_l": WIDE, "clip_g": WIDE}, "made for Stable Diffusion XL"),
        ("x.safetensors", BUNDLED, "holds the embeddings <cat>, <dog>: give the token"),
        ("x.webp", PICTURE.getvalue(), "hidden in the pixels is not read"),
        ("x.png", {"string_to_param": {"*": [["a"]]}}, "not as stable-diffusion-webui writes it"),
        ("x.png", b"\x89PNG", "broken picture"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, name, content, message):
    model = textual_inversion.added(text_model.make(), [embedding()])
    path = put(tmp_path / name, content)
    with pytest.raises(ValueError, match=rf"(?s){path}.*{message}"):
        textual_inversion.read(path, model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: textual_inversion.init(m, "cat", "a"), "'cat'.*inside of other.*give '<cat>'"),
        (lambda m: textual_inversion.init(m, "<a b>", "a"), "give '<a_b>'"),
        (lambda m: textual_inversion.init(m, "<x>", "red"), "'red', is 3 tokens"),
        (lambda m: textual_inversion.init(m, "<x>", "a", 0), "0 vectors: give 1 to 12"),
        (lambda m: textual_inversion.added(m, [embedding()] * 2), "<cat> is a token of"),
        (
            lambda m: textual_inversion.added(
                dataclasses.replace(m, tokenizer=None), [embedding()]
            ),
            "no tokenizer",
        ),
    ],
)
def test_bad_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(text_model.make())
