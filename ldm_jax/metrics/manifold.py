"""Precision, recall and memorisation of samples from k nearest neighbours in a feature space.

Distances are computed for `ROWS` rows at a time: 50 000 against 50 000 are never in memory at once.
"""

from collections.abc import Iterator

import numpy as np

ROWS = 2048  # against 50 000 in float64: 0.8 GB of distances


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances [N, M] between feature rows [N, d] and [M, d], in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    squared = np.sum(a**2, 1)[:, None] + np.sum(b**2, 1)[None] - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0))


def radii(features: np.ndarray, k: int) -> np.ndarray:
    """Distance [N] from each row to its k-th nearest other row. ValueError if it has fewer."""
    if len(features) <= k:
        raise ValueError(
            f"{len(features)} images have no {k} neighbours each: give at least {k + 1}"
        )
    blocks = [np.partition(apart, k - 1, axis=1)[:, k - 1] for _, apart in _blocks(features)]
    return np.concatenate(blocks)


def precision_recall(
    real: np.ndarray, generated: np.ndarray, k: int = 3, *, same: bool = False
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1-2) of features [N, d], [M, d].

    Precision: share of generated rows within the k-NN ball of some real row; recall: the same with
    the roles exchanged. `same` says that both are one set: a row's own ball then does not count.
    """
    of_real, of_generated = radii(real, k), radii(generated, k)
    inside, covered = [], np.zeros(len(real), bool)
    for rows, apart in _blocks(generated, None if same else real):
        inside.append(np.any(apart <= of_real[None, :], axis=1))
        covered |= np.any(apart <= of_generated[rows, None], axis=0)
    return float(np.mean(np.concatenate(inside))), float(np.mean(covered))


def memorisation(train: np.ndarray, samples: np.ndarray) -> float:
    """Share of samples [M, d] nearer to a training row than that row's own nearest neighbour."""
    own = radii(train, 1)
    copies = [np.any(apart < own[None, :], axis=1) for _, apart in _blocks(samples, train)]
    return float(np.mean(np.concatenate(copies)))


def _blocks(a: np.ndarray, b: np.ndarray | None = None) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows, distances from these rows of `a` to all of `b`); without `b` to all others of `a`."""
    b64 = np.asarray(a if b is None else b, np.float64)
    for first in range(0, len(a), ROWS):
        rows = slice(first, min(first + ROWS, len(a)))
        apart = distances(a[rows], b64)
        if b is None:
            np.fill_diagonal(apart[:, first:], np.inf)
        yield rows, apart
