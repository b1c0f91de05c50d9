"""The frozen model that an adapter trains beside: read once, kept in the run's `frozen/`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ldm_jax import loading, schema, sharding
from ldm_jax.adapters import runs
from ldm_jax.runtime import rundir
from ldm_jax.runtime.log import LOG
from ldm_jax.train import frozen
from ldm_jax.train.finetune import full
from ldm_jax.train.ldm import initial


def find(config: schema.AdapterTrainConfig, workdir: epath.PathLike) -> dict:
    """Host {"unet", "cond_stage"} of the base, without a text encoder: `frozen.find` has that.

    From the run, at the first start from `init_from`. {} where all weights train. Only reads.
    ValueError without a base, for one that does not fit the config, and for a path that leads to
    another base than the run was trained on.
    """
    full.check_start(config, workdir)
    if not runs.trains_adapter(config):
        return {}
    base = loading.kept_base(workdir, config) or _load(config)
    wanted = runs.base_shapes(config)
    if "cond_stage" not in base:
        wanted = {"unet": wanted["unet"]}
    initial.check(config.init_from, base, wanted)
    dtype = jnp.dtype(config.base_dtype)
    return jax.tree.map(lambda x: np.asarray(x).astype(dtype, copy=False), base)


def _load(config: schema.AdapterTrainConfig) -> dict:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = jax.device_get(loading.load(config.init_from).params)
    parts = {"unet": params["unet"]}
    if schema.text_of(config.cond) is None and params["cond_stage"]:
        parts["cond_stage"] = params["cond_stage"]
    return parts


def prepare(
    config: schema.AdapterTrainConfig,
    base: dict,
    run: epath.Path,
    fixed: frozen.Frozen,
    mesh: Mesh,
) -> frozen.Frozen:
    """`fixed` with the base of `find`, kept in the run and placed on the mesh."""
    if not base:
        return fixed
    if config.keep_base:
        rundir.write_frozen(run, "unet", base["unet"], config.unet)
    elif not rundir.has_frozen(run, "unet") and rundir.read_base(run) is None:
        values = {"path": config.init_from, "hash": rundir.params_hash(base["unet"])}
        rundir.write_base(run, {**values, "dtype": config.base_dtype})
        LOG.info(f"the run does not keep its UNet: it needs {config.init_from} to go on or sample")
    if "cond_stage" in base:
        rundir.write_frozen(run, "cond_stage", base["cond_stage"], None)
    placed: dict[str, Any] = sharding.place(base, sharding.by_rules(base, sharding.RULES, mesh))
    cond_stage = placed.get("cond_stage", fixed.cond_stage)
    if cond_stage is not None:
        cond_stage = jax.tree.map(lambda x: x.astype(config.base_dtype), cond_stage)
    return dataclasses.replace(fixed, unet=placed["unet"], cond_stage=cond_stage)
