"""Means and covariances of features, their Frechet distance, and files of them.

All in float64: a float32 covariance of 2048 features loses the small eigenvalues that FID counts.
"""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from ldm_jax.runtime import reading

FORMAT = 1  # of the JSON in a file of statistics; a reader refuses a newer one


class Gaussian(NamedTuple):
    """Mean [d] and unbiased covariance [d, d] of `count` rows; count None where a file omits it."""

    mean: np.ndarray
    cov: np.ndarray
    count: int | None = None


class Moments(NamedTuple):
    """Sums over the rows so far: their number, mean [d], and scatter about it [d, d]."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray


def empty(width: int) -> Moments:
    """No rows yet."""
    return Moments(0, np.zeros(width), np.zeros((width, width)))


def add(moments: Moments, features: np.ndarray) -> Moments:
    """Add the rows of `features` [n, d].

    Each batch is centred before it is squared (Chan et al. 1979), so that a mean far from zero
    costs no digits. FloatingPointError if a feature is not finite, naming its row.
    """
    x = np.asarray(features, np.float64)
    check_finite(x, moments.count)
    if not len(x):
        return moments
    count = moments.count + len(x)
    mean = x.mean(axis=0)
    centred, step = x - mean, mean - moments.mean
    weight = moments.count * len(x) / count
    scatter = moments.scatter + centred.T @ centred + weight * np.outer(step, step)
    return Moments(count, moments.mean + step * (len(x) / count), scatter)


def from_moments(moments: Moments) -> Gaussian:
    """Mean and covariance of `moments`. ValueError for fewer than two rows, which have none."""
    if moments.count < 2:
        raise ValueError(f"{moments.count} images have no covariance: give at least 2")
    return Gaussian(moments.mean, moments.scatter / (moments.count - 1), moments.count)


def from_features(batches: Iterable[np.ndarray]) -> Gaussian:
    """Mean and covariance of features [n, d] that come in any number of batches."""
    moments = None
    for batch in batches:
        moments = add(empty(batch.shape[1]) if moments is None else moments, batch)
    return from_moments(empty(0) if moments is None else moments)


def check_finite(features: np.ndarray, first: int = 0) -> None:
    """FloatingPointError naming the first row with NaN or infinity; `first` is the first's number.

    One such row would make every figure NaN.
    """
    rows = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(rows):
        raise FloatingPointError(
            f"features of image {first + rows[0]} are not finite (NaN or infinity), and of"
            f" {len(rows)} in all of its batch: are these images, and the weights of this network?"
        )


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al. 2017, eq. 6).

    The trace of the root is that of (A^(1/2) B A^(1/2))^(1/2), which is symmetric: its eigenvalues
    are real, and those of the size of rounding are taken as zero. The root of A B itself fails
    numerically where there are fewer rows than features. ValueError if the widths differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"statistics of {a.mean.size} and of {b.mean.size} features: they are of different"
            " networks or layers"
        )
    values, vectors = np.linalg.eigh(a.cov)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = root @ b.cov @ root
    # symmetrized: rounding leaves `inner` slightly unsymmetric, and eigvalsh reads one triangle
    squares = np.maximum(np.linalg.eigvalsh((inner + inner.T) / 2), 0)
    rounding = squares.max() * len(squares) * np.finfo(np.float64).eps
    shared = np.sqrt(squares[squares > rounding]).sum()
    apart = a.mean - b.mean
    return float(apart @ apart + np.trace(a.cov) + np.trace(b.cov) - 2 * shared)


def bias(features: np.ndarray, reference: Gaussian, seed: int = 0) -> float:
    """Estimate the excess of the distance of `features` [n, d] over that of infinitely many
    samples.

    The distance of n samples exceeds its limit by about c / n (Chong & Forsyth 2020): that of n / 2
    of them, here the mean of two random halves, minus that of all. With fewer samples than features
    this is too small. ValueError for fewer than 4 samples.
    """
    if len(features) < 4:
        raise ValueError(f"{len(features)} images are too few to halve: give at least 4")
    rows = np.random.default_rng(seed).permutation(len(features))
    halves = (rows[: len(rows) // 2], rows[len(rows) // 2 :])
    of_halves = [frechet_distance(from_features([features[half]]), reference) for half in halves]
    return float(np.mean(of_halves)) - frechet_distance(from_features([features]), reference)


# --- files ---------------------------------------------------------------------------------------


class Saved(NamedTuple):
    """Content of a file of statistics.

    features, spatial: of the network's main features, and of those of sFID if the file has them.
    images: uint8 [N, H, W, 3] for precision and recall, as the ADM suite adds them, or None.
    meta: as given to `write`, {} for files of other programs.
    """

    features: Gaussian
    spatial: Gaussian | None
    images: np.ndarray | None
    meta: dict[str, Any]


def write(
    path: epath.PathLike, features: Gaussian, spatial: Gaussian | None, meta: dict[str, Any]
) -> None:
    """A .npz that pytorch-fid (mu, sigma) and the ADM suite (mu_s, sigma_s besides) read."""
    arrays = {"mu": features.mean, "sigma": features.cov}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.cov}
    text = json.dumps({"format": FORMAT, "count": features.count, **meta})
    with epath.Path(path).open("wb") as file:
        np.savez(file, **arrays, ldm_jax=np.array(text))


def read(path: epath.PathLike) -> Saved:
    """A .npz of `write`, pytorch-fid or the ADM suite. ValueError names what it lacks."""
    path = epath.Path(path)
    arrays = reading.read_npz(path, "write it with `ldm-eval statistics`")
    if not {"mu", "sigma"} <= arrays.keys():
        raise ValueError(
            f"{path}: holds {', '.join(sorted(arrays)) or 'nothing'}, and no statistics (mu,"
            " sigma): write them with `ldm-eval statistics`"
        )
    text = str(arrays["ldm_jax"]) if "ldm_jax" in arrays else "{}"
    meta = reading.parse_json(text, f"{path}: its ldm_jax")
    with reading.refusals(path, "write it with `ldm-eval statistics`"):
        reading.check_format(meta.get("format", 0), FORMAT, str(path))
        count = meta.get("count")
        if count is not None and (type(count) is not int or count < 2):
            raise ValueError(f"statistics of {count!r:.40} images")
    spatial = None
    if {"mu_s", "sigma_s"} <= arrays.keys():
        spatial = _gaussian(path, arrays["mu_s"], arrays["sigma_s"], count)
    features = _gaussian(path, arrays["mu"], arrays["sigma"], count)
    return Saved(features, spatial, arrays.get("arr_0"), meta)


def _gaussian(path: epath.Path, mean: np.ndarray, cov: np.ndarray, count: int | None) -> Gaussian:
    with reading.refusals(path):
        mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
        raise ValueError(f"{path}: a mean of {mean.shape} with a covariance of {cov.shape}")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"{path}: holds NaN or infinity; make the statistics anew")
    return Gaussian(mean, cov, count)
