import numpy as np
import pytest

from eval.metrics.reservoir import Reservoir, chosen_indices

N, SIZE, D = 101, 20, 3
FEATURES = np.random.RandomState(0).randn(N, D)


def held(order, batch, chosen=None):
    """A reservoir fed all images of `order` in batches."""
    reservoir = Reservoir(chosen_indices(N, SIZE, 7) if chosen is None else chosen, D)
    for start in range(0, len(order), batch):
        indices = np.asarray(order[start : start + batch])
        reservoir.update(indices, FEATURES[indices])
    return reservoir


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
@pytest.mark.parametrize("order", ["file", "shuffled"])
def test_the_rows_are_the_chosen_ones_for_any_batch_and_order(batch, order):
    images = range(N) if order == "file" else np.random.RandomState(3).permutation(N)
    got = held(images, batch).features()
    assert got.dtype == np.float32
    assert (got == FEATURES[chosen_indices(N, SIZE, 7)].astype(np.float32)).all()


@pytest.mark.parametrize("world", [2, 3, 200])
def test_parts_of_several_processes_join_to_the_whole(world):
    whole = held(range(N), 8).features()
    joined = held([], 1)
    parts = [held(range(rank, N, world), 8).rows() for rank in range(world)]
    assert sum(len(part.indices) for part in parts) == SIZE
    for part in reversed(parts):  # some of 200 processes hold nothing
        joined.update(*part)
    assert (joined.features() == whole).all()


def test_a_part_is_in_index_order_and_does_not_alias():
    reservoir = held(range(60)[::-1], 7)
    rows = reservoir.rows()
    chosen = chosen_indices(N, SIZE, 7)
    assert (rows.indices == chosen[chosen < 60]).all()
    assert (rows.features == FEATURES[rows.indices].astype(np.float32)).all()
    full = held(range(N), N)
    full.features()[:] = 0
    assert (full.features() != 0).any()


# -------------------------------------------------------------------------- refusals


def test_missing_rows_are_an_error_that_counts_them():
    chosen = np.array([2, 40, 90])
    with pytest.raises(ValueError, match="2 of 3 chosen images are missing, first 40"):
        held(range(40), 8, chosen).features()


@pytest.mark.parametrize("again", [[3, 40, 40], [3, 2, 5]])
def test_an_image_that_comes_twice_is_refused_and_changes_nothing(again):
    reservoir = held(range(3), 3, np.array([2, 3, 40]))
    with pytest.raises(ValueError, match=f"image {40 if 40 in again else 2} came twice"):
        reservoir.update(np.array(again), FEATURES[again])
    assert reservoir.rows().indices.tolist() == [2]


def test_images_that_are_not_chosen_may_come_twice():
    held([0, 0, 1, 2, 1], 5, np.array([2])).features()


@pytest.mark.parametrize(
    ("indices", "features", "message"),
    [
        ([1], np.zeros(D), r"shape \(3,\); expected \(N, D\)"),
        ([1, 2], np.zeros((1, D)), r"indices \(2,\) and features \(1, 3\) do not fit"),
        ([1], np.zeros((1, D + 1)), r"expected \(b,\) and \(b, 3\)"),
        ([1], np.full((1, D), np.nan), "NaN or infinity"),
    ],
)
def test_bad_batches_are_refused(indices, features, message):
    with pytest.raises(ValueError, match=message):
        Reservoir(np.array([1]), D).update(np.array(indices), features)


@pytest.mark.parametrize("indices", [[3, 2], [2, 2], [-1, 2], [[1, 2]]])
def test_chosen_indices_must_ascend(indices):
    with pytest.raises(ValueError, match="must be >= 0, ascending and different"):
        Reservoir(np.array(indices), D)
