"""The frozen first stage of a run: loaded once, kept in the run, its latent scale measured."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ldm_jax import data, finite, latents, loading, schema, sharding
from ldm_jax.data import cache
from ldm_jax.models import attention, autoencoder
from ldm_jax.runtime import rundir
from ldm_jax.runtime.log import LOG

SCALE = 0x5CA1E  # folded into the seed's key: draws of the posterior that the scale is measured on


def find(
    config: schema.LatentDiffusionTrainConfig, workdir: epath.PathLike
) -> tuple[dict, schema.FirstStageModelConfig]:
    """(host parameters, config) from the run's `frozen/`, at the first start from the given path.

    Only reads. ValueError if there is none, if a new path leads to another first stage than the
    one that the run was trained on, or if the latent cache was encoded with another.
    """
    first_stage = _find(config, workdir)
    if config.cache.path:
        cache.check(config.cache.path, config.data, rundir.params_hash(first_stage[0]))
    return first_stage


def _find(
    config: schema.LatentDiffusionTrainConfig, workdir: epath.PathLike
) -> tuple[dict, schema.FirstStageModelConfig]:
    kept, path = loading.kept_first_stage(workdir), config.first_stage.path
    if kept is not None:  # a run that began from a model has no other path
        if path not in ("", rundir.read_config(workdir).first_stage.path):
            other, _ = _load(config)
            if rundir.params_hash(other) != rundir.params_hash(kept[0]):
                raise ValueError(
                    f"--first-stage.path {path}: is not the first stage in {workdir}/frozen that"
                    " this run was trained on; leave the option out, or use another --workdir"
                )
        return kept
    if not path and not config.init_from:
        raise ValueError(
            "no first stage: give --first-stage.path, the run of CONFIG:first_stage, a diffusers"
            ' folder, a checkpoint, or "identity" to diffuse pixels'
        )
    return _load(config)


def _load(
    config: schema.LatentDiffusionTrainConfig,
) -> tuple[dict, schema.FirstStageModelConfig]:
    if config.first_stage.path == "identity":
        return {}, schema.IdentityFirstStageConfig(config.data.channels)
    return loading.load_first_stage(config.first_stage.path or config.init_from)


def prepare(
    config: schema.LatentDiffusionTrainConfig,
    first_stage: tuple[dict, schema.FirstStageModelConfig],
    run: epath.Path,
    mesh: Mesh,
    stream: Any,
) -> tuple[Any, dict, float]:
    """(module, placed parameters, latent scale) of the result of `find`; all kept in the run."""
    params, model = first_stage
    rundir.write_frozen(run, "first_stage", params, model)
    module = autoencoder.from_config(
        model,
        dtype=jnp.dtype(config.dtype),
        attention=attention.choose(mesh.devices.flat[0].platform, mesh, config.attention),
    )
    shardings = sharding.by_rules({"first_stage": params}, sharding.RULES, mesh)
    placed = sharding.place({"first_stage": params}, shardings)["first_stage"]
    known = rundir.read_latents(run)
    if known is None:
        root = rundir.root_key(run, config)
        known = scale_of(config, module, placed, mesh, stream, root)
        rundir.write_latents(run, known)
        LOG.info(f"latent scale {known['scale']:.5f} ({known['how']})")
    return module, placed, known["scale"]


def latent(
    module: Any, params: dict, batch: dict[str, jax.Array], scale: Any, keys: jax.Array | None
) -> jax.Array:
    """Scaled latents of a batch of images, or of cached moments; `keys` as in `latents.encode`.

    params: {"first_stage": parameters}; those of the first stage are not read for cached moments.
    """
    if "mean" not in batch:
        return latents.encode(module, params["first_stage"], batch["image"], scale, keys)
    moments = (batch["mean"], batch["logvar"]) if "logvar" in batch else batch["mean"]
    return latents.draw(moments, scale, keys)


def scale_of(
    config: schema.LatentDiffusionTrainConfig,
    module: Any,
    params: dict,
    mesh: Mesh,
    stream: Any,
    root: jax.Array,
) -> dict:
    """{"scale", "how"}: the given scale, or 1 / std over sampled latents of training images."""
    given = config.first_stage.scale
    if given is not None:
        finite.checked(given, "first_stage.scale", nonzero=True)
        return {"scale": given, "how": "first_stage.scale of the config"}
    batches = max(1, round(config.first_stage.scale_images / config.batch_size))
    key = jax.random.fold_in(root, SCALE)

    @jax.jit
    def moments(params: dict, batch: dict, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = latent(module, {"first_stage": params}, batch, 1.0, keys)
        return jnp.mean(z), jnp.mean(jnp.square(z))

    means, squares = [], []
    for i in range(batches):
        batch = data.global_batch(stream, i, sharding.batch_sharding(mesh))
        keys = jax.random.split(jax.random.fold_in(key, i), config.batch_size)
        mean, square = jax.device_get(moments(params, batch, keys))
        means.append(np.float64(mean))
        squares.append(np.float64(square))
    std = latents.std_from_moments(means, squares)
    count = batches * config.batch_size
    return {"scale": 1.0 / std, "how": f"1 / std of sampled latents of {count} training images"}
