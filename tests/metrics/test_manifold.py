"""Precision, recall and memorisation on points whose neighbours can be counted by hand."""

import numpy as np
import pytest

from ldm_jax.metrics import manifold

LINE = np.array([[0.0], [1.0], [2.0], [3.0], [10.0]])


def test_distances():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))
    expected = np.linalg.norm(a[:, None] - b[None], axis=-1)
    np.testing.assert_allclose(manifold.distances(a, b), expected, rtol=1e-12)
    assert np.abs(manifold.distances(1e4 + a, 1e4 + a).diagonal()).max() < 1e-3  # never NaN


def test_radii_leave_the_point_itself_out():
    assert manifold.radii(LINE, 1).tolist() == [1, 1, 1, 1, 7]
    assert manifold.radii(LINE, 3).tolist() == [3, 2, 2, 3, 9]


def test_precision_and_recall_by_hand():
    # real balls at k = 1: [-1, 1] [0, 2] [1, 3] [2, 4] [3, 17]
    generated = np.array([[-0.5], [-1.5], [5.0], [30.0]])
    # generated balls at k = 1: [-1.5, 0.5] [-2.5, -0.5] [-0.5, 10.5] [5, 55]
    precision, recall = manifold.precision_recall(LINE, generated, k=1)
    assert precision == 2 / 4
    assert recall == 1
    assert manifold.precision_recall(generated, LINE, k=1) == (recall, precision)


def test_a_set_against_itself_does_not_count_its_own_balls():
    lonely = np.array([[0.0], [1.0], [10.0]])  # nearest neighbours: 1, 0, 1
    assert manifold.precision_recall(lonely, lonely, k=1) == (1, 1)
    precision, recall = manifold.precision_recall(lonely, lonely, k=1, same=True)
    # the third point lies in no other point's ball, but both others lie in its own
    assert precision == pytest.approx(2 / 3)
    assert recall == pytest.approx(2 / 3)


def test_rows_at_a_time_change_nothing(monkeypatch):
    draw = np.random.default_rng(0)
    real, other = draw.normal(size=(11, 3)), draw.normal(size=(9, 3))
    figures = [
        lambda: manifold.radii(real, 3).tolist(),
        lambda: manifold.precision_recall(real, other),
        lambda: manifold.precision_recall(real, real, same=True),
        lambda: manifold.memorisation(real, other),
    ]
    whole = [figure() for figure in figures]
    monkeypatch.setattr(manifold, "ROWS", 4)
    assert [figure() for figure in figures] == whole


def test_memorisation_counts_copies():
    assert manifold.memorisation(LINE, LINE) == 1
    assert manifold.memorisation(LINE, LINE + 0.9) == 1  # within 1 of its neighbour to the left
    # a distance equal to the radius is no copy
    assert manifold.memorisation(LINE, np.array([[-1.0], [4.0], [18.0], [0.5]])) == 0.5
    assert manifold.memorisation(LINE, np.array([[-2.0], [17.5]])) == 0
