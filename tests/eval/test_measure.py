"""One pass: which images' features are kept, and what several processes find."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from eval.measure import Wanted, chosen_indices, features_of, measure
from eval.networks.extractors import load_extractor
from eval.processes import joined
from eval.sources.open import open_source
from tests.eval.test_statistics import small_inception
from tests.processes import start

N, SIZE = 101, 20


# ------------------------------------------------------------------------ the choice


def test_the_choice_is_sorted_different_and_in_range():
    got = chosen_indices(N, SIZE, 7)
    assert got.dtype == np.int64
    assert got.shape == (SIZE,)
    assert (np.diff(got) > 0).all()
    assert got[0] >= 0
    assert got[-1] < N


def test_the_choice_never_changes():
    """The frozen stream itself: another NumPy must give these."""
    assert chosen_indices(1000, 5, 2020).tolist() == [469, 656, 725, 815, 986]


def test_the_choice_depends_on_the_seed_alone():
    np.random.seed(1)
    first = chosen_indices(N, SIZE, 7)
    np.random.seed(2)
    assert (chosen_indices(N, SIZE, 7) == first).all()
    assert (chosen_indices(N, SIZE, 8) != first).any()


def test_every_image_is_as_likely():
    """Among 2000 draws each of 20 images is chosen 500 times give or take 5 deviations of 19.4."""
    times = np.zeros(20)
    for seed in range(2000):
        times[chosen_indices(20, 5, seed)] += 1
    assert abs(times - 500).max() < 97


@pytest.mark.parametrize(("n", "size"), [(5, 5), (5, 6), (1, 10), (0, 3)])
def test_a_size_of_n_or_more_takes_all(n, size):
    got = chosen_indices(n, size, 0)
    assert got.tolist() == list(range(n))
    assert got.dtype == np.int64


@pytest.mark.parametrize(("n", "size"), [(-1, 3), (5, 0)])
def test_an_impossible_choice_is_refused(n, size):
    with pytest.raises(ValueError, match=f"cannot choose {size} of {n} images"):
        chosen_indices(n, size, 0)


# --------------------------------------------------------------------------- keeping


@pytest.mark.parametrize("batch", [1, 7, 64, N])
def test_the_rows_are_those_of_the_chosen_images_for_any_batch(digits, batch):
    net = load_extractor("random-conv-v1")
    images = digits[0][:N]
    expected = features_of(net, images[chosen_indices(N, SIZE, 7)]).pool
    got = measure(open_source(images), net, Wanted(keep=SIZE, seed=7), batch_size=batch)
    assert got.features.dtype == np.float32
    assert_allclose(got.features, expected, rtol=1e-4, atol=1e-6)
    others = measure(open_source(images), net, Wanted(keep=SIZE, seed=8), batch_size=batch)
    assert (got.rows_seed, others.rows_seed) == (7, 8)
    assert got.rows_sha256 != others.rows_sha256
    assert measure(open_source(images), net, Wanted()).features is None


def what_processes_find(file, out):
    """What each of them has measured, with every feature; the second one had nothing to look at."""
    with np.load(file) as arrays:
        source = open_source(arrays["images"])
    with joined() as group:
        found = measure(source, small_inception(), Wanted(True, True, 30, 7), batch_size=128, processes=group)
    sums = [found.gaussian.covariance, found.spatial.covariance, found.features]
    np.savez(f"{out}/{group.rank}.npz", *sums, np.array(found.inception), np.array([group.world, found.count]))


def test_processes_without_a_batch_find_what_the_others_do(tmp_path, digits):
    images = digits[0][:N]
    np.savez(tmp_path / "images.npz", images=images)
    group = start(what_processes_find, tmp_path / "images.npz", tmp_path, folder=tmp_path / "log", world=2)
    assert group.wait() == [0, 0], group.err() + group.err(1)
    alone = measure(open_source(images), small_inception(), Wanted(True, True, 30, 7), batch_size=128)
    for rank in (0, 1):
        with np.load(tmp_path / f"{rank}.npz") as found:
            assert found["arr_4"].tolist() == [2, N]
            assert_allclose(found["arr_0"], alone.gaussian.covariance, rtol=1e-9, atol=1e-15)
            assert_allclose(found["arr_1"], alone.spatial.covariance, rtol=1e-9, atol=1e-15)
            assert (found["arr_2"] == alone.features).all()
            assert_allclose(found["arr_3"], alone.inception, rtol=1e-9)
