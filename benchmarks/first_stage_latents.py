"""A latent diffusion step from images and from a latent cache, for `first_stage.py`.

`python first_stage_latents.py --weights JOB.json` writes the first stage and the cache instead.
"""

import dataclasses
from pathlib import Path

import first_stage_cases as cases
import first_stage_jax
import jax
import sides

from ldm_jax import data, schema, sharding
from ldm_jax.configs import digits, folder
from ldm_jax.runtime import checkpoint, rundir
from ldm_jax.schema import serialize
from ldm_jax.train import autoencoder, ldm
from ldm_jax.train.frozen import first_stage
from ldm_jax.train.prepare import encode

MESH, ROOT = first_stage_jax.MESH, first_stage_jax.ROOT


def config_of(job: cases.Job, case: cases.Case, cached: bool) -> schema.LatentDiffusionTrainConfig:
    """`digits`, or `folder:ldm` (LDM-4 of the paper) on drawn shapes; no image is mirrored."""
    kept = cases.weights_of(job)
    config = digits.ldm() if case.model == "demo" else folder.ldm()
    return dataclasses.replace(
        config,
        data=first_stage_jax.data_config(case),
        batch_size=case.batch,
        first_stage=schema.FirstStageConfig(path=str(kept / "first_stage"), scale=1.0),
        cache=schema.LatentCacheConfig(path=str(kept / "cache") if cached else ""),
    )


def write_weights(job: cases.Job) -> None:
    """A first stage of random weights as a run, and the cache that it makes of the data."""
    case = cases.CASES[job.case]
    stage = first_stage_jax.step_config(case)
    kept = cases.weights_of(job)
    run, _ = rundir.open_run(kept / "first_stage", stage)
    state = jax.device_get(autoencoder.init_state(stage, ROOT, MESH)[0])
    checkpoint.save_snapshot(run, 1, state.params, serialize.to_dict(stage.model))
    encode.encode(config_of(job, case, cached=False), kept / "cache")


def run_case(job: cases.Job, case: cases.Case) -> dict:
    """Times the recipe's step with all that feeds it; see `first_stage_cases.serve`."""
    jax.config.update("jax_compilation_cache_dir", str(Path(job.kept) / "xla"))
    cached = job.side == cases.CACHE
    config = config_of(job, case, cached)
    rows = sharding.batch_sharding(MESH)
    stream = data.stream(
        config.data, batch_size=case.batch, seed=config.seed, cached=config.cache.path
    )
    workdir = cases.weights_of(job) / f"run_{'cache' if cached else 'images'}"
    run, _ = rundir.open_run(workdir, config)
    frozen = first_stage.prepare(config, first_stage.find(config, run), run, MESH, stream)
    state = [ldm.init_state(config, ROOT, MESH)[0]]
    train_step = ldm.make_train_step(config, frozen, MESH)
    given = (state[0], data.global_batch(stream, 0, rows), ROOT)
    lowered = train_step.func.lower(*train_step.args, *given)
    program, compiling = sides.timed(lowered.compile)
    with data.prefetch(stream, 0, rows) as batches:

        def step() -> list[float]:
            _, batch = next(batches)
            state[0], metrics = program(*train_step.args, state[0], batch, ROOT)
            return [float(metrics["loss"])]  # waits

        figures, values = sides.measure(step, job.seconds, cases.COMPARED - 1)
    return figures | {"compile": compiling, "losses": values[: cases.COMPARED]}


if __name__ == "__main__":
    cases.serve(run_case, write_weights)
