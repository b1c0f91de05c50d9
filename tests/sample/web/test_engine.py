"""Requests by segments: equal to the command's, watched, stopped, and survived."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from ldm_jax.runtime import images
from ldm_jax.sample import class2img, generate
from ldm_jax.sample.web import engine as engines
from ldm_jax.sample.web import jobs
from ldm_jax.sample.web.limits import RefusedError


@pytest.fixture(scope="module")
def engine():
    return engines.Engine()


@pytest.fixture
def request_of(ldm_run, engine):
    def make(steps=6, **changes):
        options = class2img.Options(
            model=str(ldm_run), out="", labels=(3,), num_images=8, batch_size=4, steps=steps,
            guidance_scale=2.0, progress="none", **changes,
        )  # fmt: skip
        return class2img.request(options, engine.load)

    return make


@pytest.fixture
def each_level(monkeypatch):
    monkeypatch.setattr(engines, "SEGMENT", 0.0)


def test_pictures_are_those_of_the_command(engine, request_of):
    what = request_of(solver="dpmpp_2m")
    drawn = list(engine.draw(what, jobs.Watch()))
    for part, made in zip(drawn, generate.made(what), strict=True):
        assert np.array_equal(part.places, made.places)
        assert np.array_equal(part.image, images.to_uint8(made.image))


def test_what_a_watch_tells(engine, request_of, each_level):
    watch = jobs.Watch()
    watch.wants_preview = True
    told = []
    drawn = []
    for part in engine.draw(request_of(), watch):
        told.append((watch.step, watch.steps, watch.doing))
        drawn.append(part)
    levels = len(generate.levels_of(request_of()).t)
    assert told == [(levels, 2 * levels, "decoding"), (2 * levels, 2 * levels, "decoding")]
    assert watch.images == 8
    assert watch.fraction == 1
    assert watch.eta == 0
    assert watch.preview.shape == drawn[0].image.shape
    assert not np.array_equal(watch.preview, drawn[1].image)  # of the level before the last


def test_previews_by_another_decoder(engine, request_of, each_level, monkeypatch):
    what = request_of()
    down, shape = what.model.config.first_stage.downsample, what.shape
    seen = []
    monkeypatch.setattr(
        engine, "_quick", ((down, shape[2]), lambda z: seen.append(z) or z[..., :3])
    )
    watch = jobs.Watch()
    watch.wants_preview = True
    list(engine.draw(what, watch))
    assert watch.preview.shape == (4, *shape[:2], 3)
    assert seen[0].shape == (4, *shape)
    monkeypatch.setattr(engine, "_quick", ((8, 4), lambda z: pytest.fail("of another latent")))
    list(engine.draw(what, watch))


def stopping(monkeypatch, watch, at, how):
    """The watch is told `how` to stop when so many segments have run."""
    count = [0]
    ready = generate.ready

    def counted(array):
        count[0] += 1
        if count[0] == at:
            watch.stop = how
        return ready(array)

    monkeypatch.setattr(generate, "ready", counted)
    return count


def test_cancel_takes_effect_within_a_segment(engine, request_of, each_level, monkeypatch):
    watch = jobs.Watch()
    count = stopping(monkeypatch, watch, 3, "cancel")
    with pytest.raises(jobs.CancelledError):
        list(engine.draw(request_of(), watch))
    assert count == [3]


def test_interrupt_and_skip_give_pictures_as_they_are(engine, request_of, each_level, monkeypatch):
    whole = list(engine.draw(request_of(), jobs.Watch()))
    for how, calls in (("interrupt", 1), ("skip", 2)):
        watch = jobs.Watch()
        stopping(monkeypatch, watch, 3, how)
        drawn = list(engine.draw(request_of(), watch))
        assert len(drawn) == calls
        assert not np.array_equal(drawn[0].image, whole[0].image)
        if how == "skip":
            assert np.array_equal(drawn[1].image, whole[1].image)
    watch = jobs.Watch()
    stopping(monkeypatch, watch, 3, "last")  # the server ends: the running call is whole
    (drawn,) = engine.draw(request_of(), watch)
    assert np.array_equal(drawn.image, whole[0].image)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 507),
        (MemoryError(), 507),
        (None, 422),
    ],
)
def test_what_fails_does_not_stay(engine, request_of, monkeypatch, error, status):
    what = request_of()
    whole = list(engine.draw(what, jobs.Watch()))
    asked = what
    if error is None:
        nan = jax.tree.map(lambda x: x * np.nan, what.model.params["first_stage"])
        broken = dataclasses.replace(what.model, params=what.model.params | {"first_stage": nan})
        asked = dataclasses.replace(what, model=broken)
    with monkeypatch.context() as patch:
        if error is not None:
            patch.setattr(generate, "arguments_of", lambda *args: (_ for _ in ()).throw(error))
        with pytest.raises(RefusedError) as refused:
            list(engine.draw(asked, jobs.Watch()))
    assert refused.value.status == status
    again = list(engine.draw(what, jobs.Watch()))
    assert all(np.array_equal(a.image, b.image) for a, b in zip(whole, again, strict=True))


def test_models_and_programs_are_kept_up_to_a_number():
    kept, made = engines.Kept(2), []

    def make(name):
        return lambda: made.append(name) or name

    for name in ("a", "b", "a", "c", "a", "b"):
        assert kept.get(name, make(name)) == name
    assert made == ["a", "b", "c", "b"]


def test_a_model_is_loaded_once(engine, request_of, monkeypatch):
    first = request_of()
    monkeypatch.setattr(engines.options, "load_base", lambda *_: pytest.fail("it loads again"))
    assert request_of(steps=4).model is first.model


def test_threads_share_a_watch(engine, request_of, each_level):
    """The thread that asks sees steps of the one that draws."""
    watch, seen = jobs.Watch(), set()
    drawing = threading.Thread(target=lambda: list(engine.draw(request_of(steps=40), watch)))
    drawing.start()
    while drawing.is_alive():
        seen.add((watch.doing, watch.step))
    assert len({step for doing, step in seen if doing == "sampling"}) > 3
