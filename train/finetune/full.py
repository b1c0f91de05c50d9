"""Trains all of a trained model: `ldm-train finetune:full --init-from PATH --workdir DIR`."""

from etils import epath

from ldm_jax import schema
from ldm_jax.runtime import checkpoint
from ldm_jax.train import ldm
from ldm_jax.train.run.watchdog import Watch


def train(
    config: schema.FinetuneTrainConfig, workdir: epath.PathLike, watch: Watch | None = None
) -> int:
    """As `train.ldm.train`. ValueError without a model to start from."""
    check_start(config, workdir)
    return ldm.train(config, workdir, watch)


def check_start(config: schema.FinetuneTrainConfig, workdir: epath.PathLike) -> None:
    """ValueError unless `init_from` names a model, or the run holds weights already."""
    if config.init_from or 0 in checkpoint.snapshot_steps(workdir):
        return
    raise ValueError(
        "--init-from PATH is missing: the trained model to start from, a run, a diffusers folder or"
        " a checkpoint"
    )
