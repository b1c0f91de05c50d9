"""Goodput over the starts of a run, on a clock that is set by hand."""

import types

import pytest

from ldm_jax.train.run import goodput


class Made:
    """An array of the device's."""

    def __init__(self, ready):
        self.is_ready = lambda: ready


@pytest.fixture
def clock(monkeypatch):
    """`clock.now` is the time of day, unless the clock has been `set` forth or back since."""
    clock = types.SimpleNamespace(now=1000.0, set=0.0)
    clock.time = lambda: clock.now + clock.set
    clock.monotonic = lambda: clock.now - 700
    monkeypatch.setattr(goodput, "time", clock)
    return clock


def slowly(clock, seconds, made, watch):
    """Batches of which each takes some time; before each, the device was given `made`."""
    for wait, array in zip(seconds, made):
        watch.made = array
        clock.now += wait
        yield 0, {}


def test_only_training_counts(clock):
    watch = goodput.Clock(clock.now)
    clock.now += 10  # restoring, compiling
    assert watch.share() == 0
    watch.begin()
    clock.now += 60
    with watch.paused():
        clock.now += 20
    clock.now += 10
    assert watch.share() == pytest.approx(70 / 100)


def test_a_wait_for_data_is_lost_only_if_the_device_waits_too(clock):
    watch = goodput.Clock(clock.now)
    watch.begin()
    seconds, made = (5, 3, 2), (None, Made(False), Made(True))
    assert len(list(watch.batches(slowly(clock, seconds, made, watch)))) == 3
    clock.now += 10
    assert watch.share() == pytest.approx((20 - 5 - 2) / 20)


@pytest.mark.parametrize("set_by", [-3e7, 3e7])
def test_a_clock_that_is_set_changes_nothing(clock, set_by):
    """Before, a year back made a goodput of 6e11 %."""
    watch = goodput.Clock(clock.time())
    clock.now += 10
    clock.set += set_by
    watch.begin()
    clock.now += 30
    with watch.paused():
        clock.now += 10
        clock.set -= 2 * set_by
    assert watch.share() == pytest.approx(30 / 50)
    kept = watch.spent(orderly=False)
    clock.set = -3e7  # before what the checkpoint says
    again = goodput.Clock(clock.time(), kept)
    again.begin()
    clock.now += 50
    assert again.share() == pytest.approx(80 / 100)


@pytest.mark.parametrize(("orderly", "wall"), [(True, 110), (False, 150)])
def test_times_go_on_from_the_checkpoint(clock, orderly, wall):
    """80 of 100 s trained; 40 s later the run goes on, and trains 5 of 10 s."""
    watch = goodput.Clock(clock.now)
    watch.begin()
    with watch.paused():
        clock.now += 20
    clock.now += 80
    kept = watch.spent(orderly)
    assert kept == {"trained_s": 80, "wall_s": 100, "time": 1100, "orderly": orderly}
    clock.now += 40  # steps that are lost, and until somebody starts it again
    again = goodput.Clock(clock.now, kept)
    clock.now += 5
    again.begin()
    clock.now += 5
    assert again.share() == pytest.approx(85 / wall)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H200", 989.4e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert goodput.peak(types.SimpleNamespace(device_kind=kind)) == peak
