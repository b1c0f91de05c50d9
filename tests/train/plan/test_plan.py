"""Planning: names of machines, what a result depends on, and compilers that die."""

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from ldm_jax import schema, sharding
from ldm_jax.configs import tiny
from ldm_jax.train import main
from ldm_jax.train.plan import command, programs, reports, topologies

GOLDEN = Path(__file__).parents[2] / "golden"
TARGET = programs.Target(
    tiny.get_config("class"), topologies.parse("v5e:2x2"), tiny.first_stage().model
)
CONFIG = TARGET.config
CHECK_COMPILER = topologies.check_compiler  # tests of what follows do without one


def with_config(**fields):
    return dataclasses.replace(TARGET, config=dataclasses.replace(CONFIG, **fields))


@pytest.mark.parametrize(
    ("text", "slices", "name", "devices"),
    [
        ("v5e:16x16", 1, "v5e:16x16", 256),
        ("v5p:4x4x4", 1, "v5p:4x4x4", 64),
        ("v6e:4x8", 2, "2 x v6e:4x8", 64),
        ("gpu:8", 1, "gpu:8", 8),
    ],
)
def test_topologies(text, slices, name, devices):
    found = topologies.parse(text, slices)
    assert (str(found), found.num_devices) == (name, devices)
    assert (found.chip is None) == (found.kind == "gpu")


@pytest.mark.parametrize(
    ("text", "slices", "complaint"),
    [
        ("v7:4x4", 1, "'v7' is not one of v5e, v6e, v5p, gpu"),
        ("v5e:16", 1, "v5e takes 2 sizes, as v5e:4x4"),
        ("v5e:4x0", 1, "v5e takes 2 sizes, as v5e:4x4"),
        ("v5p:4x4", 1, "v5p takes 3 sizes, as v5p:4x4x4"),
        ("v5e:3x4", 1, "a host has 2x2 chips"),
        ("gpu:2x4", 1, "gpu takes 1 size, as gpu:8"),
        ("gpu:8", 2, "GPUs have no slices"),
        ("v5e:4x4", 0, "--slices 0: give at least 1"),
    ],
)
def test_wrong_topologies_are_told(text, slices, complaint):
    with pytest.raises(ValueError, match=complaint):
        topologies.parse(text, slices)


def test_a_missing_compiler_is_told_with_its_version(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps 'libtpu==0\.\d+\.\d+\.\*'"):
        CHECK_COMPILER(TARGET.topology)
    CHECK_COMPILER(topologies.parse("gpu:2"))


def test_a_result_is_found_by_what_shapes_the_program(monkeypatch):
    name = command.key(TARGET)
    same = with_config(steps=99, seed=1, intervals=schema.IntervalConfig(log=7))
    assert command.key(same) == name
    others = [
        with_config(batch_size=16),
        with_config(remat=True),
        with_config(mesh=schema.MeshConfig(fsdp=2)),
        dataclasses.replace(TARGET, topology=topologies.parse("v5e:2x4")),
        dataclasses.replace(TARGET, cached=True),
    ]
    assert len({name, *map(command.key, others)}) == 6
    monkeypatch.setattr(topologies, "version", lambda name: "0")
    assert command.key(TARGET) != name


def test_a_target_comes_back_from_json():
    values = json.loads(json.dumps(TARGET.to_json()))
    assert programs.Target.from_json(values) == TARGET


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--topology", "v5e:2x2", "--space", "3"], "--space 3 does not divide 4 devices"),
        (["--topology", "v5e:2x2", "--first-stage-config", "tiny:class"], "no config of a first"),
    ],
)
def test_options_that_do_not_fit(argv, complaint):
    config, options = command.parse(CONFIG, [*argv, "--sample"], "tiny:class")
    with pytest.raises(ValueError, match=complaint):
        command.target_of(config, options, "tiny:class", main.load_config)


def test_options_make_a_target():
    argv = ["--topology", "v5e:4x4", "--slices", "2", "--mesh.dcn-data", "2", "--remat"]
    config, options = command.parse(CONFIG, [*argv, "--cached"], "tiny:class")
    target = command.target_of(config, options, "tiny:class", main.load_config)
    assert (target.topology.num_devices, target.cached, target.sample) == (32, True, False)
    assert (target.config.mesh.dcn_data, target.config.remat) == (2, True)
    assert target.first_stage == tiny.first_stage().model
    argv = ["--topology", "v5e:4x4", "--sample", "--space", "8", "--height", "64"]
    config, options = command.parse(CONFIG, argv, "tiny:class")
    target = command.target_of(config, options, "tiny:class", main.load_config)
    assert (target.images, target.height, target.width, target.space) == (2, 64, 16, 8)


def test_rows_of_a_batch_are_those_of_training():
    mesh = sharding.make_mesh(schema.MeshConfig())
    shapes = programs.abstract_batch(dataclasses.replace(TARGET, cached=True), mesh)
    assert {n: x.shape for n, x in shapes.items()} == {
        "label": (8,), "mean": (8, 8, 8, 4), "logvar": (8, 8, 8, 4)
    }  # fmt: skip
    text = dataclasses.replace(TARGET, config=tiny.get_config("hybrid"))
    shapes = programs.abstract_batch(text, mesh)
    assert set(shapes) == {"tokens", "null_tokens", "mask", "image"}
    assert shapes["image"].sharding.spec == sharding.batch_sharding(mesh).spec


# --- compilers ------------------------------------------------------------------------------------

TRACED = {
    "mesh": {"data": 4, "fsdp": 1, "tensor": 1},
    "operations": 1e12,
    "kernels": [],
    "largest_logits": {"shape": [8, 8, 4096, 4096], "bytes": 2**32, "local": False},
    "resident": {"parameters": 10e9, "moments": 20e9, "batch": 1e6},
    "whole": 30e9,
    "parameters": [[[1024, 4096], [64, 4096]]],
}
CHILD = f"""
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
assert (folder / "request.json").exists()
(folder / "traced.json").write_text({json.dumps(json.dumps(TRACED))})
"""


def planned(tmp_path, capsys, code, *options):
    """(exit code, what is printed) of a plan whose compiler runs `code`."""
    child = [sys.executable, "-c", CHILD + code]
    argv = ["--topology", "v5e:2x2", "--out", str(tmp_path), *options]
    result = command.plan(argv, "tiny:class", main.load_config, child)
    return result, capsys.readouterr().out


@pytest.fixture(autouse=True)
def _compiler_is_there(monkeypatch):
    monkeypatch.setattr(topologies, "check_compiler", lambda topology: None)


@pytest.mark.parametrize(
    ("code", "words", "kept"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", ["ended by SIGSEGV", "known to crash on large"],
         1),
        ("os.abort()", ["ended by SIGABRT", "[8, 8, 4096, 4096], 4.29 GB over all devices"], 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", ["ended by SIGKILL", "memory runs out"], 0),
        ("sys.exit('F0101 check failed: x')", ["exit code 1: F0101 check failed: x"], 0),
    ],
)  # fmt: skip
def test_a_dead_compiler_is_told(tmp_path, capsys, code, words, kept):
    result, out = planned(tmp_path, capsys, code)
    assert result == 1
    assert all(word in out for word in [*words, f"are in {tmp_path}"])
    assert len(list(tmp_path.glob("*/result.json"))) == kept
    assert Path(out.split("words are in ")[1].strip()).exists()


def test_the_compiler_ends_with_its_command(tmp_path):
    (tmp_path / "request.json").write_text("{}")
    child = [
        sys.executable,
        "-c",
        "import os, time; print(os.getpid(), flush=True); time.sleep(60)",
    ]

    def end():
        while not (tmp_path / "log").exists() or not (tmp_path / "log").read_text().endswith("\n"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=end)
    thread.start()
    with pytest.raises(SystemExit, match="143"):
        command.run_child(TARGET, tmp_path, 1, child)
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "log").read_text()), 0)


def test_a_slow_compiler_is_stopped(tmp_path, capsys):
    result, out = planned(tmp_path, capsys, "time.sleep(60)", "--minutes", "0.02")
    assert result == 1
    assert "stopped after 0.02 minutes" in out


FAILED = (
    'json.dump({{"error": "{}", "message": "{}"}}, (folder / "failed.json").open("w")); exit(1)'
)
TOO_LARGE = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, 21.00G exceeds available HBM (15.75G)."


def test_what_does_not_fit_is_kept_with_what_would(tmp_path, capsys):
    code = FAILED.format("JaxRuntimeError", TOO_LARGE)
    result, out = planned(tmp_path, capsys, code)
    assert result == 1
    assert "exceeds available HBM (15.75G)" in out
    assert "--mesh.data 1 --mesh.fsdp -1: 30.00 GB lie there; split over 4 chips 7.50 GB" in out
    assert "--remat --accumulate 2: 1 images per device at a time" in out
    assert len(list(tmp_path.glob("*/result.json"))) == 1
    assert planned(tmp_path, capsys, "sys.exit('not run again')") == (1, out)


def test_an_error_of_the_target_is_an_error(tmp_path, capsys):
    with pytest.raises(ValueError, match="batch_size 7 is not"):
        planned(tmp_path, capsys, FAILED.format("ValueError", "batch_size 7 is not a multiple"))


COMPILED = f"""
import gzip
about = dict(argument=3e9, output=2e9, alias=2e9, temp=4e9, generated_code=0, peak=6e9, seconds=60)
(folder / "compiled.json").write_text(json.dumps(about))
text = pathlib.Path({str(GOLDEN / "tpu_slices.txt")!r}).read_bytes()
(folder / "program.txt.gz").write_bytes(gzip.compress(text))
"""


def test_a_report(tmp_path, capsys):
    small = json.dumps(TRACED["resident"])
    code = COMPILED.replace("import gzip", f"import gzip\nsmall = {small}")
    result, out = planned(tmp_path, capsys, code)
    assert "memory of a device: 7.00 GB of 16.91 GB (201 %): DOES NOT FIT" in out  # 27 unread
    assert result == 1
    assert "held but not read by this program: 27.00 GB" in out
    assert "operations of the model: 1 TFLOP per device" in out
    assert "all-reduce in a slice: 1 times, arrays 33.55 MB, sent 62.91 MB" in out
    assert "all-reduce between slices: 2 times, arrays 2.10 MB, sent 2.10 MB" in out
    assert "not of a parameter's size" not in out
    again = planned(tmp_path, capsys, "sys.exit('not run again')")
    assert again == (result, out)
    assert (
        "exit code 1: run again" in planned(tmp_path, capsys, "sys.exit('run again')", "--again")[1]
    )


def test_what_moves_activations_is_named():
    text = (GOLDEN / "tpu_slices.txt").read_text()
    found = reports.estimate(TARGET, reports.Result(TRACED, text))
    about = TRACED | {"parameters": [[[7], [7]]]}
    lines = reports.collective_lines(about, found)
    assert any("of these not of a parameter's size: 3" in line for line in lines)


def test_search_compiles_the_cheapest_change_first(tmp_path, capsys):
    code = FAILED.format("JaxRuntimeError", TOO_LARGE)
    fit = COMPILED + "\nsys.exit(0)\n"
    code = f"""
asked = json.loads((folder / "request.json").read_text())["config"]
traced = json.loads((folder / "traced.json").read_text()) | {{"resident": {{"parameters": 1e9}}}}
(folder / "traced.json").write_text(json.dumps(traced))
if asked["remat"]:
    exec({fit!r})
{code}"""
    result, out = planned(tmp_path, capsys, code, "--search")
    assert result == 0
    assert out.count("--search:") == 1
    assert out.index("Ran out of memory") < out.index("--search: --remat") < out.index("): fits")


# --- the real thing -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_plan_traces_the_step_of_training():
    """Nothing is compiled; operations are those of the whole batch over the devices."""
    target = dataclasses.replace(
        with_config(mesh=schema.MeshConfig(fsdp=2)), topology=topologies.parse("gpu:4")
    )
    mesh = programs.make_mesh(target, jax.devices())
    program = programs.build(target, mesh)
    traced = program.jitted.trace(*program.arguments)
    found = programs.facts(target, mesh, program, traced)
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert found["resident"]["moments"] == pytest.approx(2 * found["resident"]["parameters"], 0.01)
    assert 1e7 < found["operations"] < 1e9
    assert len(found["largest_logits"]["shape"]) > 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["class", "gan"])
def test_gpus_are_planned_on_fake_devices(tmp_path, capsys, stage):
    argv = ["--topology", "gpu:2", "--out", str(tmp_path), "--mesh.data", "1", "--mesh.fsdp", "2"]
    assert command.plan(argv, f"tiny:{stage}", main.load_config) == 0
    out = capsys.readouterr().out
    assert "NOT A GPU COMPILE" in out
    assert "all-gather in a slice" in out
    assert "time of a step" not in out
    assert command.plan([*argv], f"tiny:{stage}", main.load_config, ["false"]) == 0


@pytest.mark.slow
def test_samplers_are_planned_on_fake_devices(tmp_path, capsys):
    argv = ["--topology", "gpu:2", "--out", str(tmp_path), "--sample", "--space", "2"]
    assert command.plan([*argv, "--sample-steps", "2"], "tiny:class", main.load_config) == 0
    assert "2 devices an image, 2 steps" in capsys.readouterr().out
