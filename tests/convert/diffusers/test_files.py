"""The kinds of files in a diffusers folder: shards, .bin, msgpack, variants, and damage."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from diffusers_modules import FIRST_STAGES, made
from flax import serialization

from ldm_jax import loading, schema
from ldm_jax.convert import diffusers
from ldm_jax.convert.formats import safetensors_file

torch = pytest.importorskip("torch", reason="torch is the reference here")
pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """(folder, state dict, our parameters) of a small AutoencoderKL."""
    folder = tmp_path_factory.mktemp("vae")
    module = made("AutoencoderKL", FIRST_STAGES["kl"][1])
    module.save_pretrained(folder)
    return folder, module.state_dict(), diffusers.load_first_stage(folder)[0]


def copied(vae, folder):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text((vae[0] / "config.json").read_text())
    return folder


def same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_shards_of_diffusers(vae, tmp_path):
    made("AutoencoderKL", FIRST_STAGES["kl"][1]).save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    same(diffusers.load_first_stage(tmp_path)[0], vae[2])


def test_bin_files_with_the_names_of_2022(vae, tmp_path):
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, x in vae[1].items():
        for new, before in names.items():
            name = name.replace(f".{new}.", f".{before}.")
        old[name] = x
    torch.save(old, copied(vae, tmp_path) / "diffusion_pytorch_model.bin")
    same(diffusers.load_first_stage(tmp_path)[0], vae[2])


def test_msgpack_of_flax(vae, tmp_path):
    content = serialization.msgpack_serialize(vae[2])
    (copied(vae, tmp_path) / "diffusion_flax_model.msgpack").write_bytes(content)
    options = json.loads((tmp_path / "config.json").read_text())
    options["_class_name"] = "FlaxAutoencoderKL"
    (tmp_path / "config.json").write_text(json.dumps(options))
    same(diffusers.load_first_stage(tmp_path)[0], vae[2])


def test_variants_and_types(vae, tmp_path):
    half = {name: x.half().numpy() for name, x in vae[1].items()}
    safetensors_file.write(copied(vae, tmp_path) / "diffusion_pytorch_model.fp16.safetensors", half)
    with pytest.raises(FileNotFoundError, match=r"the variant fp16 alone .*give --variant fp16"):
        diffusers.load_first_stage(tmp_path)
    # options without a variant (--first-stage.path, ldm-eval reconstruct) take the only one
    assert diffusers.sole_variant(tmp_path, "first_stage") == "fp16"
    half_params, _ = loading.load_first_stage(tmp_path)
    same(half_params, jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), vae[2]))
    assert diffusers.sole_variant(vae[0], "first_stage") is None
    params, _ = diffusers.load_first_stage(tmp_path, variant="fp16", param_dtype=jnp.bfloat16)
    expected = jax.tree.map(lambda x: x.astype(np.float16).astype(ml_dtypes.bfloat16), vae[2])
    assert jax.tree.leaves(params)[0].dtype == jnp.bfloat16
    same(params, expected)


def test_tensors_that_do_not_fit_are_named(vae, tmp_path):
    tensors = {name: x.numpy() for name, x in vae[1].items()}
    tensors["encoder.extra.weight"] = tensors.pop("quant_conv.bias")
    path = copied(vae, tmp_path) / "diffusion_pytorch_model.safetensors"
    safetensors_file.write(path, tensors)
    with pytest.raises(ValueError, match=r"missing quant_conv\.bias; unknown encoder\.extra") as e:
        diffusers.load_first_stage(tmp_path)
    assert str(path) in str(e.value)


def test_an_index_cannot_leave_its_folder(vae, tmp_path):
    copied(vae, tmp_path / "vae")
    index = {"weight_map": dict.fromkeys(vae[1], "../other.safetensors")}
    path = tmp_path / "vae/diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    safetensors_file.write(
        tmp_path / "other.safetensors", {name: x.numpy() for name, x in vae[1].items()}
    )
    with pytest.raises(ValueError, match=r"'\.\./other\.safetensors'"):
        diffusers.load_first_stage(tmp_path / "vae")


def test_a_config_is_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: does not exist"):
        diffusers.load_unet(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json: holds .*, not an object"):
        diffusers.load_unet(tmp_path)


def test_schema_is_what_the_folder_says(vae):
    expected = schema.AutoencoderKLConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1)
    assert diffusers.load_first_stage(vae[0])[1] == expected
