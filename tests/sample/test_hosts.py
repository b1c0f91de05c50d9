"""Several processes draw one list: rows once, and files as of one process."""

import contextlib

import jax
import numpy as np
import pytest
import recipes
import task_models
import text_model
from two_processes import codes, logs, two

from ldm_jax import saving, schema, sharding
from ldm_jax.sample import generate, hosts, request

# Draws what the flags ask for, as process `address` of two.
SAMPLE = """
import sys
from ldm_jax.runtime import cli
from ldm_jax.sample import hosts, main
hosts.SECONDS = 2
address, *flags = sys.argv[1:]
sys.exit(cli.run("ldm-sample", main.sample, [*flags, "--distributed", address]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of four classes as a run."""
    cond = schema.ClassCondConfig(num_classes=4, via="label")
    return task_models.save(task_models.make(cond, num_classes=5), tmp_path_factory.mktemp("hosts"))


@pytest.mark.parametrize("sizes", [{"data": 4}, {"data": 2, "tensor": 2}, {"data": 1, "tensor": 4}])
def test_every_row_is_written_once(sizes):
    rows = sharding.batch_sharding(recipes.mesh_of(**sizes))
    values = np.arange(24.0).reshape(8, 3)
    numbers, found = hosts.own(sharding.place(values, rows))
    assert numbers.tolist() == list(range(8))
    np.testing.assert_array_equal(found, values)


def test_rows_that_others_write_are_left_out(monkeypatch):
    """As in a process that has the last two of four devices."""

    class Seen:
        def __init__(self, array):
            self.shape, self.dtype = array.shape, array.dtype
            self.addressable_shards = array.addressable_shards[:1:-1]

        def __len__(self):
            return self.shape[0]

    place = lambda mesh: sharding.place(np.arange(8.0), sharding.batch_sharding(mesh))  # noqa: E731
    numbers, found = hosts.own(Seen(place(recipes.mesh_of(data=4))))
    assert numbers.tolist() == found.tolist() == [4, 5, 6, 7]
    numbers, found = hosts.own(Seen(place(recipes.mesh_of(data=1, tensor=4))))
    assert numbers.shape == found.shape == (0,)


def test_rows_are_placed_without_asking_other_processes(monkeypatch):
    """jax.device_put compares what all processes give, and takes no keys for devices of others."""
    mesh = recipes.mesh_of(data=4)
    options = request.Options(model="", out="", seed=3)
    rows = {"x_T": np.ones((4, 2, 2, 1), np.float32), "label": np.arange(4)}
    what = request.Request(
        "", options, task_models.make(None), mesh, (2, 2, 1), True, rows, list("abcd"), [{}] * 4
    )
    (call,) = request.calls_of(what)
    keys = request.keys_of(what, call.places)
    monkeypatch.setattr(jax, "device_put", None)
    _, donated, given, placed, scales, *_ = generate.arguments_of(what, rows, call)
    for array in (donated["x_T"], given["label"], placed, scales):
        assert array.sharding.is_equivalent_to(sharding.batch_sharding(mesh), array.ndim)
    assert (jax.random.key_data(placed) == jax.random.key_data(keys)).all()


def test_one_process_refuses_for_itself():
    with pytest.raises(ValueError, match="mine"), hosts.together():
        raise ValueError("mine")


# --- two real processes ---------------------------------------------------------------------------


def draw(tmp_path, *flags):
    """Exit codes of `ldm-sample` with these flags in two processes of two devices."""

    def command(address):
        return ["-c", SAMPLE, address, *map(str, flags)]

    with two(tmp_path, command) as processes:
        return codes(tmp_path, processes)


def files_in(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same_files(one, other):
    found, expected = files_in(one), files_in(other)
    assert sorted(found) == sorted(expected)
    for name, content in expected.items():
        assert found[name] == content, name


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(run, tmp_path):
    """Images with their settings, previews, latents, grid: byte for byte, also when resumed."""
    flags = ["class2img", "--model", run, "--labels", 1, 3, 0, "--num-images", 3, "--steps", 2,
             "--batch-size", 4, "--preview", 2, "--save-latents", "--npz"]  # fmt: skip
    with contextlib.chdir(tmp_path):
        assert task_models.sample(*flags, "--out", tmp_path / "one") == 0
    assert draw(tmp_path, *flags, "--out", tmp_path / "two") == [0, 0], logs(tmp_path)
    assert_same_files(tmp_path / "two", tmp_path / "one")

    gone = tmp_path / "two" / "00005_class3_seed0.png"
    gone.unlink()
    again = [*flags, "--out", tmp_path / "two", "--resume"]
    assert draw(tmp_path, *again) == [0, 0], logs(tmp_path)
    assert "8 of 9 images" not in (tmp_path / "0.log").read_text()
    assert "5 of 9 images are in" in (tmp_path / "0.log").read_text()  # a call is made whole
    assert_same_files(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_two_processes_draw_on_from_each_others_images(tmp_path):
    """The second pass of a hires fix begins with the pixels of all, and with their noise."""
    saving.save(text_model.make(), tmp_path / "run", to="ldm_jax")
    flags = ["text2img", "--model", tmp_path / "run", "--prompt", "red", "blue", "--num-images", 3,
             "--steps", 2, "--batch-size", 4, "--save-latents", "--hires-scale", 2,
             "--hires-upscaler", "lanczos", "--noise-source", "nv",
             "--solver", "euler_ancestral"]  # fmt: skip
    assert task_models.sample(*flags, "--out", tmp_path / "one") == 0
    assert draw(tmp_path, *flags, "--out", tmp_path / "two") == [0, 0], logs(tmp_path)
    assert_same_files(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_two_processes_find_the_noise_of_an_image(run, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    photo = task_models.write_png(tmp_path / "photo.png", picture)
    flags = ["invert", "--model", run, "--images", photo, "--labels", 1, "--steps", 2]
    assert task_models.sample(*flags, "--out", tmp_path / "one") == 0
    assert draw(tmp_path, *flags, "--out", tmp_path / "two") == [0, 0], logs(tmp_path)
    assert_same_files(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_refused_by_all(run, tmp_path):
    for i in range(2):
        (tmp_path / str(i)).mkdir()
    code = SAMPLE.replace("address, *flags", "address, *flags", 1).replace(
        "sys.exit", f"import os; os.chdir({str(tmp_path)!r} + '/' + address[-1]); sys.exit", 1
    )
    flags = ["class2img", "--model", str(run), "--steps", "2", "--batch-size", "4", "--out", "out"]
    with two(tmp_path, lambda address: ["-c", code, address, *flags]) as processes:
        assert codes(tmp_path, processes) == [1, 1], logs(tmp_path)
    assert "process 1 of 2 refuses" in (tmp_path / "0.log").read_text()
    assert "process 1 sees another folder there" in (tmp_path / "1.log").read_text()
