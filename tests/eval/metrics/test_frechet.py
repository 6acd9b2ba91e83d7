import tracemalloc

import numpy as np
import pytest
import scipy.linalg
from numpy.testing import assert_allclose

from eval.metrics.frechet import FeatureStatistics, Gaussian, frechet_distance


def features(n, d, seed, spread=1.0):
    """ReLU-like features with correlated dimensions and a decaying spectrum."""
    rng = np.random.RandomState(seed)
    mix = np.random.RandomState(0).randn(d, d) / np.arange(1, d + 1)[:, None]
    return np.maximum(spread * rng.randn(n, d) @ mix + 0.3, 0)


def moments(x):
    """The obvious two-pass version."""
    return Gaussian(x.mean(axis=0), np.cov(x, rowvar=False))


def rotation(d, seed=5):
    return np.linalg.qr(np.random.RandomState(seed).randn(d, d))[0]


def stream(x, batch):
    statistics = FeatureStatistics(x.shape[1])
    for start in range(0, len(x), batch):
        statistics.update(x[start : start + batch])
    return statistics


# ---------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("basis", ["diagonal", "rotated"])
def test_commuting_covariances_have_the_closed_form(basis):
    rng = np.random.RandomState(1)
    a, b = rng.uniform(0, 4, 12), rng.uniform(0, 4, 12)
    a[3] = b[7] = 0  # a dimension that one side does not use
    m, n = rng.randn(12), rng.randn(12)
    q = np.eye(12) if basis == "diagonal" else rotation(12)
    expected = ((m - n) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    got = frechet_distance(Gaussian(m, q * a @ q.T), Gaussian(n, q * b @ q.T))
    assert_allclose(got, expected, rtol=1e-9)


def test_two_by_two_that_do_not_commute():
    """tr sqrt(M) of a 2x2 matrix is sqrt(tr M + 2 sqrt(det M))."""
    a = np.array([[2.0, 0.5], [0.5, 1.0]])
    b = np.array([[1.0, -0.3], [-0.3, 3.0]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    zero = np.zeros(2)
    got = frechet_distance(Gaussian(zero, a), Gaussian(zero, b))
    assert_allclose(got, np.trace(a) + np.trace(b) - 2 * root, rtol=1e-12)


def test_symmetry_rotation_scale_and_translation_laws():
    x, y = features(300, 20, 1), features(250, 20, 2, spread=1.3)
    distance = frechet_distance(moments(x), moments(y))
    assert distance > 0.1
    q, t = rotation(20), np.random.RandomState(3).randn(20)
    assert_allclose(frechet_distance(moments(y), moments(x)), distance, rtol=1e-10)
    assert_allclose(frechet_distance(moments(x @ q), moments(y @ q)), distance, rtol=1e-10)
    assert_allclose(frechet_distance(moments(3 * x), moments(3 * y)), 9 * distance, rtol=1e-10)
    assert_allclose(frechet_distance(moments(x + t), moments(y + t)), distance, rtol=1e-9)
    assert_allclose(frechet_distance(moments(x), moments(x + t)), t @ t, rtol=1e-9)


@pytest.mark.parametrize(("n", "d"), [(300, 20), (20, 64), (3, 64)])
def test_identity_is_zero_even_when_rank_deficient(n, d):
    gaussian = moments(features(n, d, 1))
    assert 0 <= frechet_distance(gaussian, gaussian) < 1e-11 * np.trace(gaussian.covariance)


def test_constant_features_are_exactly_zero_apart_from_the_mean():
    a = stream(np.full((10, 4), 2.5), 3).gaussian()
    b = stream(np.full((10, 4), 0.5), 4).gaussian()
    assert frechet_distance(a, a) == 0
    assert frechet_distance(a, b) == 16


# --------------------------------------------------------------------------- oracles


@pytest.mark.parametrize(("n", "d"), [(400, 32), (60, 64), (40, 128)])
@pytest.mark.parametrize("oracle", ["scipy", "torch-fidelity"])
def test_agrees_with_the_libraries(n, d, oracle):
    a, b = moments(features(n, d, 1)), moments(features(n, d, 2, spread=1.2))
    if oracle == "scipy":
        root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
        offset = a.mean - b.mean
        expected = offset @ offset + np.trace(a.covariance + b.covariance - 2 * root.real)
    else:
        metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
        sides = ({"mu": g.mean, "sigma": g.covariance} for g in (a, b))
        expected = metric_fid.fid_statistics_to_metric(*sides, False)[metric_fid.KEY_METRIC_FID]
    assert_allclose(frechet_distance(a, b), expected, rtol=1e-5)


def test_rank_deficient_agrees_with_the_svd_of_centred_factors():
    """With N < D the features themselves are exact factors of the covariances."""
    x, y = features(40, 128, 1), features(30, 128, 2, spread=1.2)
    f, g = ((v - v.mean(axis=0)) / np.sqrt(len(v) - 1) for v in (x, y))
    offset = x.mean(axis=0) - y.mean(axis=0)
    overlap = np.linalg.svd(f @ g.T, compute_uv=False).sum()
    expected = offset @ offset + (f**2).sum() + (g**2).sum() - 2 * overlap
    assert_allclose(frechet_distance(moments(x), moments(y)), expected, rtol=1e-7)


# ------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_streaming_equals_the_whole(batch):
    x = features(331, 16, 4)
    got, expected = stream(x, batch).gaussian(), moments(x)
    assert_allclose(got.mean, expected.mean, rtol=1e-12)
    assert_allclose(got.covariance, expected.covariance, rtol=1e-10, atol=1e-14)
    assert (got.covariance == got.covariance.T).all()


@pytest.mark.parametrize("batch", [1, 64])
def test_no_cancellation_far_from_zero(batch):
    """Unshifted sums of squares of 1e6 +- 0.01 keep no digit of the variance."""
    x = 1e6 + 0.01 * np.random.RandomState(6).randn(2000, 3)
    got = stream(x, batch).gaussian().covariance
    assert_allclose(np.diag(got), x.var(axis=0, ddof=1), rtol=1e-6)


def test_float32_features_are_summed_in_float64():
    x = (100 + 0.01 * np.random.RandomState(7).randn(20_000, 3)).astype(np.float32)
    got = stream(x, 64).gaussian()
    assert_allclose(np.diag(got.covariance), x.astype(float).var(axis=0, ddof=1), rtol=1e-9)


def test_memory_does_not_grow_with_n():
    def peak(batches):
        statistics = FeatureStatistics(64)
        tracemalloc.start()
        for i in range(batches):
            statistics.update(np.random.RandomState(i).randn(50, 64))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    assert peak(200) < peak(10) + 20_000  # keeping the features would take 4.8 MB more


def test_update_leaves_the_callers_array_alone():
    x = features(10, 4, 1)
    before = x.copy()
    stream(x, 5)
    assert (x == before).all()


def test_an_empty_batch_changes_nothing():
    statistics = stream(features(10, 4, 1), 5)
    statistics.update(np.empty((0, 4)))
    assert statistics.n == 10


# -------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (np.zeros(4), r"shape \(4,\); expected \(N, 4\)"),  # squeezed to 1-D
        (np.zeros((3, 5)), r"shape \(3, 5\); expected \(N, 4\)"),
        (np.full((3, 4), np.nan), "NaN or infinity"),
        (np.full((3, 4), np.inf), "NaN or infinity"),
    ],
)
def test_statistics_refuse_bad_features(batch, message):
    statistics = FeatureStatistics(4)
    with pytest.raises(ValueError, match=message):
        statistics.update(batch)
    assert statistics.n == 0


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_samples_have_no_covariance(n):
    with pytest.raises(ValueError, match=f"at least 2 images, got {n}"):
        stream(np.zeros((n, 4)), 1).gaussian()


GOOD = Gaussian(np.zeros(3), np.eye(3))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Gaussian(np.zeros(2), np.eye(2)), "3 and 2 features"),
        (Gaussian(np.zeros(3), np.eye(2)), r"expected \(D,\) and \(D, D\)"),
        (Gaussian(np.full(3, np.nan), np.eye(3)), "NaN or infinity"),
        (Gaussian(np.zeros(3), np.full((3, 3), np.inf)), "NaN or infinity"),
        (Gaussian(np.zeros(3), np.eye(3) + np.eye(3, k=1)), "not symmetric"),
        (Gaussian(np.zeros(3), np.diag([1.0, 1.0, -0.1])), "eigenvalue -0.1 < 0"),
    ],
)
def test_distance_refuses_bad_statistics(bad, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(GOOD, bad)
