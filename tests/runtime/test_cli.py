"""Command lines: one-line errors, exit codes, help that is complete, flags before the config's."""

import contextlib
import dataclasses
import importlib.metadata
import os
import re
import subprocess
import sys
import types

import pytest

import ldm_jax
from ldm_jax import __main__ as package_main
from ldm_jax import schema
from ldm_jax.configs import digits, tiny
from ldm_jax.runtime import cli, cluster, flags
from ldm_jax.runtime.log import LOG
from ldm_jax.sample import again, class2img
from ldm_jax.sample import main as sample_main
from ldm_jax.sample.evaluate import main as eval_main
from ldm_jax.train import main as train_main
from ldm_jax.train.plan.command import PlanOptions


def flags_of(cls_or_value, prefix="") -> set[str]:
    """Every field below a config, as the flag it should have."""
    flags = set()
    for field in dataclasses.fields(cls_or_value):
        value = getattr(cls_or_value, field.name, None)
        name = f"{prefix}{field.name}".replace("_", "-")
        flags |= flags_of(value, f"{name}.") if dataclasses.is_dataclass(value) else {f"--{name}"}
    return flags


def raising(error):
    def command(argv):
        raise error

    return command


# --- run ----------------------------------------------------------------------------------------


def test_run_returns_the_commands_code():
    assert cli.run("p", lambda argv: None, []) == 0
    assert cli.run("p", lambda argv: cli.INTERRUPTED, []) == 75


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyboardInterrupt(), "p: interrupted\n"),
        (BrokenPipeError(32, "Broken pipe"), "p: error: [Errno 32] Broken pipe\n"),
        (ValueError("steps 3\n  is odd"), "p: error: steps 3 is odd\n"),
        (FileNotFoundError("x: does not exist"), "p: error: x: does not exist\n"),
        (FloatingPointError("not finite"), "p: error: not finite\n"),
        (RuntimeError("5 records"), "p: error: 5 records\n"),
        (ImportError("needs scikit-learn"), "p: error: needs scikit-learn\n"),
        (ValueError(), "p: error: no message\n"),
        (KeyError("a"), "p: error: KeyError: 'a' (--debug shows where)\n"),
        (RecursionError("deep"), "p: error: RecursionError: deep (--debug shows where)\n"),
    ],
)
def test_an_error_is_one_line(capfd, error, line):
    assert cli.run("p", raising(error), []) == (130 if "interrupted" in line else 1)
    assert capfd.readouterr().err == line


def test_debug_raises():
    with pytest.raises(ValueError, match="odd"):
        cli.run("p", raising(ValueError("odd")), ["a", "--debug", "b"])


@pytest.mark.parametrize("argv", [["--version"], ["tiny", "--steps", "3", "--version"]])
def test_version_instead_of_the_command(capsys, argv):
    assert cli.run("ldm-train", raising(ValueError("runs")), argv) == 0
    found = importlib.metadata.version
    expected = f"ldm-train {found('ldm-jax')} (jax {found('jax')})\n"
    assert capsys.readouterr().out == expected
    assert ldm_jax.__version__ == found("ldm-jax")


@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [(["--help"], ""), (["digits", "--help"], "1")],
    ids=["noticed at the end", "noticed while printing"],
)
def test_a_reader_that_leaves_is_not_an_error(arguments, unbuffered):
    """`ldm-train digits --help | head -1` prints nothing of its own."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "ldm_jax.train.main", *arguments],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writer)
    assert (done.stderr, done.returncode) == (b"", 141)


def test_the_log_is_on_stderr_inside_alone(capsys):
    cli.run("p", lambda argv: LOG.info("inside"), [])
    LOG.info("outside")
    assert capsys.readouterr().err == "inside\n"


# --- flags of every command ---------------------------------------------------------------------


@pytest.fixture
def jax_calls(monkeypatch) -> list:
    """Calls that would change JAX's settings."""
    calls = []
    monkeypatch.setattr(cli.jax.config, "update", lambda *args: calls.append(args))
    return calls


@pytest.fixture
def joined(monkeypatch) -> list:
    """Places that would have been joined; no launcher is seen."""
    places = []
    monkeypatch.setattr(cli.cluster, "join", places.append)
    monkeypatch.setattr(cli.cluster, "find", lambda: None)
    return places


@pytest.mark.parametrize(
    ("argv", "rest", "place"),
    [
        (["--a", "1"], ["--a", "1"], None),
        (["--distributed", "off", "--a", "1"], ["--a", "1"], "off"),
        (["--a", "1", "--distributed", "h:12,4,3", "--b"], ["--a", "1", "--b"], "h:12,4,3"),
        (["--a", "--distributed=h:12,4,3"], ["--a"], "h:12,4,3"),
        (["--distributed", "--a"], ["--a"], "auto"),
        (["--a", "--distributed"], ["--a"], "auto"),
    ],
)
def test_the_value_of_distributed_may_be_left_out(argv, rest, place):
    assert flags.parse_known(argv, "p", flags.Process) == (flags.Process(distributed=place), rest)


@pytest.mark.parametrize(
    ("value", "place"),
    [(None, None), ("off", None), ("h:12,4,3", cluster.Place("--distributed", "h:12", 4, 3))],
)
def test_distributed(joined, value, place):
    cli.join_processes(value)
    assert joined == ([] if place is None else [place])


def test_a_launcher_is_found_without_a_flag_unless_it_is_off(joined, monkeypatch):
    place = cluster.Place("SLURM", "node1:61440", 4, 3)
    monkeypatch.setattr(cli.cluster, "find", lambda: place)
    cli.join_processes()
    cli.join_processes("auto")
    assert joined == [place, place]
    cli.join_processes("off")
    assert joined == [place, place]


def test_distributed_without_a_launcher_is_refused(joined):
    with pytest.raises(ValueError, match="no launcher of several processes is seen"):
        cli.join_processes("auto")
    assert joined == []


@pytest.mark.parametrize("value", ["h:12", "h:12,4", "h:12,four,3", "h:12,4,-1", "h,4,3", "on"])
def test_distributed_refuses_what_it_cannot_read(joined, value):
    with pytest.raises(ValueError, match=r"is not ADDRESS:PORT,PROCESSES,INDEX, nor off"):
        cli.join_processes(value)
    with pytest.raises(ValueError, match="the last of 4 processes is 3"):
        cli.join_processes("h:12,4,4")
    assert joined == []


def test_compilation_cache(jax_calls, joined, monkeypatch, tmp_path):
    process, rest = flags.parse_known(["a", "--no-compilation-cache"], "p", flags.Process)
    cli.start(process)
    assert (rest, jax_calls) == (["a"], [])
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cli.start(flags.Process())
    assert ("jax_compilation_cache_dir", os.path.join(tmp_path, "ldm_jax", "xla")) in jax_calls


# --- the first argument -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "program", "names"),
    [
        (train_main.train, "ldm-train", ["CONFIG[:STAGE]", "digits", "tiny", "encode", "plan"]),
        (sample_main.sample, "ldm-sample", ["TASK", *sample_main.TASKS, "again"]),
        (eval_main.evaluate, "ldm-eval", ["TASK", *eval_main.TASKS]),
    ],
)
def test_without_arguments_usage_says_what_to_give(jax_calls, capsys, command, program, names):
    for argv, code in (([], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as stopped:
            cli.run(program, command, argv)
        assert stopped.value.code == code
        printed = capsys.readouterr()
        text = printed.out if code == 0 else printed.err
        assert text.startswith(f"usage: {program} {names[0]}")
        assert all(name in text for name in names)


def test_top_help_has_the_first_sentence_of_each(jax_calls, capsys):
    for command, line in (
        (train_main.train, f"  tiny              {flags.summary(tiny.__doc__)}\n"),
        (train_main.train, f"  pack CONFIG    {flags.summary(train_main.Pack.__doc__)}\n"),
        (sample_main.sample, f"  class2img      {flags.summary(class2img.Options.__doc__)}\n"),
    ):
        with pytest.raises(SystemExit):
            command(["--help"])
        assert line in capsys.readouterr().out


def test_a_sentence_ends_before_a_capital():
    assert flags.summary("Images (Meng et al. 2021)\nof a model. As many.\n\nMore.") == (
        "Images (Meng et al. 2021) of a model."
    )


@pytest.mark.parametrize(
    ("argv", "code", "output"),
    [
        (["--help"], 0, "  convert  Convert a model between the formats of"),
        (["--version"], 0, f"ldm_jax {ldm_jax.__version__}\n"),
        ([], 2, "error: a command is missing"),
        (["paint"], 2, "error: 'paint' is not a command"),
        (["sample", "--version"], 0, f"ldm-sample {ldm_jax.__version__} (jax "),
        (["eval", "paint"], 1, "ldm-eval: error: task 'paint' is not one of reconstruct"),
    ],
)
def test_the_package_runs_its_commands(monkeypatch, capsys, argv, code, output):
    monkeypatch.setattr(sys, "argv", ["ldm_jax", *argv])
    with contextlib.suppress(SystemExit) if code == 0 else pytest.raises(SystemExit) as stopped:
        package_main.main()
    printed = capsys.readouterr()
    assert output in (printed.out if code == 0 else printed.err)
    if code:
        assert stopped.value.code == code


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nope", r"config 'nope' is not one of digits, .*tiny, nor a path to a \.py file"),
        ("digits:nope", "digits has no stage 'nope'; it has first_stage, gan, ldm"),
        ("gone.py", r"config file gone\.py does not exist"),
    ],
)
def test_unknown_configs_are_named(name, complaint):
    with pytest.raises(ValueError, match=complaint):
        train_main.load_config(name)


def test_a_config_may_be_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import dataclasses\nfrom ldm_jax.configs import tiny\n"
        "def get_config(stage='class'):\n"
        "    return dataclasses.replace(tiny.get_config(stage), seed=5)\n"
    )
    assert train_main.load_config(f"{path}").seed == 5
    first_stage = train_main.load_config(f"{path}:first_stage")
    assert first_stage == dataclasses.replace(tiny.get_config("first_stage"), seed=5)
    path.write_text("")
    with pytest.raises(ValueError, match=r"mine\.py has no get_config\(stage\)"):
        train_main.load_config(f"{path}")


# --- fields as flags ----------------------------------------------------------------------------


TRAIN = train_main.train
PROCESS = {"--debug", "--no-compilation-cache", "--version", "--distributed"}
RESTART = {"--restart", "--max-restarts", "--restart-delay"}


def shown(text) -> list[str]:
    """Options at the beginning of a line of --help."""
    return re.findall(r"^[│ ]*(--[a-z][a-z0-9.-]*)", text, re.M)


def helped(capsys, command, *argv) -> str:
    """What --help prints."""
    with pytest.raises(SystemExit) as stopped:
        command([*argv, "--help", *(() if argv[0] == "plan" else ("--distributed", "off"))])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("stage", ["first_stage", "ldm"])
def test_help_lists_every_field(jax_calls, capsys, stage):
    text = helped(capsys, train_main.train, f"digits:{stage}")
    # what a file leaves out altogether has no fields to set
    fields = flags_of(digits.get_config(stage)) - {"--cond", "--discriminator", "--disc-optimizer"}
    assert len(fields) > 50
    expected = fields | PROCESS | RESTART | {"--workdir"}
    assert sorted(expected - set(shown(text))) == []


@pytest.mark.parametrize(
    ("command", "argv", "expected"),
    [
        (TRAIN, ["encode", "tiny:class"], {"--workdir", "--data.size"} | PROCESS | RESTART),
        (TRAIN, ["pack", "folder"], {"--records-per-shard"} | PROCESS | RESTART),
        (TRAIN, ["plan", "tiny:class"], flags_of(PlanOptions) | PROCESS - {"--distributed"}),
        # IMAGE.png of `again` stands without a flag
        *((sample_main.sample, [name], flags_of(task.Options) - {"--image"} | PROCESS)
          for name, task in {**sample_main.TASKS, "again": again}.items()),
        *((eval_main.evaluate, [name], flags_of(task.Options) | PROCESS)
          for name, task in eval_main.TASKS.items()),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_help_lists_every_option(jax_calls, capsys, command, argv, expected):
    text = helped(capsys, command, *argv)
    assert sorted(expected - set(shown(text))) == []
    for anonymous in ("STR STR", "INT INT", "FLOAT FLOAT", "{None}|"):
        assert anonymous not in text or command is TRAIN


def test_help_shows_required_options_first_and_those_of_the_task_before_others(jax_calls, capsys):
    text = helped(capsys, sample_main.sample, "inpaint")
    listed = shown(text)
    assert listed[:4] == ["--model", "--out", "--masks", "--pad"]
    assert listed.index("--images") < listed.index("--steps") < listed.index("--debug")
    for metavar in ("--masks FILE ...", "--pad ABOVE BELOW LEFT RIGHT", "--out DIR", "--step N"):
        assert metavar in text
    listed = shown(helped(capsys, eval_main.evaluate, "reconstruct"))
    assert listed[:2] == ["--model", "--out"]


def test_parts_of_a_command_line_come_back_as_they_are():
    asked, config, common = flags.parse(
        ["--out", "o", "--model=m", "--labels", "3", "4", "--seed", "5", "--no-compilation-cache"],
        "p",
        "About.",
        class2img.Options,
        digits.get_config("first_stage").loss,
        flags.Common,
    )
    assert asked == class2img.Options(model="m", out="o", labels=("3", "4"), seed=5)
    assert config == digits.get_config("first_stage").loss
    assert common == flags.Common(compilation_cache=False)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--guidance-scale", "nan"),
        ("--guidance-scale", "inf"),
        ("--eta", "-inf"),
        ("--guidance-interval", "0 nan"),
        ("--perceptual-weight", "nan"),
    ],
)
def test_numbers_that_are_not_finite_are_refused(option, value):
    parts = (class2img.Options, digits.get_config("first_stage").loss)
    argv = ["--out", "o", "--model", "m", option, *value.split()]
    with pytest.raises(ValueError, match=rf"{option} -?(nan|inf) is not a finite number"):
        flags.parse(argv, "p", "About.", *parts)


def test_flags_override_fields_and_keep_the_kind_of_a_union():
    argv = (
        "--workdir runs/a --unet.model-channels 64 --unet.channel-mult 1 2 2 --cond.dropout 0.5"
        " --mesh.fsdp 2 --data.no-flip --intervals.save 7"
    )
    workdir, config = train_main.parse(tiny.get_config("class"), argv.split(), "ldm-train")
    base = tiny.get_config("class")
    assert workdir == "runs/a"
    assert config == dataclasses.replace(
        base,
        unet=dataclasses.replace(base.unet, model_channels=64, channel_mult=(1, 2, 2)),
        cond=dataclasses.replace(base.cond, dropout=0.5),
        mesh=schema.MeshConfig(fsdp=2),
        data=dataclasses.replace(base.data, flip=False),
        intervals=dataclasses.replace(base.intervals, save=7),
    )


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--unet.widht 3", "--unet.widht"),
        ("--unet.model-channels many", "'many'"),
        ("--data.crop left", "left"),
        ("--cond.factor 4", "--cond.factor"),
        ("--seed", "--seed"),
        ("", "--workdir"),
    ],
)
def test_wrong_and_missing_flags_are_named(capsys, argv, named):
    given = ["--workdir", "a", *argv.split()] if argv else []
    with pytest.raises(SystemExit) as stopped:
        train_main.parse(tiny.get_config("class"), given, "ldm-train")
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_deterministic_sets_the_flag_and_says_what_it_costs(monkeypatch, capsys, shown):
    before = os.environ["XLA_FLAGS"]
    monkeypatch.setenv("XLA_FLAGS", before)  # and back again
    train_main.be_deterministic()
    assert os.environ["XLA_FLAGS"] == f"{before} --xla_gpu_deterministic_ops=true"
    said = capsys.readouterr().err
    assert said == "deterministic: costs nothing on cpu, where every step repeats bit for bit\n"
    gpu = types.SimpleNamespace(platform="gpu")
    monkeypatch.setattr(train_main.jax, "devices", lambda: [gpu])
    train_main.be_deterministic()
    said = capsys.readouterr().err
    assert "leaves out faster algorithms" in said
    assert "the cost is" in said


def test_help_of_a_config_names_values_as_people_do(capsys):
    with pytest.raises(SystemExit):
        train_main.train(["folder:text", "--no-compilation-cache", "--help"])
    text = capsys.readouterr().out
    for named in (
        "--workdir DIR",
        "--batch-size N",
        "--optimizer.learning-rate NUMBER",
        "--optimizer.decay-steps N",
        "--data.source.path PATH",
        "--data.source.eval-path PATH",
        "--cond.tokenizer PATH",
    ):
        assert f"{named} " in text
    assert not [word for word in ("STR", "INT", "FLOAT", "{None}|N ") if f" {word} " in text]
    assert text.index("--workdir") < text.index("--batch-size")
