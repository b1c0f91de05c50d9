"""Kernel distance, Inception score, CLIP score and codebook figures, by hand and by formula."""

import numpy as np
import pytest

from ldm_jax.metrics import manifold, scores

RNG = np.random.default_rng(0)
REAL = RNG.normal(size=(90, 16)).astype(np.float32)
FAKE = (0.3 + 1.2 * RNG.normal(size=(80, 16))).astype(np.float32)


def test_kernel_distance_by_its_definition():
    def k(x, y):
        return (np.dot(x, y) / len(x) + 1) ** 3

    x, y = np.float64(FAKE[:12]), np.float64(REAL[:12])
    pairs = [(i, j) for i in range(12) for j in range(12)]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / (12 * 11)
    expected = within - 2 * np.mean([k(x[i], y[j]) for i, j in pairs])
    mean, std = scores.kernel_distance(x, y, subsets=2, subset_size=12)
    assert mean == pytest.approx(expected, rel=1e-9)
    assert std == pytest.approx(0, abs=1e-9)  # both subsets hold all rows


@pytest.mark.torch
def test_kernel_distance_of_torch_fidelity():
    """Its random subsets; it needs torchvision, and is in no extra."""
    torch = pytest.importorskip("torch")
    kid = pytest.importorskip("torch_fidelity.metric_kid", exc_type=ImportError)
    expected = kid.kid_features_to_metric(
        torch.as_tensor(FAKE), torch.as_tensor(REAL), kid_subsets=7, kid_subset_size=50
    )
    found = scores.kernel_distance(FAKE, REAL, subsets=7, subset_size=50)
    names = ("kernel_inception_distance_mean", "kernel_inception_distance_std")
    assert found == pytest.approx([expected[name] for name in names], rel=1e-3)


def test_kernel_distance_has_no_bias():
    draw = np.random.default_rng(3)
    pairs = [draw.normal(size=(2, 20, 8)) for _ in range(200)]
    found = [scores.kernel_distance(a, b, subsets=1, subset_size=20)[0] for a, b in pairs]
    assert abs(np.mean(found)) < 3 * np.std(found) / len(found) ** 0.5
    with pytest.raises(ValueError, match="80 images are fewer than the 1000"):
        scores.kernel_distance(REAL, FAKE)


def test_inception_score_by_hand():
    certain = 50 * np.eye(4)[np.arange(40) % 4]  # each image of one class, all four alike
    assert scores.inception_score(certain, splits=1)[0] == pytest.approx(4, rel=1e-6)
    assert scores.inception_score(np.zeros((40, 4)))[0] == pytest.approx(1, rel=1e-9)
    with pytest.raises(ValueError, match="9 images cannot be split into 10"):
        scores.inception_score(np.zeros((9, 4)))


@pytest.mark.torch
def test_inception_score_as_torch_fidelity_writes_it():
    import torch

    logits = 3 * RNG.normal(size=(95, 30)).astype(np.float32)
    rows = np.random.RandomState(2020).permutation(95)
    p = torch.as_tensor(logits)[torch.as_tensor(rows)].double().softmax(1)
    parts = [p[i * 95 // 10 : (i + 1) * 95 // 10] for i in range(10)]
    found = [(q * (q.log() - q.mean(0, keepdim=True).log())).sum(1).mean().exp() for q in parts]
    mean, std = scores.inception_score(logits)
    assert mean == pytest.approx(np.mean(found), rel=1e-9)
    assert std == pytest.approx(np.std(found), rel=1e-9)


@pytest.mark.torch
def test_precision_and_recall_as_torch_fidelity_writes_them():
    import torch

    a, b = torch.as_tensor(FAKE).double(), torch.as_tensor(REAL).double()
    apart = torch.cdist(a, b)
    own = [torch.cdist(x, x).kthvalue(4).values for x in (a, b)]  # the first is the row itself
    expected = [
        (apart <= own[1][None]).any(1).double().mean(),
        (apart <= own[0][:, None]).any(0).double().mean(),
    ]
    assert manifold.precision_recall(REAL, FAKE) == pytest.approx([float(x) for x in expected])


def test_clip_score():
    images, texts = np.float32([[2, 0], [1, 1], [1, 0]]), np.float32([[5, 0], [0, 3], [-1, 0]])
    np.testing.assert_allclose(scores.clip_score(images, texts), [100, 50 * 2**0.5, 0], rtol=1e-6)


def test_codebook_figures():
    found = scores.codebook(np.array([5, 5, 0, 5, 5, 0, 0, 0]))
    assert found == pytest.approx({"usage": 0.5, "perplexity": 4})
    with pytest.raises(ValueError, match="no code"):
        scores.codebook(np.zeros(4))
