"""The digits' split and images."""

import numpy as np
import pytest

from ldm_jax.data import digits

datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is in the extra [demo]")


def test_split_is_stratified_random_and_fixed():
    labels = datasets.load_digits().target
    train, test = digits.split_of(labels)
    assert (len(train), len(test)) == (1437, 360)
    assert sorted([*train, *test]) == list(range(1797))
    share = np.bincount(labels[test]) / np.bincount(labels) * 5
    np.testing.assert_allclose(share, 1, atol=0.03)
    assert test[:8].tolist() == digits.split_of(labels)[1][:8].tolist()
    # Spread over the file, whose parts were written by different people.
    counts = np.histogram(test, bins=9, range=(0, 1797))[0]
    assert counts.min() > 25


@pytest.mark.parametrize("size", digits.SIZES)
def test_enlarged_digits_shrink_back_to_themselves(size):
    digit = datasets.load_digits().images[0]
    image = digits.enlarge(digit, size)
    assert image.size == (size, size)
    assert image.mode == "L"
    pixels = np.asarray(image, np.float64)
    back = pixels.reshape(8, size // 8, 8, size // 8).mean((1, 3)) / 255 * 16
    assert np.abs(back - digit).mean() < 1  # of 16 levels
