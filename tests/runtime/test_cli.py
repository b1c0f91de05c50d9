"""Command lines: one-line errors, exit codes, help that is complete, flags before the config's."""

import dataclasses
import os
import subprocess
import sys
import types

import pytest

from ldm_jax import schema
from ldm_jax.configs import digits, tiny
from ldm_jax.runtime import cli, cluster
from ldm_jax.runtime.log import LOG
from ldm_jax.sample import class2img
from ldm_jax.sample import main as sample_main
from ldm_jax.train import main as train_main


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
def test_an_error_is_one_line(capsys, error, line):
    assert cli.run("p", raising(error), []) == 1
    assert capsys.readouterr().err == line


def test_debug_raises_and_is_not_passed_on():
    with pytest.raises(ValueError, match="odd"):
        cli.run("p", raising(ValueError("odd")), ["--debug"])
    seen = []
    cli.run("p", seen.extend, ["a", "--debug", "b"])
    assert seen == ["a", "b"]


def test_ctrl_c_before_training_is_not_an_error(capsys):
    assert cli.run("p", raising(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == "p: interrupted\n"


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


def test_another_pipe_that_breaks_is_an_error(capfd):
    assert cli.run("p", raising(BrokenPipeError(32, "Broken pipe")), []) == 1
    assert capfd.readouterr().err == "p: error: [Errno 32] Broken pipe\n"


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
        (["--distributed", "off", "--a", "1"], ["--a", "1"], None),
        (
            ["--a", "1", "--distributed", "h:12,4,3", "--b"],
            ["--a", "1", "--b"],
            cluster.Place("--distributed", "h:12", 4, 3),
        ),
    ],
)
def test_distributed(joined, argv, rest, place):
    assert cli.join_processes(argv) == rest
    assert joined == ([] if place is None else [place])


def test_a_launcher_is_found_without_a_flag_unless_it_is_off(joined, monkeypatch):
    place = cluster.Place("SLURM", "node1:61440", 4, 3)
    monkeypatch.setattr(cli.cluster, "find", lambda: place)
    assert cli.join_processes(["--a"]) == ["--a"]
    assert cli.join_processes(["--distributed", "--a"]) == ["--a"]
    assert joined == [place, place]
    assert cli.join_processes(["--a", "--distributed", "off"]) == ["--a"]
    assert joined == [place, place]


def test_distributed_without_a_launcher_is_refused(joined):
    with pytest.raises(ValueError, match="no launcher of several processes is seen"):
        cli.join_processes(["--distributed"])
    assert joined == []


@pytest.mark.parametrize("value", ["h:12", "h:12,4", "h:12,four,3", "h:12,4,-1", "h,4,3", "on"])
def test_distributed_refuses_what_it_cannot_read(joined, value):
    with pytest.raises(ValueError, match=r"is not ADDRESS:PORT,PROCESSES,INDEX, nor off"):
        cli.join_processes(["--distributed", value])
    with pytest.raises(ValueError, match="the last of 4 processes is 3"):
        cli.join_processes(["--distributed", "h:12,4,4"])
    assert joined == []


def test_compilation_cache(jax_calls, monkeypatch, tmp_path):
    assert cli.enable_compilation_cache(["a", "--no-compilation-cache"]) == ["a"]
    assert jax_calls == []
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.enable_compilation_cache(["a"]) == ["a"]
    assert ("jax_compilation_cache_dir", os.path.join(tmp_path, "ldm_jax", "xla")) in jax_calls


# --- the first argument -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "program", "names"),
    [
        (train_main.train, "ldm-train", ["CONFIG[:STAGE]", "digits", "tiny"]),
        (sample_main.sample, "ldm-sample", ["TASK", "class2img"]),
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


def flags_of(cls_or_value, prefix="") -> set[str]:
    """Every field below a config, as the flag it should have."""
    flags = set()
    for field in dataclasses.fields(cls_or_value):
        value = getattr(cls_or_value, field.name)
        name = f"{prefix}{field.name}".replace("_", "-")
        flags |= flags_of(value, f"{name}.") if dataclasses.is_dataclass(value) else {f"--{name}"}
    return flags


@pytest.mark.parametrize("stage", ["first_stage", "ldm"])
def test_help_lists_every_field(capsys, stage):
    config = digits.get_config(stage)
    with pytest.raises(SystemExit) as stopped:
        train_main.parse(config, ["--help"], "ldm-train digits")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    # what a file leaves out altogether has no fields to set
    flags = flags_of(config) - {"--cond", "--discriminator", "--disc-optimizer"}
    assert len(flags) > 50
    assert sorted(flag for flag in flags if flag not in text) == []
    for other in ("--workdir", "--debug", "--distributed", "--no-compilation-cache"):
        assert other in text


def test_help_of_a_task_lists_every_option(capsys):
    with pytest.raises(SystemExit):
        sample_main.sample(["class2img", "--help", "--no-compilation-cache"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(class2img.Options):
        assert f"--{field.name.replace('_', '-')}" in text


def test_flags_override_fields_and_keep_the_kind_of_a_union():
    flags = (
        "--workdir runs/a --unet.model-channels 64 --unet.channel-mult 1 2 2 --cond.dropout 0.5"
        " --mesh.fsdp 2 --data.no-flip --intervals.save 7"
    )
    workdir, config = train_main.parse(tiny.get_config("class"), flags.split(), "ldm-train")
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
    ("flags", "named"),
    [
        ("--unet.widht 3", "--unet.widht"),
        ("--unet.model-channels many", "'many'"),
        ("--data.crop left", "left"),
        ("--cond.factor 4", "--cond.factor"),
        ("--seed", "--seed"),
    ],
)
def test_wrong_flags_are_named(capsys, flags, named):
    with pytest.raises(SystemExit) as stopped:
        train_main.parse(tiny.get_config("class"), ["--workdir", "a", *flags.split()], "ldm-train")
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


def test_a_missing_workdir_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        train_main.parse(tiny.get_config("class"), [], "ldm-train tiny")
    assert stopped.value.code == 2
    assert "--workdir" in capsys.readouterr().err
