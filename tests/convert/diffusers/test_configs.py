"""Options of diffusers mean what they say, back and forth; what we cannot build is named."""

import dataclasses

import numpy as np
import pytest

from ldm_jax import diffusion, schema
from ldm_jax.convert.diffusers import part_configs, scheduler_config, tables, unet_config

SD2 = schema.UNetConfig(
    num_heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True, upcast_attention=True
)
UPSCALER = schema.UNetConfig(
    in_channels=7, model_channels=256, channel_mult=(1, 2, 2, 4), attention_downsample=(8, 4, 2),
    context_dim=1024, only_cross_attention=(True, True, True, False), linear_projection=True,
    num_classes=1000,
)  # fmt: skip
CELEBA = schema.UNetConfig(
    in_channels=3, out_channels=3, model_channels=224, channel_mult=(1, 2, 3, 4),
    attention_downsample=(8, 4, 2), num_heads=None, num_head_channels=32, spatial_transformer=False,
    context_dim=None,
)  # fmt: skip
UNETS = {
    "sd1": schema.UNetConfig(), "sd2": SD2, "depth": dataclasses.replace(SD2, in_channels=5),
    "inpaint": schema.UNetConfig(in_channels=9), "upscaler": UPSCALER,
    "vector": schema.UNetConfig(vector_dim=24, scale_shift_norm=True, dropout=0.1),
    "celeba": CELEBA,
    "resnet": dataclasses.replace(CELEBA, scale_shift_norm=True, resblock_updown=True),
    "one head": dataclasses.replace(CELEBA, num_heads=1, num_head_channels=None),
}  # fmt: skip
FIRST_STAGES = {
    "kl-f8": schema.AutoencoderKLConfig(),
    "kl-f16": schema.AutoencoderKLConfig(
        channel_mult=(1, 1, 2, 2, 4), attention_downsample=(16,), z_channels=16, embed_dim=16
    ),
    "vq-f4-noattn": schema.AutoencoderVQConfig(mid_attention=False),
    "vq-f8": schema.AutoencoderVQConfig(
        channel_mult=(1, 2, 2, 4), attention_downsample=(8,), z_channels=4, embed_dim=2,
        num_codes=16384,
    ),
}  # fmt: skip


def unet_options(**changed):
    return {**unet_config.unet_options(schema.UNetConfig(), 64), **changed}


def plain_unet_options(**changed):
    return {**unet_config.unet_options(CELEBA, 64), **changed}


def kl_options(**changed):
    return {**part_configs.first_stage_options(FIRST_STAGES["kl-f8"], 1.0, 256), **changed}


def vq_options(**changed):
    return {**part_configs.first_stage_options(FIRST_STAGES["vq-f8"], 1.0, 256), **changed}


@pytest.mark.parametrize("name", UNETS)
def test_unet_goes_there_and_back(name):
    config = UNETS[name]
    assert unet_config.unet_config(unet_config.unet_options(config, 64), "x") == config


def test_one_number_of_heads_stands_for_all_levels():
    assert unet_options()["attention_head_dim"] == 8
    assert unet_config.unet_options(SD2, 64)["attention_head_dim"] == [5, 10, 20, 20]


def test_heads_by_their_width_become_heads_by_level():
    config = dataclasses.replace(SD2, num_heads=None, num_head_channels=64)
    assert unet_config.unet_config(unet_config.unet_options(config, 64), "x") == SD2


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_first_stage_goes_there_and_back(name):
    options = part_configs.first_stage_options(FIRST_STAGES[name], 0.25, 256)
    assert part_configs.first_stage_config(options, "x") == (FIRST_STAGES[name], 0.25)


@pytest.mark.parametrize(
    "config", [schema.CLIPTextConfig(), schema.BERTTextConfig()], ids=["clip", "bert"]
)
def test_text_encoder_goes_there_and_back(config):
    assert part_configs.text_config(part_configs.text_options(config), "x") == config


def test_what_a_file_leaves_out_is_the_default_of_its_class():
    options = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768, "sample_size": 64}
    assert unet_config.unet_config(options, "x") == schema.UNetConfig()
    options = {"_class_name": "FlaxAutoencoderKL", "block_out_channels": [128]}
    found, scale = part_configs.first_stage_config(options, "x")
    assert (found.num_res_blocks, found.embed_dim, scale) == (1, 4, 0.18215)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (unet_options(_class_name="UNet3DConditionModel"), "_class_name UNet3DConditionModel"),
        (unet_options(addition_embed_type="text_time"), "addition_embed_type='text_time'"),
        (unet_options(time_cond_proj_dim=256), "time_cond_proj_dim=256"),
        (unet_options(layers_per_block=10**9), "layers_per_block=1000000000"),
        (unet_options(in_channels=-4), "in_channels=-4"),
        (unet_options(in_channels="4"), "in_channels='4'"),
        (unet_options(in_channels=None), "in_channels=None"),
        (unet_options(in_channels=[4]), "in_channels=[4]"),
        (unet_options(transformer_layers_per_block=[[1]]), "transformer_layers_per_block=[[1]]"),
        (unet_options(layers_per_block=[]), "layers_per_block=[]"),
        (unet_options(block_out_channels=[]), "block_out_channels=[]"),
        (unet_options(block_out_channels=[0, 0, 0, 0]), "block_out_channels=[0, 0, 0, 0]"),
        (unet_options(block_out_channels=[320] * 99), "block_out_channels=[320, 320"),
        (unet_options(down_block_types="DownBlock2D"), "down_block_types='DownBlock2D'"),
        (unet_options(norm_num_groups=16), "norm_num_groups=16"),
        (unet_options(norm_eps=1e-6), "norm_eps=1e-06"),
        (unet_options(act_fn="gelu"), "act_fn='gelu'"),
        (unet_options(class_embed_type="timestep"), "class_embed_type='timestep'"),
        (unet_options(mid_block_type="UNetMidBlock2D"), "mid_block_type='UNetMidBlock2D'"),
        (unet_options(new_option="x"), "new_option='x'"),
        (unet_options(layers_per_block=[1, 2, 2, 2]), "[1, 2, 2, 2]: one value"),
        (unet_options(cross_attention_dim=[8, 8, 8, 16]), "[8, 8, 8, 16]: one value"),
        (unet_options(block_out_channels=[320, 480, 640, 640]), "[320, 480, 640, 640]"),
        (unet_options(up_block_types=["CrossAttnUpBlock2D"] * 4), "do not attend at the same"),
        (unet_options(down_block_types=["SimpleCrossAttnDownBlock2D"] * 4), "SimpleCrossAttn"),
        (unet_options(resnet_time_scale_shift="spatial"), "resnet_time_scale_shift='spatial'"),
        (plain_unet_options(freq_shift=1), "freq_shift=1"),
        (plain_unet_options(downsample_padding=0), "downsample_padding=0"),
        (plain_unet_options(upsample_type="resnet"), "upsample_type='resnet'"),
        (plain_unet_options(resnet_time_scale_shift="scale_shift"), "attn_norm_num_groups=None"),
        (plain_unet_options(attn_norm_num_groups=8), "attn_norm_num_groups=8"),
        (plain_unet_options(add_attention=False), "add_attention=False"),
    ],
)
def test_a_unet_we_cannot_build_is_refused(options, complaint):
    with pytest.raises(ValueError, match=r"unet/config\.json") as error:
        unet_config.unet_config(options, "unet/config.json")
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (kl_options(_class_name="AutoencoderTiny"), "_class_name AutoencoderTiny"),
        (kl_options(scaling_factor=0), "scaling_factor 0 is not a finite number other than 0"),
        (kl_options(scaling_factor=float("nan")), "scaling_factor=nan"),
        (kl_options(shift_factor=0.1), "shift_factor=0.1"),
        (kl_options(use_quant_conv=False), "use_quant_conv=False"),
        (kl_options(latents_mean=[0.0]), "latents_mean=[0.0]"),
        (kl_options(down_block_types=["DownBlock2D"] * 4), "DownEncoderBlock2D"),
        (kl_options(up_block_types=["UpDecoderBlock2D"]), "each of the 4"),
        (vq_options(norm_type="spatial"), "norm_type='spatial'"),
        (vq_options(lookup_from_codebook=True), "lookup_from_codebook=True"),
    ],
)
def test_a_first_stage_we_cannot_build_is_refused(options, complaint):
    with pytest.raises(ValueError, match=r"vae/config\.json") as error:
        part_configs.first_stage_config(options, "vae/config.json")
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"model_type": "t5"}, "model_type='t5'"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"use_attention_mask": True}, "use_attention_mask=True"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps=1e-06"),
    ],
)
def test_a_text_encoder_we_cannot_build_is_refused(changed, complaint):
    options = part_configs.text_options(schema.CLIPTextConfig()) | changed
    with pytest.raises(ValueError, match=r"te/config\.json") as error:
        part_configs.text_config(options, "te/config.json")
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (schema.UNetConfig(channel_mult=(2, 4)), "channel_mult=(2, 4)"),
        (schema.UNetConfig(resblock_updown=True), "resblock_updown=True"),
        (schema.UNetConfig(context_dim=None), "context_dim=None"),
        (dataclasses.replace(CELEBA, vector_dim=8), "vector_dim=8"),
        (dataclasses.replace(CELEBA, num_heads=8, num_head_channels=None), "[56, 84, 112] wide"),
    ],
)
def test_a_unet_that_diffusers_cannot_build_is_refused(config, complaint):
    with pytest.raises(ValueError) as error:
        unet_config.unet_options(config, 64)
    assert complaint in str(error.value)


def test_names_are_anchored():
    name = tables.torch_name
    assert name("down_blocks_0/attentions_1/transformer_blocks_2/attn1/to_out_0/kernel", True) == (
        "down_blocks.0.attentions.1.transformer_blocks.2.attn1.to_out.0.weight"
    )
    assert (
        name("mid_block/attentions_0/to_out_0/bias", False)
        == "mid_block.attentions.0.to_out.0.bias"
    )
    assert name("mid_block/attentions_0/to_q/kernel", True) == "mid_block.attentions.0.query.weight"
    for ours, new in (("query", "to_q"), ("proj_attn", "to_out.0"), ("group_norm", "group_norm")):
        path = f"encoder/mid_block/attentions_0/{ours}/bias"
        assert name(path, True) == f"encoder.mid_block.attentions.0.{ours}.bias"
        assert name(path, False) == f"encoder.mid_block.attentions.0.{new}.bias"
    assert name("time_embedding/linear_1/kernel", False) == "time_embedding.linear_1.weight"
    assert name("quantize/embedding", False) == "quantize.embedding.weight"


# --- schedulers ----------------------------------------------------------------------------------

DDIM = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}


@pytest.mark.parametrize(
    "config",
    [
        schema.DiffusionConfig(),
        schema.DiffusionConfig(schedule="linear", beta_start=1e-4, beta_end=0.02, prediction="x0"),
        schema.DiffusionConfig(prediction="v", zero_terminal_snr=True, timesteps=500),
        schema.DiffusionConfig(schedule="cosine", beta_start=None, beta_end=None),
    ],
)
@pytest.mark.parametrize(
    "sampling",
    [
        schema.SamplingConfig(final="alphas_cumprod_0", rule="diffusers"),
        schema.SamplingConfig(spacing="trailing", steps_offset=0, final="one", rule="diffusers"),
    ],
)
def test_scheduler_goes_there_and_back(config, sampling):
    options = scheduler_config.scheduler_options(config, sampling)
    assert scheduler_config.diffusion_config(options, "x") == config
    assert scheduler_config.sampling_config(options, "LDMPipeline", "x") == sampling
    assert scheduler_config.left_out(options, "LDMPipeline") == []


def test_a_schedule_without_a_name_goes_as_its_betas():
    config = schema.DiffusionConfig(schedule="sqrt", beta_start=1e-6, beta_end=1e-4)
    options = scheduler_config.scheduler_options(config, schema.SamplingConfig())
    found = scheduler_config.diffusion_config(options, "x")
    assert found.schedule == "sqrt"
    np.testing.assert_allclose(
        diffusion.from_config(found).betas, diffusion.from_config(config).betas, rtol=1e-12
    )


def test_trained_betas_must_be_a_known_schedule():
    known = diffusion.make_schedule("scaled_linear").betas.astype(np.float32).tolist()
    found = scheduler_config.diffusion_config({**DDIM, "trained_betas": known}, "x")
    assert found.schedule == "scaled_linear"
    assert found.beta_start == pytest.approx(8.5e-4, rel=1e-6)
    odd = [*known[:500], 0.5, *known[501:]]
    with pytest.raises(ValueError, match=r"x: trained_betas \(1000 from"):
        scheduler_config.diffusion_config({**DDIM, "trained_betas": odd}, "x")


@pytest.mark.parametrize(
    ("name", "pipeline", "expected"),
    [
        ("PNDMScheduler", "LDMPipeline", ("leading", 0, "alphas_cumprod_0")),
        ("DDIMScheduler", "LDMPipeline", ("leading", 0, "one")),
        # these two count from 1, whatever the file says
        ("DDIMScheduler", "StableDiffusionPipeline", ("leading", 1, "one")),
        ("FlaxPNDMScheduler", "StableDiffusionInpaintPipeline", ("leading", 1, "alphas_cumprod_0")),
        ("EulerDiscreteScheduler", "LDMPipeline", ("linspace", 0, "one")),
    ],
)
def test_spacing_of_a_class(name, pipeline, expected):
    found = scheduler_config.sampling_config({"_class_name": name}, pipeline, "x")
    assert found == schema.SamplingConfig(*expected, rule="diffusers")


def test_defaults_of_the_classes_are_not_ours():
    found = scheduler_config.diffusion_config({"_class_name": "DDIMScheduler"}, "x")
    assert (found.schedule, found.beta_start, found.beta_end) == ("linear", 1e-4, 0.02)
    found = scheduler_config.diffusion_config({"_class_name": "HeunDiscreteScheduler"}, "x")
    assert (found.beta_start, found.beta_end) == (0.00085, 0.012)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_karras_sigmas": True}, ["use_karras_sigmas=True (--spacing karras)"]),
        (
            {"solver_order": 3, "thresholding": True},
            ["solver_order=3", "thresholding=True (--dynamic-threshold)"],
        ),
        ({"sigma_min": 0.03, "sigma_max": None}, ["sigma_min=0.03"]),
        ({"_class_name": "HeunDiscreteScheduler", "clip_sample": True}, ["clip_sample=True"]),
        ({"algorithm_type": "dpmsolver"}, ["algorithm_type='dpmsolver'"]),
        ({"final_sigmas_type": "sigma_min"}, ["final_sigmas_type='sigma_min'"]),
        ({"use_karras_sigmas": False, "solver_order": 2, "lower_order_final": True}, []),
        ({"_class_name": "PNDMScheduler"}, ["skip_prk_steps=False"]),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, []),
    ],
)
def test_options_that_are_not_followed_are_named(options, named):
    options = {"_class_name": "DPMSolverMultistepScheduler", **options}
    assert scheduler_config.left_out(options, "LDMPipeline") == named


def test_clipping_is_reported():
    assert scheduler_config.left_out(DDIM, "LDMPipeline") == ["clip_sample=True"]
    assert scheduler_config.left_out(DDIM, "StableDiffusionPipeline") == []
    euler = {"_class_name": "EulerDiscreteScheduler"}
    assert scheduler_config.left_out(euler, "LDMPipeline") == []


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"beta_start": None}, "beta_start=None"),
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps=1000000000000"),
        ({"beta_start": "x"}, "beta_start='x'"),
        ({"trained_betas": [[1]]}, "trained_betas=[[1]]"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        ({"beta_start": 2.0}, "beta_start=2.0"),
        ({"rescale_betas_zero_snr": True}, "zero_terminal_snr=True with prediction='eps'"),
    ],
)
def test_a_scheduler_we_do_not_have_is_refused(changed, complaint):
    with pytest.raises(ValueError, match=r"s/scheduler_config\.json") as error:
        scheduler_config.diffusion_config(DDIM | changed, "s/scheduler_config.json")
    assert complaint in str(error.value)
    with pytest.raises(ValueError, match="timestep_spacing='karras'"):
        scheduler_config.sampling_config(DDIM | {"timestep_spacing": "karras"}, "LDM", "x")


def test_a_scheduler_without_a_solver_of_ours_gives_its_schedule():
    """As of Latent Consistency Models; flow matching has no such schedule."""
    options = scheduler_config.scheduler_options(
        schema.DiffusionConfig(), schema.SamplingConfig("trailing", 0, "alphas_cumprod_0")
    )
    lcm = options | {"_class_name": "LCMScheduler", "original_inference_steps": 50}
    assert not scheduler_config.is_known(lcm)
    assert scheduler_config.diffusion_config(lcm, "x") == schema.DiffusionConfig()
    sampling = scheduler_config.sampling_config(lcm, "StableDiffusionPipeline", "x")
    assert (sampling.spacing, sampling.final) == ("trailing", "alphas_cumprod_0")
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler is not one of .* beta_"):
        scheduler_config.diffusion_config(flow, "x")


def test_options_that_compute_nothing_are_named(monkeypatch):
    said = []
    monkeypatch.setattr(part_configs.LOG, "info", said.append)
    ema = {"decay": 0.9999, "use_ema_warmup": True, "notes": "of a friend"}
    assert unet_config.unet_config(unet_options(**ema), "u/config.json") == schema.UNetConfig()
    assert "u/config.json: left out, as the class has no such option: decay=0.9999" in said[0]
    found, _ = part_configs.first_stage_config(kl_options(use_tiling=True), "v/config.json")
    assert found == FIRST_STAGES["kl-f8"]
    assert "use_tiling=True" in said[1]
    older, newer = ({"_diffusers_version": v, "new_option": 3} for v in ("0.30.0.dev0", "0.43.0"))
    unet_config.unet_config(unet_options(**older), "x")
    with pytest.raises(ValueError, match="not supported: new_option=3"):
        unet_config.unet_config(unet_options(**newer), "x")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("UNet2DConditionModel", (unet_config.UNET_DEFAULTS, unet_config.UNET_FIXED)),
        ("UNet2DModel", (unet_config.PLAIN_UNET_DEFAULTS, unet_config.PLAIN_UNET_FIXED)),
        ("AutoencoderKL", (part_configs.KL_DEFAULTS, part_configs.KL_FIXED)),
        ("VQModel", (part_configs.VQ_DEFAULTS, part_configs.VQ_FIXED)),
    ],
)
def test_no_option_of_a_class_is_taken_for_one_that_computes_nothing(name, known):
    import inspect

    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference here")
    version = tuple(map(int, diffusers.__version__.split(".")[:2]))
    if version > part_configs.NEWEST:
        pytest.skip(f"diffusers {version} is newer than what we know")
    options = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}
    assert options <= set().union(*known, part_configs.IGNORED)


def test_noise_of_the_upscaler_goes_there_and_back():
    config = schema.UpscaleCondConfig(schedule="linear", beta_end=0.01, max_noise_level=300)
    options = scheduler_config.low_res_scheduler_options(config)
    assert scheduler_config.upscale_config(options, 4, 300, "x") == config
    options["num_train_timesteps"] = 500
    with pytest.raises(ValueError, match="num_train_timesteps=500"):
        scheduler_config.upscale_config(options, 4, 300, "x")
