"""Figures from features, and the two files that a run of `ldm-eval` leaves: result.json, row.md."""

import dataclasses
import importlib.metadata
import json
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from ldm_jax.metrics import features, gaussian, manifold, scores
from ldm_jax.runtime import rundir
from ldm_jax.runtime.log import LOG

NEIGHBOURS = 3  # of precision and recall
SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance, as torch-fidelity's
SPLITS = 10  # of the Inception score

# Name of a distance in JSON and in a table, by network: only Inception's is called FID.
NAMES = {
    "Inception": {"fd": ("fid", "FID"), "kd": ("kid", "KID"), "sfd": ("sfid", "sFID")},
    "CLIP": {"fd": ("fd_clip", "FD (CLIP)"), "kd": ("kd_clip", "KD (CLIP)")},
    "random features": {
        "fd": ("fd_random_features", "FD (random features)"),
        "kd": ("kd_random_features", "KD (random features)"),
    },
}
_DISTANCES = {key: title for names in NAMES.values() for key, title in names.values()}
_DISTANCES["inception_score"] = "IS"
TITLES = {
    **_DISTANCES,
    "precision": "Precision",
    "recall": "Recall",
    "clip_score": "CLIP score",
    **{f"r_{key}": f"R-{title}" for key, title in _DISTANCES.items()},
    "psnr": "PSNR",
    "lpips": "LPIPS",
    "lpips_random_features": "LPIPS (random features)",
    "ssim": "SSIM",
    "gradient_energy": "Gradient energy",
    "fine_power": "Power above Nyquist/2",
    "usage": "Codes used",
    "perplexity": "Perplexity",
}
"""Titles of the columns of a table, in order; `r_` is of reconstructions (the paper's Table 8)."""


class Reference(NamedTuple):
    """Reference of samples: statistics, and features where there are images."""

    features: gaussian.Gaussian
    spatial: gaussian.Gaussian | None
    image_features: np.ndarray | None
    """[N, d], for kernel distance, precision and recall; None where only statistics are known."""


def reference_of(outputs: dict[str, np.ndarray]) -> Reference:
    """Reference of the features of a set of images."""
    spatial = outputs.get("spatial")
    return Reference(
        gaussian.from_features([outputs["features"]]),
        None if spatial is None else gaussian.from_features([spatial]),
        outputs["features"],
    )


def reference_of_file(saved: gaussian.Saved, network: features.Network, path: str) -> Reference:
    """Reference of a file of statistics. ValueError if it names another network."""
    made_with, digest = saved.meta.get("features"), saved.meta.get("feature_weights")
    if made_with is None:
        LOG.info(
            f"{path}: does not say which network it is of; taken for {network.name}"
            f" {network.details}"
        )
    for name, there, here in (
        ("features", made_with, network.name),
        ("feature weights", digest, network.digest),
        *((n, saved.meta.get(n), x) for n, x in network.details.items()),
    ):
        if there is not None and there != here:
            raise ValueError(
                f"{path}: is of {name} {there}, and these are of {here}: give the same network and"
                " preprocessing for both"
            )
    return Reference(saved.features, saved.spatial, None)


def distances(
    network: features.Network, outputs: dict[str, np.ndarray], reference: Reference
) -> dict[str, float]:
    """Every figure that features of samples and a reference give.

    Warns where there are fewer images than features: the covariance is then singular and the
    Frechet distance far too large. `..._bias` estimates by how much, from half of the samples.
    """
    names, samples = NAMES[network.name], outputs["features"]
    width = samples.shape[1]
    if reference.features.mean.size != width:
        raise ValueError(
            f"the reference has {reference.features.mean.size} features and {network.name} gives"
            f" {width}: its statistics are of another network or layer"
        )
    key = names["fd"][0]
    drawn = gaussian.from_features([samples])
    figures = {key: gaussian.frechet_distance(drawn, reference.features)}
    if len(samples) >= 4:
        figures[f"{key}_bias"] = gaussian.bias(samples, reference.features)
    _warn(len(samples), reference, width, names["fd"][1], figures.get(f"{key}_bias"))
    if "spatial" in outputs and reference.spatial is not None:
        of_spatial = gaussian.from_features([outputs["spatial"]])
        figures[names["sfd"][0]] = gaussian.frechet_distance(of_spatial, reference.spatial)
    if "logits" in outputs and len(samples) >= SPLITS:
        mean, std = scores.inception_score(outputs["logits"], splits=SPLITS)
        figures |= {"inception_score": mean, "inception_score_std": std}
    if reference.image_features is None:
        LOG.info("the reference has no images: no kernel distance, precision or recall")
        return figures
    return figures | _neighbours(samples, reference.image_features, names["kd"][0])


def _neighbours(samples: np.ndarray, real: np.ndarray, key: str) -> dict[str, float]:
    least = min(len(samples), len(real))
    figures: dict[str, float] = {}
    if least >= SUBSET_SIZE:
        mean, std = scores.kernel_distance(samples, real, subsets=SUBSETS, subset_size=SUBSET_SIZE)
        figures |= {key: mean, f"{key}_std": std}
    elif least >= 2:  # all of them at once: still without bias
        figures[key] = scores.kernel_distance(samples, real, subsets=1, subset_size=least)[0]
    figures[f"{key}_subset"] = min(least, SUBSET_SIZE)
    if least > NEIGHBOURS:
        precision, recall = manifold.precision_recall(real, samples, NEIGHBOURS)
        figures |= {"precision": precision, "recall": recall}
    return figures


def _warn(count: int, reference: Reference, width: int, title: str, bias: float | None) -> None:
    least = min(count, reference.features.count or count)
    if least < width:
        how = "" if bias is None else f", here by about {bias:.3g} (from half of the samples)"
        LOG.info(
            f"warning: {least} images are fewer than the {width} features: {title} is too"
            f" large{how}, and only comparable between sets of the same size"
        )


def per_image(outputs: dict[str, np.ndarray], names: tuple[str, ...]) -> dict[str, float]:
    """Means over images, and standard deviations as `NAME_std`."""
    figures: dict[str, float] = {}
    for name in names:
        values = np.asarray(outputs[name], np.float64)
        figures |= {name: float(values.mean()), f"{name}_std": float(values.std())}
    return figures


# --- files ---------------------------------------------------------------------------------------


def write(
    out: epath.Path, task: str, options: Any, figures: dict[str, float], facts: dict[str, Any]
) -> None:
    """result.json with everything that repeats the run, and row.md, a Markdown table of one row.

    facts: what the figures depend on beside the options: "model", "images", "features", ...
    Only the first process writes; stdout gets the table.
    """
    if jax.process_index() != 0:
        return
    result = {
        "task": task,
        "figures": {name: _plain(x) for name, x in figures.items()},
        **facts,
        "options": {k: x for k, x in dataclasses.asdict(options).items() if k != "overwrite"},
        "versions": versions(),
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    rundir.write_text(out / "result.json", json.dumps(result, indent=2, default=str) + "\n")
    text = table(figures, facts)
    rundir.write_text(out / "row.md", text)
    sys.stdout.write(text)
    LOG.info(f"{out / 'result.json'} holds all that repeats this")


def table(figures: dict[str, float], facts: dict[str, Any]) -> str:
    """A Markdown table of one row: the facts, then every figure that has a title."""
    cells = {"Model": facts.get("name", ""), "N": facts.get("count", "")}
    cells |= {TITLES[name]: _shown(name, figures) for name in TITLES if name in figures}
    cells |= {name: facts[name] for name in ("Sampler", "Reference") if name in facts}
    head, values = (" | ".join(str(x) for x in row) for row in (cells.keys(), cells.values()))
    return f"| {head} |\n|{' --- |' * len(cells)}\n| {values} |\n"


def _shown(name: str, figures: dict[str, float]) -> str:
    spread = figures.get(f"{name}_std")
    value = figures[name]
    text = "inf" if np.isinf(value) else f"{value:.4g}"
    return text if spread is None else f"{text} ± {spread:.2g}"


def _plain(value: float) -> float | str:
    return value if np.isfinite(value) else str(value)  # JSON has no infinity


def versions() -> dict[str, str]:
    """Versions that affect figures: Python, ldm_jax, jax, NumPy, and Pillow, which resizes."""
    names = ("ldm-jax", "jax", "jaxlib", "flax", "numpy", "scipy", "pillow")
    return {"python": sys.version.split()[0]} | {n: importlib.metadata.version(n) for n in names}
