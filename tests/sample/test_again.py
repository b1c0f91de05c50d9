"""`ldm-sample again` of every task that has no such test beside its own."""

import json

import numpy as np
import pytest
import task_models
import text_model

from ldm_jax import schema

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

CLASSES = schema.ClassCondConfig(num_classes=5, embed_dim=32)
UPSCALE = schema.HybridCondConfig(
    schema.TextCondConfig(text_model.ENCODER, trainable=False),
    schema.UpscaleCondConfig(factor=2, max_noise_level=30),
)
LAYOUT = schema.BERTTextConfig(
    vocab_size=64, max_length=8, width=32, num_layers=1, num_heads=2, head_width=16
)
CONTEXT = task_models.CONTEXT


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


@pytest.mark.parametrize(
    ("task", "model", "flags", "name"),
    [
        ("unconditional", (CLASSES, None, CONTEXT), "--num-images 6", "00005_seed3"),
        (
            "inpaint",
            (CLASSES, None, CONTEXT),
            "--images {f}/a.png {f}/b.png --masks {f}/mask_a.png {f}/mask_b.png --labels 1 2"
            " --num-images 3",
            "00004_b_class2_seed3",
        ),
        (
            "superres",
            (UPSCALE, "bytes", {"in_channels": 7, "num_classes": 31, **CONTEXT}),
            "--images {f}/small_a.png {f}/small_b.png --num-images 3 --prompt x",
            "00004_small_b_seed3",
        ),
        (
            "semantic",
            (schema.SemanticCondConfig(num_classes=5, stages=1), None, {"in_channels": 7}),
            "--maps {f}/map_a.png {f}/map_b.png --num-images 3 --eta 1",
            "00003_map_b_seed3",
        ),
        (
            "layout2img",
            (schema.LayoutCondConfig(LAYOUT), None, CONTEXT),
            "--boxes {f}/a.json {f}/b.json --num-images 3 --solver ddpm --guidance-scale 2",
            "00005_b_seed3",
        ),
        (
            "variations",
            (CLASSES, None, CONTEXT),
            "--seeds 3 4 --labels 1 2 --num-images 6",
            "00004_leg0_004",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_an_image_is_drawn_again(files, tmp_path, capsys, task, model, flags, name):
    cond, tokenizer, changes = model
    run = task_models.save(task_models.make(cond, tokenizer, **changes), tmp_path)
    flags = ["--model", run, "--out", tmp_path / "out", *flags.format(f=files).split()]
    assert task_models.sample(task, *flags, "--seed", 3, "--batch-size", 4) == 0
    one = tmp_path / "out" / f"{name}.png"
    capsys.readouterr()
    assert task_models.again(one, tmp_path / "again") == 0
    assert capsys.readouterr().err.endswith(f"equal to {one}, pixel for pixel\n")
    new = task_models.pixels(tmp_path / "again" / one.name)
    np.testing.assert_array_equal(new, task_models.pixels(one))
    other = next(path for path in sorted(one.parent.glob("0*.png")) if path != one)
    assert np.abs(new - task_models.pixels(other)).max() > 0
