"""What a run that has ended tells to do next is a command that parses."""

import shlex

import pytest

from ldm_jax import conditioning, schema
from ldm_jax.configs import digits, own, tiny
from ldm_jax.runtime import flags
from ldm_jax.sample.main import TASKS
from ldm_jax.train import main
from ldm_jax.train.run import next_steps

CONDITIONS = {name: config for name, config in tiny.CONDITIONS.items() if config is not None}


def command(text):
    """The words of the last line."""
    return shlex.split(text.splitlines()[-1])


def test_a_stopped_run_goes_on_with_the_same_words():
    argv = ["--workdir", "my runs/a", "--steps", "9"]
    said = next_steps.after_stop("my runs/a", "digits:first_stage", argv)
    assert said.startswith("my runs/a: stopped, and saved; this goes on:\n")
    assert command(said) == ["ldm-train", "digits:first_stage", *argv]


def test_after_a_first_stage_comes_the_model_on_it():
    said = next_steps.after_last_step("runs/first", "digits", digits.first_stage())
    assert said.startswith("runs/first: 800 steps are made, pictures in runs/first/samples; next:")
    program, name, *argv = command(said)
    assert (program, name) == ("ldm-train", "digits")
    workdir, config = main.parse(main.load_config(name), argv, "ldm-train")
    assert (workdir, config.first_stage.path) == ("runs/first_model", "runs/first")


def test_the_images_go_with_it(tmp_path):
    argv = ["--data.source.path", str(tmp_path), "--workdir", "first/"]
    config = main.parse(own.get_config("first_stage"), argv, "ldm-train")[1]
    words = command(next_steps.after_last_step("first/", "own", config))
    assert words[words.index("--data.source.path") + 1] == str(tmp_path)
    assert words[words.index("--workdir") + 1] == "first_model"


def test_a_file_of_first_stages_alone_names_no_model():
    assert main._model_on("first_stages:kl-f8") == "CONFIG"
    assert main._model_on("stable_diffusion:first_stage") == "stable_diffusion"
    assert main._model_on("own:first_stage") == "own"


@pytest.mark.parametrize("name", ["unconditional", *CONDITIONS])
def test_a_model_is_sampled_by_its_task(name):
    config = tiny.get_config(name)
    program, task, *argv = command(next_steps.after_last_step("runs/a", "tiny", config))
    assert program == "ldm-sample"
    options, _ = flags.parse(argv, task, "", TASKS[task].Options, flags.Process)
    assert (options.model, options.out) == ("runs/a", "runs/a_samples")
    assert conditioning.sampled_by(config.cond).split()[0] == task


@pytest.mark.parametrize(
    ("cond", "words"),
    [
        (schema.LayoutCondConfig(), "layout2img --boxes BOXES"),
        (schema.UpscaleCondConfig(), "superres --images PICTURE"),
        (schema.HybridCondConfig(), 'inpaint --images PICTURE --masks MASK --prompt "..."'),
        (schema.DepthCondConfig(), ""),
        (schema.EmbeddingCondConfig(), ""),
        (schema.HybridCondConfig(concat=schema.DepthCondConfig()), ""),
    ],
)
def test_tasks_of_models_that_are_loaded(cond, words):
    assert conditioning.sampled_by(cond) == words
