"""A training loop of your own on many hosts, with the public surface of ldm_jax alone.

Start the same command on every host; a Cloud TPU slice or a SLURM job finds its members itself.

    python docs/train_multihost.py gs://bucket/first_stage gs://bucket/ldm

Run it again to go on from the newest checkpoint, on as many hosts as there are then.
"""

import dataclasses
import sys

import jax

from ldm_jax import checkpoint, data, schema, seeds, sharding, train_state
from ldm_jax.configs import digits
from ldm_jax.runtime import rundir
from ldm_jax.train import frozen, ldm
from ldm_jax.train.step import make_step


def train(config: schema.LatentDiffusionTrainConfig, workdir: str) -> None:
    """Train until `config.steps`, saving every `config.intervals.save` steps."""
    mesh = sharding.make_mesh(config.mesh)  # all devices of all hosts
    stream = data.stream(config.data, batch_size=config.batch_size, seed=config.seed)
    fixed = frozen.prepare(config, workdir, mesh, stream)  # first stage, kept in the run

    key = seeds.root_key(config.seed)
    fresh, _ = ldm.init_state(config, key, mesh)
    manager = checkpoint.manager(workdir, config.max_to_keep)
    saved = checkpoint.resume(manager, fresh)  # onto this mesh, whatever it was saved from
    state = fresh if saved is None else saved
    tx, _ = train_state.make_optimizer(config.optimizer)  # or an optax transformation of yours
    train_step = make_step(ldm.make_loss(config, fixed, mesh), tx, config, mesh)

    first, place = int(state.step), sharding.batch_sharding(mesh)
    with data.prefetch(stream, first, place) as batches:  # a host decodes its own examples only
        for i, batch in batches:
            if i == config.steps:
                break
            state, metrics = train_step(state, batch, key)
            step = i + 1
            if step % config.intervals.log == 0 and jax.process_index() == 0:
                print(f"step {step}: loss {float(metrics['loss']):.4f}", flush=True)
            if step % config.intervals.save == 0 or step == config.steps:
                checkpoint.save(manager, state, rundir.meta(config, mesh))
    manager.close()  # waits for the last checkpoint


if __name__ == "__main__":
    jax.distributed.initialize()
    path, workdir = sys.argv[1:]
    config = dataclasses.replace(
        digits.get_config("ldm"),
        first_stage=schema.FirstStageConfig(path=path),
        mesh=schema.MeshConfig(data=-1, fsdp=jax.local_device_count()),
    )
    train(config, workdir)
