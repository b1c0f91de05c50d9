"""Kernel distance, Inception score and CLIP score, from features and logits on the host."""

import numpy as np
from scipy import special

SEED = 2020
"""Seed of the subsets and of the order, torch-fidelity's own, so that figures compare."""


def kernel_distance(
    a: np.ndarray,
    b: np.ndarray,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = SEED,
) -> tuple[float, float]:
    """(mean, standard deviation) over subsets of the KID of features [N, d], [M, d].

    The unbiased estimate of the squared MMD with the kernel (x . y / d + 1)^3 (Binkowski et al.
    2018, section 4); it has no bias for few images, where FID has. ValueError if there are fewer
    rows than `subset_size`.
    """
    least = min(len(a), len(b))
    if least < subset_size:
        raise ValueError(f"{least} images are fewer than the {subset_size} of a subset of KID")
    draw = np.random.RandomState(seed)  # the generator of torch-fidelity
    distances = []
    for _ in range(subsets):
        x = a[draw.choice(len(a), subset_size, replace=False)]
        y = b[draw.choice(len(b), subset_size, replace=False)]
        distances.append(_squared_mmd(np.asarray(x, np.float64), np.asarray(y, np.float64)))
    return float(np.mean(distances)), float(np.std(distances))


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return (p @ q.T / p.shape[1] + 1) ** 3

    n, within = len(x), 0.0
    for rows in (x, y):
        own = kernel(rows, rows)
        within += (own.sum() - np.trace(own)) / (n * (n - 1))
    return float(within - 2 * kernel(x, y).mean())


def inception_score(
    logits: np.ndarray, *, splits: int = 10, seed: int = SEED
) -> tuple[float, float]:
    """(mean, standard deviation) over splits of exp(E KL(p(y|x) || p(y))), logits [N, classes].

    Salimans et al. 2016, section 4, on logits without the last layer's bias, rows in the random
    order that torch-fidelity takes. ValueError if there are fewer rows than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} images cannot be split into {splits} parts")
    draw = np.random.RandomState(seed)  # the generator of torch-fidelity
    log_p = special.log_softmax(np.asarray(logits, np.float64)[draw.permutation(len(logits))], 1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        marginal = special.logsumexp(part, axis=0) - np.log(len(part))
        scores.append(np.exp(np.mean(np.sum(np.exp(part) * (part - marginal), axis=1))))
    return float(np.mean(scores)), float(np.std(scores))


def clip_score(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """[N]: 100 max(cos, 0) of CLIP's image and text embeddings [N, d], as torchmetrics scales it.

    Hessel et al. 2021, eq. 1, has 2.5 in place of 100.
    """
    a, b = (np.asarray(x, np.float64) for x in (images, texts))
    cos = np.sum(a * b, axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return 100 * np.maximum(cos, 0)


def codebook(counts: np.ndarray) -> dict[str, float]:
    """`usage`, the share of codes that occur, and `perplexity`, exp of the entropy of their counts.

    counts: how often each of the codebook's codes was taken.
    """
    p = np.asarray(counts, np.float64)
    if p.sum() <= 0:
        raise ValueError("no code was taken: there are no images")
    p = p / p.sum()
    return {
        "usage": float(np.mean(p > 0)),
        "perplexity": float(np.exp(-np.sum(special.xlogy(p, p)))),
    }
