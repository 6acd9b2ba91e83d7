"""Charts and maps: sizes, refusals; and what the numbers behind the expert maps say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ditmoe.analysis.routing import mutual_information, relative_load, routing_summary
from ditmoe.report import charts
from ditmoe.report.maps import expert_loads, expert_maps


def log(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"step": 20 * (i + 1), "loss": 1 / (i + 1) + 0.1, "mse": 1 / (i + 1), "lr": 1e-3 * (count - i), **more}
            for i in range(count)]  # fmt: skip


def opened(path: Path) -> Image.Image:
    assert path.stat().st_size < 300_000
    assert not list(path.parent.glob("*.tmp"))
    return Image.open(path)


@pytest.mark.parametrize(("count", "moe"), [(1, True), (2, False), (10, True), (200, False), (10_000, True)])
def test_loss_curve_of_few_and_many_rows(tmp_path: Path, count: int, moe: bool) -> None:
    rows = log(count)
    for i, row in enumerate(rows if moe else []):
        row |= {"balance": 1 + i / count, "z": 0.0, "load_max_over_mean": [1.1, 1 + i], "dead_experts": [0, 1]}
    charts.loss_curve(rows, tmp_path / "loss.png")
    width, height = opened(tmp_path / "loss.png").size
    assert width == 1040
    assert 300 <= height <= 500


def test_loss_curve_survives_nan_and_refuses_nothing(tmp_path: Path) -> None:
    rows = log(100)
    rows[50]["loss"] = float("nan")
    charts.loss_curve(rows, tmp_path / "loss.png")
    with pytest.raises(ValueError, match="rows is empty"):
        charts.loss_curve([], tmp_path / "loss.png")


def test_smooth_is_a_centred_mean_that_skips_what_is_not_finite() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 9.0])
    assert charts.smooth(values, 1)[[0, 1, 3, 4]].tolist() == [1, 2, 4, 9]
    assert charts.smooth(values, 3).tolist() == [1.5, 1.5, 3.0, 6.5, 6.5]
    assert np.allclose(charts.smooth(np.arange(20.0), 5)[2:-2], np.arange(2, 18))  # no lag


def test_loads_of_single_experts() -> None:
    counts = np.zeros((3, 2, 1, 2, 2), int)
    counts[:, 0, 0, 0], counts[:, 1, 0, 1] = [3, 1], [0, 4]  # early at the first place, late at the second
    known: Any = {"class_names": ["a"], "timesteps": [250, 750], "grid": (1, 2), "layer_names": ["x", "y", "z"]}
    loads = expert_loads(counts, **known)
    assert loads["load"] == [[0.75, 1.25]] * 3
    assert loads["time"][0] == [[1.5, 0], [0.5, 2]]
    assert loads["place"] == loads["time"]
    assert (loads["octaves"], expert_loads(np.ones_like(counts), **known)["octaves"]) == (3, 1)
    assert loads["class"][2] == [[0.75], [1.25]]
    assert (loads["layers"], loads["grid"]) == (["x", "y", "z"], [1, 2])
    many = expert_loads(counts.repeat(64, axis=-1), **known)
    assert many["layers"] == ["x", "z"]  # as in the picture
    assert expert_loads(counts * 0, **known)["load"] == [[0, 0]] * 3


@pytest.mark.parametrize(("layers", "experts"), [(1, 4), (2, 8), (14, 4), (14, 64)])
def test_expert_maps_of_any_size(tmp_path: Path, layers: int, experts: int) -> None:
    counts = np.random.default_rng(0).integers(0, 50, (layers, 10, 3, 4 * 4, experts))
    counts[0, :, :, :, 0] = 0  # an expert without work
    expert_maps(
        counts, tmp_path / "experts.png", class_names=["a", "b" * 80, "<script>"], timesteps=range(50, 1000, 100),
        grid=(4, 4), layer_names=[f"block {i}" for i in range(layers)],
    )  # fmt: skip
    width, height = opened(tmp_path / "experts.png").size
    assert width == 1040
    assert 400 <= height <= 2000


def test_expert_maps_refuse_a_dense_model_and_wrong_names(tmp_path: Path) -> None:
    names: dict[str, Any] = {"class_names": ["a"], "timesteps": [500], "grid": (2, 2)}
    for counts, layer_names in ((np.zeros((0, 1, 1, 4, 8), int), []), (np.ones((2, 1, 1, 4, 8), int), ["block 1"])):
        with pytest.raises(ValueError, match="counts has shape"):
            expert_maps(counts, tmp_path / "experts.png", layer_names=layer_names, **names)
    assert not list(tmp_path.iterdir())


def test_relative_load_is_one_when_even() -> None:
    assert (relative_load(np.full((3, 8), 5)) == 1).all()
    assert relative_load(np.array([[4, 0], [1, 3]])).tolist() == [[2, 0], [0.5, 1.5]]
    assert np.isnan(relative_load(np.zeros((1, 4), int))).all()


def test_mutual_information_of_known_tables() -> None:
    assert mutual_information(np.eye(4, dtype=int) * 7) == pytest.approx(2.0)  # the row says the expert: log2 4
    assert mutual_information(np.outer([1, 2, 3], [5, 1])) == pytest.approx(0.0, abs=1e-12)  # independent
    p = np.array([[3, 1], [1, 3]]) / 8
    assert mutual_information(np.array([[3, 1], [1, 3]])) == pytest.approx((p * np.log2(p * 4)).sum())


def test_routing_summary_finds_what_the_choice_depends_on() -> None:
    counts = np.zeros((2, 4, 3, 4, 4), int)
    for t in range(4):
        counts[0, t, :, :, t] = 1  # the expert is the time bin
        counts[1, :, :, t, t // 2] = 1  # two experts, by position
    by_time, by_place = routing_summary(counts)
    assert by_time == pytest.approx(
        {"busiest": 1, "idle": 0, "bits_time": 2, "bits_class": 0, "bits_position": 0}, abs=1e-9
    )
    assert by_place == pytest.approx(
        {"busiest": 2, "idle": 2, "bits_time": 0, "bits_class": 0, "bits_position": 1}, abs=1e-9
    )


def test_names_with_dollars_are_no_formulas(tmp_path: Path) -> None:
    fig = charts.figure(2.0)
    charts.title(fig.add_subplot(), r"cash $\nothing more$")
    charts.save_figure(fig, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0
