"""What experts specialise in, of counts that are made up: bits that are known, verdicts of known values."""

import math

import numpy as np
import pytest

from ditmoe.analysis.findings import beyond_chance, judge, layer_row, mean_rows, tables, values_of, verdicts
from ditmoe.analysis.tally import Tally

Y, N, B, T, E = 4, 20, 4, 4, 4


def made(expert: np.ndarray) -> Tally:
    """The tally of a layer in which one expert (Y, N, B, T) serves each token."""
    served = np.eye(E, dtype=np.int64)[np.broadcast_to(expert, (Y, N, B, T))]
    total = served.sum(axis=(0, 1, 2, 3)).astype(float)
    return Tally(
        served.sum(axis=1).transpose(1, 0, 2, 3), served.sum(axis=2).reshape(-1, T, E),
        served.sum(axis=3).reshape(-1, B, E), np.diag(total), total, 0.25, 0.0,
    )  # fmt: skip


def grid(axis: int) -> np.ndarray:
    """The number of the class, image, time bin or place of every token."""
    return np.indices((Y, N, B, T))[axis]


@pytest.mark.parametrize(("axis", "key"), [(0, "class"), (2, "time"), (3, "place")])
def test_all_bits_are_explained_by_what_decides(axis: int, key: str) -> None:
    row = layer_row("block 1", made(grid(axis)), 0)
    assert row["entropy"] == row["choice"] == 2
    assert {k: row[k] for k in ("place", "time", "class")} == {**dict.fromkeys(("place", "time", "class"), 0), key: 2}
    assert row["load_entropy"] == row["busiest"] == 1
    assert row["idle"] == 0
    assert row["contribution"].tolist() == [1] * E
    assert row["routed"] == 0.25
    assert row["entropy_by_time"].tolist() == [0 if key == "time" else 2] * B
    assert row["given"].tolist() == [0] * B
    assert row["all"] == 2


def test_a_random_router_explains_nothing() -> None:
    rng = np.random.default_rng(0)
    rows = [layer_row("block 1", made(rng.integers(0, E, (Y, N, B, T))), 0) for _ in range(30)]
    for key in ("place", "time", "class"):
        assert np.mean([row["chance"][key] for row in rows]) > 0.004
        assert abs(np.mean([row[key] for row in rows])) < 0.002
    assert np.mean([row["given"] for row in rows]) == pytest.approx(2, abs=0.02)  # of 20 images
    shares = values_of(rows)
    assert abs(shares["place_and_time"]) < 0.005


def test_half_of_the_bits() -> None:
    row = layer_row("block 1", made(grid(3) % 2 + 2 * (grid(0) % 2)), 0)
    assert (row["place"], row["time"]) == (pytest.approx(1, abs=0.03), 0)
    assert row["class"] == pytest.approx(1, abs=0.05)


def test_one_class_says_nothing_of_classes_and_few_images_nothing_of_what_is_known() -> None:
    tally = made(grid(3))
    one = tally._replace(counts=tally.counts[:, :1], by_place=tally.by_place[:8], by_time=tally.by_time[:8])
    row = layer_row("block 1", one, 0)
    assert math.isnan(row["class"])
    assert math.isnan(values_of([row])["place_and_time"])
    assert np.isnan(row["given"]).all()
    assert "| block 1 | 2.00 | 2.00 | 2.000 (100.0 %) | 0.000 (0.0 %) | - | - |" in tables(mean_rows([[row]]), range(B))


def test_adjusted_information() -> None:
    assert beyond_chance(0.1, 0.1, 2.0) == 0
    assert beyond_chance(2.0, 0.1, 2.0) == 2
    assert beyond_chance(1.05, 0.1, 2.0) == pytest.approx(1)
    assert beyond_chance(0.0, 0.0, 0.0) == 0
    assert math.isnan(beyond_chance(0.0, math.nan, 2.0))


def test_values_over_depth_and_noise() -> None:
    concentrated = np.where(grid(2) >= 2, 0, grid(3))  # in the last bins, which are the noisiest
    rows = [layer_row("block 1", made(np.where(grid(3) == 0, 1, grid(3))), 0), layer_row("block 3", made(grid(3)), 0)]
    values = values_of(rows)
    assert values["deeper_is_more_even"] == pytest.approx(1 - 1.5 / 2)
    assert values["noise_is_concentrated"] == 0
    values = values_of([layer_row("block 1", made(concentrated), 0)])
    assert values["noise_is_concentrated"] == 2
    assert math.isnan(values["deeper_is_more_even"])


def test_verdicts_of_known_values() -> None:
    runs = [
        {"place_and_time": x, "deeper_is_more_even": -x, "noise_is_concentrated": y}
        for x, y in ((0.10, 0.3), (0.12, -0.2), (0.11, 0.1))
    ]
    holds, does_not, undecided = judge(runs)
    assert [row["verdict"] for row in (holds, does_not, undecided)] == ["holds", "does not hold", "undecided"]
    assert holds["mean"] == pytest.approx(0.11)
    assert holds["interval"] == pytest.approx([0.11 - 4.3027 * 0.01 / 3**0.5, 0.11 + 4.3027 * 0.01 / 3**0.5], abs=1e-5)
    text = verdicts([holds, does_not, undecided])
    assert "| experts go by place and time, not by class | +0.110 | +0.085 to +0.135 | holds |" in text
    assert [row["verdict"] for row in judge([dict.fromkeys(runs[0], 0.0)] * 2)] == ["does not hold"] * 3
    assert [row["verdict"] for row in judge([dict.fromkeys(runs[0], math.nan)] * 2)] == ["undecided"] * 3
    assert [row["verdict"] for row in judge(runs[:1])] == ["undecided"] * 3
    assert "verdict" not in verdicts(judge(runs[:1]))
