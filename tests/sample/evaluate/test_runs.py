"""`ldm-eval` of runs by kind: quantized first stages, models conditioned on images."""

import functools
import json

import jax
import numpy as np
import pytest
import recipes

import ldm_jax
from ldm_jax import bundle, conditioning, data, latents, sampling
from ldm_jax.configs import tiny
from ldm_jax.models import autoencoder as models
from ldm_jax.runtime import checkpoint, cli, images, rundir
from ldm_jax.sample.evaluate import main
from ldm_jax.schema import serialize
from ldm_jax.train import autoencoder, ldm

RANDOM = ["--features", "random", "--batch-size", "4"]


def run(*flags):
    """Exit code of the command."""
    return cli.run("ldm-eval", main.evaluate, [*map(str, flags)])


def result(out):
    return json.loads((out / "result.json").read_text())


def run_of(config, path, **frozen):
    """A run with one snapshot of weights by formula."""
    recipe = ldm if frozen else autoencoder
    run, _ = rundir.open_run(path, config)
    params = recipes.filled(jax.eval_shape(lambda: recipe.init_params(config, jax.random.key(0))))
    section = config.model if not frozen else bundle.model_config(config, frozen["stage"].config)
    checkpoint.save_snapshot(run, 1, params, serialize.to_dict(section))
    if frozen:
        stage = frozen["stage"]
        rundir.write_frozen(run, "first_stage", jax.device_get(stage.params), stage.config)
        rundir.write_latents(run, {"scale": stage.scale, "how": "given"})
    return run, params


def test_a_quantized_run_is_reconstructed_with_its_codes_counted(tmp_path):
    config = recipes.gan_config("vq", discriminator=None)
    path, params = run_of(config, tmp_path / "run")
    out = tmp_path / "out"
    assert run("reconstruct", "--model", path, "--out", out, *RANDOM, "--batch-size", 12) == 0
    figures = result(out)["figures"]
    held = data.stream(config.data, batch_size=1, seed=0, split="eval")
    image = np.stack([held[i]["image"] for i in range(16)])  # four of the last batch are padding
    module = models.from_config(config.model)

    @jax.jit
    def through(params, image):
        z = module.apply({"params": params}, image, method="encode")
        _, indices = module.apply({"params": params}, z, method="quantize")
        return indices, module.apply({"params": params}, z, method="decode")

    indices, decoded = through(params["autoencoder"], image)
    share = np.bincount(np.asarray(indices).reshape(-1), minlength=32) / indices.size
    assert figures["usage"] == np.mean(share > 0)
    entropy = -np.sum(share[share > 0] * np.log(share[share > 0]))
    assert figures["perplexity"] == pytest.approx(np.exp(entropy), rel=1e-5)
    error = images.to_uint8(image).astype(float) - images.to_uint8(decoded)
    psnr = np.mean(20 * np.log10(255) - 10 * np.log10(np.mean(error**2, axis=(1, 2, 3))))
    assert figures["psnr"] == pytest.approx(psnr, rel=1e-3)
    assert "codes" in (out / "row.md").read_text().lower()


@pytest.mark.parametrize(
    "condition",
    [
        pytest.param("inpaint", marks=pytest.mark.slow),
        pytest.param("superres", marks=pytest.mark.slow),
        pytest.param("semantic", marks=pytest.mark.slow),
    ],
)
def test_a_concat_model_is_asked_with_the_held_out_images(condition, tmp_path):
    """Sample i is drawn for the mask, small image or map of record i, in the data's order."""
    config = recipes.ldm_config(condition, data=tiny.DATA)
    path, _ = run_of(config, tmp_path / "run", stage=recipes.frozen(recipes.mesh_of()))
    flags = ["--model", path, "--out", tmp_path / "out", "--npz", "--steps", 2, "--count", 6]
    assert run("samples", *flags, *RANDOM) == 0
    found = result(tmp_path / "out")
    assert found["conditions"]["split"] == "eval"
    assert {"fd_random_features", "recall"} <= set(found["figures"])

    model = ldm_jax.load(path)
    held = data.stream(config.data, batch_size=1, seed=0, split="eval")
    needed = {"image", "mask", "segmentation"} & set(held.spec)
    batch = {name: np.stack([held[i][name] for i in range(4)]) for name in needed}
    sample = sampling.make_sampler(model, shape=model.latent_shape, steps=2)

    @jax.jit
    def draw(params, batch, keys):
        encode = functools.partial(
            latents.encode, model.first_stage, params["first_stage"], scale=model.latent_scale
        )
        given = (model.config.cond, model.cond_stage, params["cond_stage"], batch, encode)
        return sample(params, conditioning.from_batch(*given), keys, None, 1.0)

    expected = images.to_uint8(draw(model.params, batch, sampling.keys_of(0, np.arange(4))))
    with np.load(tmp_path / "out" / "samples.npz") as file:
        pixels = file["arr_0"]
    assert pixels.shape == (6, 16, 16, 3)
    assert np.abs(pixels[:4].astype(int) - expected).max() <= 1
    assert np.abs(pixels[0].astype(int) - pixels[1]).max() > 1
