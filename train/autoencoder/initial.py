"""The start from the weights of another first stage (`init_from`), and of its discriminator."""

from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from ldm_jax import loading, schema, sharding
from ldm_jax.convert import auxiliary
from ldm_jax.runtime import checkpoint, rundir
from ldm_jax.runtime.log import LOG
from ldm_jax.train.autoencoder import codebook
from ldm_jax.train_state import GanState


class Given(NamedTuple):
    """Weights that a run starts from: host arrays."""

    params: dict
    """Parameters of the autoencoder."""
    disc: dict | None
    """{"params", "batch_stats"} of the discriminator; None: it starts from fresh weights, or there
    is none."""
    said: str
    """Log line about the discriminator; "" where the config has none."""


def find(
    config: schema.AutoencoderTrainConfig, workdir: epath.PathLike, shapes: GanState
) -> Given | None:
    """The weights of `init_from`, or of a run that a conversion made, at its snapshot of step 0.

    None without either, or in a run that has a checkpoint. Only reads. A discriminator that does
    not fit the config is left out, and reported. ValueError if the autoencoder does not fit, or if
    only the decoder should train and there is nothing to start from.
    """
    if checkpoint.latest_step(workdir) is not None:
        return None
    path = config.init_from
    if 0 in checkpoint.snapshot_steps(workdir):
        if path:
            raise ValueError(
                f"--init-from {path}: {workdir} has weights of its own (snapshots/0); leave the"
                " option out, or use another --workdir"
            )
        path = str(workdir)
    if not path:
        if config.train_only == "decoder":
            raise ValueError(
                "--train-only decoder: give --init-from, the first stage whose latents stay"
            )
        return None
    params, model = loading.load_first_stage(path)
    wanted, given = _shapes(shapes.params["autoencoder"]), _shapes(params)
    odd = [n for n in sorted(wanted.keys() | given.keys()) if wanted.get(n) != given.get(n)]
    if odd:
        raise ValueError(
            f"--init-from {path}: is another first stage ({model}) than this config's:"
            f" {len(odd)} arrays differ, as {odd[0]}: {given.get(odd[0], 'not there')} instead of"
            f" {wanted.get(odd[0], 'nothing')}; set --model to fit"
        )
    return Given(params, *_discriminator(config, shapes, path))


def _discriminator(
    config: schema.AutoencoderTrainConfig, shapes: GanState, path: epath.PathLike
) -> tuple[dict | None, str]:
    """({"params", "batch_stats"} or None, log line about it)."""
    if config.discriminator is None:
        return None, ""
    path, kind = loading.recognise(path)
    if kind in ("diffusers", "first_stage"):
        given, about = None, f"{path} is a diffusers folder, which holds none"
    else:
        wanted = {"params": shapes.disc_params, "batch_stats": shapes.disc_stats["batch_stats"]}
        given, about = _kept(path, wanted) if kind == "run" else _published(path)
        if given is not None:
            different = _difference(given, wanted)
            about, given = about + different, None if different else given
    if given is None:
        return None, f"the discriminator starts anew: {about}"
    disc = jax.tree.map(lambda x, like: np.asarray(x, like.dtype), given, wanted)
    return disc, f"the discriminator starts from {about} too"


def _difference(given: dict, wanted: dict) -> str:
    """The first array that two discriminators do not share, as the end of a line; or ""."""
    known, own = _shapes(given), _shapes(wanted)
    odd = [n for n in sorted(known.keys() | own.keys()) if known.get(n) != own.get(n)]
    if not odd:
        return ""
    return f" has {known.get(odd[0], 'none')} at {odd[0]}, the config's {own.get(odd[0], 'none')}"


def _published(path: epath.Path) -> tuple[dict | None, str]:
    """(discriminator of a CompVis checkpoint, its name), or (None, reason)."""
    try:
        return auxiliary.load_discriminator(path)[1], f"loss.discriminator of {path}"
    except ValueError as error:  # none, or no PatchGAN
        return None, str(error)


def _kept(run: epath.Path, wanted: dict) -> tuple[dict | None, str]:
    """(discriminator of a run's newest checkpoint, its name), or (None, reason)."""
    step = checkpoint.latest_step(run)
    if step is None or rundir.read_config(run).discriminator is None:
        return None, f"{run} has {'no checkpoint' if step is None else 'none'}"
    about = f"that of {run} at step {step}"
    saved = {
        "params": checkpoint.saved_shapes(run, step, "disc_params"),
        "batch_stats": checkpoint.saved_shapes(run, step, "disc_stats").get("batch_stats"),
    }
    if different := _difference(saved, wanted):  # before anything of another size is read
        return None, about + different
    restored = checkpoint.restore_parts(run, step, ("disc_params", "disc_stats"))
    disc = {"params": restored["disc_params"], "batch_stats": restored["disc_stats"]["batch_stats"]}
    return disc, about


def start(
    config: schema.AutoencoderTrainConfig, state: GanState, shardings: GanState, given: Given
) -> GanState:
    """The new state with the given autoencoder (its weights, average and codes) and discriminator.

    The optimizers start anew. Logs how the discriminator starts.
    """
    others = {n: jax.device_get(x) for n, x in state.params.items() if n != "autoencoder"}
    host = {"autoencoder": given.params, **others}
    codes = jax.device_get(codebook.start(config, host))
    if given.said:
        LOG.info(given.said)
    if given.disc is not None:
        stats = {**state.disc_stats, "batch_stats": given.disc["batch_stats"]}
        state = state.replace(
            disc_params=sharding.place(given.disc["params"], shardings.disc_params),
            disc_stats=sharding.place(jax.device_get(stats), shardings.disc_stats),
        )
    return state.replace(
        params=sharding.place(host, shardings.params),
        ema_params=sharding.place({n: host[n] for n in state.ema_params}, shardings.ema_params),
        codes=sharding.place(codes, shardings.codes),
    )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_name(path): x.shape for path, x in flat}
