"""Precision, recall and memorisation of samples from k nearest neighbours in a feature space."""

import numpy as np


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances [N, M] between feature rows [N, d] and [M, d], in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    squared = np.sum(a**2, 1)[:, None] + np.sum(b**2, 1)[None] - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0))


def radii(features: np.ndarray, k: int) -> np.ndarray:
    """Distance [N] from each row to its k-th nearest other row."""
    apart = distances(features, features)
    np.fill_diagonal(apart, np.inf)
    return np.partition(apart, k - 1, axis=1)[:, k - 1]


def precision_recall(
    real: np.ndarray, generated: np.ndarray, k: int = 3, *, same: bool = False
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1-2) of features [N, d], [M, d].

    Precision: share of generated rows within the k-NN ball of some real row; recall: the same with
    the roles exchanged. `same` says that both are one set: a row's own ball then does not count.
    """
    apart = distances(generated, real)
    if same:
        np.fill_diagonal(apart, np.inf)
    precision = np.mean(np.any(apart <= radii(real, k)[None, :], axis=1))
    recall = np.mean(np.any(apart <= radii(generated, k)[:, None], axis=0))
    return float(precision), float(recall)


def memorisation(train: np.ndarray, samples: np.ndarray) -> float:
    """Share of samples [M, d] nearer to a training row than that row's own nearest neighbour."""
    apart = distances(samples, train)
    return float(np.mean(np.any(apart < radii(train, 1)[None, :], axis=1)))
