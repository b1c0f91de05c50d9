"""FlaxAutoencoderKL as JAX papers call it, on weights of Flax and of torch."""

import functools
import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
import reference

from ldm_jax.compat import FlaxAutoencoderKL, FlaxDiagonalGaussianDistribution
from ldm_jax.convert.formats import safetensors_file, torch_writer

OPTIONS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (32, 64),
    "sample_size": 16,
    "scaling_factor": 0.25,
}


@pytest.fixture(scope="module")
def made():
    """(model, parameters)."""
    model = FlaxAutoencoderKL(**OPTIONS)
    shapes = jax.eval_shape(model.init_weights, jax.random.key(0))
    return model, reference.filled(shapes)


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    """A folder as Flax diffusers saved it: config.json and msgpack."""
    folder = tmp_path_factory.mktemp("vae")
    model, params = made
    options = {"_class_name": "FlaxAutoencoderKL", "_diffusers_version": "0.30.0", **model.config}
    (folder / "config.json").write_text(json.dumps({**options, "force_upcast": True}))
    (folder / "diffusion_flax_model.msgpack").write_bytes(flax.serialization.to_bytes(params))
    return folder


def test_loads_flax_weights_as_they_are(made, folder):
    model, params = FlaxAutoencoderKL.from_pretrained(folder)
    assert model == made[0]
    recipes.assert_same_bits(params, made[1])
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(params))


def test_writes_what_it_loads(made, folder, tmp_path):
    model, params = made
    model.save_pretrained(tmp_path / "vae", params)
    assert sorted(f.name for f in (tmp_path / "vae").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    for _ in range(2):
        again, read = FlaxAutoencoderKL.from_pretrained(tmp_path, subfolder="vae", from_pt=True)
        assert again == model
        recipes.assert_same_bits(read, params)
        if file.exists():  # then as a pickle of torch
            torch_writer.write(file.with_suffix(".bin"), safetensors_file.read(file))
            file.unlink()
    half = FlaxAutoencoderKL.to_bf16(params)
    model.save_pretrained(tmp_path / "half", half)
    _, read = FlaxAutoencoderKL.from_pretrained(tmp_path / "half", dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(read)} == {jnp.dtype("bfloat16")}
    recipes.assert_same_bits(read, half)


def test_is_called_as_stable_vae_calls_it(folder):
    """A struct with the module as static field, jitted methods, channels-last latents."""

    @flax.struct.dataclass
    class StableVAE:
        params: dict
        module: FlaxAutoencoderKL = flax.struct.field(pytree_node=False)

        @functools.partial(jax.jit, static_argnames="scale")
        def encode(self, key, images, scale=True):
            images = jnp.transpose(images, (0, 3, 1, 2))
            latents = self.module.apply(
                {"params": self.params}, images, method=self.module.encode
            ).latent_dist.sample(key)
            return latents * self.module.config.scaling_factor if scale else latents

        @functools.partial(jax.jit, static_argnames="scale")
        def decode(self, latents, scale=True):
            latents = latents / self.module.config.scaling_factor if scale else latents
            images = self.module.apply(
                {"params": self.params}, latents, method=self.module.decode
            ).sample
            return jnp.transpose(images, (0, 2, 3, 1))

    module, params = FlaxAutoencoderKL.from_pretrained(str(folder))
    vae = StableVAE(params=jax.device_get(params), module=module)
    images = reference.draw(2, 16, 12, 3)
    latents = vae.encode(jax.random.PRNGKey(0), images)
    assert latents.shape == (2, 8, 6, 4)
    assert vae.decode(latents).shape == images.shape
    assert 2 ** (len(vae.module.block_out_channels) - 1) == 2
    first = vae.encode(jax.random.PRNGKey(0), images, scale=False)
    np.testing.assert_allclose(first * 0.25, latents, rtol=1e-6)
    assert np.abs(vae.encode(jax.random.PRNGKey(1), images) - latents).max() > 1e-3


@pytest.mark.slow
def test_is_called_as_other_papers_call_it(made):
    """Unbound methods, pmap over devices, channels-first latents, outputs leave the program."""
    model, params = made
    decode = functools.partial(model.apply, method=FlaxAutoencoderKL.decode)
    latents = reference.draw(4, 1, 4, 6, 8)
    variables = jax.tree.map(lambda x: jnp.stack([x] * 4), {"params": params})
    images = jax.pmap(decode, axis_name="batch")(variables, latents).sample
    assert images.shape == (4, 1, 3, 12, 16)
    alone = decode({"params": params}, latents[2].transpose(0, 2, 3, 1)).sample
    np.testing.assert_allclose(images[2], alone, atol=1e-5)

    @jax.jit
    def encode(images):
        return model.apply({"params": params}, images, method=FlaxAutoencoderKL.encode).latent_dist

    dist = encode(images[:, 0])
    assert dist.mean.shape == dist.std.shape == (4, 6, 8, 4)
    both = model.apply({"params": params}, images[:, 0])
    np.testing.assert_allclose(
        both.sample, decode({"params": params}, dist.mode()).sample, atol=1e-5
    )
    drawn = model.apply(
        {"params": params}, images[:, 0], sample_posterior=True,
        rngs={"gaussian": jax.random.key(1)},
    )  # fmt: skip
    assert np.abs(drawn.sample - both.sample).max() > 1e-3
    (image,) = model.apply({"params": params}, dist.mean, return_dict=False, method=model.decode)
    np.testing.assert_allclose(image, both.sample, atol=1e-5)


def test_the_distribution_is_a_normal():
    mean, logvar = reference.draw(2, 3, 4, 5), reference.draw(2, 3, 4, 5, seed=2)
    dist = FlaxDiagonalGaussianDistribution(jnp.concatenate([mean, logvar], axis=-1))
    np.testing.assert_array_equal(dist.mode(), mean)
    np.testing.assert_allclose(dist.std, np.exp(logvar / 2), rtol=1e-6)
    np.testing.assert_allclose(dist.var, np.exp(logvar), rtol=1e-6)
    expected = (np.exp(logvar) + mean**2 - 1 - logvar).sum(axis=(1, 2, 3)) / 2
    np.testing.assert_allclose(dist.kl(), expected, rtol=1e-5)
    unit = FlaxDiagonalGaussianDistribution(jnp.zeros((2, 3, 4, 10)))
    np.testing.assert_allclose(dist.kl(unit), dist.kl(), rtol=1e-5)
    noise = jax.random.normal(jax.random.key(3), mean.shape)
    np.testing.assert_allclose(dist.sample(jax.random.key(3)), mean + dist.std * noise, rtol=1e-6)
    x = reference.draw(2, 3, 4, 5, seed=3)
    density = jax.scipy.stats.norm.logpdf(x, mean, dist.std).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(dist.nll(x), -density, rtol=1e-5)
    wild = FlaxDiagonalGaussianDistribution(jnp.full((1, 1, 1, 2), 100.0))
    assert float(wild.logvar[0, 0, 0, 0]) == 20
    exact = FlaxDiagonalGaussianDistribution(wild.parameters, deterministic=True)
    assert float(exact.sample(jax.random.key(0))[0, 0, 0, 0]) == 100


def test_config_is_read_by_key_and_attribute(made):
    config = made[0].config
    assert config.scaling_factor == config["scaling_factor"] == 0.25
    assert (config.latent_channels, config.block_out_channels) == (4, (32, 64))
    with pytest.raises(AttributeError, match="no 'shift_factor'; it has in_channels"):
        _ = config.shift_factor
    assert getattr(config, "shift_factor", None) is None


def test_what_is_not_there_is_named(folder, tmp_path):
    load = FlaxAutoencoderKL.from_pretrained
    with pytest.raises(FileNotFoundError, match="nowhere: is not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="hf download owner/no-such-model"):
        load("owner/no-such-model", cache_dir=str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r'no config.json \(give subfolder="vae"\?\)'):
        load(tmp_path)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"none of diffusion_flax_model\.fp16\.msgpack"):
        load(tmp_path, subfolder="vae", variant="fp16")
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="norm_num_groups=16"):
        FlaxAutoencoderKL.from_config({**config, "norm_num_groups": 16})
