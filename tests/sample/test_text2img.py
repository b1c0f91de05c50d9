"""`ldm-sample text2img` from end to end, on a run with a frozen text encoder; bytes are tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import task_models
import text_model
from task_models import pixels

from ldm_jax import conditioning, loading, sampling, saving
from ldm_jax.runtime import images
from ldm_jax.sample import adapters, text2img
from ldm_jax.sample.program import make_run

FAST = ["--num-images", "2"]
sample = functools.partial(task_models.sample, "text2img")


@pytest.fixture(scope="module")
def model():
    return text_model.make()


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """The model as a run directory."""
    folder = tmp_path_factory.mktemp("text") / "run"
    saving.save(model, folder, to="ldm_jax")
    return folder


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    """(folder of images, stderr lines) of two prompts and of one in a file."""
    folder = tmp_path_factory.mktemp("text2img")
    (folder / "prompts.txt").write_text("a disc\n\n  größer  \n")
    flags = ["--prompt", "a red square of sand", "--prompt-file", folder / "prompts.txt"]
    assert sample("--model", run, "--out", folder / "out", *flags, *FAST, "--save-latents") == 0
    return folder / "out"


def test_files_names_and_settings(made, run):
    names = [
        "00000_a_red_square_of_sand_seed0", "00001_a_red_square_of_sand_seed0",
        "00002_a_disc_seed0", "00003_a_disc_seed0",
        "00004_gr_er_seed0", "00005_gr_er_seed0",
    ]  # fmt: skip
    files = {*(f"{name}.png" for name in names), "grid.png", "latents.npy"}
    assert {f.name for f in made.iterdir()} == files
    kept = images.read_settings(made / "00004_gr_er_seed0.png")
    assert (kept["task"], kept["prompt"], kept["index"]) == ("text2img", "größer", 4)
    assert (kept["guidance_scale"], kept["spacing"], kept["model"]) == (7.5, "leading", str(run))
    singles = [pixels(made / f"{name}.png") for name in names]
    assert singles[0].shape == (16, 16, 3)
    assert len({single.tobytes() for single in singles}) == 6


def test_an_image_is_what_the_public_functions_give(made, model):
    """Prompt number 1, image number 2, without the command."""
    batch = text2img.read_plain(model.tokenizer, ["a disc"], [""])
    arguments = (model.config.cond, model.cond_stage, model.params["cond_stage"], batch)
    cond, null = conditioning.from_batch(*arguments), conditioning.null_like(*arguments)
    draw = jax.jit(sampling.make_sampler(model, shape=(8, 8, 4), steps=2))
    image = draw(model.params, cond, sampling.keys_of(0, [2]), null, 7.5)
    expected = images.to_uint8(np.asarray(image))[0].astype(int)
    assert np.abs(pixels(made / "00002_a_disc_seed0.png") - expected).max() <= 1


def test_the_run_holds_the_model_bit_for_bit(run, model):
    again = loading.load(run)
    assert again.config == model.config
    assert again.latent_scale == model.latent_scale
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    text = ["größer", ""]
    np.testing.assert_array_equal(again.tokenizer.encode(text), model.tokenizer.encode(text))
    half = loading.load(run, param_dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}
    with pytest.raises(ValueError, match=r"config=a\.yaml is of a checkpoint, and this is a run"):
        loading.load(run, config="a.yaml")


def test_the_text_is_encoded_once_for_all_steps(model):
    options = text2img.Options(model="", out="", steps=4)
    run = make_run(model, options, guided=True, shape=(8, 8, 4))
    batch = text2img.read_plain(model.tokenizer, ["a disc"], [""])
    arguments = (model.params, batch, sampling.keys_of(0, [0]), 7.5, 0.0)
    scans = [e for e in jax.make_jaxpr(run)(*arguments).eqns if e.primitive.name == "scan"]
    assert [scan.params["length"] for scan in scans] == [4]
    table = model.params["cond_stage"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
    read = [v.aval.shape for v in scans[0].invars]
    assert table.shape not in read
    heads = {(2, 12, 32), (2, 12, 2, 16), (1, 12, 32), (1, 12, 2, 16)}
    assert heads & set(read)  # keys and values of the text


def test_lost_words_are_named(model, capsys, shown):
    texts = ["a red square of sand", "a disc"]
    batch = text2img.read_plain(model.tokenizer, texts, ["no", "no"])
    assert batch["tokens"].shape == batch["null_tokens"].shape == (2, 12)
    np.testing.assert_array_equal(batch["tokens"][:1], model.tokenizer.encode(["a red square"]))
    (line,) = capsys.readouterr().err.splitlines()
    assert "prompt 'a red square of sand'... is longer than the text encoder's 12 tokens" in line
    assert line.endswith("left out: ' of sand'")


@pytest.mark.slow
def test_negative_prompt_and_guidance(run, made, tmp_path, capsys):
    flags = ["--model", run, "--prompt", "a red square of sand", *FAST]
    assert sample(*flags, "--out", tmp_path / "n", "--negative-prompt", "a disc") == 0
    name = "00001_a_red_square_of_sand_seed0.png"
    assert np.abs(pixels(tmp_path / "n" / name) - pixels(made / name)).max() > 1
    capsys.readouterr()
    scale = ["--guidance-scale", "1", "--negative-prompt"]
    for negative in ("", "a disc"):
        assert sample(*flags, "--out", tmp_path / f"1{negative}", *scale, negative) == 0
    assert "--negative-prompt has no effect" in capsys.readouterr().err
    np.testing.assert_array_equal(
        pixels(tmp_path / "1" / name), pixels(tmp_path / "1a disc" / name)
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], 'give --prompt "..." or --prompt-file FILE'),
        (["--prompt-file", "{tmp}/none.txt"], "none.txt"),
        (["--prompt", "x", "--width", "0"], "--width 0 is not a multiple of 2, by which"),
        (["--prompt", "x", "--model", "{classes}"], "is trained with class label, not with"),
        (["--prompt", "x", "--model", "{mute}"], "comes without a tokenizer; give --tokenizer"),
        (["--prompt", "x", "--tokenizer", "{tmp}"], "no tokenizer in"),
        (["--prompt", "x", "--variant", "fp16"], "variant=fp16, but a run has one set of weights"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(run, ldm_run, model, tmp_path, capsys, flags, message):

    if "{mute}" in flags:
        saving.save(dataclasses.replace(model, tokenizer=None), tmp_path / "mute", to="ldm_jax")
    places = {"tmp": tmp_path, "classes": ldm_run, "mute": tmp_path / "mute"}
    flags = ["--model", run, "--out", tmp_path / "out", *(f.format(**places) for f in flags)]
    task_models.assert_one_line("text2img", capsys, message, *flags)


@pytest.fixture(scope="module")
def words_run(tmp_path_factory):
    """A run with the tokenizer of CLIP."""
    folder = tmp_path_factory.mktemp("words")
    saving.save(text_model.make(text_model.clip_tokenizer(folder / "clip")), folder / "run")
    return folder / "run"


def test_a_prompt_in_webuis_syntax_is_repeated_from_its_picture(words_run, tmp_path, capsys):
    prompt = "[red:(blue:1.5):0.5] AND disc:0.5"
    flags = ["--model", words_run, "--prompt", prompt, "--num-images", "1"]
    assert sample(*flags, "--out", tmp_path / "out", "--prompt-syntax", "webui") == 0
    (path,) = (tmp_path / "out").glob("0*.png")
    assert images.read_settings(path)["prompt"] == prompt
    assert task_models.again(path, "--out", tmp_path / "again") == 0
    assert capsys.readouterr().err.endswith("pixel for pixel\n")
    assert sample(*flags, "--out", tmp_path / "plain") == 0
    (plain,) = (tmp_path / "plain").glob("0*.png")
    assert (pixels(plain) != pixels(path)).any()


def test_a_lora_of_the_prompt_is_that_of_the_option(words_run, tmp_path):
    given = {"prompt": ("red <lora:sky:0.5>",), "prompt_syntax": "webui", "lora_dir": str(tmp_path)}
    with pytest.raises(
        ValueError, match=r"<lora:sky>: --lora-dir .* has no such file, but nothing"
    ):
        text2img.request(text2img.Options(str(words_run), "out", **given))
    (tmp_path / "sky.safetensors").write_bytes(b"")
    options = adapters.with_networks(text2img.Options(str(words_run), "out", **given))
    assert (options.prompt, options.lora) == (("red ",), (f"{tmp_path}/sky.safetensors:0.5:0.5",))
    two = {**given, "prompt": ("red <lora:sky:0.5>", "blue")}
    with pytest.raises(ValueError, match="all prompts of a command ask for the same LoRAs"):
        adapters.with_networks(text2img.Options(str(words_run), "out", **two))


def test_a_picture_of_another_program_is_drawn_with_the_model_that_is_given(words_run, tmp_path):
    prompt = "red (blue:1.5)"
    flags = ["--model", words_run, "--prompt", prompt, "--num-images", "1", "--seed", "3"]
    flags += ["--noise-source", "nv", "--prompt-syntax", "webui", "--solver", "euler"]
    assert sample(*flags, "--spacing", "karras", "--out", tmp_path / "out") == 0
    (path,) = (tmp_path / "out").glob("0*.png")
    text = images.read_info(path)["parameters"]
    assert text.startswith("red (blue:1.5)\nSteps: 2, Sampler: Euler, Schedule type: Karras, ")
    other = tmp_path / "other.png"
    images.save_png(other, np.zeros((16, 16, 3), np.uint8), parameters=text)
    assert task_models.again(other, "--model", words_run, "--out", tmp_path / "again") == 0
    (found,) = (tmp_path / "again").glob("0*.png")
    np.testing.assert_array_equal(pixels(found), pixels(path))
    images.save_png(other, np.zeros((16, 16, 3), np.uint8))
    assert task_models.again(other, "--model", words_run, "--out", tmp_path / "no") == 1
