"""LoRA files of every dialect, read and written, against peft and diffusers with the same weights.

The reference merges an adapter into its own weights and saves them: what `load` reads of that must
equal what `lora.merged` makes of the base model and the adapter's file.
"""

import copy
import hashlib
import json

import jax
import numpy as np
import pytest
import recipes
from PIL import Image

from ldm_jax import loading
from ldm_jax.adapters import lora
from ldm_jax.convert.formats import files, safetensors_file
from ldm_jax.runtime import cli, images
from ldm_jax.sample import convert, main

torch = pytest.importorskip("torch", reason="torch is the reference here")
import pipelines  # noqa: E402

pytestmark = pytest.mark.torch

UNET = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "time_emb_proj")
TEXT = ("q_proj", "out_proj", "fc1")
ALPHA = 6


class Reference:
    """A pipeline with a LoRA of rank 4 on both parts, and its files."""

    def __init__(self, root, kind, **options):
        from peft import LoraConfig

        self.root = root
        self.base, self.pipe = root / "base", pipelines.stable_diffusion(root / "base", kind)
        torch.manual_seed(1)
        for module, targets in ((self.pipe.unet, UNET), (self.pipe.text_encoder, TEXT)):
            config = LoraConfig(r=4, target_modules=list(targets), **options)
            module.add_adapter(config)
            with torch.no_grad():
                for name, p in module.named_parameters():
                    if "lora_B" in name:
                        p.normal_(std=0.1)

    def weights(self):
        """({part: PEFT's state dict}, {part: its settings}) of the adapter."""
        from peft.utils import get_peft_model_state_dict

        modules = {"unet": self.pipe.unet, "text_encoder": self.pipe.text_encoder}
        states = {part: get_peft_model_state_dict(m) for part, m in modules.items()}
        settings = {part: m.peft_config["default"].to_dict() for part, m in modules.items()}
        return states, settings

    def saved(self, name, dialect):
        """A file of the adapter as one of the programs writes it."""
        from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya

        states, settings = self.weights()
        if dialect == "kohya":
            states = {
                f"{part}.{key}": value for part, own in states.items() for key, value in own.items()
            }
            file = self.root / f"{name}.safetensors"
            named = convert_state_dict_to_kohya(states)
            # the text encoder of today's transformers has lost the name that kohya's files hold,
            # and alpha, which diffusers writes as the rank, is what was trained with
            named = {
                k.replace("lora_te1_encoder", "lora_te_text_model_encoder"): v.numpy()
                for k, v in named.items()
            }
            named |= {k: np.float32(ALPHA) for k in named if k.endswith(".alpha")}
            safetensors_file.write(file, named)
            return file
        if dialect == "diffusers":
            states = {part: convert_state_dict_to_diffusers(own) for part, own in states.items()}
        self.pipe.save_lora_weights(
            self.root / name,
            unet_lora_layers=states["unet"],
            text_encoder_lora_layers=states["text_encoder"],
            unet_lora_adapter_metadata=settings["unet"],
            text_encoder_lora_adapter_metadata=settings["text_encoder"],
        )
        return self.root / name

    def fused(self, scale=1.0):
        """Our parameters of the weights with the adapter in them."""
        folder = self.root / f"fused{scale}"
        if folder.exists():
            return loading.load(folder).params
        pipe = copy.deepcopy(self.pipe)  # what is fused with a scale keeps it
        pipe.fuse_lora(components=["unet", "text_encoder"], lora_scale=scale)
        plain = type(pipe).from_pretrained(self.base, safety_checker=None)
        for part in ("unet", "text_encoder"):
            state = getattr(pipe, part).state_dict()
            named = {k.replace(".base_layer", ""): v for k, v in state.items() if "lora_" not in k}
            getattr(plain, part).load_state_dict(named)
        plain.save_pretrained(folder)
        return loading.load(folder).params


@pytest.fixture(scope="module", params=["v1", "v"])
def reference(request, tmp_path_factory):
    return Reference(tmp_path_factory.mktemp(request.param), request.param, lora_alpha=ALPHA)


@pytest.mark.parametrize("dialect", ["peft", "diffusers", "kohya"])
def test_files_of_others_are_merged_as_they_merge_them(reference, dialect):
    path, model = reference.saved(dialect, dialect), loading.load(reference.base)
    read = lora.read(path, model)
    assert len(read.unet) > 20
    assert len(read.cond_stage) == 6
    for scale in (1.0, 0.4):
        close(lora.merged(model.params, [(read, scale)]), reference.fused(scale), model.params)


def close(ours, theirs, base):
    """Equal but for the last bits, and both unlike the base."""
    for part in ("unet", "cond_stage"):
        leaves = [jax.tree.leaves_with_path(tree[part]) for tree in (ours, theirs, base)]
        assert any(np.abs(x - z).max() > 0.01 for (_, x), (_, z) in zip(leaves[0], leaves[2]))
        for (path, x), (_, y) in zip(leaves[0], leaves[1], strict=True):
            np.testing.assert_allclose(x, y, atol=2e-6, err_msg=str(path))


def test_written_files_are_read_by_diffusers_and_by_us(reference, tmp_path):
    model = loading.load(reference.base)
    made = lora.read(reference.saved("peft", "peft"), model)
    for to in ("peft", "kohya"):
        path = tmp_path / f"{to}.safetensors"
        lora.write(path, made, to)
        recipes.assert_same_bits(lora.read(path, model), made)
    theirs, settings = type(reference.pipe).lora_state_dict(
        tmp_path / "peft.safetensors", return_lora_metadata=True
    )[0:3:2]
    states, _ = reference.weights()
    wanted = {f"{part}.{k}": v for part, own in states.items() for k, v in own.items()}
    wanted = {k.replace("text_encoder.encoder", "text_encoder.text_model.encoder"): v
              for k, v in wanted.items()}  # fmt: skip
    assert theirs.keys() == wanted.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(tensor.numpy(), wanted[name].numpy(), err_msg=name)
    assert {settings[f"{part}.lora_alpha"] for part in ("unet", "text_encoder")} == {ALPHA}


def test_kohya_files_carry_what_webui_reads(reference, tmp_path):
    model = loading.load(reference.base)
    path = tmp_path / "kohya.safetensors"
    lora.write(path, lora.read(reference.saved("peft", "peft"), model), "kohya", base="v2-768-v")
    tensors, info = files.open_state_dict(path)
    names = {name.partition(".")[0] for name in tensors}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0" in names
    assert "lora_te_text_model_encoder_layers_1_self_attn_out_proj" in names
    assert info.metadata["ss_v2"] == "True"
    assert info.metadata["ss_network_alpha"] == "6"
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    assert info.metadata["sshs_model_hash"] == hashlib.sha256(content[begin:]).hexdigest()
    assert json.loads(content[8:begin])["__metadata__"]["ss_network_dim"] == "4"


@pytest.mark.slow  # the weights are compared above; what is left is that the commands use them
def test_pictures_are_those_of_diffusers(reference, tmp_path):
    """Several at once, of both dialects, each part with its own scale; to 1 grey level."""
    pipe, base = copy.deepcopy(reference.pipe), reference.base
    file = reference.saved("kohya", "kohya")
    x_T = np.random.default_rng(5).normal(size=(1, 8, 8, 4)).astype(np.float32)
    np.save(tmp_path / "x_T.npy", x_T)
    options = ["text2img", "--model", base, "--prompt", "a red square", "--num-images", 1]
    options += ["--steps", 10, "--guidance-scale", 5, "--init-latents", tmp_path / "x_T.npy"]

    def drawn(name, *more):
        argv = [*map(str, options), "--out", str(tmp_path / name), *more]
        assert cli.run("ldm-sample", main.sample, argv) == 0
        (path,) = sorted((tmp_path / name).glob("0*.png"))
        return np.asarray(Image.open(path)).astype(int), path

    ours, path = drawn(
        "lora", "--lora", f"{file}:0.5:0.25", f"{reference.saved('peft', 'peft')}:0.1"
    )
    # weights of one adapter add up: 0.5 + 0.1 for the UNet, 0.25 + 0.1 for the text encoder
    pipe.set_adapters(["default"], [{"unet": 0.6, "text_encoder": 0.35}])
    latents = torch.from_numpy(np.ascontiguousarray(x_T.transpose(0, 3, 1, 2)))
    theirs = pipe("a red square", num_inference_steps=10, guidance_scale=5, latents=latents)
    theirs = np.asarray(theirs.images[0]).astype(int)
    plain, _ = drawn("plain")
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours - plain).max() > 5
    settings = images.read_settings(path)
    assert str(file) in settings["files"]
    assert (
        cli.run("ldm-sample", main.sample, ["again", str(path), "--out", str(tmp_path / "a")]) == 0
    )
    assert (np.asarray(Image.open(tmp_path / "a" / path.name)) == ours).all()


def test_ldm_convert_bakes_them_in(reference, tmp_path):
    file = reference.saved("kohya", "kohya")
    argv = [reference.base, tmp_path / "baked", "--to", "diffusers", "--lora", f"{file}:0.4"]
    assert cli.run("ldm-convert", convert.convert, [*map(str, argv)]) == 0
    baked, model = loading.load(tmp_path / "baked"), loading.load(reference.base)
    close(baked.params, reference.fused(0.4), model.params)
