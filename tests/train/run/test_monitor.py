"""What a person sees of a run: the bar, the facts of the compiled step, metrics on disk."""

import functools
import itertools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorboard_file
from terminal import screen

from ldm_jax.runtime import rundir
from ldm_jax.train.run import monitor, writers


@pytest.fixture
def clock(monkeypatch):
    """Half a second passes between any two looks at it."""
    ticks = itertools.count(0, 0.5)
    clock = types.SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr(monitor, "time", clock)


def metrics(loss, bad_steps=0):
    return {"loss": jnp.float32(loss), "bad_steps": jnp.int32(bad_steps)}


def test_bar_shows_loss_rates_and_what_remains(tmp_path, capsys, clock, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    watch = monitor.Monitor(tmp_path, 2, 8, batch_size=24)
    for step in range(3, 7):
        watch.step(step, metrics(1 / step), bad_records=0, log=True)
    watch.bar.refresh()
    shown = screen(capsys.readouterr().err)[-1]
    watch.close()
    assert "6/8" in shown
    assert "loss 0.2000" in shown  # of step 5: fetched one late, so that no device is waited for
    assert f"{2 * 24 / jax.device_count():.1f} images/s/device" in shown
    assert "step/s" in shown
    remains = shown.split("<")[1].split(",")[0]
    assert remains.startswith("00:")


def test_lines_and_tensorboard_hold_every_number(tmp_path, clock):
    board = lambda: [writers.TensorBoard(tmp_path)]  # noqa: E731
    watch = monitor.Monitor(tmp_path, 0, 3, batch_size=8, beside=board)
    for step, loss in ((1, 0.5), (2, float("nan")), (3, 0.25)):
        watch.step(step, metrics(loss, bad_steps=int(step == 2)), bad_records=step, log=True)
    watch.write(3, {"eval/loss": 0.125})
    assert watch.bad_steps == 1  # of step 2, the last one fetched
    watch.close()
    lines = rundir.read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert [line.get("loss") for line in lines if "bad_steps" in line] == [0.5, None, 0.25]
    assert [line["bad_records"] for line in lines if "bad_steps" in line] == [1, 2, 3]
    assert {line["steps_per_s"] for line in lines if "bad_steps" in line} == {2}
    assert lines[0]["images_per_s_per_device"] == 2 * 8 / jax.device_count()
    shown = {key: value.simple_value for key, value in tensorboard_file.values(tmp_path).items()}
    assert (shown["loss", 1], shown["loss", 3], shown["eval/loss", 3]) == (0.5, 0.25, 0.125)
    assert ("loss", 2) not in shown


def test_skipped_steps_are_said(tmp_path, capsys, shown):
    watch = monitor.Monitor(tmp_path, 0, 5, batch_size=8)
    for step, skipped in enumerate((0, 1, 1, 3, 3), start=1):
        values = {**metrics(1.0), "skipped_steps": jnp.int32(skipped)}
        watch.step(step, values, bad_records=0, log=True)
    watch.close()
    said = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert [line.split("\r")[-1].strip() for line in said] == [
        "step 2: 1 skipped, 1 in all",
        "step 4: 2 skipped, 3 in all",
    ]


def test_time_spent_elsewhere_does_not_slow_the_rate(tmp_path, clock):
    watch = monitor.Monitor(tmp_path, 0, 4, batch_size=8)
    watch.step(1, metrics(1.0), 0, log=True)
    for _ in range(100):
        monitor.time.perf_counter()  # an evaluation
    watch.pause()
    for step in (2, 3, 4):
        watch.step(step, metrics(1.0), 0, log=True)
    watch.close()
    rates = [line.get("steps_per_s") for line in rundir.read_metrics(tmp_path)]
    assert rates[0] is None  # fetched after the pause: nobody knows how long it took
    assert rates[2:] == [2, 2]


def test_a_silent_interval_writes_nothing(tmp_path):
    watch = monitor.Monitor(tmp_path, 0, 2, batch_size=8)
    watch.step(1, metrics(1.0), 0, log=False)
    watch.close()
    assert not (tmp_path / "metrics").exists()


def test_the_compiled_step_says_what_it_costs(capsys, shown):
    scale, x = jnp.float32(2), jnp.ones((512, 512))
    jitted = jax.jit(lambda scale, x: scale * (x @ x))
    step = types.SimpleNamespace(frozen=scale, trace=functools.partial(jitted.trace, scale))
    compiled, work = monitor.compile_step(step, x)
    assert work == 2 * 512**3
    np.testing.assert_array_equal(compiled(x), 1024 * np.ones((512, 512)))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "compiling the training step ..."
    said = second.split(", ")
    assert said[0].startswith("compiled in ")
    assert said[1] == "0.27 GFLOP per step"  # 2 * 512 ** 3
    size = int(said[2].removesuffix(" MiB per device"))
    assert 1 <= size <= 4  # x, and room to work


def test_parameters_are_counted():
    shapes = {"a": jnp.zeros((2, 3)), "b": {"c": jax.ShapeDtypeStruct((4,), jnp.float32)}}
    assert monitor.count_parameters(shapes) == 10
    assert monitor.count_parameters({}) == 0
