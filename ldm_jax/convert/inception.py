"""The published weights of the FID Inception, as our parameters."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.convert import table
from ldm_jax.convert.formats import files
from ldm_jax.convert.table import CONV, DENSE, Entry
from ldm_jax.models import inception
from ldm_jax.runtime import storage

PUBLISHED = (
    "pt_inception-2015-12-05-6726825d.pth (releases of github.com/mseitzer/pytorch-fid, tag"
    " fid_weights), or weights-inception-2015-12-05-6726825d.pth (releases of"
    " github.com/toshas/torch-fidelity, tag v0.2.0), one file under two names, with the SHA-256"
    " 6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
)
MOMENTS = (("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "var"))


def entries(shapes: dict) -> list[Entry]:
    """The table of a file whose parameters have `shapes`: a tree of `InceptionV3`."""
    pairs: list[Entry] = []

    def walk(branch: dict, where: tuple[str, ...]) -> None:
        torch, ours = ".".join(where), "/".join(where)
        if "bn" in branch:
            pairs.append(Entry(f"{torch}.conv.weight", (f"{ours}/conv/kernel",), CONV))
            for theirs, name in MOMENTS:
                pairs.append(Entry(f"{torch}.bn.{theirs}", (f"{ours}/bn/{name}",), table.VECTOR))
            return
        for name, inner in branch.items():
            if isinstance(inner, dict):
                walk(inner, (*where, name))

    walk(shapes, ())
    return [*pairs, *table.layer("fc", "fc", DENSE)]


def shapes() -> dict:
    """Shapes of the parameters, nested."""
    image = jnp.zeros((1, inception.SIDE, inception.SIDE, 3))
    return jax.eval_shape(inception.InceptionV3().init, jax.random.key(0), image)["params"]


def load(path: str | os.PathLike) -> tuple[dict, str]:
    """(parameters as host arrays, SHA-256 of the file) of the published PyTorch file.

    FileNotFoundError and ValueError name the file that is needed, and the fault of this one.
    """
    if not str(path) or not os.path.exists(path):
        raise FileNotFoundError(
            f"{path or 'no path'}: is no file with Inception weights; wanted is {PUBLISHED}"
        )
    tensors, _ = files.open_state_dict(path)
    # counters of the training, which say nothing about the network
    tensors = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    wanted = shapes()
    try:
        params = table.from_torch(entries(wanted), tensors, wanted, where=str(path))
    except ValueError as error:
        raise ValueError(
            f"{error}. The network of FID is not torchvision's: wanted is {PUBLISHED}"
        ) from error
    bad = [k for k, v in tensors.items() if not np.all(np.isfinite(np.asarray(v)))]
    if bad:
        raise ValueError(f"{path}: is damaged, {bad[0]} is not finite; wanted is {PUBLISHED}")
    return params, storage.sha256(path)
