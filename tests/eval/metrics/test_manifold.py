import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch.utils._python_dispatch import TorchDispatchMode

from eval.metrics.manifold import prdc
from tests.reference.manifold import prdc as slow


def normal(n, d, seed, spread=1.0):
    return spread * np.random.RandomState(seed).randn(n, d)


def lattice(n, d, seed, levels=3):
    """Few different values: duplicates and equal distances everywhere."""
    return np.random.RandomState(seed).randint(0, levels, (n, d)).astype(np.float32)


# ---------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(("pr_k", "dc_k"), [(3, 5), (1, 1), (5, 2)])
def test_identical_sets_are_exactly_1(pr_k, dc_k):
    x = normal(60, 8, 1)
    assert prdc(x, x, pr_k=pr_k, dc_k=dc_k) == (1, 1, 1, 1)
    assert prdc(x, x[::-1].copy(), pr_k=pr_k, dc_k=dc_k, block_size=7) == (1, 1, 1, 1)


def test_one_and_the_same_point_lies_in_closed_balls_only():
    assert prdc(np.ones((9, 4)), np.ones((7, 4))) == (1, 1, 0, 0)
    assert prdc(np.ones((9, 4)), np.ones((7, 4)) + 1e-3) == (0, 0, 0, 0)


def test_far_sets_are_exactly_0():
    assert prdc(normal(40, 8, 1), normal(50, 8, 2) + 100) == (0, 0, 0, 0)


def test_a_point_in_the_middle_is_precise_but_covers_little():
    """Real 0, 1, ..., 9 on a line, all generated at 4.4: with k = 1 the balls of 4 and 5 hold them."""
    real, generated = np.arange(10.0)[:, None], np.full((6, 1), 4.4)
    assert prdc(real, generated, pr_k=1, dc_k=1) == (1, 0, 2, 0.2)
    assert prdc(real, generated, pr_k=1, dc_k=2).coverage == 0.2  # ends reach to 2, the others to 1
    assert prdc(real, generated, pr_k=3, dc_k=3) == (1, 0, 4 / 3, 0.4)


def test_precision_and_recall_are_not_swapped():
    """One of two real modes: what is generated is real, half of what is real is generated."""
    real = np.vstack([normal(50, 4, 1), normal(50, 4, 2) + 50])
    generated = normal(100, 4, 3, 0.7)
    got = prdc(real, generated)
    assert got.precision > 0.95
    assert 0.2 < got.recall <= 0.5
    assert 0.2 < got.coverage <= 0.5
    back = prdc(generated, real)
    assert (back.precision, back.recall) == (got.recall, got.precision)


def test_balls_are_closed_for_precision_and_recall_and_open_for_density_and_coverage():
    """The ball of 0 among 0, 1 and 3 ends exactly at the generated -1."""
    real, generated = np.array([[0.0], [1.0], [3.0]]), np.array([[-1.0], [-90.0]])
    assert prdc(real, generated, pr_k=1, dc_k=1) == (0.5, 1 / 3 * 3, 0, 0)


def test_equal_distributions_have_density_1_and_the_expected_coverage():
    """E density = 1; E coverage = 1 - (N-1)...(N-k) / ((N+M-1)...(N+M-k)) (Naeem et al., 2020, eq. 5)."""
    n, m, k, times = 30, 20, 4, 300
    draws = [prdc(normal(n, 3, s), normal(m, 3, 1000 + s), dc_k=k) for s in range(times)]
    steps = np.arange(1, k + 1)
    coverage = 1 - np.prod((n - steps) / (n + m - steps))
    for values, expected in (([d.density for d in draws], 1), ([d.coverage for d in draws], coverage)):
        error = np.std(values) / np.sqrt(times)
        assert error < 0.02
        assert abs(np.mean(values) - expected) < 4 * error


def test_noise_lowers_fidelity_and_lost_modes_lower_diversity():
    real = normal(300, 6, 1)
    noisy = [prdc(real, normal(300, 6, 2) + normal(300, 6, 3, s)) for s in (0.0, 0.7, 2.0)]
    assert noisy[0].precision > noisy[1].precision > noisy[2].precision
    assert noisy[0].density > noisy[1].density > noisy[2].density
    narrow = [prdc(real, normal(300, 6, 2, s)) for s in (1.0, 0.6, 0.2)]
    assert narrow[0].recall > narrow[1].recall > narrow[2].recall
    assert narrow[0].coverage > narrow[1].coverage > narrow[2].coverage


# --------------------------------------------------------------------------- oracles


@pytest.mark.parametrize(("n", "m"), [(30, 30), (17, 41), (41, 17)])
@pytest.mark.parametrize(("pr_k", "dc_k"), [(3, 5), (2, 1)])
@pytest.mark.parametrize("kind", ["normal", "lattice"])
def test_equals_the_definition(n, m, pr_k, dc_k, kind):
    make = normal if kind == "normal" else lattice
    real, generated = make(n, 3, 1), make(m, 3, 2)
    expected = slow(real, generated, pr_k, dc_k)
    assert_allclose(prdc(real, generated, pr_k=pr_k, dc_k=dc_k, block_size=8), expected, rtol=1e-12)


def test_clusters_far_apart_equal_the_definition():
    """Squared norms near 4e6 and radii near 1: float32 products would get this wrong by half."""
    real, generated = normal(60, 4, 1), normal(60, 4, 2)
    real[30:] += 2000
    generated[30:] += 2000
    assert_allclose(prdc(real, generated), slow(real, generated), rtol=1e-12)


@pytest.mark.parametrize("path", ["full", "part"])
@pytest.mark.parametrize(("n", "m", "k"), [(300, 200, 3), (150, 260, 5)])
def test_equals_torch_fidelity(n, m, k, path):
    """From 0.4.0 on: before, its precision and recall were swapped."""
    metric_prc = pytest.importorskip("torch_fidelity.metric_prc")
    real, generated = normal(n, 5, 1), normal(m, 5, 2, 0.7)
    options = {"prc_neighborhood": k, "prc_batch_size": 64, "save_cpu_ram": path == "part", "verbose": False}
    expected = metric_prc.prc_features_to_metric(torch.from_numpy(generated), torch.from_numpy(real), **options)
    got = prdc(real, generated, pr_k=k)
    assert_allclose(got[:2], (expected["precision"], expected["recall"]), rtol=1e-6)


# ------------------------------------------------------------------------- invariance


@pytest.mark.parametrize("block_size", [1, 7, 64, 10_000])
@pytest.mark.parametrize("kind", ["normal", "lattice"])
def test_block_size_changes_nothing(block_size, kind):
    make = normal if kind == "normal" else lattice
    real, generated = make(43, 6, 1), make(50, 6, 2)
    generated[:20] = real[:20]
    assert prdc(real, generated, block_size=block_size) == prdc(real, generated)


@pytest.mark.parametrize("kind", ["normal", "lattice"])
def test_order_changes_nothing(kind):
    make = normal if kind == "normal" else lattice
    real, generated = make(83, 6, 1), make(70, 6, 2)
    rng = np.random.RandomState(3)
    shuffled = prdc(rng.permutation(real), rng.permutation(generated), block_size=16)
    assert_allclose(shuffled, prdc(real, generated), rtol=1e-12)


@pytest.mark.parametrize("offset", [1e3, -1e6])
def test_translation_changes_nothing(offset):
    """Values are multiples of 1/64, so that adding the offset is exact; |x|^2 - 2 x.y + |y|^2 of them is not."""
    real, generated = (np.round(64 * normal(200, 16, seed)) / 64 for seed in (1, 2))
    assert prdc(real + offset, generated + offset) == prdc(real, generated)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_small_floats_are_computed_in_float64(dtype):
    real, generated = (normal(100, 16, seed).astype(dtype) + dtype(1000) for seed in (1, 2))
    assert prdc(real, generated) == prdc(real.astype(np.float64), generated.astype(np.float64))


def test_duplicates_are_neighbours_of_each_other():
    """Each real image six times: the radius is 0, so only copies are inside, and only of closed balls."""
    x = 1000 * normal(30, 64, 1)
    real = np.repeat(x, 6, axis=0)
    assert prdc(real, x, block_size=50) == (1, 1, 0, 0)
    assert prdc(real, x * 1.00001).precision == 0


def test_memory_is_bounded_by_the_block():
    """No tensor that any step makes has more values than a block against a block, or k for each sample."""
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                value.numel() for value in (out if isinstance(out, tuple) else [out]) if torch.is_tensor(value)
            )
            return out

    with Watch():
        prdc(normal(900, 4, 1), normal(800, 4, 2), block_size=64)
    assert 64 * 64 < max(sizes) <= max(64 * (64 + 5), 900 * 5)


# -------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("real", "generated", "options", "message"),
    [
        (5, 9, {}, "5 real images have no 5 neighbours each; give at least 6"),
        (9, 3, {}, "3 generated images have no 3 neighbours each; give at least 4"),
        (9, 9, {"pr_k": 9}, "9 real images have no 9 neighbours"),
        (9, 9, {"pr_k": 0}, "pr_k 0, dc_k 5 and block_size 1024 must be at least 1"),
        (9, 9, {"dc_k": 0}, "dc_k 0"),
        (9, 9, {"block_size": 0}, "block_size 0"),
    ],
)
def test_too_few_samples_are_refused(real, generated, options, message):
    with pytest.raises(ValueError, match=message):
        prdc(normal(real, 3, 1), normal(generated, 3, 2), **options)


def test_as_few_samples_as_may_be_work():
    x = normal(6, 3, 1)
    assert prdc(x, x[:4])[:2] == (1, 1)


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (np.zeros(9), np.zeros((9, 3)), r"the real features have shape \(9,\)"),
        (np.zeros((9, 3)), np.zeros((9, 2)), "3 and 2 features"),
        (np.zeros((9, 3)), np.full((9, 3), np.nan), "the generated features hold NaN or infinity"),
    ],
)
def test_bad_features_are_refused(real, generated, message):
    with pytest.raises(ValueError, match=message):
        prdc(real, generated)
