"""Messages at the end of a run: where it is, and the next command."""

import shlex
from collections.abc import Sequence

from ldm_jax import conditioning, schema


def after_stop(workdir: str, name: str, argv: Sequence[str]) -> str:
    """The message of a stopped run, with the command that resumes it; `argv` are its options."""
    return f"{workdir}: stopped, and saved; this goes on:\n{_command('ldm-train', name, *argv)}"


def after_last_step(workdir: str, model: str, config: schema.TrainConfig) -> str:
    """The message of a finished run: next, train a model on a first stage, or sample a model.

    model: name of the config that trains on such a first stage.
    """
    done = f"{workdir}: {config.steps} steps are made"
    pictures = f", pictures in {workdir}/samples" if config.intervals.sample else ""
    if isinstance(config, schema.AutoencoderTrainConfig):
        after = _model_on(workdir, model, config)
    else:
        after = _samples_of(workdir, config)
    return f"{done}{pictures}" + (f"; next:\n{after}" if after else "")


def _model_on(workdir: str, model: str, config: schema.AutoencoderTrainConfig) -> str:
    source = config.data.source
    images = ("--data.source.path", source.path) if isinstance(source, schema.FolderConfig) else ()
    folder, _, own = workdir.rstrip("/").rpartition("/")
    beside = f"{folder}/{own}_model" if folder else f"{own}_model"
    return _command("ldm-train", model, "--workdir", beside, "--first-stage.path", workdir, *images)


def _samples_of(workdir: str, config: schema.LatentDiffusionTrainConfig) -> str:
    words = conditioning.sampled_by(config.cond)
    if not words:
        return ""
    task, _, needed = words.partition(" ")
    run = workdir.rstrip("/")
    line = _command("ldm-sample", task, "--model", run, "--out", f"{run}_samples")
    return f"{line} {needed}".rstrip()


def _command(*words: str) -> str:
    return f"    {shlex.join(words)}"
