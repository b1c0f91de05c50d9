"""Lists of prompts, from the command line: bad lines, going on after an interruption, again."""

import numpy as np
import pytest
import task_models
import text_model
from task_models import pixels

from ldm_jax import saving
from ldm_jax.runtime import images
from ldm_jax.sample import main, program, write

TABLE = """\
prompt,negative_prompt,seed,guidance_scale,num_images
a disc,,7,3,2
"a ring, red",no,,,
,,,,
a dot,,x,,
a cross,,,1,1
"""
NAMES = (
    "00000_a_disc_seed7", "00001_a_disc_seed7", "00002_a_ring_red_seed0", "00003_a_ring_red_seed0",
    "00004_a_ring_red_seed0", "00005_a_cross_seed0",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of text as a run."""
    folder = tmp_path_factory.mktemp("lists") / "run"
    saving.save(text_model.make(), folder, to="ldm_jax")
    return folder


@pytest.fixture(scope="module")
def command(run):
    """command(out, *flags) -> exit code of drawing TABLE in two batches of 4."""

    def call(out, *flags):
        table = run.parent / "a.csv"
        table.write_text(TABLE)
        flags = ["--model", run, "--out", out, "--prompt-file", table, *flags]
        flags += ["--batch-size", 4, "--num-images", 3, "--save-latents", "--npz"]
        return task_models.sample("text2img", *flags)

    return call


@pytest.fixture(scope="module")
def made(command, tmp_path_factory):
    """(folder of the whole list, exit code)."""
    out = tmp_path_factory.mktemp("lists") / "out"
    return out, command(out, "--preview", 2)


def files(folder):
    """{name: bytes} of all that is in it."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_bad_line_is_named_and_the_others_are_drawn(made, run):
    out, code = made
    assert code == 1
    expected = {f"{name}.png" for name in NAMES} | {f"previews/{name}.png" for name in NAMES}
    assert files(out).keys() == expected | {"grid.png", "latents.npy", "samples.npz"}
    kept = [images.read_settings(out / f"{name}.png") for name in NAMES]
    assert [(k["seed"], k["index"]) for k in kept] == [*zip((7, 7, 0, 0, 0, 0), range(6))]
    assert [k["guidance_scale"] for k in kept] == [3, 3, 7.5, 7.5, 7.5, 1]
    assert [k["negative_prompt"] for k in kept] == ["", "", "no", "no", "no", ""]
    singles = np.stack([pixels(out / f"{name}.png") for name in NAMES])
    assert len({single.tobytes() for single in singles}) == 6
    with np.load(out / "samples.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], singles)
    assert np.load(out / "latents.npy").shape == (6, 8, 8, 4)
    assert pixels(out / "previews" / f"{NAMES[0]}.png").shape == (16 + 4, 2 * 18 + 2, 3)


@pytest.mark.parametrize("name", [NAMES[5], pytest.param(NAMES[1], marks=pytest.mark.slow)])
def test_an_image_of_a_list_is_drawn_again(made, tmp_path, capsys, shown, name):
    out, _ = made
    assert main.sample(["again", f"{out / name}.png", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err.endswith("pixel for pixel\n")
    np.testing.assert_array_equal(pixels(tmp_path / f"{name}.png"), pixels(out / f"{name}.png"))


@pytest.fixture(scope="module")
def stopped(command, tmp_path_factory):
    """(folder of a list that Ctrl-C stops after the first batch, exit code)."""
    out, part = tmp_path_factory.mktemp("lists") / "out", write.part

    def interrupted(*arguments):
        if arguments[2].places[0] > 0:
            (out / "latents" / ".00004.npy.part").write_bytes(b"half")
            raise KeyboardInterrupt
        return part(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "part", interrupted)
        return out, command(out, "--preview", 2)


def test_resume_completes_an_interrupted_list(stopped, made, command, capsys):
    out, code = stopped
    assert code == 130
    before = files(out)
    images_of = {f"{folder}{name}.png" for name in NAMES[:4] for folder in ("", "previews/")}
    assert before.keys() == images_of | {"latents/00000.npy"}
    for flags, message in (
        ((), "already holds images; --resume goes on with them"),
        (("--resume", "--overwrite"), "--resume keeps what --overwrite replaces"),
        (("--resume", "--steps", 4), f"{NAMES[0]}.png was made with steps 2, and here it is 4"),
        (("--resume", "--negative-prompt", "x"), 'was made with negative_prompt "", and here'),
        (("--resume", "--seed", 3), f"{NAMES[2]}.png is none of the images of this list"),
    ):
        assert command(out, "--preview", 2, *flags) == 1
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert files(out) == before
    for done in ("4 of 6", "6 of 6"):
        assert command(out, "--preview", 2, "--resume") == 1  # of the bad line
        assert f"{done} images are in {out} already" in capsys.readouterr().err
        assert files(out) == files(made[0])


def test_ctrl_c_says_how_to_go_on(command, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "compiled", interrupted)
    assert command(tmp_path / "out") == 130
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2:] == [
        f"0 of 6 images are in {tmp_path / 'out'}; go on with --resume",
        "ldm-sample: interrupted",
    ]
    assert not files(tmp_path / "out")
