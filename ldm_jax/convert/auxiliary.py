"""Published weights of the networks in the losses of first stages: VGG16, LPIPS, discriminators."""

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax.convert import table
from ldm_jax.convert.formats import files
from ldm_jax.convert.table import CONV, VECTOR, Entries, Entry, Layout, layer, norm
from ldm_jax.models import discriminator, lpips
from ldm_jax.models.discriminator import PatchGAN

LIN = Layout("1 c 1 1", "c")


class Published(NamedTuple):
    """A file that cannot be shipped: its content, name, source and checksum."""

    what: str
    name: str
    source: str
    checksum: str

    def __str__(self) -> str:
        return f"{self.what}: {self.name} from {self.source} ({self.checksum})"


VGG16 = Published(
    "VGG16 of torchvision, trained on ImageNet",
    "vgg16-397923af.pth",
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "SHA-256 begins with 397923af",
)
LPIPS = Published(
    "the last layers of LPIPS 0.1 for VGG16",
    "vgg.pth",
    "https://github.com/richzhang/PerceptualSimilarity, lpips/weights/v0.1",
    "MD5 d507d7349b931f0638a25a48a722f98a",
)


LPIPS_0_0 = (3.6416, 1.9601, 1.1231, 20.1063, 25.6896)
"""Sums of the five last layers of LPIPS 0.0, which has the names and shapes of 0.1; it was trained
on images without the shift and scale of 0.1."""


# --- VGG16 and LPIPS -----------------------------------------------------------------------------


def load_lpips(vgg_path: str | os.PathLike, lin_path: str | os.PathLike) -> dict:
    """Parameters of `lpips.LPIPS` on the host, from two files (or one that holds both).

    vgg_path: of `VGG16`; lin_path: of `LPIPS`; in any format of `files.open_state_dict`. A first
        stage's checkpoint of the reference holds both under `loss.perceptual_loss.`.
    FileNotFoundError if one is missing, ValueError if one is of another network or version; both
    messages name the file that is needed.
    """
    tensors = _tensors(vgg_path, VGG16, _vgg_name) | _tensors(lin_path, LPIPS, _lin_name)
    entries, shapes = list(lpips_entries()), lpips.shapes()
    for path, wanted, part in ((vgg_path, VGG16, "features."), (lin_path, LPIPS, "lin")):
        about = [p for p in table.misfits(entries, tensors, shapes) if f" {part}" in f" {p}"]
        table.refuse(about, f"{path} is not {wanted}")
    params = table.from_torch(entries, tensors, shapes)
    sums = [np.sum(params[f"lin{i}"]["scale"], dtype=np.float64) for i in range(len(LPIPS_0_0))]
    if np.allclose(sums, LPIPS_0_0, rtol=1e-2):
        raise ValueError(f"{lin_path} holds the last layers of LPIPS 0.0, not {LPIPS}")
    return params


def lpips_entries() -> Entries:
    """Entries of LPIPS: `features.N` of torchvision's VGG16 and `linN.model.1` of LPIPS."""
    index = 0
    for stage, (_, count) in enumerate(lpips.STAGES, 1):
        for i in range(1, count + 1):
            yield from layer(f"features.{index}", f"vgg/conv{stage}_{i}", CONV)
            index += 2  # a ReLU follows
        index += 1  # a pooling
        yield Entry(f"lin{stage - 1}.model.1.weight", (f"lin{stage - 1}/scale",), LIN)


def _vgg_name(name: str) -> str | None:
    """`features.N.weight`, as the reference too calls it: `net.sliceS.N.weight`."""
    match = re.fullmatch(r"(?:.+\.)?(?:features|net\.slice\d)\.(\d+)\.(\w+)", name)
    return f"features.{match[1]}.{match[2]}" if match else None


def _lin_name(name: str) -> str | None:
    """`linN.model.1.weight`; 0 instead of 1 where it was saved without dropout."""
    match = re.fullmatch(r"(?:.+\.)?(lin\d+)\.model\.[01]\.(\w+)", name)
    return f"{match[1]}.model.1.{match[2]}" if match else None


def _tensors(path: str | os.PathLike, wanted: Published, rename: Any) -> dict[str, Any]:
    """The tensors of a file under the names that `rename` gives; those without are left out."""
    if not os.fspath(path):
        raise FileNotFoundError(f"no file is given for {wanted}")
    try:
        state_dict, _ = files.open_state_dict(path)
    except OSError as error:
        raise FileNotFoundError(f"{path}: {error.strerror or error}; wanted: {wanted}") from error
    tensors = {new: x for name, x in state_dict.items() if (new := rename(name))}
    if not tensors:
        some = ", ".join(list(state_dict)[:3])
        raise ValueError(f"{path} (with tensors {some}, ...) is not {wanted}")
    return tensors


# --- discriminators ------------------------------------------------------------------------------


def load_discriminator(path: str | os.PathLike) -> tuple[PatchGAN, dict]:
    """(discriminator, {"params", "batch_stats"} on the host) of a first stage's checkpoint.

    Its tensors are those under `loss.discriminator.main.`, or under `main.` of the module alone;
    width, layers and norm follow from their names and shapes. ValueError if there are none, or they
    fit no discriminator.
    """
    state_dict, _ = files.open_state_dict(path)
    pattern = r"(?:.*discriminator\.)?main\.(\d+\.\w+)"
    tensors = {m[1]: x for name, x in state_dict.items() if (m := re.fullmatch(pattern, name))}
    if "0.weight" not in tensors:
        raise ValueError(f"{path} holds no discriminator (no tensor discriminator.main.0.weight)")
    try:
        return discriminator_from(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def discriminator_from(tensors: Mapping[str, Any]) -> tuple[PatchGAN, dict]:
    """`load_discriminator` from the tensors of torch's `main`: names like `0.weight`."""
    convolutions = sum(
        len(x.shape) == 4 and name.endswith(".weight") for name, x in tensors.items()
    )
    model = PatchGAN(
        width=tensors["0.weight"].shape[0],
        layers=max(convolutions - 2, 1),
        norm="act" if any(name.endswith(".loc") for name in tensors) else "batch",
    )
    shapes = _discriminator_shapes(model, tensors["0.weight"].shape[1])
    counters = ("num_batches_tracked", "initialized")
    read = {n: x for n, x in tensors.items() if n.rpartition(".")[2] not in counters}
    if model.norm == "batch":
        return model, table.from_torch(
            list(discriminator_entries(model)), read, shapes, where="discriminator"
        )
    entries, wanted = list(discriminator_entries(model)), {"params": shapes["params"]}
    params = table.from_torch(entries, read, wanted, where="discriminator")["params"]
    stats = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes["batch_stats"])
    for i in range(1, model.layers + 1):
        name = f"norm_{i}"
        if np.any(np.asarray(tensors.get(f"{3 * i}.initialized", 1))):
            stats[name]["initialized"] = np.ones((), np.bool_)
        else:  # not initialized: its values are not learned, and the first batch replaces them
            params[name] = jax.tree.map(np.zeros_like, params[name])
            stats[name]["scale"] = np.ones_like(stats[name]["scale"])
    return model, {"params": params, "batch_stats": stats}


def discriminator_state_dict(model: PatchGAN, variables: dict) -> dict[str, np.ndarray]:
    """Inverse of `discriminator_from`: torch's names within `main`, all that it loads strictly."""
    if model.norm == "act":
        stats = variables["batch_stats"]
        params = {
            name: {k: np.asarray(x) + np.asarray(stats[name][k]) for k, x in part.items()}
            if name in stats
            else part
            for name, part in variables["params"].items()
        }
        variables = {"params": params}
    tensors = table.to_torch(list(discriminator_entries(model)), variables)
    for i in range(1, model.layers + 1):
        if model.norm == "act":
            initialized = np.asarray(stats[f"norm_{i}"]["initialized"])
            tensors[f"{3 * i}.initialized"] = initialized.astype(np.uint8)
        else:
            tensors[f"{3 * i}.num_batches_tracked"] = np.zeros((), np.int64)
    return tensors


def discriminator_entries(model: PatchGAN) -> Entries:
    """Entries of a discriminator: torch's names within `main`, paths within our variables.

    torch counts the activations too: the layers are at 0, 2, 5, 8, ... and norms at 3, 6, 9, ....
    """
    yield from layer("0", "params/conv_in", CONV)
    for i in range(1, model.layers + 1):
        yield from layer(str(3 * i - 1), f"params/conv_{i}", CONV, bias=model.norm != "batch")
        if model.norm == "batch":
            yield from norm(str(3 * i), f"params/norm_{i}")
            yield Entry(f"{3 * i}.running_mean", (f"batch_stats/norm_{i}/mean",), VECTOR)
            yield Entry(f"{3 * i}.running_var", (f"batch_stats/norm_{i}/var",), VECTOR)
        else:
            yield Entry(f"{3 * i}.loc", (f"params/norm_{i}/loc",), LIN)
            yield Entry(f"{3 * i}.scale", (f"params/norm_{i}/scale",), LIN)
    yield from layer(str(3 * model.layers + 2), "params/conv_out", CONV)


def _discriminator_shapes(model: PatchGAN, channels: int) -> dict:
    image = discriminator.smallest_image(model, channels)
    return jax.eval_shape(model.init, jax.random.key(0), image)
