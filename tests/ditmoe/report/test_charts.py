"""Pictures: sizes, exact enlargement, refusals; and what the numbers behind the expert maps say."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ditmoe.analysis.routing import mutual_information, relative_load, routing_summary
from ditmoe.generate import pictures
from ditmoe.report import charts
from ditmoe.report.maps import expert_maps


def random_images(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def log(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"step": 20 * (i + 1), "loss": 1 / (i + 1) + 0.1, "mse": 1 / (i + 1), "lr": 1e-3 * (count - i), **more}
            for i in range(count)]  # fmt: skip


def opened(path: Path) -> Image.Image:
    assert path.stat().st_size < 300_000
    assert not list(path.parent.glob("*.tmp"))
    return Image.open(path)


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3), (256, 3)])
def test_sample_grid_has_a_size_one_can_look_at(tmp_path: Path, size: int, channels: int) -> None:
    noise = random_images(10, 10, 8, 8, channels).repeat(-(-size // 8), 2).repeat(-(-size // 8), 3)
    path = tmp_path / "grid.png"
    pictures.sample_grid(noise[:, :, :size, :size], [f"class {i}" for i in range(10)], path)
    width, height = opened(path).size
    assert 600 <= width <= 1200
    assert 500 <= height <= 1200


def test_small_images_are_enlarged_without_smoothing(tmp_path: Path) -> None:
    image = random_images(1, 1, 8, 8, 1)
    pictures.sample_grid(image, [""], tmp_path / "one.png")
    pixels = np.asarray(Image.open(tmp_path / "one.png").convert("L"))
    assert pixels.shape == (8 * 12 + 28, 8 * 12 + 28)
    assert (pixels[14:-14, 14:-14] == image[0, 0, :, :, 0].repeat(12, 0).repeat(12, 1)).all()


def test_grid_of_very_many_columns_grows_instead_of_failing(tmp_path: Path) -> None:
    pictures.sample_grid(random_images(2, 200, 8, 8, 1), ["a", "b"], tmp_path / "wide.png")
    assert Image.open(tmp_path / "wide.png").width > 200 * 24


def test_sample_grid_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row_names has 1 names for 2 rows"):
        pictures.sample_grid(random_images(2, 3, 8, 8, 1), ["a"], tmp_path / "x.png")
    with pytest.raises(ValueError, match="uint8"):
        pictures.sample_grid(np.zeros((2, 3, 8, 8, 1)), ["a", "b"], tmp_path / "x.png")
    with pytest.raises(ValueError, match="C 1 or 3"):
        pictures.sample_grid(random_images(2, 3, 8, 8, 4), ["a", "b"], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_film_strip_shows_the_first_and_last_step(tmp_path: Path) -> None:
    steps = np.zeros((2, 50, 8, 8, 1), np.uint8)
    steps[:, 0], steps[:, -1] = 100, 200
    pictures.film_strip(steps, steps, np.linspace(999, 19, 50).tolist(), tmp_path / "film.png", names=["0", "<b>"])
    picture = opened(tmp_path / "film.png")
    assert 900 <= picture.width <= 1200
    row = np.asarray(picture.convert("L"))[100]
    assert (row == 100).any()
    assert row[np.flatnonzero((row == 100) | (row == 200))[-1]] == 200
    with pytest.raises(ValueError, match="do not match"):
        pictures.film_strip(steps, steps, [1.0, 2.0], tmp_path / "film.png")


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


def test_spread_keeps_the_ends() -> None:
    assert pictures.spread(3, 12) == [0, 1, 2]
    assert pictures.spread(50, 4) == [0, 16, 33, 49]
    assert pictures.spread(1, 5) == [0]


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
