"""Whole pipelines: from diffusers to ours and back, without a warning and bit for bit."""

import functools
import json
import logging
import pathlib
import warnings

import jax
import numpy as np
import pipelines
import pytest
from reference import max_difference

from ldm_jax import bundle, schema
from ldm_jax.convert import diffusers
from ldm_jax.convert.formats import files

torch = pytest.importorskip("torch", reason="torch is the reference here")
pytestmark = pytest.mark.torch

KL, VQ = schema.AutoencoderKLConfig, schema.AutoencoderVQConfig
EXPECTED = {  # kind: (their pipeline, our conditioning, our first stage)
    "v1": ("StableDiffusionPipeline", schema.TextCondConfig, KL),
    "v": ("StableDiffusionPipeline", schema.TextCondConfig, KL),
    "inpaint": ("StableDiffusionInpaintPipeline", schema.InpaintCondConfig, KL),
    "depth": ("StableDiffusionDepth2ImgPipeline", schema.DepthCondConfig, KL),
    "upscale": ("StableDiffusionUpscalePipeline", schema.UpscaleCondConfig, KL),
    "bert": ("LDMTextToImagePipeline", schema.TextCondConfig, KL),
    "uncond": ("LDMPipeline", type(None), VQ),
    "superres": ("LDMSuperResolutionPipeline", schema.SuperResCondConfig, VQ),
    "pixels": ("DDIMPipeline", type(None), schema.IdentityFirstStageConfig),
}


def plain_unet(in_channels):
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8, in_channels=in_channels, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def quantized():
    from diffusers import VQModel

    return VQModel(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=20, vq_embed_dim=3,
        sample_size=16, scaling_factor=1.0,
    )  # fmt: skip


def save_theirs(kind, folder):
    """A pipeline of this kind with random weights, saved by diffusers."""
    import diffusers as theirs

    if kind in ("v1", "v", "inpaint"):
        return pipelines.stable_diffusion(folder, kind)
    if kind == "bert":
        return pipelines.latent_diffusion(folder)
    torch.manual_seed(0)
    scheduler = theirs.DDIMScheduler(**pipelines.SD_SCHEDULER)
    if kind in ("uncond", "superres", "pixels"):
        parts = {"unet": plain_unet(6 if kind == "superres" else 3), "scheduler": scheduler}
        parts |= {} if kind == "pixels" else {"vqvae": quantized()}
    else:
        tokenizer = pipelines.clip_tokenizer(folder.parent / f"{folder.name}_tokenizer")
        parts = {
            "vae": pipelines.autoencoder(levels=3 if kind == "upscale" else 2),
            "text_encoder": pipelines.clip_text(tokenizer),
            "tokenizer": tokenizer,
            "scheduler": scheduler,
        }
    if kind == "depth":
        parts |= {"unet": pipelines.unet(5), "depth_estimator": None, "feature_extractor": None}
    elif kind == "upscale":
        parts["unet"] = pipelines.unet(7, num_class_embeds=400)
        parts["vae"].register_to_config(scaling_factor=0.08333)
        parts["low_res_scheduler"] = theirs.DDPMScheduler(beta_schedule="scaled_linear")
        parts["max_noise_level"] = 340
    made = getattr(theirs, EXPECTED[kind][0])(**parts)
    made.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """kind -> folder that diffusers wrote."""

    @functools.cache
    def folder(kind):
        save_theirs(kind, folder := tmp_path_factory.mktemp(kind) / "theirs")
        return folder

    return folder


@pytest.fixture(scope="module")
def loaded(saved):
    return functools.cache(lambda kind: diffusers.load(saved(kind)))


@pytest.fixture(scope="module")
def written(loaded, tmp_path_factory):
    """kind -> folder that we wrote."""

    @functools.cache
    def folder(kind):
        diffusers.save(loaded(kind), folder := tmp_path_factory.mktemp(kind) / "ours")
        return folder

    return folder


def tensors(folder):
    """{component/name: array} of every component; text encoders without the outer scope."""
    found = {}
    for path in pathlib.Path(folder).glob("*/*.safetensors"):
        for name, x in files.open_state_dict(path)[0].items():
            found[f"{path.parent.name}/{name.removeprefix('text_model.')}"] = np.asarray(x)
    return found


@pytest.mark.parametrize("kind", EXPECTED)
def test_folder_says_what_the_model_is(kind, loaded):
    model = loaded(kind)
    _, cond, first_stage = EXPECTED[kind]
    beside = getattr(model.config.cond, "concat", model.config.cond)
    assert (type(beside), type(model.config.first_stage)) == (cond, first_stage)
    scales = {"upscale": 0.08333, "uncond": 1.0, "superres": 1.0, "pixels": 1.0}
    assert model.latent_scale == scales.get(kind, 0.18215)
    assert model.config.size == 8 * model.config.first_stage.downsample
    assert model.prediction == ("v" if kind == "v" else "eps")
    text = schema.text_of(model.config.cond)
    assert (model.tokenizer is None) == (text is None)
    offset, final = (0, "one") if kind == "bert" else (1, "alphas_cumprod_0")
    spacing = "trailing" if kind == "v" else "leading"
    assert model.config.sampling == schema.SamplingConfig(spacing, offset, final, "diffusers")
    if kind == "inpaint":
        assert (beside.order, beside.mask_range, beside.fill) == ("mask_image", (0.0, 1.0), 0.0)
    if kind == "upscale":
        assert (beside.factor, beside.max_noise_level, beside.beta_end) == (4, 340, 0.02)


@pytest.mark.parametrize("kind", EXPECTED)
def test_diffusers_loads_what_we_write(kind, saved, loaded, written, tmp_path, caplog):
    import diffusers as theirs
    import transformers

    name, folder = EXPECTED[kind][0], written(kind)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == name
    given = {"depth_estimator": None, "feature_extractor": None} if kind == "depth" else {}
    loggers = [theirs.utils.logging.get_logger(), transformers.utils.logging.get_logger()]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    caplog.clear()  # what was said while the fixtures wrote the folder
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made = getattr(theirs, name).from_pretrained(folder, **given)
    finally:
        for logger in loggers:
            logger.removeHandler(caplog.handler)
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert [line for line in said if "accelerate" not in line and "torchvision" not in line] == []
    before, after = tensors(saved(kind)), tensors(folder)
    assert before.keys() == after.keys()
    for key, x in before.items():
        np.testing.assert_array_equal(x, after[key], err_msg=key)
    made.save_pretrained(tmp_path / "again")
    again = tensors(tmp_path / "again")
    assert again.keys() == before.keys()
    assert all(np.array_equal(x, again[key]) for key, x in before.items())
    if made.components.get("tokenizer"):
        texts = ["a red disc", "blue squares " * 20]
        length = made.tokenizer.model_max_length
        ids = made.tokenizer(texts, padding="max_length", truncation=True, max_length=length)
        np.testing.assert_array_equal(loaded(kind).tokenizer.encode(texts), ids["input_ids"])


@pytest.mark.parametrize("kind", EXPECTED)
def test_options_come_back(kind, saved, written):
    for path in sorted(saved(kind).glob("*/*.json")):
        if path.name not in ("config.json", "scheduler_config.json"):
            continue
        ours = json.loads((written(kind) / path.relative_to(saved(kind))).read_text())
        for key, value in json.loads(path.read_text()).items():
            if key in ours and not key.startswith("_") and "token_id" not in key:
                assert ours[key] == value or {ours[key], value} == {None, False}, (path, key)


@pytest.mark.parametrize("kind", ["v", "upscale"])
def test_the_model_comes_back(kind, loaded, written):
    again = diffusers.load(written(kind))
    assert again.config == loaded(kind).config
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded(kind).params)


def test_half_precision_and_back(loaded, tmp_path):
    diffusers.save(loaded("uncond"), tmp_path / "half", dtype=np.float16)
    half = tensors(tmp_path / "half")
    assert {x.dtype for x in half.values()} == {np.dtype(np.float16)}
    diffusers.save(diffusers.load(tmp_path / "half"), tmp_path / "again", dtype=np.float16)
    again = tensors(tmp_path / "again")
    assert all(np.array_equal(x, again[key]) for key, x in half.items())


def test_penultimate_layer_is_the_last_of_a_shorter_encoder(loaded, tmp_path):
    model = loaded("v1")
    encoder = schema.CLIPTextConfig(
        **{**vars(model.config.cond.encoder), "layer": "penultimate", "activation": "gelu"}
    )
    config = schema.LatentDiffusionConfig(
        **{**vars(model.config), "cond": schema.TextCondConfig(encoder=encoder, trainable=False)}
    )
    model = bundle.LatentDiffusion(
        **{**vars(bundle.build(config, model.params, 0.18215)), "tokenizer": model.tokenizer}
    )
    diffusers.save(model, tmp_path / "short")
    short = diffusers.load(tmp_path / "short")
    assert (short.config.cond.encoder.num_layers, short.config.cond.encoder.layer) == (1, "last")
    ids = model.tokenizer.encode(["a red square"])
    found = [
        jax.jit(m.cond_stage.apply)({"params": m.params["cond_stage"]}, ids) for m in (model, short)
    ]
    assert max_difference(*found) == 0


def test_a_mesh_places_the_parameters(saved):
    from ldm_jax import sharding

    mesh = sharding.make_mesh(schema.MeshConfig(data=1, fsdp=2, tensor=2))
    model = diffusers.load(saved("v1"), mesh=mesh)
    kernel = model.params["unet"]["mid_block"]["resnets_0"]["conv1"]["kernel"]
    assert len(kernel.sharding.device_set) == 4
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {np.dtype(np.float32)}


# --- what is refused -----------------------------------------------------------------------------


def changed_index(saved, tmp_path, kind="uncond", **entries):
    """A copy of a folder with other entries in its index; weights are links."""
    folder = tmp_path / "changed"
    for path in saved(kind).rglob("*"):
        target = folder / path.relative_to(saved(kind))
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.name != "model_index.json":
            target.symlink_to(path)
    index = json.loads((saved(kind) / "model_index.json").read_text()) | entries
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ({"../secret": ["diffusers", "UNet2DModel"]}, r"not supported: \.\./secret="),
        ({"text_encoder_2": ["transformers", "CLIPTextModel"]}, "not supported: text_encoder_2="),
        ({"unet": [None, None]}, "needs the components unet and scheduler"),
    ],
)
def test_components_we_do_not_know(saved, tmp_path, entries, complaint):
    folder = changed_index(saved, tmp_path, **entries)
    with pytest.raises(ValueError, match=complaint) as error:
        diffusers.load(folder)
    assert "model_index.json: LDMPipeline" in str(error.value)


def test_a_conditioning_we_do_not_know(saved, tmp_path):
    folder = changed_index(saved, tmp_path, "v1", text_encoder=[None, None])
    with pytest.raises(ValueError, match=r"cross_attention_dim=32.* without text encoder"):
        diffusers.load(folder)


def test_a_variant_that_no_component_has(saved):
    with pytest.raises(FileNotFoundError, match="variant=fp16 in unet, vqvae"):
        diffusers.load(saved("uncond"), variant="fp16")
    with pytest.raises(ValueError, match=r"variant='\.\./x' is no part"):
        diffusers.load(saved("uncond"), variant="../x")


def test_nothing_is_overwritten(loaded, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another name"):
        diffusers.save(loaded("uncond"), tmp_path)


@pytest.mark.parametrize(
    ("kind", "changed", "complaint"),
    [
        ("v1", {"tokenizer": None}, "the model has none: give one"),
        ("superres", {"latent_scale": 2.0}, "latent_scale=2.0"),
        ("upscale", {"latent_scale": 0.2}, "latent_scale=0.2"),
        ("inpaint", {"cond": schema.InpaintCondConfig()}, "masked image on a KL first stage"),
        ("v1", {"cond": schema.ClassCondConfig()}, "class label on a KL first stage"),
    ],
)
def test_what_no_pipeline_has(kind, changed, complaint, loaded, tmp_path):
    fields = vars(loaded(kind))
    if "cond" in changed:
        config = schema.LatentDiffusionConfig(**{**vars(fields["config"]), **changed})
        changed = {"config": config}
    model = bundle.LatentDiffusion(**{**fields, **changed})
    with pytest.raises(ValueError, match=complaint):
        diffusers.save(model, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
