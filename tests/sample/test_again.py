"""`ldm-sample again`: what it takes from a PNG, and images of tasks that have no such test."""

import contextlib
import dataclasses
import hashlib
import json
import types

import numpy as np
import pytest
import task_models
import text_model

from ldm_jax import schema
from ldm_jax.runtime import images
from ldm_jax.sample import again, main, retrieval, text2img, write

CLASSES = schema.ClassCondConfig(num_classes=5, embed_dim=32)
UPSCALE = schema.HybridCondConfig(
    schema.TextCondConfig(text_model.ENCODER, trainable=False),
    schema.UpscaleCondConfig(factor=2, max_noise_level=30),
)
LAYOUT = schema.BERTTextConfig(
    vocab_size=64, max_length=8, width=32, num_layers=1, num_heads=2, head_width=16
)
CONTEXT = task_models.CONTEXT
MODELS = {  # condition, tokenizer, changes of the UNet
    "class": (CLASSES, None, CONTEXT),
    "upscaler": (UPSCALE, "bytes", {"in_channels": 7, "num_classes": 31, **CONTEXT}),
    "map": (schema.SemanticCondConfig(num_classes=5, stages=1), None, {"in_channels": 7}),
    "layout": (schema.LayoutCondConfig(LAYOUT), None, CONTEXT),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images, masks, maps and a layout."""
    folder, rng = tmp_path_factory.mktemp("again"), np.random.default_rng(0)
    for name in ("a", "b"):
        task_models.write_png(folder / f"{name}.png", rng.integers(0, 256, (16, 16, 3)))
        task_models.write_png(folder / f"small_{name}.png", rng.integers(0, 256, (8, 8, 3)))
        task_models.write_png(folder / f"map_{name}.png", rng.integers(0, 5, (16, 16)))
        task_models.write_png(folder / f"mask_{name}.png", 255 * rng.integers(0, 2, (16, 16)))
        scene = {"objects": [{"class": ord(name) % 7, "box": [0, 0, 0.5, 1]}]}
        (folder / f"{name}.json").write_text(json.dumps(scene))
    return folder


# task, kind of model, name of a picture, flags
DRAWN = """\
unconditional class 00005_seed3 --num-images 6
inpaint class 00001_b_class2_seed3 --images a.png b.png --masks mask_a.png mask_b.png --labels 1 2
superres upscaler 00004_small_b_seed3 --images small_a.png small_b.png --num-images 3 --prompt x
semantic map 00003_map_b_seed3 --maps map_a.png map_b.png --num-images 3 --eta 1
layout2img layout 00005_b_seed3 --boxes a.json b.json --num-images 3 --solver ddpm
variations class 00004_leg0_004 --seeds 3 4 --labels 1 2 --num-images 6
invert class 00001_b_class1_seed3 --images a.png b.png --labels 1
megapixel class 00001_class2_seed3 --labels 1 2 --height 32 --width 16 --window 16 --stride 8
""".splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("asked", DRAWN, ids=lambda line: line.split()[0])
def test_an_image_is_drawn_again(files, tmp_path, capsys, asked):
    task, kind, name, *flags = asked.split()
    cond, tokenizer, changes = MODELS[kind]
    run = task_models.save(task_models.make(cond, tokenizer, **changes), tmp_path)
    flags = ["--model", run, "--out", tmp_path / "out", *flags, "--seed", 3, "--batch-size", 4]
    with contextlib.chdir(files):
        assert task_models.sample(task, *flags) == 0
        one = tmp_path / "out" / f"{name}.png"
        capsys.readouterr()
        assert task_models.again(one, "--out", tmp_path / "again") == 0
    assert capsys.readouterr().err.endswith(f"equal to {one}, pixel for pixel\n")
    new = task_models.pixels(tmp_path / "again" / one.name)
    np.testing.assert_array_equal(new, task_models.pixels(one))
    other = next(path for path in sorted(one.parent.glob("0*.png")) if path != one)
    assert np.abs(new - task_models.pixels(other)).max() > 0


# --- a PNG from anywhere --------------------------------------------------------------------------

KEPT = {
    **{"task": "text2img", "model": "somewhere", "prompt": "a cat", "steps": 2, "seed": 7},
    **{"first_index": 1, "num_images": 1, "index": 1, "call": [4, 2], "guided": True},
    **{"files": {}, "made_with": {"ldm_jax": "0.1.0"}},
}
LEFT = {
    *("out", "overwrite", "resume", "save_latents", "npz", "export", "export_platforms"),
    *("progress", "prompt_file", "index_file", "index_batch", "rebuild", "lora_dir"),
    *("styles", "style", "across", "down", "sheets"),
}
"""Options that say where files go, what is written and shown, or how fast it is."""


class Stop(Exception):
    """The options are known: nothing needs to be drawn."""


@pytest.fixture
def asked_by(tmp_path):
    """asked_by(**settings) -> the options that `again` makes of a PNG with these settings."""

    def ask(module=text2img, **changes):
        def request(options):
            seen.append(options)
            raise Stop

        seen = []
        kept = {name: x for name, x in {**KEPT, **changes}.items() if x is not ...}
        image = tmp_path / "a.png"
        images.save_png(image, np.zeros((2, 2, 3), np.uint8), kept)
        fake = types.SimpleNamespace(
            Options=module.Options,
            request=request,
            **{n: f for n, f in vars(module).items() if n == "writing_below"},
        )
        with pytest.raises(Stop):
            again.main(again.Options(str(image), out=str(tmp_path / "new")), {kept["task"]: fake})
        return seen[0]

    return ask


def test_every_option_is_known_to_shape_the_picture_or_not_to():
    options = {f.name for task in main.TASKS.values() for f in dataclasses.fields(task.Options)}
    assert options == again.SHAPING | LEFT, "say in SHAPING or LEFT what a new option is"
    assert not again.SHAPING & LEFT


def test_only_options_that_shape_the_picture_are_taken(asked_by, tmp_path):
    evil = dict.fromkeys(("overwrite", "resume", "save_latents", "npz"), True)
    evil |= {"out": "elsewhere", "export": "elsewhere", "prompt_file": "elsewhere"}
    options = asked_by(**evil)
    plain = text2img.Options(model="somewhere", out=str(tmp_path / "new"))
    shaping = {"prompt": ("a cat",), "steps": 2, "seed": 7, "first_index": 1, "num_images": 1}
    shaping["batch_size"] = 4  # that of the call, on other devices
    shaping["spacing_rule"] = "compvis"  # that of pictures which name none
    assert options == dataclasses.replace(plain, **shaping)


def test_an_index_is_neither_taken_nor_written_elsewhere(asked_by, tmp_path):
    """Before, `index_file` and `rebuild` of a PNG overwrote any file."""
    (tmp_path / "photos").mkdir()
    evil = {"index_file": str(tmp_path / "thesis"), "rebuild": True}
    photos = str(tmp_path / "photos")
    options = asked_by(retrieval, task="retrieval", clip="c", database=photos, **evil)
    assert not options.rebuild
    assert options.index_file == str(tmp_path / "new" / retrieval.INDEX)
    (tmp_path / "photos" / retrieval.INDEX).write_text("")
    options = asked_by(retrieval, task="retrieval", clip="c", database=photos, **evil)
    assert options.index_file is None  # that of the folder is read


@pytest.mark.parametrize("name", ["init_latents", "config"])
def test_files_are_those_whose_hashes_are_known(asked_by, tmp_path, name):
    path = tmp_path / "file"
    path.write_text("as it was")
    digest = hashlib.sha256(b"as it was").hexdigest()
    assert getattr(asked_by(**{name: str(path)}, files={str(path): digest}), name) == str(path)
    with pytest.raises(ValueError, match=f"a.png: names {path} without its hash"):
        asked_by(**{name: str(path)})
    path.write_text("another")
    with pytest.raises(ValueError, match=f"{path}, which has changed since"):
        asked_by(**{name: str(path)}, files={str(path): digest})
    with pytest.raises(ValueError, match="/dev/zero: is no regular file"):
        asked_by(**{name: "/dev/zero"}, files={"/dev/zero": digest})
    assert asked_by(files={"/dev/zero": digest}).config is None  # not named: not read


def test_a_program_runs_only_if_its_hash_is_known(asked_by, tmp_path, shown, capsys):
    path = tmp_path / "program.bin"
    path.write_text("a program")
    digest = hashlib.sha256(b"a program").hexdigest()
    options = asked_by(from_export=str(path), files={str(path): digest})
    assert options.from_export == str(path)
    assert asked_by(from_export=str(path)).from_export is None
    assert "does not say which program" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "2"}, "steps: '2' is not a int"),
        ({"prompt": {"a": 1}}, "prompt: .* is not a tuple"),
        ({"model": ["a"]}, r"model: \['a'\] is not a str"),
        ({"files": ["a"]}, r"files: \['a'\] is not a dict"),
        ({"call": [10**12, 0]}, "call .* is no place in a batch of at most 4096"),
        ({"call": [4, 4]}, r"call \[4, 4\] is no place"),
        ({"call": 4}, "call: 4 is not a tuple"),
        ({"index": None}, "index: None is not a int"),
        ({"made_with": None}, "made_with: None is not a dict"),
    ],
)
def test_settings_of_another_type_are_refused(asked_by, change, message):
    with pytest.raises(ValueError, match=f"a.png: {message}"):
        asked_by(**change)


@pytest.mark.parametrize("task", [["text2img"], {}, None, 3])
def test_a_task_that_is_no_name_is_refused(tmp_path, task):
    images.save_png(tmp_path / "a.png", np.zeros((2, 2, 3), np.uint8), {**KEPT, "task": task})
    with pytest.raises(ValueError, match=r"a.png: does not say how it was made"):
        again.main(again.Options(str(tmp_path / "a.png")), main.TASKS)


def test_input_files_are_all_that_options_name():
    names = {name for task in main.TASKS.values() for name in write.file_options(task.Options)}
    assert names == {
        *("config", "init_latents", "from_export", "images", "masks", "maps", "palette"),
        *("boxes", "class_names", "query_image"),
    }
