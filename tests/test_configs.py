"""Every stage of every config builds: shapes only, nothing is computed."""

import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

from ldm_jax import bundle, conditioning, configs, schema, sharding
from ldm_jax.configs import digits, tiny
from ldm_jax.train import autoencoder, ldm

STAGES = {
    "digits": ("first_stage", "ldm"),
    "folder": ("first_stage", "ldm", "class", "text", "clip"),
    "tiny": ("first_stage", *tiny.CONDITIONS),
}
ALL = [(name, stage) for name, stages in STAGES.items() for stage in stages]
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
    recipe = autoencoder if stage == "first_stage" else ldm
    shapes, shardings = recipe.abstract_state(config, mesh)
    assert jax.tree.structure(shapes) == jax.tree.structure(shardings)
    leaves = jax.tree.leaves(shapes.params)
    assert sum(int(np.prod(x.shape)) for x in leaves) > 100_000
    assert {str(x.dtype) for x in leaves} == {"float32"}
    assert set(shapes.ema_params) <= set(shapes.params)
    sharding.check_batch(config.batch_size, mesh, config.accumulate)


@pytest.mark.parametrize("name", ["folder", "tiny"])
def test_a_frozen_text_encoder_fits_its_mesh(name):
    cond = module(name).get_config("clip").cond
    encoder = conditioning.build(cond)
    shapes = jax.eval_shape(lambda key: conditioning.init(cond, encoder, key), jax.random.key(0))
    mesh = sharding.make_mesh(MESH)
    shardings = sharding.by_rules({"cond_stage": shapes}, sharding.RULES, mesh)
    large = [
        s for x, s in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings)) if x.size > 2**18
    ]
    assert all("fsdp" in s.spec for s in large)
    assert len(large) == {"folder": 12 * 6 + 1, "tiny": 0}[name]


@pytest.mark.parametrize(("name", "stage"), [pair for pair in ALL if pair[1] != "first_stage"])
def test_stages_fit_each_other(name, stage):
    model, config = (module(name).get_config(s) for s in ("first_stage", stage))
    assert type(model.data.source) is type(config.data.source)
    assert (model.data.size, model.data.channels) == (config.data.size, config.data.channels)
    bundle.check(bundle.section(config, model.model), config.data.channels)


@pytest.mark.parametrize("name", STAGES)
def test_unknown_stage_is_named_with_the_known_ones(name):
    with pytest.raises(ValueError, match=f"{name} has no stage 'nope'; it has first_stage"):
        module(name).get_config("nope")


def test_default_stage_trains_the_latent_diffusion_model():
    assert isinstance(digits.get_config(), schema.LatentDiffusionTrainConfig)
    assert isinstance(tiny.get_config(), schema.LatentDiffusionTrainConfig)
