"""The loop by itself: what it does in which order, with steps that compute nothing."""

import contextlib
import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
from jax.sharding import PartitionSpec as P

from ldm_jax import schema
from ldm_jax.configs import tiny
from ldm_jax.runtime import checkpoint, rundir
from ldm_jax.train.run import loop, profiling, startup


class OnDevice:
    """A metric that says when somebody waits for it."""

    def __init__(self, name, value, events):
        self.name, self.value, self.events = name, value, events

    def __array__(self, dtype=None, copy=None):
        self.events.append(f"wait for {self.name}")
        return np.asarray(self.value, dtype)

    def is_ready(self):
        return False


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """run(steps, **intervals): the events of a loop over steps that compute nothing."""
    events = []
    one, zero = jnp.ones(()), jnp.zeros((), jnp.int32)
    broken_from = None

    def step(state, batch, root):
        number = int(state.step) + 1
        events.append(f"step {number}")
        loss = OnDevice(f"step {number}", 0.5, events)
        bad = OnDevice(f"step {number}", 0, events)
        state = dataclasses.replace(state, step=jnp.int32(number))
        return state, {"loss": loss, "bad_steps": bad}

    def save(manager, state, meta, final):
        events.append(f"save {int(state.step)}")
        events.append(meta["clock"]["orderly"])
        assert final == meta["clock"]["orderly"]
        return True

    @contextlib.contextmanager
    def prefetch(stream, first, rows):
        yield read(first)

    def read(first):
        for i in range(first, 10**6):
            if i == broken_from:
                raise ValueError("the data are bad")
            yield i, {}

    @dataclasses.dataclass
    class State:
        step: jax.Array
        params: dict
        ema_params: dict
        skips: dict

    def run(steps, data_end=None, **intervals):
        nonlocal broken_from
        broken_from = data_end
        off = dict.fromkeys(("save", "snapshot", "evaluate", "sample"), 0)
        config = dataclasses.replace(
            tiny.get_config("class"),
            steps=steps,
            intervals=schema.IntervalConfig(**{"log": 1, **off, **intervals}),
        )
        state = State(jnp.int32(0), {"a": one}, {}, {"count": zero})
        manager = mock.MagicMock(retry_due=False, directory=tmp_path / "checkpoints")
        stream = mock.MagicMock(bad_records=0)
        run = rundir.epath.Path(tmp_path)
        around = loop.Loop(config, run, recipes.mesh_of(), stream, manager, state, started=0.0)
        train_step = around.compile(step, state, jax.random.key(0), lambda: step)
        with around:
            for i, batch in around.batches:
                with around.traced(i):
                    state, metrics = train_step(state, batch, jax.random.key(0))
                number = i + 1
                around.made(number, state, metrics)
                if around.due("evaluate", number):
                    with around.paused("evaluating", state):
                        events.append(f"evaluate {number}")
                        around.evaluated(number, {})
                if around.due("sample", number):
                    with around.paused("drawing", state):
                        events.append(f"draw {rundir.sample_path(run, number).name}")
                stop = around.stops(number)
                around.save(number, state, {}, final=stop)
                if stop:
                    break
        return around.exit_code, events

    run.events = events
    monkeypatch.setattr(loop, "compile_step", lambda *arguments, model_step: (step, 0.0))
    monkeypatch.setattr(loop.data, "prefetch", prefetch)
    monkeypatch.setattr(loop.data, "global_batch", lambda *arguments: {})
    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(checkpoint, "save_snapshot", lambda run, step, *_: events.append("snap"))
    return run


def test_metrics_are_never_waited_for_while_the_device_has_nothing_else(alone):
    code, events = alone(6, save=3)
    assert code == 0
    for n in range(1, 7):
        waits = events.index(f"wait for step {n}")
        if n not in (3, 6):  # where a checkpoint waits for the device anyway
            assert waits > events.index(f"step {n + 1}")
        else:
            assert waits < events.index(f"save {n}")


def test_intervals_and_the_end(alone):
    _, events = alone(5, save=4, evaluate=2, sample=3, snapshot=4, log=0)
    done = [e for e in events if not str(e).startswith(("wait", "step"))]
    assert done == [
        "evaluate 2",
        *("draw 000003.png",),
        *("evaluate 4", "save 4", False, "snap"),
        # the end does all that is ever done, and stops on purpose
        *("evaluate 5", "draw 000005.png", "save 5", True, "snap"),
    ]


@pytest.mark.parametrize(
    ("end", "saved"),
    [(5, ["save 3", "save 5"]), (6, ["save 3", "save 6"]), (0, [])],
    ids=["between checkpoints", "after one", "before the first step"],
)
def test_data_that_end_a_run_are_raised_after_the_steps_are_saved(alone, end, saved):
    with pytest.raises(ValueError, match="the data are bad"):
        alone(9, data_end=end, save=3, log=0)
    assert [e for e in alone.events if str(e).startswith("save")] == saved


def test_another_error_saves_nothing(alone, monkeypatch):
    def refuse(*_):
        raise FloatingPointError("not finite")

    monkeypatch.setattr(loop.stop, "refuse_bad", refuse)
    with pytest.raises(FloatingPointError):
        alone(9, save=3, log=0)
    assert not [e for e in alone.events if str(e).startswith("save")]


def test_goodput_is_among_the_metrics(alone, tmp_path):
    alone(3)
    assert all(0 < line["goodput"] < 1 for line in rundir.read_metrics(tmp_path))


def test_plain_config_counts_what_the_model_needs():
    config = dataclasses.replace(tiny.get_config("class"), remat=True, attention="chunked")
    assert loop.plain(config) == dataclasses.replace(config, remat=False, attention="xla")


# --- --profile ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["5", "5:", "5:5", "6:5", "-1:5", "a:b", "20:30", "5:6:7"])
def test_windows_that_trace_nothing_are_refused(value):
    with pytest.raises(ValueError, match=f"--profile '{value}' is not FIRST:END"):
        profiling.window(value, 20)


def test_a_window_is_traced_once_and_holds_its_steps(tmp_path, capsys, shown):
    run, step = rundir.epath.Path(tmp_path), jax.jit(lambda x: x @ x)
    profile = profiling.Profile(run, profiling.window("3:5", 20), first=2)
    x, ended = jnp.ones((8, 8)), []
    for i in range(2, 7):
        with profile.traced(i):
            x = step(x)
        if profile.ends(i + 1):
            jax.block_until_ready(x)
            profile.close()
            ended.append(i)
    assert ended == [4]
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.parent.name == "steps_000003_000005"
    assert trace.name == "process_0000.xplane.pb"
    found = jax.profiler.ProfileData.from_file(str(trace))
    events = [e for plane in found.planes for line in plane.lines for e in line.events]
    steps = sorted(dict(e.stats)["step_num"] for e in events if e.name == "train")
    assert steps == [3, 4]
    assert "trace of steps 000003 000005" in capsys.readouterr().err


def test_a_run_that_is_past_its_window_says_so(tmp_path, capsys, shown):
    profile = profiling.Profile(tmp_path, profiling.window("3:5", 20), first=5)
    with profile.traced(5):
        pass
    profile.close()
    assert "--profile 3:5: the run is at step 5 already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- the report ---------------------------------------------------------------------------------


def test_bytes_per_device_are_those_of_the_shards():
    @dataclasses.dataclass
    class State:
        step: jax.Array
        params: dict
        opt_state: dict
        disc_params: dict

    mesh = recipes.mesh_of(data=2, fsdp=2)
    split = jax.sharding.NamedSharding(mesh, P(None, "fsdp"))
    whole = jax.sharding.NamedSharding(mesh, P())
    a = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=split)
    b = jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=whole)
    one = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    state = State(one, {"a": a}, {"mu": {"a": a}, "nu": {"a": a}}, {"b": b})
    assert startup.bytes_per_device(state) == {
        "other": 4,
        "parameters": 4 * 8 * 16 // 2,
        "optimizer": 2 * 4 * 8 * 16 // 2,
        "discriminator": 16,
    }
