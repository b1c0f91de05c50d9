"""Both recipes cut to one level, stepped by hand on any mesh from weights by formula."""

import dataclasses
import functools
import shutil
import zlib

import jax
import numpy as np

from ldm_jax import conditioning, data, schema, sharding, train_state
from ldm_jax.configs import tiny
from ldm_jax.data import tokens
from ldm_jax.models import autoencoder as autoencoder_model
from ldm_jax.train import autoencoder, ldm
from ldm_jax.train.frozen import Frozen, text_encoder

# Where a gradient is zero but for rounding, Adam divides rounding by itself: a larger eps keeps
# that out of comparisons between meshes.
OPTIMIZER = schema.OptimizerConfig(learning_rate=1e-3, warmup_steps=2, eps=1e-3, clip_norm=1.0)
SPIKES = schema.SpikeConfig(factor=1e3, warmup=1)  # so that no step of a test is one by itself
MESHES = ({"data": 4}, {"fsdp": 4}, {"data": 2, "fsdp": 2}, {"tensor": 2, "fsdp": 2})


def ldm_config(condition="class", unet=(), **changes):
    """tiny:CONDITION at half the size, with one level and a well-conditioned optimizer.

    Scale and shift: with one channel in every group, GroupNorm would take out an added embedding.
    """
    config = tiny.get_config(condition)
    sizes = {"channel_mult": (1,), "scale_shift_norm": True}
    small = dataclasses.replace(config.data, size=8)
    net = dataclasses.replace(config.unet, **{**sizes, **dict(unet)})
    parts = {"unet": net, "data": small, "optimizer": OPTIMIZER}
    return dataclasses.replace(config, **{**parts, **changes})


def first_stage_config(**changes):
    """tiny:first_stage with few blocks, a well-conditioned optimizer and an average."""
    config = tiny.get_config("first_stage")
    model = dataclasses.replace(config.model, num_res_blocks=0)
    ema = schema.EMAConfig(decay=0.9, parts=("autoencoder",))
    return dataclasses.replace(
        config, **{"model": model, "optimizer": OPTIMIZER, "ema": ema, **changes}
    )


def gan_config(stage="gan", **changes):
    """tiny:gan or tiny:vq with few blocks in one level, and a well-conditioned optimizer."""
    config = tiny.get_config(stage)
    sizes = {"channel_mult": (1,), "num_res_blocks": 0, "mid_attention": False}
    model = dataclasses.replace(config.model, **sizes)
    return dataclasses.replace(config, **{"model": model, "optimizer": OPTIMIZER, **changes})


def mesh_of(**sizes):
    """A mesh of just as many devices as the sizes ask for; without any, of one."""
    config = schema.MeshConfig(**{"data": 1, **sizes})
    count = config.data * config.fsdp * config.tensor
    return sharding.make_mesh(config, jax.devices()[:count])


def filled(shapes):
    """Host arrays of a tree of shapes, none of them zero, by path: no gradient vanishes."""

    def value(path, leaf):
        name = sharding.path_name(path)
        draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(leaf.shape)
        if leaf.ndim < 2:
            draw = 0.1 * draw + name.endswith("scale")
        else:
            draw = draw / np.sqrt(np.prod(leaf.shape[:-1]))
        return draw.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, shapes)


def frozen(mesh, cond=None):
    """The tiny first stage with weights by formula, and the text encoder of a frozen `cond`."""
    config = tiny.get_config("first_stage").model
    module = autoencoder_model.from_config(config)
    image = np.zeros((1, 4, 4, config.in_channels), np.float32)
    shapes = {"first_stage": jax.eval_shape(module.init, jax.random.key(0), image)["params"]}
    if not text_encoder.trains(cond):
        encoder = conditioning.build(cond)
        shapes["cond_stage"] = jax.eval_shape(
            lambda key: conditioning.init(cond, encoder, key), jax.random.key(0)
        )
    params = filled(shapes)
    placed = sharding.place(params, sharding.by_rules(params, sharding.RULES, mesh))
    return Frozen(module, placed["first_stage"], 0.8, config, placed.get("cond_stage"))


def start(config, mesh):
    """The state before the first step, placed on the mesh."""
    recipe = _recipe(config)
    params = filled(jax.eval_shape(lambda: recipe.init_params(config, jax.random.key(0))))
    if recipe is ldm:
        tx, _ = train_state.make_optimizer(config.optimizer)
        state = train_state.create(params, tx, config.ema)
    else:
        state = autoencoder.fresh(config, jax.random.key(0))
        ema = train_state.init_ema(config.ema, params)
        disc_params = filled(jax.eval_shape(lambda: state.disc_params))
        state = state.replace(params=params, ema_params=ema, disc_params=disc_params)
    return sharding.place(jax.device_get(state), recipe.abstract_state(config, mesh)[1])


@functools.cache
def step_of(config, mesh):
    """step(state, batch, key) of the recipe, made once for a config and a mesh."""
    if _recipe(config) is ldm:
        return ldm.make_train_step(config, frozen(mesh, config.cond), mesh)
    return autoencoder.make_train_step(config, mesh)


@functools.cache
def stream_of(config):
    text = schema.text_of(getattr(config, "cond", None))
    tokenizer = text and tokens.load_tokenizer(text.tokenizer, text.encoder.max_length)
    return data.stream(
        config.data, batch_size=config.batch_size, seed=config.seed, tokenizer=tokenizer
    )


def batch_of(config, mesh, step):
    return data.global_batch(stream_of(config), step, sharding.batch_sharding(mesh))


def steps(config, mesh, count, state=None):
    """(state after `count` steps from `state` or the start, [metrics])."""
    state, metrics = start(config, mesh) if state is None else state, []
    for _ in range(count):
        batch = batch_of(config, mesh, int(state.step))
        state, found = step_of(config, mesh)(state, batch, jax.random.key(config.seed))
        metrics.append({name: float(value) for name, value in found.items()})
    return state, metrics


def copy_until(run, step, to):
    """A copy of a run as it was after `step`; returns its folder."""
    shutil.copytree(run, to)
    for later in (*(to / "checkpoints").iterdir(), *(to / "snapshots").glob("*")):
        if later.name.isdigit() and int(later.name) > step:
            shutil.rmtree(later)
    return to


def with_usual_norm(state, network, norm):
    """The state as if the gradient of a network had had this norm so far."""
    norms = state.skips["norms"]
    mean = jax.device_put(norms["mean"].at[network].set(norm), norms["mean"].sharding)
    return state.replace(skips={**state.skips, "norms": {**norms, "mean": mean}})


def largest_difference(a, b):
    """Largest absolute difference of two trees, after checking that their paths agree.

    Of states without their norms of gradients, which are large: metrics hold them too.
    """
    a, b = jax.device_get([x.replace(skips={}) if hasattr(x, "skips") else x for x in (a, b)])
    differences = jax.tree.map(
        lambda x, y: np.max(np.abs(x.astype(np.float64) - y), initial=0.0), a, b
    )
    return float(max(jax.tree.leaves(differences)))


def assert_same_bits(a, b):
    """Two trees, of any sharding, agree in every bit."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def _recipe(config):
    return ldm if isinstance(config, schema.LatentDiffusionTrainConfig) else autoencoder
