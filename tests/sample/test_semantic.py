"""`ldm-sample semantic`: maps of ids, palettes and colours, and what is no map."""

import json

import jax
import numpy as np
import pytest
import task_models
from PIL import Image

from ldm_jax import conditioning, sampling, schema
from ldm_jax.runtime import images
from ldm_jax.sample import semantic

IDS = np.random.default_rng(0).integers(0, 5, (8, 12))
COLOURS = [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [7, 8, 9]]


@pytest.fixture(scope="module")
def model():
    cond = schema.SemanticCondConfig(num_classes=5, stages=1)
    return task_models.make(cond, in_channels=7)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    return task_models.save(model, tmp_path_factory.mktemp("semantic"))


def test_images_of_maps(model, run, tmp_path):
    path = task_models.write_png(tmp_path / "a.png", IDS)
    flags = ["--model", run, "--out", tmp_path / "out", "--maps", path, "--num-images", 2]
    assert task_models.sample("semantic", *flags) == 0
    made = task_models.pixels(tmp_path / "out" / "00001_a_seed0.png")
    assert made.shape == (8, 12, 3)
    arguments = (model.config.cond, model.cond_stage, model.params["cond_stage"])
    cond = conditioning.from_batch(*arguments, {"segmentation": IDS[None]})
    draw = sampling.make_sampler(model, shape=(4, 6, 4), steps=2)
    image = jax.jit(draw)(model.params, cond, sampling.keys_of(0, [1]), None, 1.0)
    expected = images.to_uint8(np.asarray(image))[0].astype(int)
    assert np.abs(made - expected).max() <= 1


def test_the_same_map_in_every_form(tmp_path):
    forms = {"grey": Image.fromarray(IDS.astype(np.uint8))}
    forms["palette"] = Image.fromarray(IDS.astype(np.uint8), mode="P")
    forms["palette"].putpalette(np.uint8(COLOURS).tobytes())
    forms["wide"] = Image.fromarray(IDS.astype(np.uint16))
    forms["colours"] = forms["palette"].convert("RGB")
    colours = {tuple(colour): i for i, colour in enumerate(COLOURS)}
    for name, image in forms.items():
        image.save(tmp_path / f"{name}.png")
        known = colours if name == "colours" else None
        ids = semantic.read_map(str(tmp_path / f"{name}.png"), known)
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, IDS, name)
    # given colours decide, not the numbers in the file
    backwards = {colour: 4 - i for colour, i in colours.items()}
    ids = semantic.read_map(str(tmp_path / "palette.png"), backwards)
    np.testing.assert_array_equal(ids, 4 - IDS)


def test_palettes(tmp_path):
    path = tmp_path / "palette.json"
    path.write_text(json.dumps(COLOURS))
    assert semantic.read_palette(str(path))[7, 8, 9] == 4
    path.write_text(json.dumps({"17": [1, 2, 3]}))
    assert semantic.read_palette(str(path)) == {(1, 2, 3): 17}
    for data, message in [
        ("{", "is not JSON"),
        ("[]", "give a list"),
        ("[[1, 2]]", "is not an id and"),
        ("[[1, 2, 256]]", "is not an id and"),
        ('{"x": [1, 2, 3]}', "'x': .* is not an id and"),
        ("[[1, 2, 3], [1, 2, 3]]", r"the colour \[1, 2, 3\] stands there twice"),
    ]:
        path.write_text(data)
        with pytest.raises(ValueError, match=message):
            semantic.read_palette(str(path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --maps FILE.png"),
        (["--maps", "{tmp}/none.png"], "none.png: does not exist"),
        (["--maps", "{tmp}/text.png"], "text.png: is not an image"),
        (["--maps", "{tmp}/lossy.jpg"], "lossy.jpg: is JPEG, whose compression"),
        (["--maps", "{tmp}/rgb.png"], "rgb.png: is in colours (RGB); give --palette"),
        (["--maps", "{tmp}/rgb.png", "--palette", "{tmp}/p.json"], "[0, 0, 1] (at row 2, "),
        (["--maps", "{tmp}/void.png"], "void.png: holds class 5 (at row 1, column 3)"),
        (["--maps", "{tmp}/ids.png", "{tmp}/odd.png"], "give maps of one size"),
        (["--maps", "{tmp}/odd.png"], "odd.png: height 7 is not a multiple of 2"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value[:20],
)  # fmt: skip
def test_bad_input_is_one_line(run, tmp_path, capsys, flags, message):
    void, rgb = IDS.copy(), np.zeros((8, 12, 3))
    void[1, 3], rgb[2, 5] = 5, (0, 0, 1)
    for name, values in {"void": void, "rgb": rgb, "ids": IDS, "odd": IDS[:7]}.items():
        task_models.write_png(tmp_path / f"{name}.png", values)
    Image.new("L", (12, 8)).save(tmp_path / "lossy.jpg")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "p.json").write_text(json.dumps(COLOURS))
    common = ["--model", run, "--out", tmp_path / "out"]
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    task_models.assert_one_line("semantic", capsys, message, *common, *flags)
