"""Two real processes under jax.distributed do what one does: batches, losses, one checkpoint."""

import signal
import time

import jax
import numpy as np
import pytest
import recipes
from runs import ldm_config
from two_processes import MIXED, SECONDS, assert_losses_as, codes, logs, training, two

from ldm_jax import data, schema, sharding
from ldm_jax.runtime import checkpoint, cli, rundir
from ldm_jax.train import ldm

STEPS = 6

# Prints nothing; writes the rows it holds of batch 3, and the whole batch, gathered.
BATCHES = """
import sys, jax, numpy as np
from jax.experimental import multihost_utils
from ldm_jax import data, schema, sharding
from ldm_jax.runtime import cli
from ldm_jax.configs import tiny
cli.join_processes(sys.argv[1])
assert jax.process_count() == 2 and jax.device_count() == 4
first, second, third, fourth = jax.devices()
crossed = [first, third, second, fourth]  # neighbours along the last axis are in two processes
stream = data.stream(tiny.DATA, batch_size=8, seed=5)
found = {}
for name, sizes, devices in (
    ("data", {"data": 4}, None),
    ("tensor", {"data": 1, "tensor": 4}, None),
    ("crossed", {"data": 2, "tensor": 2}, crossed),
):
    rows = sharding.batch_sharding(sharding.make_mesh(schema.MeshConfig(**sizes), devices))
    with data.prefetch(stream, 3, rows) as batches:
        step, batch = next(batches)
    assert step == 3
    for key, value in batch.items():
        gathered = multihost_utils.process_allgather(value, tiled=True)
        found[f"{name}/{key}"] = gathered
        for shard in value.addressable_shards:
            np.testing.assert_array_equal(shard.data, gathered[shard.index])
    found[f"{name}/rows"] = data.pipeline.local_examples(8, rows)
np.savez(sys.argv[2] + str(jax.process_index()), **found)
"""


def test_two_processes_see_the_ordered_global_batch_of_one(tmp_path):
    def command(address):
        return ["-c", BATCHES, address, str(tmp_path / "batch")]

    with two(tmp_path, command) as processes:
        assert codes(tmp_path, processes) == [0, 0], logs(tmp_path)
    stream = data.stream(
        schema.DataConfig(
            source=schema.SyntheticConfig(num_images=64, size=16, num_classes=4), size=16
        ),
        batch_size=8,
        seed=5,
    )
    mesh = sharding.make_mesh(schema.MeshConfig(data=1), jax.devices()[:1])
    alone = data.global_batch(stream, 3, sharding.batch_sharding(mesh))
    rows = {}
    for index in range(2):
        with np.load(tmp_path / f"batch{index}.npz") as found:
            for mesh in ("data", "tensor", "crossed"):
                for name, value in alone.items():
                    np.testing.assert_array_equal(found[f"{mesh}/{name}"], value)
                rows[mesh, index] = found[f"{mesh}/rows"].tolist()
    # each decodes its own half, and all of what it shares with the other
    assert rows["data", 0] + rows["data", 1] == list(range(8))
    assert rows["tensor", 0] == rows["tensor", 1] == list(range(8))
    assert rows["crossed", 0] == rows["crossed", 1] == list(range(8))


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_goes_on(tmp_path, ldm_run, first_stage_run):
    run = tmp_path / "run"
    more = [*MIXED.split(), "--steps", str(STEPS)]
    with two(tmp_path, training(run, first_stage_run, *more)) as processes:
        assert codes(tmp_path, processes) == [0, 0], logs(tmp_path)
    assert checkpoint.saved_steps(run) == [4, STEPS]
    assert checkpoint.snapshot_steps(run) == [STEPS]
    assert_losses_as(run, ldm_run, STEPS)
    one_goes_on(run, ldm_run, first_stage_run)


def test_two_processes_go_on_where_one_stopped_and_one_where_they_did(
    tmp_path, ldm_run, first_stage_run
):
    """On another mesh: tensor across processes."""
    run = recipes.copy_until(ldm_run, 4, tmp_path / "run")
    more = ["--mesh.data", "1", "--mesh.tensor", "4", "--steps", str(STEPS)]
    with two(tmp_path, training(run, first_stage_run, *more)) as processes:
        assert codes(tmp_path, processes) == [0, 0], logs(tmp_path)
    assert checkpoint.read_meta(rundir.epath.Path(run) / "checkpoints" / "6")["processes"] == 2
    assert_losses_as(run, ldm_run, STEPS)
    one_goes_on(run, ldm_run, first_stage_run)


# The data of process 1 end after five batches, of four examples each: before them are read those
# of the latent scale and that of the compilation.
ENDING = """
import sys
from ldm_jax import data
from ldm_jax.runtime import cli
from ldm_jax.train import main
accept, left = data.Stream.accept, 8 + 4 + 20
def ending(self, made):
    global left
    left -= 1
    if left < 0:
        raise data.BadDataError("all is broken")
    return accept(self, made)
if sys.argv[3].endswith(",1"):
    data.pipeline.Batches.accept = data.Stream.accept = ending
sys.exit(cli.run("ldm-train", main.train, sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("most", [0, 100])
def test_data_that_end_in_one_process_are_saved_by_both(tmp_path, ldm_run, first_stage_run, most):
    run = tmp_path / "run"
    flags = ["--max-bad-steps", str(most), "--steps", "400", *MIXED.split()]
    command = training(run, first_stage_run, *flags)
    with two(tmp_path, lambda address: ["-c", ENDING, *command(address)[2:]]) as processes:
        assert codes(tmp_path, processes) == [1, 1], logs(tmp_path)
    assert "error: process 1 could not make batch 5" in (tmp_path / "0.log").read_text()
    assert "error: all is broken" in (tmp_path / "1.log").read_text()
    assert checkpoint.saved_steps(run) == [4, 5]
    assert_losses_as(run, ldm_run, 5)
    config = ldm_config(first_stage_run, "--steps", "8")
    assert ldm.train(config, run) == 0
    assert_losses_as(run, ldm_run, 8)


# Held-out records of process 1 cannot be read, which it learns at the first evaluation.
UNREADABLE = """
import sys
from ldm_jax import data
from ldm_jax.runtime import cli
from ldm_jax.train import ldm, main
evaluate = ldm.loop.make_evaluate
class Broken(data.Stream):
    def __getitem__(self, index):
        raise data.BadDataError("all is broken")
def of_broken(config, fixed, mesh, held_out, key):
    held_out.__class__ = Broken
    return evaluate(config, fixed, mesh, held_out, key)
if sys.argv[3].endswith(",1"):
    ldm.loop.make_evaluate = of_broken
sys.exit(cli.run("ldm-train", main.train, sys.argv[1:]))
"""


@pytest.mark.slow
def test_held_out_data_that_fail_in_one_process_end_both_with_a_checkpoint(
    tmp_path, ldm_run, first_stage_run
):
    run = tmp_path / "run"
    flags = ["--intervals.evaluate", "5", "--steps", "400", *MIXED.split()]
    command = training(run, first_stage_run, *flags)
    with two(tmp_path, lambda address: ["-c", UNREADABLE, *command(address)[2:]]) as processes:
        assert codes(tmp_path, processes) == [1, 1], logs(tmp_path)
    assert "process 1 cannot read it, see its log" in (tmp_path / "0.log").read_text()
    assert "error: all is broken" in (tmp_path / "1.log").read_text()
    assert checkpoint.saved_steps(run) == [4, 5]
    assert_losses_as(run, ldm_run, 5)


def one_goes_on(run, ldm_run, first_stage_run):
    """One process on the mesh of `ldm_run`, for two steps."""
    config = ldm_config(first_stage_run, "--steps", "8")
    assert ldm.train(config, run) == 0
    assert checkpoint.saved_steps(run) == [4, STEPS, 8]
    assert_losses_as(run, ldm_run, 8)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["--mesh.data 4", "--mesh.data 1 --mesh.fsdp 4"])
def test_a_run_moves_between_one_process_and_two_on_one_mesh(
    tmp_path, ldm_run, first_stage_run, mesh, record_property
):
    """Up and down at steps 8 and 16: how far the end is from that of one process is recorded."""
    runs = [recipes.copy_until(ldm_run, 8, tmp_path / name) for name in ("moved", "stayed")]
    with two(tmp_path, training(runs[0], first_stage_run, *mesh.split(), "--steps", "16")) as both:
        assert codes(tmp_path, both) == [0, 0], logs(tmp_path)
    for run in runs:
        assert ldm.train(ldm_config(first_stage_run, *mesh.split()), run) == 0
    parts = ("params", "ema_params", "opt_state")
    ends = [checkpoint.restore_parts(run, 24, parts) for run in runs]
    found = {n: recipes.largest_difference(ends[0][n], ends[1][n]) for n in parts}
    record_property("differences", found)
    lines = [[m["loss"] for m in rundir.read_metrics(run)] for run in runs]
    assert lines[0] == pytest.approx(lines[1], rel=1e-4)


@pytest.mark.slow
def test_sigterm_to_one_stops_both_at_one_step(tmp_path, ldm_run, first_stage_run):
    run = tmp_path / "run"
    more = [*MIXED.split(), "--steps", "400", "--intervals.save", "0", "--intervals.snapshot", "0"]
    with two(tmp_path, training(run, first_stage_run, *more)) as processes:
        until = time.monotonic() + SECONDS
        board = run / "tensorboard"  # made with the first line of metrics: the loop is running
        while not board.exists():
            assert all(p.poll() is None for p in processes), logs(tmp_path)
            assert time.monotonic() < until, logs(tmp_path)
            time.sleep(0.01)
        processes[1].send_signal(signal.SIGTERM)
        assert codes(tmp_path, processes) == [cli.INTERRUPTED] * 2, logs(tmp_path)
    (step,) = checkpoint.saved_steps(run)
    assert 0 < step < 400
    assert f"stopped at step {step} of " in (tmp_path / "0.log").read_text()
    assert_losses_as(run, ldm_run, min(step, 8), exactly=False)
