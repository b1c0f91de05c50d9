"""`ldm-eval` from the command line: figures, resuming, files for other programs, bad input."""

import json

import clip_model
import jax
import numpy as np
import pytest
import reference
import task_models
import text_model
from two_processes import codes, logs, two

from ldm_jax import data, latents, loading, schema, sharding
from ldm_jax.metrics import features, gaussian
from ldm_jax.models import autoencoder
from ldm_jax.runtime import cli, images, rundir
from ldm_jax.sample.evaluate import extraction, image_sets, main, reconstruct

RANDOM = ["--features", "random", "--batch-size", "4"]
SHORT = ["--steps", "2", "--count", "10", *RANDOM]
FIGURES = {"fd_random_features", "kd_random_features", "precision", "recall"}


def run(*flags):
    """Exit code of the command."""
    return cli.run("ldm-eval", main.evaluate, [*map(str, flags)])


def result(out):
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def reconstructed(first_stage_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("reconstruct")
    assert run("reconstruct", "--model", first_stage_run, "--out", out, *RANDOM) == 0
    return out


@pytest.fixture(scope="module")
def drawn(ldm_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("samples")
    assert run("samples", "--model", ldm_run, "--out", out, "--npz", *SHORT) == 0
    return out


@pytest.fixture(scope="module")
def statistics(ldm_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("statistics")
    assert run("statistics", "--data", ldm_run, "--out", out, *RANDOM) == 0
    return out / "statistics.npz"


# --- reconstruct ---------------------------------------------------------------------------------


def test_reconstruction_figures_are_those_of_the_images(reconstructed, first_stage_run):
    found = result(reconstructed)
    config = rundir.read_config(first_stage_run)
    params, model = loading.load_first_stage(first_stage_run)
    held = data.stream(config.data, batch_size=1, seed=0, split="eval")
    real = np.stack([held[i]["image"] for i in range(16)])
    module = autoencoder.from_config(model)

    @jax.jit
    def back(params, real):
        return latents.decode(module, params, latents.encode(module, params, real, 1.0), 1.0)

    decoded = images.to_uint8(back(params, real)).astype(np.float64)
    mse = np.mean((images.to_uint8(real) - decoded) ** 2, axis=(1, 2, 3))
    psnr = np.mean(10 * np.log10(255**2 / mse))
    pairs = (decoded, images.to_uint8(real).astype(np.float64))
    other, originals = (sum(np.mean(np.diff(x, axis=i) ** 2) for i in (1, 2)) for x in pairs)
    assert found["count"] == 16  # a quarter of 64
    assert found["figures"]["psnr"] == pytest.approx(psnr, rel=1e-3)
    assert -1 <= found["figures"]["ssim"] <= 1
    assert found["figures"]["gradient_energy"] == pytest.approx(other / originals, rel=1e-3)
    assert 0 < found["figures"]["fine_power"] < 10
    assert found["figures"]["r_fd_random_features"] > 0
    assert (reconstructed / "reconstructions.png").exists()


def test_everything_that_repeats_a_run_is_written(reconstructed):
    found = result(reconstructed)
    assert found["features"] == "random features"
    assert found["feature_weights"] == "random, seed 0"
    assert found["images"]["data"]["resize"] == "bicubic"
    assert found["options"]["posterior"] == "mode"
    assert len(found["model_weights"]) == 64
    assert {"jax", "numpy", "pillow"} <= set(found["versions"])
    head, _, row = (reconstructed / "row.md").read_text().splitlines()
    assert "R-FD (random features)" in head
    assert len(head.split("|")) == len(row.split("|"))


def test_a_vector_quantized_stage_has_its_codes_counted(tmp_path):
    """Those of the images that are meant, not of what fills up the last batch."""
    config = schema.AutoencoderVQConfig(
        channels=32, channel_mult=(1, 1), num_res_blocks=0, mid_attention=False, num_codes=16
    )
    module = autoencoder.from_config(config)
    shapes = text_model.shapes_of(module, autoencoder)
    params = reference.filled(shapes)
    mesh = sharding.make_mesh(schema.MeshConfig())
    stage = reconstruct.Stage(module, params, config, None)
    opened = extraction.Opened(features.random_network(), mesh, None)
    options = reconstruct.Options(model="", out=str(tmp_path))
    run = reconstruct.make_run(stage, opened, None, options)
    image = np.random.default_rng(0).uniform(-1, 1, (4, 16, 16, 3)).astype(np.float32)
    found, decoded = run(image, np.arange(4), np.array([1, 1, 1, 0]))

    @jax.jit
    def codes(params, image):
        z = module.apply({"params": params}, image, method="encode")
        return module.apply({"params": params}, z, method="quantize")[1]

    expected = np.bincount(np.asarray(codes(params, image))[:3].reshape(-1), minlength=16)
    assert found["total_codes"].tolist() == expected.tolist()
    assert decoded.shape == image.shape
    assert 0 < np.mean(expected > 0) <= 1
    figures = reconstruct.figures_of(opened.network, found)
    assert figures["usage"] == pytest.approx(np.mean(expected > 0))


# --- samples -------------------------------------------------------------------------------------


def test_samples_of_a_run_against_its_training_data(drawn, ldm_run):
    found = result(drawn)
    assert set(found["figures"]) >= FIGURES
    assert found["sampler"]["steps"] == 2
    assert found["reference"]["split"] == "train"
    assert found["reference"]["images"] == 64
    assert (drawn / "grid.png").exists()


def test_the_same_samples_from_a_file_give_the_same_figures(drawn, ldm_run, tmp_path):
    samples = ["--samples", drawn / "samples.npz", "--reference", ldm_run, *RANDOM]
    assert run("samples", *samples, "--out", tmp_path) == 0
    assert result(tmp_path)["figures"] == pytest.approx(result(drawn)["figures"], rel=1e-6)


def test_saved_statistics_give_the_same_distance(drawn, statistics, tmp_path):
    flags = ["--samples", drawn / "samples.npz", "--reference", statistics, *RANDOM]
    assert run("samples", *flags, "--out", tmp_path) == 0
    figures, expected = result(tmp_path)["figures"], result(drawn)["figures"]
    assert figures["fd_random_features"] == pytest.approx(expected["fd_random_features"], rel=1e-9)
    assert "recall" not in figures  # needs images
    saved = gaussian.read(statistics)
    assert (saved.features.count, saved.meta["size"]) == (64, [16, 16, 3])


@pytest.mark.slow
def test_a_model_of_text_is_asked_with_the_captions_of_the_data(tmp_path, capsys):
    """FD in CLIP features and the CLIP score, of a model that brings no data of its own."""
    model = task_models.save(text_model.make(), tmp_path)
    clip_folder = clip_model.save(tmp_path / "clip")
    rng = np.random.default_rng(0)
    for i, text in enumerate(("red square", "blue", "a blue disc", "red")):
        pixels = rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)
        images.save_png(tmp_path / "data" / f"{i}.png", pixels)
        (tmp_path / "data" / f"{i}.txt").write_text(text)
    flags = ["--model", model, "--features", "clip", "--clip", clip_folder, "--batch-size", 4]
    flags += ["--steps", 1, "--count", 6, "--guidance-scale", 2, "--out", tmp_path / "out"]
    flags += ["--data", tmp_path / "data"]
    assert run("samples", *flags) == 1
    assert "but the data have no captions: give --captions" in capsys.readouterr().err
    flags += ["--captions", "sidecar"]
    assert run("samples", *flags) == 1
    assert "the model does not say what it was trained on" in capsys.readouterr().err
    assert run("samples", *flags, "--reference", tmp_path / "data") == 0
    found = result(tmp_path / "out")
    assert {"fd_clip", "kd_clip", "clip_score", "recall"} <= set(found["figures"])
    assert 0 <= found["figures"]["clip_score"] <= 100
    assert "FD (CLIP)" in (tmp_path / "out" / "row.md").read_text()
    assert found["conditions"]["data"]["source"]["captions"] == "sidecar"


# --- resuming ------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(drawn, ldm_run, tmp_path, monkeypatch, capsys):
    """Stopped after two of three parts, which stay."""
    monkeypatch.setattr(extraction, "PART", 4)
    write, parts = extraction._write_part, []

    def stop(path, found):
        if len(parts) == 2:
            raise KeyboardInterrupt
        write(path, found)
        parts.append(path.name)

    flags = ["--samples", drawn / "samples.npz", "--reference", ldm_run, *RANDOM]
    flags += ["--reference-count", 12, "--out", tmp_path]
    monkeypatch.setattr(extraction, "_write_part", stop)
    assert run("samples", *flags) == 130
    assert parts == ["00000000.npz", "00000004.npz"]
    parts.clear()
    monkeypatch.setattr(extraction, "_write_part", lambda p, x: (parts.append(p), write(p, x)))
    assert run("samples", *flags) == 0
    assert [part.name for part in parts[:1]] == ["00000008.npz"]
    assert "goes on after 8 of 12 images" in capsys.readouterr().err
    assert len(list((tmp_path / "features" / "reference").glob("0*.npz"))) == 3
    straight = tmp_path / "straight"
    assert run("samples", *flags[:-1], straight) == 0
    assert result(tmp_path)["figures"] == result(straight)["figures"]


def test_other_settings_are_refused(reconstructed, first_stage_run, capsys):
    flags = ["--model", first_stage_run, "--out", reconstructed, "--features", "random"]
    assert run("reconstruct", *flags, "--batch-size", 8) == 1
    assert "holds features of other settings (batch_size: 4 -> 8)" in capsys.readouterr().err


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_draw_and_measure_as_one(drawn, ldm_run, tmp_path):
    """Two processes of two devices each; the first one writes."""

    def command(address):
        flags = ["--model", ldm_run, "--out", tmp_path / "out", "--npz", *SHORT]
        program = ("-m", "ldm_jax.sample.evaluate.main", "samples", "--distributed", address)
        return [*program, *map(str, flags)]

    with two(tmp_path, command) as processes:
        assert codes(tmp_path, processes) == [0, 0], logs(tmp_path)
    expected = result(drawn)["figures"]
    assert result(tmp_path / "out")["figures"] == pytest.approx(expected, rel=1e-3)
    with np.load(drawn / "samples.npz") as one, np.load(tmp_path / "out" / "samples.npz") as other:
        apart = one["arr_0"].astype(int) - other["arr_0"]
    assert np.abs(apart).max() <= 1


# --- bad input -----------------------------------------------------------------------------------


def npz(path, array):
    np.savez(path, arr_0=array)
    return path


def bad(name, tmp_path):
    """A file that `--samples` should not take."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    arrays = {
        "floats": pixels / np.float32(255),
        "zero_to_one": (pixels > 127).astype(np.uint8),
        "flat": pixels.reshape(8, -1),
        "large": pixels.repeat(2, axis=1).repeat(2, axis=2),
        "few": pixels[:1],
    }
    return npz(tmp_path / f"{name}.npz", arrays[name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("floats", "arr_0 is float32 (8, 16, 16, 3); images are uint8"),
        ("zero_to_one", "hold nothing above 1, on a scale of 0 to 255"),
        ("flat", "arr_0 is uint8 (8, 768)"),
        ("large", "samples are 32x32 and reference images are 16x16"),
        ("few", "1 images have no covariance"),
    ],
)
def test_images_that_cannot_be_compared(ldm_run, tmp_path, capsys, name, message):
    flags = ["--samples", bad(name, tmp_path), "--reference", ldm_run, "--reference-count", 8]
    assert run("samples", *flags, "--out", tmp_path / "out", *RANDOM) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert error.startswith("ldm-eval: error: ")


def test_dark_images_before_bright_ones_are_no_archive_of_0_to_1(tmp_path):
    """The whole file tells, not a part of it."""
    images = np.zeros((80, 4, 4, 3), np.uint8)
    images[79] = 200
    path = str(npz(tmp_path / "dark.npz", images))
    for limit in (None, 8):
        assert image_sets.images_from_npz(path, limit).count == (limit or 80)
    assert image_sets.images_from_npz(path)._replace(about={}).shape == (4, 4, 3)
    with pytest.raises(ValueError, match="its 79 images hold nothing above 1"):
        image_sets.images_from_npz(str(npz(tmp_path / "zeros.npz", images[:79])))


def test_fewer_images_than_features_are_warned_about(drawn, ldm_run, tmp_path, capsys):
    flags = ["--samples", drawn / "samples.npz", "--reference", ldm_run, *RANDOM]
    assert run("samples", *flags, "--out", tmp_path) == 0
    assert "10 images are fewer than the 224 features" in capsys.readouterr().err
    assert result(tmp_path)["figures"]["fd_random_features_bias"] > 0


def test_statistics_of_another_network(drawn, statistics, tmp_path, capsys):
    flags = ["--samples", drawn / "samples.npz", "--reference", statistics, *RANDOM]
    assert run("samples", *flags, "--random-seed", 1, "--out", tmp_path / "a") == 1
    assert "is of feature weights random, seed 0, and these are of random, seed 1" in (
        capsys.readouterr().err
    )
    np.savez(tmp_path / "fid.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    flags[3] = tmp_path / "fid.npz"
    assert run("samples", *flags, "--out", tmp_path / "b") == 1
    assert "has 2048 features and random features gives 224" in capsys.readouterr().err


def test_features_that_are_not_finite_stop_the_run(first_stage_run, tmp_path, capsys, monkeypatch):
    network = features.random_network()
    network.params["0"]["bias"][3] = np.nan
    monkeypatch.setattr(features, "random_network", lambda seed: network)
    assert run("statistics", "--data", first_stage_run, "--out", tmp_path, *RANDOM) == 1
    assert "features of image 0 are not finite" in capsys.readouterr().err
    assert not list((tmp_path / "features" / "data").glob("*.npz"))  # none of it is kept


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["samples", "--samples", "x.npz"], "--inception FILE, pt_inception-2015-12-05-6726825d"),
        (["samples", "--samples", "x.npz", "--features", "clip"], "takes --clip FOLDER"),
        (["samples", *RANDOM], "give --model, to draw samples, or --samples"),
        (["samples", "--samples", "nowhere", *RANDOM], "is no folder of images or .npz"),
        (["statistics", "--data", "nowhere", *RANDOM], "--data nowhere: is no run, folder"),
        (["statistics", "--data", ".", *RANDOM], "give --size, the pixels"),
        (["reconstruct", "--model", "x", *RANDOM[:2], "--batch-size", "3"], "not a multiple of 4"),
        (["fid"], "task 'fid' is not one of reconstruct, samples, statistics"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, flags, message):
    assert run(*flags, *([] if flags == ["fid"] else ["--out", tmp_path])) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1


def test_an_archive_is_read_piece_by_piece(tmp_path):
    pixels = np.random.default_rng(0).integers(2, 256, (9, 4, 4, 1)).astype(np.uint8)
    path = npz(tmp_path / "x.npz", pixels)
    shape, dtype = image_sets._npy_header(path)
    assert (shape, dtype) == ((9, 4, 4, 1), np.uint8)
    np.testing.assert_array_equal(image_sets._npy_slice(path, shape, range(3, 7)), pixels[3:7])
