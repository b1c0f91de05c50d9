"""What is asked of a program: keys of every seed and number, options out of range refused."""

import dataclasses
import json

import numpy as np
import pytest
import recipes
import task_models

from ldm_jax import export, loading, sampling, schema
from ldm_jax.sample import draw, generate, inputs, request, text2img, variations, write
from ldm_jax.sample.options import Options, open_model
from ldm_jax.schema import serialize

LARGEST = 2**64 - 1


def asked(count, *, seeds=None, **options):
    """A request of `count` images."""
    return request.Request(
        "", request.Options(model="", out="", **options), task_models.make(None),
        recipes.mesh_of(), (2, 2, 1), False, {}, list("abcdefgh")[:count], [{}] * count,
        seeds=seeds,
    )  # fmt: skip


@pytest.mark.parametrize("seed", [5, 2**32 + 5, 2**63 + 5, LARGEST])
def test_keys_are_those_of_the_library(seed):
    what = asked(3, seed=seed, first_index=2**32 - 3)
    expected = sampling.keys(seed, 3, first=2**32 - 3)
    assert (request.keys_of(what, np.arange(3)) == expected).all()
    assert request.seeds_of(what).tolist() == [seed] * 3


def test_seeds_of_a_list_keep_all_bits():
    seeds = [LARGEST, 1, 2**53 + 1]
    rows = [text2img.prompts.Prompt("a", "", seed, 1.0, 1) for seed in seeds]
    found, _ = text2img.numbered(rows, request.Options(model="", out=""))
    what = asked(3, seeds=np.asarray(found, np.uint64))
    keys = request.keys_of(what, np.arange(3))
    for i, seed in enumerate(seeds):
        assert (keys[i] == sampling.keys(seed, i + 1)[i]).all()
    assert [x["seed"] for x in write.settings_of(what, request.calls_of(what))] == seeds


def test_numbers_beyond_32_bits_are_refused():
    with pytest.raises(ValueError, match=r"--first-index 4294967295: image numbers .*2\*\*32 - 1"):
        request.indices_of(asked(2, first_index=2**32 - 1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seed": -1}, r"--seed -1 is not in 0\.\.2\*\*64 - 1"),
        ({"seed": 2**64}, r"--seed 18446744073709551616 is not in 0\.\.2\*\*64 - 1"),
        ({"first_index": -1}, r"--first-index -1: .*0\.\.2\*\*32 - 1"),
        ({"first_index": 2**32}, r"--first-index 4294967296: .* 0\.\.2\*\*32 - 1"),
    ],
)
def test_options_out_of_range_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        open_model(Options(model="", out="", **flags))


def test_seeds_of_a_path_out_of_range_are_refused():
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=rf"--seeds {seed} is not in 0\.\.2\*\*64 - 1"):
            variations.check(variations.Options(model="", out="", seeds=(3, seed)))


def made_of(what, image):
    """All images of a request, as the program gives them."""
    (call,) = request.calls_of(what)
    latent = image[..., :1]
    return generate.Made(call, call.places[call.wanted], image, latent, image[:, None])


def test_an_image_that_is_not_finite_is_no_picture(tmp_path, monkeypatch):
    what = asked(4, npz=True, save_latents=True, preview=1, overwrite=True)
    what = dataclasses.replace(
        what, options=dataclasses.replace(what.options, out=str(tmp_path / "out"))
    )
    good = np.zeros((4, 4, 4, 3), np.float32)
    monkeypatch.setattr(draw.program, "program_of", lambda *arguments: None)
    monkeypatch.setattr(generate, "made", lambda what, *rest: [made_of(what, good)])
    draw.draw(what)
    everything = sorted(path.name for path in (tmp_path / "out").iterdir())
    wanted = ["a.png", "b.png", "c.png", "d.png", "grid.png", "latents.npy", "previews"]
    assert everything == [*wanted, "samples.npz"]
    bad = good.copy()
    bad[0, 1, 2] = np.nan
    bad[2, 0, 0, 1] = np.inf
    monkeypatch.setattr(generate, "made", lambda what, *rest: [made_of(what, bad)])
    with pytest.raises(FloatingPointError, match=r"2 of 4 images are not finite .*written: a, c;"):
        draw.draw(what)  # over the others, of which nothing is left
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["b.png", "d.png", "grid.png", "previews"]
    assert sorted(x.name for x in (tmp_path / "out/previews").iterdir()) == ["b.png", "d.png"]
    monkeypatch.setattr(generate, "made", lambda what, *rest: [made_of(what, bad * np.nan)])
    with pytest.raises(FloatingPointError, match="4 of 4 images"):
        draw.draw(what)
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_noise_that_is_not_finite_is_refused(tmp_path, value):
    """Also as float32, which sampling is in."""
    x_T = np.zeros((3, 2, 2, 1))
    x_T[1, 0, 0, 0] = value
    np.save(tmp_path / "x.npy", x_T)
    options = Options(model="", out="", init_latents=str(tmp_path / "x.npy"))
    with pytest.raises(ValueError, match=r"--init-latents .*x\.npy: .* finite"):
        inputs.start_latents(options, 3, (2, 2, 1))


def test_a_picture_of_before_keeps_the_seed_that_it_was_drawn_with(tmp_path):
    picture = np.zeros((4, 4, 3), np.uint8)
    for number, (seed, drawn) in enumerate([(7, 7), (2**32 + 5, 5), (-1, 2**32 - 1)]):
        path = tmp_path / f"{number}.png"
        write.images.save_png(path, picture, {"seed": seed, "seeds": [seed, 3]})
        kept = write.read_settings(path)
        assert (kept["seed"], kept["seeds"]) == (drawn, [drawn, 3])
        write.images.save_png(path, picture, {"seed": seed, "format": write.FORMAT})
        assert write.read_settings(path)["seed"] == seed
    write.images.save_png(path, picture, {"format": write.FORMAT + 1})
    with pytest.raises(ValueError, match=r"2\.png: its settings have format \d+, newer than"):
        write.read_settings(path)


# --- levels ---------------------------------------------------------------------------------------


def of_rule(rule, **sampling):
    """A model whose spacing follows a rule."""
    model = task_models.make(None)
    own = dataclasses.replace(model.config.sampling, rule=rule, **sampling)
    return dataclasses.replace(model, config=dataclasses.replace(model.config, sampling=own))


@pytest.mark.parametrize(
    ("own", "asked_for", "count", "first"),
    [
        ("compvis", None, 31, 991),
        ("diffusers", None, 30, 958),
        ("diffusers", "compvis", 31, 991),
        ("compvis", "diffusers", 30, 958),
    ],
)
def test_a_rule_is_the_models_own_or_asked_for(own, asked_for, count, first):
    levels = sampling.levels_of(of_rule(own), 30, None, rule=asked_for)
    assert (len(levels.t), levels.t[0], levels.t[-1]) == (count, first, 1)
    with pytest.raises(ValueError, match="spacing_rule 'k' is not one of compvis, diffusers"):
        sampling.levels_of(of_rule(own), 30, None, rule="k")


def test_the_levels_of_diffusers_depend_on_the_solver():
    model = of_rule("diffusers", spacing="linspace")
    t = {x: sampling.levels_of(model, 7, None, x).t.tolist() for x in ("ddim", "euler", "unipc")}
    assert t["ddim"] == [999, 832, 666, 500, 333, 166, 0]
    assert t["euler"] == [999, 832.5, 666, 499.5, 333, 166.5, 0]
    assert t["unipc"] == [999, 856, 714, 571, 428, 285, 143]
    ours = sampling.levels_of(model, 7, "karras", "euler").t
    assert (ours == sampling.levels_of(of_rule("compvis"), 7, "karras").t).all()


def test_a_program_takes_no_rule_from_its_model():
    """Programs that were exported before rules had names run the levels that they hold."""
    assert export.identity(of_rule("diffusers")) == export.identity(of_rule("compvis"))
    assert export.identity(of_rule("compvis")) != export.identity(
        of_rule("compvis", spacing="trailing")
    )


def test_what_is_without_a_rule_has_the_one_that_there_was(tmp_path):
    write.images.save_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8), {"seed": 3})
    assert write.read_settings(tmp_path / "a.png")["spacing_rule"] == "compvis"
    config = schema.LatentDiffusionTrainConfig()
    values = json.loads(serialize.to_json(config))
    assert values["config"]["sampling"].pop("rule") == "compvis"
    assert serialize.from_json(json.dumps(values)).sampling.rule == "compvis"


def test_the_number_of_steps_that_run_is_said(shown, capsys):
    for rule, count, first in (("compvis", 31, 991), ("diffusers", 30, 958)):
        what = asked(1, steps=30, spacing="leading", spacing_rule=rule)
        draw.say_steps(what)
        said = f"ddim: {count} steps, timesteps {first} to 1 (leading of {rule})"
        assert said in capsys.readouterr().err
    draw.say_steps(dataclasses.replace(what, start=20))
    assert "ddim: 10 steps, timesteps 298 to 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "rule"),
    [(None, "diffusers"), ({}, "compvis"), ({"spacing_rule": "diffusers"}, "diffusers")],
)
def test_a_program_keeps_its_levels(program, rule, monkeypatch):
    """One without a rule is of the time when there was one; the options then ask for its levels."""
    monkeypatch.setattr(loading, "load", lambda *given, **more: of_rule("diffusers"))
    monkeypatch.setattr(export, "read_meta", lambda path: {"program": program})
    path = None if program is None else "program.bin"
    for asked_for, expected in ((None, rule), ("compvis", "compvis")):
        given = Options(
            model="m", out="o", step=0, steps=30, from_export=path, spacing_rule=asked_for
        )
        _, _, found = open_model(given)
        assert (found.spacing, found.spacing_rule) == ("leading", expected)
