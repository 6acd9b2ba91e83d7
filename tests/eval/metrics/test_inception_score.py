import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from numpy.testing import assert_allclose

from eval.metrics.inception_score import InceptionSums


def random_logits(n, c, seed=0, scale=2.0):
    return scale * np.random.RandomState(seed).randn(n, c)


def stream(logits, batch=64, split_size=5000, order=None):
    score = InceptionSums(*logits.shape, split_size=split_size)
    order = np.arange(len(logits)) if order is None else order
    for start in range(0, len(order), batch):
        indices = order[start : start + batch]
        score.update(indices, logits[indices])
    return score


def direct(logits, split_size):
    """Split after split in file order, a short one at the end included, as ADM's evaluation suite has it."""
    scores = []
    for start in range(0, len(logits), split_size):
        p = scipy.special.softmax(logits[start : start + split_size], axis=1)
        scores.append(np.exp(scipy.stats.entropy(p, p.mean(axis=0)[None], axis=1).mean()))
    return np.mean(scores), np.std(scores)


# ---------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("c", [1, 2, 10])
def test_the_same_answer_for_all_images_scores_1(c):
    for seed in range(20):  # rounding falls on either side, but a score is never below 1
        mean, std = stream(np.tile(random_logits(1, c, seed), (30, 1)), split_size=10).compute()
        assert 1 <= mean < 1 + 1e-14
        assert std < 1e-14


@pytest.mark.parametrize("sure", [50.0, 1e4])  # 1e4: every other probability underflows to 0
def test_sure_and_even_answers_score_the_number_of_classes(sure):
    assert_allclose(stream(sure * np.tile(np.eye(10), (6, 1)), split_size=20).compute(), (10, 0), rtol=1e-13)


def test_two_answers_of_two_classes():
    """p = (a, 1-a) or its mirror: KL to the even mean is log 2 minus the binary entropy."""
    a = 0.9
    logits = np.log(np.tile([[a, 1 - a], [1 - a, a]], (5, 1)))
    entropy = -(a * np.log(a) + (1 - a) * np.log(1 - a))
    assert_allclose(stream(logits).compute().mean, 2 * np.exp(-entropy), rtol=1e-13)


def test_classes_that_no_image_shows_change_nothing():
    logits = random_logits(20, 5)
    padded = np.hstack([logits, np.full((20, 3), -1e5)])
    assert_allclose(stream(padded).compute(), stream(logits).compute(), rtol=1e-13)


def test_grows_with_the_classifiers_certainty():
    scores = [stream(random_logits(500, 10, scale=s)).compute().mean for s in (0.0, 0.5, 1.0, 4.0)]
    assert_allclose(scores[0], 1, rtol=1e-13)
    assert 1.05 < scores[1] < 0.9 * scores[2] < 0.5 * scores[3] < 5


# ---------------------------------------------------------------------------- splits


@pytest.mark.parametrize(("n", "split_size"), [(100, 25), (103, 25), (26, 25), (10, 25)])
def test_splits_are_by_index_and_a_short_last_one_counts(n, split_size):
    logits = random_logits(n, 6)
    score = stream(logits, 7, split_size)
    assert_allclose(score.compute(), direct(logits, split_size), rtol=1e-12, atol=1e-14)
    assert len(score.count) == -(-n // split_size)


def test_a_split_of_one_image_scores_1_and_pulls_the_mean_down():
    logits = random_logits(26, 6)
    first = stream(logits[:25]).compute().mean
    assert_allclose(stream(logits, split_size=25).compute().mean, (first + 1) / 2, rtol=1e-13)


def test_the_default_split_has_5000_images():
    logits = random_logits(5100, 3)
    score = InceptionSums(5100, 3)
    score.update(np.arange(5100), logits)
    assert_allclose(score.compute(), direct(logits, 5000), rtol=1e-12)


# --------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("splits", [1, 4, 10])
def test_equals_torch_fidelity_unshuffled(splits):
    metric_isc = pytest.importorskip("torch_fidelity.metric_isc")
    logits = random_logits(400, 12, 3)
    expected = metric_isc.isc_features_to_metric(torch.from_numpy(logits), splits, shuffle=False)
    got = stream(logits, split_size=400 // splits).compute()
    assert_allclose(got, list(expected.values()), rtol=1e-11, atol=1e-13)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore`", "ignore:std")
def test_equals_torchmetrics_with_one_split():
    from torchmetrics.image.inception import InceptionScore as Torchmetrics

    logits = random_logits(400, 12, 3)
    oracle = Torchmetrics(feature=torch.nn.Identity(), splits=1)
    oracle.update(torch.from_numpy(logits))
    assert_allclose(stream(logits).compute().mean, float(oracle.compute()[0]), rtol=1e-11)


# ------------------------------------------------------------------ order and processes


@pytest.mark.parametrize("batch", [1, 7, 103])
def test_batches_and_order_change_nothing(batch):
    logits = random_logits(103, 6)
    order = np.random.RandomState(1).permutation(103)
    got = stream(logits, batch, 25, order).compute()
    assert_allclose(got, stream(logits, 103, 25).compute(), rtol=1e-12)


@pytest.mark.parametrize("world", [2, 3, 200])
def test_processes_join_by_summing_the_arrays(world):
    logits = random_logits(103, 6)
    joined = stream(logits, split_size=25, order=np.arange(0))
    for rank in range(world):  # some of 200 processes hold nothing
        part = stream(logits, 8, 25, np.arange(rank, 103, world))
        for name in ("count", "sum_p", "sum_p_log_p"):
            getattr(joined, name)[...] += getattr(part, name)
    assert_allclose(joined.compute(), stream(logits, 103, 25).compute(), rtol=1e-12)


def test_float32_logits_are_computed_in_float64():
    logits = random_logits(60, 6).astype(np.float32)
    assert stream(logits).compute() == stream(logits.astype(np.float64)).compute()


def test_large_logits_do_not_overflow():
    logits = random_logits(60, 6)
    assert_allclose(stream(logits + 1e5).compute(), stream(logits).compute(), rtol=1e-9)


def test_the_callers_array_stays():
    logits = random_logits(10, 4)
    before = logits.copy()
    InceptionSums(10, 4).update(np.arange(10), logits)
    assert (logits == before).all()


# -------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("order", [np.arange(29), np.arange(31) % 30])
def test_every_image_must_come_once(order):
    logits = random_logits(30, 4)
    split, had = (2, 9) if len(order) == 29 else (0, 11)
    with pytest.raises(ValueError, match=f"split {split} had {had} images of 10"):
        stream(logits, split_size=10, order=order).compute()


@pytest.mark.parametrize(
    ("indices", "logits", "message"),
    [
        ([0], np.zeros(4), r"logits \(4,\) do not fit; expected \(b,\) and \(b, 4\)"),
        ([0], np.zeros((1, 5)), r"logits \(1, 5\) do not fit"),
        ([0], np.zeros((2, 4)), r"indices \(1,\) and logits \(2, 4\) do not fit"),
        ([30], np.zeros((1, 4)), "below n = 30"),
        ([-1], np.zeros((1, 4)), "at least 0"),
        ([0], np.full((1, 4), np.nan), "NaN or infinity"),
        ([0], np.array([[0, 0, 0, -np.inf]]), "NaN or infinity"),
    ],
)
def test_bad_batches_are_refused_and_add_nothing(indices, logits, message):
    score = InceptionSums(30, 4)
    with pytest.raises(ValueError, match=message):
        score.update(np.array(indices), logits)
    assert score.count.sum() == score.sum_p.sum() == 0


@pytest.mark.parametrize(("n", "c", "split_size"), [(0, 4, 10), (10, 0, 10), (10, 4, 0)])
def test_sizes_must_be_at_least_1(n, c, split_size):
    with pytest.raises(ValueError, match=f"n {n}, num_classes {c} and split_size {split_size} must be at least 1"):
        InceptionSums(n, c, split_size=split_size)
