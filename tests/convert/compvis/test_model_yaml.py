"""The YAML of whole models: what published files say, and what we write back."""

import copy
import dataclasses
import itertools
import os

import jax
import numpy as np
import pytest
import yaml
from compvis_options import SD2, UPSCALER
from families import FAMILIES, FIRST_STAGE, UNET
from reference import released

from ldm_jax import bundle, schema
from ldm_jax.convert import compvis, table
from ldm_jax.convert.compvis import checkpoints, conditions, model_yaml
from ldm_jax.convert.formats import files, torch_writer
from ldm_jax.models import unet
from ldm_jax.runtime.log import LOG

CLIP = schema.TextCondConfig(schema.CLIPTextConfig(), trainable=False)
RETRIEVAL = schema.EmbeddingCondConfig()
# config: (conditioning, side of an image, scale or None for "in the checkpoint")
PUBLISHED = {
    "sd__configs__stable-diffusion__v1-inference": (CLIP, 512, 0.18215),
    "configs__latent-diffusion__txt2img-1p4B-eval": (schema.TextCondConfig(), 256, 0.18215),
    "configs__latent-diffusion__cin256-v2": (schema.ClassCondConfig(), 256, 1.0),
    "configs__retrieval-augmented-diffusion__768x768": (RETRIEVAL, 768, 0.22765929),
    "ldm__cin256": (schema.ClassCondConfig(dropout=0.0, null_class=False), 256, 1.0),
    "ldm__bsr_sr": (schema.SuperResCondConfig(), 256, 1.0),
    "ldm__celeba256": (None, 256, 1.0),
    "ldm__inpainting_big": (schema.InpaintCondConfig(), 256, 1.0),
    "ldm__layout2img-openimages256": (schema.LayoutCondConfig(), 256, 1.0),
    "ldm__lsun_churches256": (None, 256, None),
    "ldm__semantic_synthesis512": (schema.SemanticCondConfig(), 512, 1.0),
    "ldm__text2img256": (schema.TextCondConfig(schema.BERTTextConfig(width=640)), 256, 1.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    config, scale, guesses = model_yaml.model_config(released()[name][0], {})
    bundle.check(config)
    assert (config.cond, config.size, scale) == PUBLISHED[name]
    assert guesses == ()
    assert config.diffusion.schedule == "scaled_linear"
    assert config.diffusion.prediction == "eps"


def test_published_schedules():
    config, _, _ = model_yaml.model_config(released()["ldm__lsun_churches256"][0], {})
    assert config.diffusion == schema.DiffusionConfig(beta_start=0.0015, beta_end=0.0155, loss="l1")


def there_and_back(config, scale, tmp_path):
    (tmp_path / "model.yaml").write_text(model_yaml.dumps(config, scale))
    return model_yaml.read(tmp_path / "model.yaml")


PLAIN = {"spatial_transformer": False, "context_dim": None}
CONDS = {
    "none": (None, PLAIN),
    "class": (schema.ClassCondConfig(10, 64), {}),
    "class without null": (schema.ClassCondConfig(1000, 64, dropout=0.0, null_class=False), {}),
    "label": (schema.ClassCondConfig(10, via="label"), PLAIN | {"num_classes": 11}),
    "inpaint": (schema.InpaintCondConfig(), PLAIN | {"in_channels": 9}),
    "superres": (schema.SuperResCondConfig(2), PLAIN | {"in_channels": 7}),
    "semantic": (schema.SemanticCondConfig(5, stages=1), PLAIN | {"in_channels": 7}),
    "layout": (schema.LayoutCondConfig(schema.BERTTextConfig(50, 7, 64, 2)), {}),
    "embedding": (schema.EmbeddingCondConfig(64), {}),
}
CONFIGS = FAMILIES | {
    name: schema.LatentDiffusionConfig(
        FIRST_STAGE, dataclasses.replace(UNET, **unet), cond, size=32
    )
    for name, (cond, unet) in CONDS.items()
}


SNR = {"zero_terminal_snr": True}
OBJECTIVES = {
    "1 v snr": ("Stable Diffusion 1", {"prediction": "v", **SNR}),
    "2 eps": ("Stable Diffusion 2", {"prediction": "eps"}),
    "2 v snr": ("Stable Diffusion 2", {"prediction": "v", **SNR}),
    "x0 snr": ("none", {"prediction": "x0", **SNR}),
}
CONFIGS |= {
    name: dataclasses.replace(
        CONFIGS[kind], diffusion=dataclasses.replace(CONFIGS[kind].diffusion, **diffusion)
    )
    for name, (kind, diffusion) in OBJECTIVES.items()
}


@pytest.mark.parametrize("name", CONFIGS)
def test_written_and_read_back(name, tmp_path):
    config = CONFIGS[name]
    bundle.check(config)
    values = there_and_back(config, 0.25, tmp_path)
    assert model_yaml.config_of(values) == (config, 0.25, ())


@pytest.mark.parametrize("name", sorted({*CONDS, "Stable Diffusion 1"} - {"label"}))
def test_the_section_of_the_reference_says_the_same(name, tmp_path):
    """Without ours; but for what it has no word for."""
    config = CONFIGS[name]
    values = there_and_back(config, 0.25, tmp_path)
    read, scale, _ = model_yaml.config_of({"model": values["model"]})
    assert scale == 0.25
    assert (read.unet, read.first_stage, read.size) == (config.unet, FIRST_STAGE, config.size)
    assert read.diffusion == config.diffusion
    if name == "class":  # 11 rows, of which nobody says that the last is the null class
        assert read.cond == schema.ClassCondConfig(11, 64, dropout=0.0, null_class=False)
    elif "Stable" in name:  # sizes of CLIP are those of its weights
        assert type(read.cond) is type(config.cond)
    else:
        assert read.cond == config.cond


@pytest.mark.parametrize(
    ("name", "ending"), list(zip([*CONDS, *OBJECTIVES], itertools.cycle(("ckpt", "safetensors"))))
)
def test_every_kind_of_our_files_comes_back(name, ending, tmp_path, caplog):
    """Also alone: heads, objective and size are not in the names and shapes of tensors."""
    caplog.set_level("INFO", logger=LOG.name)
    path = tmp_path / f"own.{ending}"
    small = {"channel_mult": (1,), "attention_downsample": (1,)}
    config = CONFIGS[name]
    config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, **small))
    model = bundle.build(config, {}, 0.25)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float16), compvis.model_shapes(model))
    compvis.save(dataclasses.replace(model, params=params), path)
    again = compvis.load(path, shapes_only=True)  # by its own YAML: see the test of those
    assert (again.config, again.latent_scale) == (config, 0.25)
    assert f"own.{ending}: the model that the file says, as ldm_jax wrote it" in caplog.messages
    if name in ("1 v snr", "2 v snr"):
        assert {"v_pred", "ztsnr"} <= files.open_state_dict(path)[0].keys()


@pytest.mark.parametrize("name", ["Stable Diffusion 1", "Stable Diffusion 2"])
def test_files_of_others_are_guessed_aloud(name, tmp_path, caplog):
    caplog.set_level("INFO", logger=LOG.name)
    model = bundle.build(CONFIGS[name], {}, 1.0)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float16), compvis.model_shapes(model))
    tensors = table.to_torch(compvis.model_entries(model), params)
    torch_writer.write(tmp_path / "x.ckpt", tensors)
    assert compvis.load(tmp_path / "x.ckpt", shapes_only=True).config == model.config
    (said,) = [line for line in caplog.messages if "predicts" in line]
    assert said.startswith("x.ckpt: a guess: it predicts")
    assert "--variant v" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 1000, "nested deeper than 100 levels"),
        ("[1]", "damaged .TypeError"),
        (
            '{"format": 1, "config": {"class": "UNetConfig"}, "scale": 1}',
            "has no config of a model",
        ),
        ("x" * 2**18, "is longer than"),
    ],
)
def test_what_a_file_says_of_itself_is_looked_at(text, message, tmp_path):
    path = tmp_path / "x.ckpt"
    torch_writer.write_object(path, {"state_dict": {"a": np.zeros(1)}, "ldm_jax": text})
    with pytest.raises(ValueError, match=f"^{path}: .*{message}.*; give its YAML"):
        compvis.load(path)


def test_an_edited_section_holds_over_ours(tmp_path):
    config = CONFIGS["inpaint"]
    values = there_and_back(config, 1.0, tmp_path)
    values["model"]["params"]["loss_type"] = "l1"
    read, _, _ = model_yaml.config_of(values)
    assert read.diffusion.loss == "l1"


def test_numbers_as_omegaconf_reads_them(tmp_path):
    text = model_yaml.dumps(CONFIGS["none"], 1.0)
    assert text.count("linear_start: 0.00085") == 1
    text = text.replace("linear_start: 0.00085", "linear_start: 1e-3")
    (tmp_path / "model.yaml").write_text(text)
    read, _, _ = model_yaml.config_of(model_yaml.read(tmp_path / "model.yaml"))
    assert read.diffusion.beta_start == 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not YAML"),
        ("- 1", "has no `model` section"),
        ("model: {target: x}", "has no `model` section"),
        ("model: {target: !!python/object/apply:os.getcwd [], params: {}}", "is not YAML"),
    ],
)
def test_files_that_are_no_model_yaml(tmp_path, text, message):
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"model\.yaml: {message}"):
        model_yaml.read(tmp_path / "model.yaml")


def edited(name, **params):
    section = model_yaml.model_options(CONFIGS[name], 1.0)
    return {"target": section["target"], "params": section["params"] | params}


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("none", {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule='squaredcos_cap_v2'"),
        ("none", {"num_timesteps_cond": 2}, "not supported: num_timesteps_cond=2"),
        ("inpaint", {"conditioning_key": "crossattn"}, "key='crossattn' with cond_stage_config"),
        ("class", {"conditioning_key": "concat"}, "key='concat' with cond_stage_config"),
        ("layout", {"conditioning_key": "hybrid"}, "conditioning_key='hybrid' with"),
        ("Stable Diffusion 1", {"conditioning_key": "hybrid"}, "'hybrid' of LatentDiffusion is"),
        ("class", {"cond_stage_config": {"target": "a.FrozenT5"}}, "FrozenT5 is not supported"),
    ],
)
def test_options_that_cannot_be_kept_are_refused(name, params, message):
    with pytest.raises(ValueError, match=message):
        model_yaml.model_config(edited(name, **params), {})


def text(encoder):
    return {"cond": schema.TextCondConfig(encoder)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cond": schema.InpaintCondConfig(fill=0.5)}, "has no option in a CompVis YAML, only"),
        ({"cond": schema.DepthCondConfig()}, "a depth map alone has no option"),
        (text(schema.CLIPTextConfig(layer="penultimate")), "'penultimate' of a CLIP with quick"),
        (text(schema.BERTTextConfig(num_heads=2)), "has 8 heads of width 64, this encoder 2 of 64"),
    ],
)
def test_models_that_have_no_yaml_are_refused(change, message):
    config = dataclasses.replace(CONFIGS["none"], **change)
    with pytest.raises(ValueError, match=message):
        model_yaml.model_options(config, 1.0)


@pytest.mark.parametrize(
    ("options", "classes", "null"),
    [
        ({}, 1000, False),
        ({"n_classes": 1001}, 1000, True),
        ({"n_classes": 11}, 11, False),
        ({"n_classes": 11, "ucg_rate": 0.2}, 10, True),
    ],
)
def test_rows_of_a_class_embedder(options, classes, null):
    cond = conditions.cond_stage_config("ClassEmbedder", {"embed_dim": 8, **options}, {})
    assert (cond.num_classes, cond.null_class) == (classes, null)
    assert (cond.dropout > 0) == null


def test_a_guess_about_classes_is_told():
    section = edited("class")
    _, _, guesses = model_yaml.model_config(section, {})
    assert guesses == ("11 classes, null class: False",)


def test_safe_dump_gives_what_plain_yaml_reads():
    text = model_yaml.dumps(CONFIGS["semantic"], 0.18215)
    assert yaml.safe_load(text)["model"]["params"]["scale_factor"] == 0.18215


# --- Stable Diffusion 2, and inpainting of 1: options as their published files write them ---------

MIDAS = {"target": "ldm.modules.midas.api.MiDaSInference", "params": {"model_type": "dpt_hybrid"}}
LOW_SCALE = {
    "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
    "params": {
        "noise_schedule_config": {"linear_start": 0.0001, "linear_end": 0.02},
        "max_noise_level": 350,
    },
}


def stability(kind, unet, ch_mult=(1, 2, 4, 4), **params):
    ddconfig = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3}
    ddconfig |= {"out_ch": 3, "ch": 128, "ch_mult": list(ch_mult), "num_res_blocks": 2}
    ddconfig |= {"attn_resolutions": [], "dropout": 0.0}
    encoder = {"freeze": True, "layer": "penultimate"}
    options = {
        **{"linear_start": 0.00085, "linear_end": 0.012, "num_timesteps_cond": 1},
        **{"log_every_t": 200, "timesteps": 1000, "first_stage_key": "jpg", "use_ema": False},
        **{"cond_stage_key": "txt", "image_size": 64, "channels": 4},
        **{"cond_stage_trainable": False, "conditioning_key": "hybrid", "scale_factor": 0.18215},
        "unet_config": {"target": "openaimodel.UNetModel", "params": unet},
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": 4,
                "monitor": "val/rec_loss",
                "ddconfig": ddconfig,
                "lossconfig": {"target": "torch.nn.Identity"},
            },
        },
        "cond_stage_config": {"target": "modules.FrozenOpenCLIPEmbedder", "params": encoder},
    }
    return {"target": f"ldm.models.diffusion.ddpm.{kind}", "params": options | params}


SECOND = {
    "v2": (stability("LatentDiffusion", SD2, conditioning_key="crossattn"),
           (None, "eps", 0.18215, 512, 865.91)),
    "v2-v": (stability("LatentDiffusion", SD2, conditioning_key="crossattn", parameterization="v"),
             (None, "v", 0.18215, 512, 865.91)),
    "inpainting": (
        stability("LatentInpaintDiffusion", SD2 | {"in_channels": 9}, finetune_keys=None),
        (conditions.SD_INPAINT, "eps", 0.18215, 512, 865.93),
    ),
    "depth": (
        stability("LatentDepth2ImageDiffusion", SD2 | {"in_channels": 5}, depth_stage_config=MIDAS),
        (schema.DepthCondConfig(), "eps", 0.18215, 512, 865.91),
    ),
    "upscaler": (
        stability(
            "LatentUpscaleDiffusion", UPSCALER, (1, 2, 4), conditioning_key="hybrid-adm",
            parameterization="v", low_scale_config=LOW_SCALE, low_scale_key="lr",
            scale_factor=0.08333, image_size=128, linear_start=0.0001, linear_end=0.02,
        ),
        (schema.UpscaleCondConfig(), "v", 0.08333, 512, 473.40),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SECOND)
def test_published_models_of_stability(name):
    section, (beside, prediction, scale, size, millions) = SECOND[name]
    config, found, guesses = model_yaml.model_config(section, {})
    bundle.check(config)
    vit_h = schema.CLIPTextConfig(49408, 77, 1024, 24, 16, 4096, "gelu", "penultimate")
    text = schema.TextCondConfig(vit_h, trainable=False)
    assert config.cond == (text if beside is None else schema.HybridCondConfig(text, beside))
    assert (config.diffusion.prediction, found, config.size) == (prediction, scale, size)
    assert guesses == ()
    assert config.unet.linear_projection
    assert config.unet.upcast_attention
    net = unet.from_config(config.unet)
    shapes = jax.eval_shape(net.init, jax.random.key(0), *unet.example_inputs(net))["params"]
    if name in ("v2", "upscaler"):
        tensors = compvis.unet_state_dict(net, shapes)
        assert tensors["input_blocks.4.1.proj_in.weight"].ndim == 2
        assert compvis.load_unet(section["params"]["unet_config"]["params"], tensors)[1] == shapes
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert round(count / 1e6, 2) == millions
    again = model_yaml.model_config(model_yaml.model_options(config, scale), {})
    assert again == (config, scale, ())


# --- small files that ask for much ----------------------------------------------------------------

HEAD = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params: {}\n"


def doubling(line, levels=40):
    """`a0` is a value, and each `a1`, `a2`, ... is made of the one before, twice."""
    lines = ["a0: &a0 {k: v}", *(line.format(n, n - 1) for n in range(1, levels))]
    return HEAD + "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (doubling("a{0}: &a{0} [*a{1}, *a{1}]"), "its aliases stand for more than 20000 values"),
        (doubling("a{0}: &a{0} {{<<: [*a{1}, *a{1}]}}"), "its aliases stand for more than"),
        (doubling("a{0}: &a{0} {{? [*a{1}, *a{1}] : x}}"), "its aliases stand for more than"),
        (HEAD + "a: &a [*a]\n", "is nested deeper than any config, or holds itself"),
        (HEAD + "a: " + "[" * 5000, "is nested deeper than any config"),
        (HEAD + "a: " + "x" * 2**17, "is no config of a model: longer than 131072 characters"),
    ],
)
def test_small_files_that_ask_for_much(tmp_path, text, message):
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"model\.yaml: {message}"):
        model_yaml.read(path)


def test_aliases_of_a_config_are_read(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(HEAD + "a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n")
    values = model_yaml.read(path)
    assert (values["b"], values["c"]) == ({"x": 1}, {"x": 1, "y": 2})


def test_what_is_no_file_is_no_yaml(tmp_path):
    os.mkfifo(tmp_path / "model.yaml")
    for path in (tmp_path / "model.yaml", "/dev/zero"):
        with pytest.raises(ValueError, match=f"{path}: is no regular file"):
            model_yaml.read(path)


@pytest.mark.parametrize(
    ("part", "option", "value", "message"),
    [
        ("unet_config", "num_res_blocks", 10**7, "has 80000008 blocks in all, 1024 are the most"),
        ("unet_config", "num_res_blocks", -1, "num_res_blocks is -1: give 0 to"),
        ("unet_config", "num_res_blocks", "two", "num_res_blocks: 'two' is not a int"),
        ("unet_config", "transformer_depth", 10**9, "transformer_depth is 1000000000: give 0 to"),
        ("unet_config", "channel_mult", [1] * 10**4, "channel_mult has 10000 levels, 16 are"),
        ("unet_config", "model_channels", 10**30, "model_channels is a number of 100 bits"),
        ("first_stage_config", "num_res_blocks", 10**7, "first_stage has .* blocks in all"),
        ("first_stage_config", "ch_mult", 3, "'int' object is not iterable"),
    ],
)
def test_sizes_that_no_model_has(tmp_path, part, option, value, message):
    """Before, ten million blocks were built, one after another."""
    model = copy.deepcopy(released()["sd__configs__stable-diffusion__v1-inference"][0])
    params = model["params"][part]["params"]
    (params["ddconfig"] if part == "first_stage_config" else params)[option] = value
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump({"model": model}))
    with pytest.raises(ValueError, match=rf"model\.yaml: .*{message}"):
        checkpoints._config(tmp_path / "model.ckpt", path, None, {}, None, None)


@pytest.mark.parametrize("config", [
    schema.UNetConfig(num_res_blocks=10**7), schema.UNetConfig(transformer_depth=10**4),
])  # fmt: skip
def test_no_module_is_made_of_such_sizes(config):
    """Whatever file they come from: also config.json of a run, or a diffusers folder."""
    with pytest.raises(ValueError, match=r"^unet has \d+ blocks in all"):
        unet.from_config(config)
