"""Every stage of every config builds: shapes only, nothing is computed."""

import importlib
from pathlib import Path

import jax
import meshes
import numpy as np
import pytest
from reference import released

from ldm_jax import bundle, configs, schema, sharding
from ldm_jax.configs import digits, first_stages, tiny
from ldm_jax.convert.compvis import yaml_options
from ldm_jax.train import autoencoder, finetune, ldm

STAGES = {
    "digits": ("first_stage", "gan", "ldm"),
    "emoji": ("pixels", "first_stage", "text"),
    "finetune": ("full", "inpaint", "lora", "dreambooth", "textual_inversion", "first_stage"),
    "first_stages": (*first_stages.KL, *first_stages.VQ),
    "folder": ("first_stage", "ldm", "class", "text", "clip"),
    "imagenet": ("cin256-v2", "first_stage"),
    "own": ("first_stage", "ldm", "class", "captions"),
    "photos": ("first_stage", "kl_f8", "vq_f4", "vq_f8", "ldm"),
    "stable_diffusion": ("512", "1024", "first_stage"),
    "tiny": ("first_stage", "gan", "vq", *tiny.CONDITIONS),
}
# Tracing a deep one takes seconds. imagenet's UNet is that of folder:class; the first stages left
# out have the layers of those here, and clip those of text.
QUICK = {
    "emoji": ("first_stage", "text"),
    "finetune": ("lora",),  # its UNet is that of stable_diffusion
    "first_stages": ("kl-f2", "vq-f4-noattn"),
    "folder": ("first_stage", "ldm", "class", "text"),
    "imagenet": (),
    "photos": ("first_stage", "ldm"),
    "stable_diffusion": ("512",),
}
ALL = [
    pytest.param(
        name, stage, marks=[pytest.mark.slow] if stage not in QUICK.get(name, stages) else []
    )
    for name, stages in STAGES.items()
    for stage in stages
]
PAIRS = [  # with one first stage of their own
    (name, stage)
    for name in ("digits", "emoji", "folder", "own", "photos", "tiny")
    for stage in STAGES[name]
    if isinstance(
        importlib.import_module(f"ldm_jax.configs.{name}").get_config(stage),
        schema.LatentDiffusionTrainConfig,
    )
]
MESH = schema.MeshConfig(data=2, fsdp=2)


def module(name: str):
    return importlib.import_module(f"ldm_jax.configs.{name}")


def test_every_file_is_covered():
    files = {p.stem for p in Path(configs.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == STAGES.keys()


@pytest.mark.parametrize(("name", "stage"), ALL)
def test_stage_builds_and_fits_its_mesh(name, stage):
    config = module(name).get_config(stage)
    mesh = sharding.make_mesh(MESH)
    recipe = autoencoder if isinstance(config, schema.AutoencoderTrainConfig) else ldm
    recipe = finetune if isinstance(config, schema.AdapterTrainConfig) else recipe
    shapes, shardings = recipe.abstract_state(config, mesh)
    assert jax.tree.structure(shapes) == jax.tree.structure(shardings)
    leaves = jax.tree.leaves(shapes.params)
    few = stage == "textual_inversion"
    assert sum(int(np.prod(x.shape)) for x in leaves) > (500 if few else 100_000)
    assert {str(x.dtype) for x in leaves} == {"float32"}
    assert set(shapes.ema_params) <= set(shapes.params)
    if stage in first_stages.RELEASED:
        theirs = released()[f"first_stage_{stage}"][1].values()
        assert sum(x.size for x in leaves) == sum(x.size for x in theirs)
    meshes.refuse_copies(shapes)
    if name == "first_stages":  # whose batches are those of one device
        mesh = sharding.make_mesh(schema.MeshConfig(data=2), jax.devices()[:2])
    sharding.check_batch(config.batch_size, mesh, config.accumulate)


@pytest.mark.parametrize(("name", "stage"), PAIRS)
def test_stages_fit_each_other(name, stage):
    model, config = (module(name).get_config(s) for s in ("first_stage", stage))
    assert type(model.data.source) is type(config.data.source)
    assert (model.data.size, model.data.channels) == (config.data.size, config.data.channels)
    bundle.check(bundle.model_config(config, model.model), config.data.channels)


@pytest.mark.parametrize("name", STAGES)
def test_unknown_stage_is_named_with_the_known_ones(name):
    first = STAGES[name][0]
    with pytest.raises(ValueError, match=f"{name} has no stage 'nope'; it has {first}"):
        module(name).get_config("nope")


def test_default_stage_trains_the_latent_diffusion_model():
    assert isinstance(digits.get_config(), schema.LatentDiffusionTrainConfig)
    assert isinstance(tiny.get_config(), schema.LatentDiffusionTrainConfig)


@pytest.mark.parametrize("stage", first_stages.RELEASED)
def test_released_first_stages_are_those_of_their_configs(stage):
    """What the models' tensors are is in test_convert_compvis.py."""
    params = released()[f"first_stage_{stage}"][0]["params"]
    config = first_stages.get_config(stage)
    assert config.model == yaml_options.first_stage_config(params)
    theirs = params["lossconfig"]["params"]
    ours = {
        "disc_start": config.loss.disc_start,
        "disc_weight": config.loss.disc_weight,
        "disc_num_layers": config.discriminator.layers,
        "kl_weight": config.loss.kl_weight,
        "codebook_weight": config.loss.codebook_weight,
    }
    same = {n: theirs[n] for n in ours if n in theirs}
    assert same.items() <= ours.items()
    assert set(theirs) - set(ours) <= {"disc_conditional", "disc_in_channels"}
    assert config.discriminator.layers == theirs.get("disc_num_layers", 3)
    assert config.loss.perceptual_weight == 1
    assert (config.optimizer.b1, config.optimizer.b2) == (0.5, 0.9)
    base = released()[f"first_stage_{stage}"][0]["base_learning_rate"]
    assert config.optimizer.learning_rate == pytest.approx(base * config.batch_size)


def test_first_stages_of_table_8():
    """(downsampling, codes or None for KL, channels of the latent): every row of the paper's."""
    found = set()
    for stage in (*first_stages.KL, *first_stages.VQ):
        model = first_stages.get_config(stage).model
        codes = getattr(model, "num_codes", None)
        found.add((model.downsample, codes, model.embed_dim, model.mid_attention))
    quantized = [(32, 16384, 16), (16, 16384, 8), (8, 16384, 4), (8, 256, 4), (4, 8192, 3)]
    quantized += [(4, 256, 3), (2, 2048, 2), (2, 64, 2)]
    kl = [(32, 64), (32, 16), (16, 16), (16, 8), (8, 4), (4, 3), (2, 2)]
    expected = {(*row, True) for row in quantized} | {(f, None, c, True) for f, c in kl}
    assert found == expected | {(4, 8192, 3, False)}
