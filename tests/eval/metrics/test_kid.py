import inspect

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from eval.metrics.kid import kernel_distance


def features(n, d, seed, spread=1.0):
    """ReLU-like features, float32 as extractors give them."""
    return np.maximum(spread * np.random.RandomState(seed).randn(n, d) + 0.3, 0).astype(np.float32)


def slow(x, y):
    """Unbiased squared MMD of two whole sets, one pair at a time."""

    def k(a, b):
        return (float(a.astype(np.float64) @ b.astype(np.float64)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


# ---------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("d", [1, 4])
def test_two_points(d):
    """All x are 0 and all y are 1 in every dimension: k is 1, 8 and 1, so 1 + 8 - 2."""
    mean, std = kernel_distance(np.zeros((6, d)), np.ones((9, d)), subsets=3, subset_size=4)
    assert mean == 7
    assert std == 0


def test_a_set_of_all_images_is_the_definition():
    x, y = features(25, 7, 1), features(25, 7, 2, spread=1.5)
    mean, std = kernel_distance(x, y, subsets=4)
    assert_allclose(mean, slow(x, y), rtol=1e-10)
    assert std < 1e-12  # each subset is the whole in another order
    assert_allclose(kernel_distance(y, x, subsets=4).mean, mean, rtol=1e-10)


def test_equal_distributions_are_zero_on_average():
    """Unbiased: 0 within 4 standard errors, where the biased estimate is 20 of them above."""
    values = [
        kernel_distance(features(50, 8, seed), features(50, 8, 1000 + seed), subsets=1).mean for seed in range(300)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(300)
    assert min(values) < 0  # nothing is clipped


def test_grows_with_the_difference():
    x = features(300, 16, 1)
    values = [kernel_distance(x, features(300, 16, 2, s), subsets=5, subset_size=200).mean for s in (1.0, 1.2, 1.5)]
    assert abs(values[0]) < 0.3 * values[1]
    assert values[1] < 0.5 * values[2]


# --------------------------------------------------------------------------- oracles


@pytest.mark.parametrize(("n", "m", "size", "seed"), [(120, 90, 40, 2020), (90, 120, 90, 5)])
def test_equals_torch_fidelity_draw_by_draw(n, m, size, seed):
    metric_kid = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = features(n, 16, 1).astype(np.float64), features(m, 16, 2, spread=1.2).astype(np.float64)
    options = {"kid_subsets": 10, "kid_subset_size": size, "rng_seed": seed, "verbose": False}
    expected = metric_kid.kid_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), **options)
    got = kernel_distance(x, y, subsets=10, subset_size=size, seed=seed)
    assert_allclose(got.mean, expected[metric_kid.KEY_METRIC_KID_MEAN], rtol=1e-10)
    assert_allclose(got.std, expected[metric_kid.KEY_METRIC_KID_STD], rtol=1e-10)


def test_the_defaults_are_torch_fidelitys():
    metric_kid = pytest.importorskip("torch_fidelity.metric_kid")
    defaults = {name: p.default for name, p in inspect.signature(kernel_distance).parameters.items()}
    assert defaults["subsets"] == metric_kid.get_kwarg("kid_subsets", {})
    assert defaults["subset_size"] == metric_kid.get_kwarg("kid_subset_size", {})
    assert defaults["seed"] == metric_kid.get_kwarg("rng_seed", {})


# -------------------------------------------------------------------------- behaviour


def test_subset_size_is_cut_to_the_smaller_set():
    x, y = features(60, 8, 1), features(30, 8, 2)
    assert kernel_distance(x, y, subsets=5) == kernel_distance(x, y, subsets=5, subset_size=30)
    assert kernel_distance(y, x, subsets=5) == kernel_distance(y, x, subsets=5, subset_size=30)
    assert kernel_distance(x, y, subsets=5) != kernel_distance(x, y, subsets=5, subset_size=29)


def test_float32_features_are_computed_in_float64():
    x, y = features(60, 8, 1) + np.float32(30), features(60, 8, 2) + np.float32(30)
    exact = kernel_distance(x.astype(np.float64), y.astype(np.float64), subsets=5, subset_size=20)
    assert kernel_distance(x, y, subsets=5, subset_size=20) == exact


def test_the_draw_is_the_seeds_alone():
    x, y = features(60, 8, 1), features(60, 8, 2)
    before = np.random.get_state()[1].copy()
    first = kernel_distance(x, y, subsets=3, subset_size=20)
    assert kernel_distance(x, y, subsets=3, subset_size=20) == first
    assert kernel_distance(x, y, subsets=3, subset_size=20, seed=1) != first
    assert (np.random.get_state()[1] == before).all()


# -------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), {}, "at least 2 images a side, got 1 and 5"),
        (np.zeros((5, 3)), np.zeros((0, 3)), {}, "at least 2 images a side, got 5 and 0"),
        (np.zeros((5, 3)), np.zeros((5, 2)), {}, "3 and 2 features"),
        (np.zeros(5), np.zeros((5, 3)), {}, r"the first features have shape \(5,\)"),
        (np.zeros((5, 3)), np.full((5, 3), np.inf), {}, "the second features hold NaN or infinity"),
        (np.zeros((5, 3)), np.zeros((5, 3)), {"subsets": 0}, "subsets 0 must be at least 1"),
        (np.zeros((5, 3)), np.zeros((5, 3)), {"subset_size": 1}, "subset_size 1 at least 2"),
    ],
)
def test_bad_input_is_refused(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(x, y, **options)
