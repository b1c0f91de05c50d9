"""A path into a model: finds out what lies there and reads it."""

from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from ldm_jax import bundle, checkpoint, rundir, schema, sharding
from ldm_jax.models import attention, convolution


def load(
    path: epath.PathLike,
    *,
    step: int | None = None,
    ema: bool = True,
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> bundle.LatentDiffusion:
    """The model of a run directory: its newest snapshot or checkpoint, or that of `step`.

    `ema=False` takes the raw weights (of a checkpoint). `mesh` places the parameters by the
    training rules; without it they lie on the default device. `dtype` is the compute type.
    ValueError or FileNotFoundError name the path and what is wrong with it.
    """
    run = checkpoint.absolute(path)
    config = _config(run)
    if not isinstance(config, schema.LatentDiffusionTrainConfig):
        raise ValueError(
            f"{run}: is a run of {type(config).__name__}, a first stage; --model takes the run of"
            " a latent diffusion model"
        )
    trained, _ = weights(run, config, step, ema)
    kept, known = rundir.read_frozen(run, "first_stage"), rundir.read_latents(run)
    if kept is None or known is None:
        raise FileNotFoundError(f"{run}: frozen/ or latents.json is missing: copy the whole run")
    first_stage, first_stage_config = kept
    section = schema.LatentDiffusionConfig(
        first_stage=first_stage_config,
        unet=config.unet,
        cond=config.cond,
        diffusion=config.diffusion,
        size=config.data.size,
    )
    params = {
        "unet": trained["unet"],
        "first_stage": first_stage,
        "cond_stage": trained.get("cond_stage", {}),
    }
    if mesh is None:
        params = jax.tree.map(jnp.asarray, params)
    else:
        params = sharding.place(params, sharding.by_rules(params, sharding.RULES, mesh))
    platform = (mesh.devices.flat[0] if mesh is not None else jax.devices()[0]).platform
    return bundle.build(
        section,
        params,
        known["scale"],
        dtype=jnp.float32 if dtype is None else jnp.dtype(dtype),
        attention=attention.choose(platform, mesh),
        convolution=convolution.choose(platform),
    )


def load_first_stage(path: epath.PathLike, *, step: int | None = None) -> tuple[dict, Any]:
    """(host parameters, config) of the first stage that a run trained, averaged if it can be."""
    run = checkpoint.absolute(path)
    config = _config(run)
    if not isinstance(config, schema.AutoencoderTrainConfig):
        raise ValueError(f"{run}: is not the run of a first stage ({type(config).__name__})")
    params, _ = weights(run, config, step, ema=True)
    return params["autoencoder"], config.model


def weights(
    run: epath.Path, config: schema.TrainConfig, step: int | None, ema: bool
) -> tuple[dict, int]:
    """(host parameters of the parts that trained, their step): snapshot or checkpoint, the newest.

    With `ema` the averaged weights of the parts that have an average.
    """
    snapshots = set(checkpoint.snapshot_steps(run)) if ema else set()
    saved = set(checkpoint.saved_steps(run))
    if not snapshots | saved:
        raise FileNotFoundError(
            f"{run}: holds no {'snapshot or ' if ema else ''}checkpoint yet: train it first"
        )
    chosen = max(snapshots | saved) if step is None else step
    if chosen not in snapshots | saved:
        raise ValueError(f"{run}: has no step {chosen}; it has {sorted(snapshots | saved)}")
    if chosen in snapshots:
        return checkpoint.load_snapshot(run, chosen)[0], chosen
    parts = ("params", "ema_params") if ema else ("params",)
    found = checkpoint.restore_parts(run, chosen, parts)
    return {**found["params"], **found.get("ema_params", {})}, chosen


def _config(run: epath.Path) -> schema.TrainConfig:
    if not run.exists():
        raise FileNotFoundError(f"{run}: does not exist")
    if not rundir.is_run(run):
        raise ValueError(f"{run}: is not a run directory (it has no config.json)")
    return rundir.read_config(run)
