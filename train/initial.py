"""A first stage that goes on from the weights of another one (`init_from`)."""

from typing import Any

import jax
from etils import epath

from ldm_jax import checkpoint, loading, schema, sharding
from ldm_jax.train import codebook
from ldm_jax.train_state import GanState


def find(
    config: schema.AutoencoderTrainConfig, workdir: epath.PathLike, shapes: GanState
) -> dict | None:
    """Host parameters of `init_from`; None without it, or in a run that has a checkpoint.

    Only reads. ValueError if they are of another model, or if only the decoder should train and
    there is nothing to start from.
    """
    if checkpoint.latest_step(workdir) is not None:
        return None
    if not config.init_from:
        if config.train_only == "decoder":
            raise ValueError(
                "--train-only decoder: give --init-from, the first stage whose latents stay"
            )
        return None
    params, model = loading.load_first_stage(config.init_from)
    wanted, found = _shapes(shapes.params["autoencoder"]), _shapes(params)
    odd = [n for n in sorted(wanted.keys() | found.keys()) if wanted.get(n) != found.get(n)]
    if odd:
        raise ValueError(
            f"--init-from {config.init_from}: is another first stage ({model}) than this config's:"
            f" {len(odd)} arrays differ, as {odd[0]}: {found.get(odd[0], 'not there')} instead of"
            f" {wanted.get(odd[0], 'nothing')}; set --model to fit"
        )
    return params


def start(
    config: schema.AutoencoderTrainConfig, state: GanState, shardings: GanState, params: dict
) -> GanState:
    """The new state with the given autoencoder (host arrays): its weights, average and codes."""
    others = {n: jax.device_get(x) for n, x in state.params.items() if n != "autoencoder"}
    host = {"autoencoder": params, **others}
    codes = jax.device_get(codebook.start(config, host))
    return state.replace(
        params=sharding.place(host, shardings.params),
        ema_params=sharding.place({n: host[n] for n in state.ema_params}, shardings.ema_params),
        codes=sharding.place(codes, shardings.codes),
    )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_name(path): x.shape for path, x in flat}
