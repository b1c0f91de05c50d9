"""`ldm-train` from end to end: what it says, and what it leaves in the run."""

import math
import shutil

import numpy as np
import pytest
from PIL import Image
from runs import ldm_flags

from ldm_jax.runtime import checkpoint, cli, images, rundir
from ldm_jax.train import main
from ldm_jax.train.prepare import pack


def train(config, *flags):
    """Exit code of the command."""
    return cli.run("ldm-train", main.train, [config, *map(str, flags)])


def logged(run, name):
    """{step: value} of every line of metrics that has it."""
    return {line["step"]: line[name] for line in rundir.read_metrics(run) if name in line}


def test_a_first_stage_on_a_folder_with_a_broken_image(tmp_path, capsys, caplog):
    rng = np.random.default_rng(0)
    for i in range(5):  # of which the first is held out
        picture = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        images.save_png(tmp_path / "images" / f"{i}.png", picture)
    broken = tmp_path / "images" / "2.png"
    broken.write_bytes(b"no image")
    run = tmp_path / "run"
    flags = f"""--workdir {run} --data.source.path {tmp_path}/images --data.source.eval-every 5
        --data.size 16 --model.channels 32 --model.channel-mult 1 --model.num-res-blocks 0
        --batch-size 4 --steps 2 --intervals.log 1 --intervals.evaluate 2 --intervals.sample 2
        --eval-batches 1 --num-samples 3 --profile 1:2"""
    assert train("folder:first_stage", *flags.split()) == 0

    said = capsys.readouterr().err
    for fact in (
        "1 processes, 4 devices (cpu), 4 of them in each process; ldm_jax ",
        "state: ",
        "batch 4: 1 per device, 4 read by each process",
        "trace of steps 000001 000002: ",
        "parameters: autoencoder ",
        "; 4 images; mesh ",
        "compiled in ",
        " GFLOP per step",
    ):
        assert said.count(fact) == 1
    assert said.count("step 2: eval/") == 1
    bar = said.split("\r")[-1]
    assert "2/2" in bar
    assert "step/s, loss " in bar
    assert "images/s/device" in bar

    (log,) = (run / "logs" / "0000").iterdir()
    assert "INFO ldm_jax: parameters: autoencoder " in log.read_text()
    assert "process 0 of 1 on " in log.read_text()
    assert "reads examples 0-3 of every batch" in log.read_text()
    assert list((run / "profile").rglob("process_0000.xplane.pb"))
    assert all(0 < value < 1 for value in logged(run, "goodput").values())
    spent = checkpoint.read_meta(rundir.epath.Path(run) / "checkpoints" / "2")["clock"]
    assert spent["orderly"]
    assert 0 < spent["trained_s"] < spent["wall_s"]

    assert logged(run, "bad_records") == {1: 1, 2: 1}
    (report,) = [record.getMessage() for record in caplog.records if "replaces" in record.message]
    assert report.startswith(f"{broken} cannot be used; the next one replaces it")
    assert 0 < logged(run, "eval/psnr")[2] < 40
    with Image.open(rundir.sample_path(run, 2)) as sheet:
        pixels = np.asarray(sheet)
    with Image.open(tmp_path / "images" / "0.png") as held_out:
        enlarged = np.asarray(held_out).repeat(4, axis=0).repeat(4, axis=1)
    # three columns of the one held-out image, and below what the model makes of it
    np.testing.assert_array_equal(pixels[2:66, -66:-2], enlarged)
    assert np.abs(pixels[68:132, -66:-2].astype(int) - enlarged).mean() > 1
    assert pixels.shape[0] == 134


@pytest.mark.slow
def test_an_ldm_compares_weights_and_draws_at_intervals(tmp_path, ldm_run, first_stage_run, capsys):
    run = tmp_path / "run"
    shutil.copytree(ldm_run, run)
    more = ["--steps", "26", "--intervals.evaluate", "1", "--intervals.sample", "2"]
    flags = ldm_flags(first_stage_run, "--workdir", run)
    assert train("tiny:class", *flags, *more) == 0
    said = capsys.readouterr().err
    assert said.count("step 26: eval/loss ") == 1
    raw, averaged = logged(run, "eval/loss"), logged(run, "eval/loss_ema")
    assert list(raw) == list(averaged) == [25, 26]
    for values in (raw, averaged):
        assert all(math.isfinite(value) for value in values.values())
        # the same t and noise each time: one step moves it little
        assert values[25] != values[26]
        assert values[25] == pytest.approx(values[26], rel=0.1)
    assert raw[26] != averaged[26]
    assert [path.name for path in (run / "samples").iterdir()] == ["000026.png"]
    with Image.open(rundir.sample_path(run, 26)) as sheet:
        pixels = np.asarray(sheet)
    side = 64  # enlarged; two rows of two
    assert pixels.shape[0] == pixels.shape[1] > 2 * side
    assert len({pixels[:side, :side].tobytes(), pixels[-side:, -side:].tobytes()}) == 2


def test_pack_takes_the_size_of_a_shard(tmp_path, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(pack, "pack", lambda *given: called.append(given[1:]) or 0)
    flags = ["--no-compilation-cache", "--workdir", str(tmp_path)]
    assert train("pack", "folder", "--records-per-shard", "7", *flags) == 0
    assert train("pack", "folder", *flags) == 0
    assert called == [(str(tmp_path), 7), (str(tmp_path), 4096)]
    assert train("pack", "folder", "--records-per-shard", "0", *flags) == 1
    assert "--records-per-shard 0: give at least 1" in capsys.readouterr().err


def test_plan_runs_alone(capsys):
    assert train("--distributed", "h:1,2,0", "plan", "tiny", "--no-compilation-cache") == 1
    assert "--distributed: plan compiles in one process" in capsys.readouterr().err
