"""Statistics of counts: known bits, chance that is taken off, ranks and intervals of known numbers."""

import math

import numpy as np
import pytest
from scipy import stats

from ditmoe.analysis.information import chance, entropy, entropy_given, interval, lift, student
from ditmoe.analysis.routing import mutual_information


def choices(rng: np.random.Generator, shape: tuple[int, ...], weight: np.ndarray, top_k: int) -> np.ndarray:
    """(*shape, E): 1 where one of K distinct experts was drawn, by Gumbel noise on log weights."""
    scores = np.log(weight) + rng.gumbel(size=(*shape, weight.shape[-1]))
    served = np.zeros(scores.shape, int)
    np.put_along_axis(served, np.argsort(-scores, axis=-1)[..., :top_k], 1, axis=-1)
    return served


def test_entropy_of_known_counts() -> None:
    assert entropy(np.array([[4, 4, 4, 4], [8, 0, 0, 0], [2, 1, 1, 0]])).tolist() == [2, 0, 1.5]
    assert np.isnan(entropy(np.zeros(4)))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_entropy_of_few_choices_is_that_of_many(top_k: int) -> None:
    rng, weight, n = np.random.default_rng(0), np.linspace(0.3, 1.3, 8), 20
    cells = choices(rng, (1000, n), weight, top_k).sum(axis=1)
    true = float(entropy(cells.sum(axis=0)))
    plain, corrected = float(entropy(cells).mean()), float(entropy_given(cells, n))
    assert plain < true - 0.03
    assert abs(corrected - true) < (true - plain) / 4


def test_nothing_is_added_where_the_condition_decides_all() -> None:
    cells = np.zeros((5, 8), int)
    cells[:, [2, 3]] = 50  # the same two experts for all 50 images of a cell
    assert entropy_given(cells, 50) == pytest.approx(1.0, abs=1e-12)
    weighted = np.array([[30, 0], [10, 10], [0, 0]])  # a cell that counts nothing does not count
    assert entropy_given(weighted, 10) == pytest.approx(20 / 50)


def test_independent_tokens_of_alike_images_explain_nothing_beyond_chance() -> None:
    rng = np.random.default_rng(1)
    found, naive = [], []
    for _ in range(20):
        weight = np.repeat(rng.dirichlet(np.ones(8), (60, 1)), 30, axis=1)  # 60 images whose 30 tokens are alike
        images = choices(rng, (60, 30), weight + 1e-9, 2).sum(axis=1)
        units = images.reshape(6, 10, 8)  # 10 classes of 6 images
        bits = mutual_information(units.sum(axis=0))
        found.append(bits - chance(units, rng))
        naive.append(bits - (10 - 1) * (8 - 1) / (2 * images.sum() * math.log(2)))  # Miller-Madow, by assignments
    assert np.mean(naive) > 0.05
    assert abs(np.mean(found)) < 0.01


def test_chance_of_what_does_not_vary_inside_a_unit_is_what_there_is() -> None:
    rng = np.random.default_rng(2)
    same = np.repeat(rng.integers(0, 9, (12, 1, 4)), 5, axis=1)
    assert chance(same, rng) == pytest.approx(mutual_information(same.sum(axis=0)), abs=1e-12)
    decided = np.repeat(np.eye(4, dtype=int)[None], 50, axis=0)  # the condition is the expert
    assert mutual_information(decided.sum(axis=0)) == pytest.approx(2)
    assert chance(decided, rng) < 0.2


def test_lift_is_one_by_chance_and_knows_friends() -> None:
    load = np.array([5.0, 1, 2, 3, 1, 1])
    pairs = np.outer(load, load) * (1 - np.eye(6))
    by_chance = lift(pairs + np.diag(pairs.sum(axis=1)))
    assert by_chance[~np.eye(6, dtype=bool)] == pytest.approx(1)
    assert np.isnan(by_chance.diagonal()).all()
    friends = np.full((4, 4), 10.0)
    friends[0, 1] = friends[1, 0] = friends[2, 3] = friends[3, 2] = 40
    assert lift(friends)[0, 1] == pytest.approx(2)  # 40 of 60, and by chance 20 each
    assert lift(friends)[0, 2] == pytest.approx(0.5)
    assert np.isnan(lift(np.diag([3.0, 4.0]))).all()


def test_intervals_are_students() -> None:
    for freedom in (1, 2, 3, 4, 5, 9, 30, 1000):
        assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=0.004)
    values = np.array([0.1, 0.3, 0.2])
    mean, low, high = interval(values)
    assert mean == pytest.approx(0.2)
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, loc=0.2, scale=stats.sem(values)))
    assert interval(np.array([0.5])) == (0.5, -math.inf, math.inf)
