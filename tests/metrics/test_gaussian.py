"""Frechet distances: closed forms, other programs' formulas, bias, files."""

import numpy as np
import pytest
from scipy import linalg

from ldm_jax.metrics import gaussian
from ldm_jax.metrics.gaussian import Gaussian

RNG = np.random.default_rng(0)


def covariance(width, rank, rng=RNG):
    x = rng.normal(size=(rank, width))
    return x.T @ x / rank


def test_two_gaussians_in_closed_form():
    # commuting covariances: |mu|^2 + sum (sqrt(a) - sqrt(b))^2
    turn = linalg.qr(RNG.normal(size=(5, 5)))[0]
    a, b = np.array([4.0, 1, 0, 9, 2]), np.array([1.0, 1, 16, 0, 2])
    apart = np.array([3.0, 0, 0, 4, 0])
    one = Gaussian(np.zeros(5), turn @ np.diag(a) @ turn.T)
    other = Gaussian(apart, turn @ np.diag(b) @ turn.T)
    expected = 25 + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert gaussian.frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert gaussian.frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_against_the_root_of_the_product():
    """The formulas of pytorch-fid (sqrtm) and torch-fidelity (eigenvalues)."""
    one = Gaussian(RNG.normal(size=40), covariance(40, 90))
    other = Gaussian(RNG.normal(size=40), covariance(40, 70))
    product = one.cov @ other.cov
    apart = one.mean - other.mean
    outer = apart @ apart + np.trace(one.cov) + np.trace(other.cov)
    found = gaussian.frechet_distance(one, other)
    assert found == pytest.approx(outer - 2 * np.trace(linalg.sqrtm(product).real), rel=1e-9)
    eigenvalues = np.linalg.eigvals(product).astype(complex)
    assert found == pytest.approx(outer - 2 * np.sum(np.sqrt(eigenvalues).real), rel=1e-9)


def test_fewer_images_than_features():
    """Singular covariances, whose product has no root in numbers: symmetric, and never NaN."""
    one = gaussian.from_features([RNG.normal(size=(10, 64))])
    other = gaussian.from_features([RNG.normal(size=(12, 64))])
    there, back = gaussian.frechet_distance(one, other), gaussian.frechet_distance(other, one)
    assert there == pytest.approx(back, rel=1e-6)
    assert there > 0


def test_moments_of_batches_are_those_of_all_rows():
    x = (1e4 + RNG.normal(size=(101, 7))).astype(np.float32)  # far from zero
    found = gaussian.from_features([x[:40], x[40:40], x[40:41], x[41:]])
    np.testing.assert_allclose(found.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-12)
    expected = np.cov(x.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(found.cov, expected, rtol=1e-9, atol=1e-12)
    assert found.count == 101


def test_bias_is_that_of_a_small_sample():
    draw = np.random.default_rng(1)
    reference = Gaussian(np.zeros(20), np.eye(20))
    samples = draw.normal(size=(400, 20))
    distance = gaussian.frechet_distance(gaussian.from_features([samples]), reference)
    # all of the distance is bias here
    assert gaussian.bias(samples, reference) == pytest.approx(distance, rel=0.3)


def test_features_that_are_not_finite_are_refused():
    moments = gaussian.add(gaussian.empty(3), np.ones((5, 3)))
    with pytest.raises(FloatingPointError, match="image 6 are not finite"):
        gaussian.add(moments, np.array([[1, 1, 1], [1, np.nan, 1]]))


def test_what_has_no_distance_is_refused():
    with pytest.raises(ValueError, match="of 3 and of 4 features"):
        gaussian.frechet_distance(
            Gaussian(np.zeros(3), np.eye(3)), Gaussian(np.zeros(4), np.eye(4))
        )
    with pytest.raises(ValueError, match="1 images have no covariance"):
        gaussian.from_features([np.ones((1, 3))])


# --- files ---------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    features = gaussian.from_features([RNG.normal(size=(20, 4))])
    spatial = gaussian.from_features([RNG.normal(size=(20, 3))])
    gaussian.write(tmp_path / "x.npz", features, spatial, {"features": "CLIP"})
    saved = gaussian.read(tmp_path / "x.npz")
    np.testing.assert_array_equal(saved.features.cov, features.cov)
    np.testing.assert_array_equal(saved.spatial.mean, spatial.mean)
    assert saved.features.count == 20
    assert saved.meta["features"] == "CLIP"
    with np.load(tmp_path / "x.npz") as file:  # as pytorch-fid and the ADM suite read it
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(file.files)
        assert file["mu"].dtype == np.float64


def test_files_of_pytorch_fid_and_of_the_adm_suite(tmp_path):
    mu, sigma = RNG.normal(size=4), covariance(4, 9)
    np.savez_compressed(tmp_path / "fid.npz", mu=mu, sigma=sigma)
    saved = gaussian.read(tmp_path / "fid.npz")
    np.testing.assert_array_equal(saved.features.cov, sigma)
    assert saved.spatial is saved.images is None
    images = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma, arr_0=images)
    saved = gaussian.read(tmp_path / "adm.npz")
    assert saved.images.shape == (2, 8, 8, 3)
    assert saved.spatial.mean.shape == (4,)


def test_files_that_are_no_statistics(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(3))
    with pytest.raises(ValueError, match=r"images.npz: holds arr_0, and no statistics"):
        gaussian.read(tmp_path / "images.npz")
    (tmp_path / "text.npz").write_text("mu and sigma")
    with pytest.raises(ValueError, match=r"text.npz: is no .npz archive"):
        gaussian.read(tmp_path / "text.npz")
    np.savez(tmp_path / "nan.npz", mu=np.full(2, np.nan), sigma=np.eye(2))
    with pytest.raises(ValueError, match="holds NaN"):
        gaussian.read(tmp_path / "nan.npz")
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"mean of \(3,\) with a covariance of \(2, 2\)"):
        gaussian.read(tmp_path / "odd.npz")
