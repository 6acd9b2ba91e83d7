"""Grids and strips: sizes, exact enlargement, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ditmoe.generate import pictures


def random_images(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def opened(path: Path) -> Image.Image:
    assert path.stat().st_size < 300_000
    assert not list(path.parent.glob("*.tmp"))
    return Image.open(path)


def grid(images: Any, names: list[str], path: Path) -> None:
    """Images (R, columns, H, W, C), a row a class."""
    labels = np.repeat(np.arange(len(images)), images.shape[1]).tolist()
    pictures.write_grid(images.reshape(-1, *images.shape[2:]), labels, dict(enumerate(names)), path)


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3), (256, 3)])
def test_a_grid_has_a_size_one_can_look_at(tmp_path: Path, size: int, channels: int) -> None:
    noise = random_images(10, 10, 8, 8, channels).repeat(-(-size // 8), 2).repeat(-(-size // 8), 3)
    path = tmp_path / "grid.png"
    grid(noise[:, :, :size, :size], [f"class {i}" for i in range(10)], path)
    width, height = opened(path).size
    assert 600 <= width <= 1200
    assert 500 <= height <= 1200


def test_small_images_are_enlarged_without_smoothing(tmp_path: Path) -> None:
    image = random_images(1, 1, 8, 8, 1)
    grid(image, [""], tmp_path / "one.png")
    pixels = np.asarray(Image.open(tmp_path / "one.png").convert("L"))
    assert pixels.shape == (8 * 12 + 28, 8 * 12 + 28)
    assert (pixels[14:-14, 14:-14] == image[0, 0, :, :, 0].repeat(12, 0).repeat(12, 1)).all()


def test_grid_of_very_many_columns_grows_instead_of_failing(tmp_path: Path) -> None:
    grid(random_images(2, 200, 8, 8, 1), ["a", "b"], tmp_path / "wide.png")
    assert Image.open(tmp_path / "wide.png").width > 200 * 24


def test_pictures_that_are_no_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uint8"):
        grid(np.zeros((2, 3, 8, 8, 1)), ["a", "b"], tmp_path / "x.png")
    latents = random_images(2, 3, 8, 8, 4)
    with pytest.raises(ValueError, match="C 1 or 3"):
        pictures.film_strip(latents, latents, [9.0, 5.0, 1.0], tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
    grid(latents, ["a", "b"], tmp_path / "latents.png")  # of which the first three channels are seen
    grid(latents[..., :3], ["a", "b"], tmp_path / "three.png")
    assert (tmp_path / "latents.png").read_bytes() == (tmp_path / "three.png").read_bytes()


def shown(path: Path, left: int, rows: int, columns: int) -> Any:
    """The grey level of every cell of a grid of 8 x 8 images that are of one level each."""
    room = (np.asarray(Image.open(path).convert("L")).shape[1] - left - 14 + 5) // columns
    levels = np.asarray(Image.open(path).convert("L"))[14 + 20 :: room, left + 20 :: room]
    return levels[:rows, :columns].tolist()


def test_a_grid_has_a_row_a_class_and_all_images_or_so_many_rows_of_one_length(tmp_path: Path) -> None:
    labels = [0, 1, 2, 0, 1, 2, 0, 4, 4, 4]
    images = (10 * np.arange(10, dtype=np.uint8) + 10).repeat(64).reshape(10, 8, 8, 1)
    pictures.write_grid(images, labels, dict.fromkeys(range(5), ""), tmp_path / "all.png")
    assert shown(tmp_path / "all.png", 14, 4, 3) == [[10, 40, 70], [20, 50, 255], [30, 60, 255], [80, 90, 100]]
    some = {"columns": 5, "most_rows": 3}
    pictures.write_grid(images, labels, dict.fromkeys(range(5), ""), tmp_path / "some.png", **some)  # classes 0, 2, 4
    assert shown(tmp_path / "some.png", 14, 3, 2) == [[10, 40], [30, 60], [80, 90]]
    pictures.write_grid(images, None, {}, tmp_path / "none.png")
    assert shown(tmp_path / "none.png", 14, 2, 8) == [list(range(10, 90, 10)), [90, 100] + [255] * 6]
    pictures.write_grid(images, None, {}, tmp_path / "few.png", columns=4, most_rows=20)  # the last row is short
    assert shown(tmp_path / "few.png", 14, 2, 4) == [[10, 20, 30, 40], [50, 60, 70, 80]]
    pictures.write_grid(images[:3], None, {}, tmp_path / "one.png", columns=4, most_rows=20)
    assert shown(tmp_path / "one.png", 14, 1, 3) == [[10, 20, 30]]


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


def test_film_strip_says_where_every_picture_is(tmp_path: Path) -> None:
    levels = np.arange(2 * 3 * 2, dtype=np.uint8).reshape(2, 3, 2) * 20  # of a sample, step, noisy or clean
    noisy, clean = (np.broadcast_to(levels[:, :, k, None, None, None], (2, 3, 8, 8, 1)) for k in (0, 1))
    where = pictures.film_strip(noisy, clean, [999.0, 499.96, 0.0], tmp_path / "film.png", names=["0", "1"])
    assert (where["times"], where["rows"][:2]) == ([999.0, 500.0, 0.0], ["0  noisy xₜ", "predicted x₀"])
    grey, (w, h) = np.asarray(Image.open(tmp_path / "film.png").convert("L")), where["size"]
    cells = [[np.unique(grey[y : y + h, x : x + w]).tolist() for x in where["x"]] for y in where["y"]]
    assert cells == [[[int(levels[n, k, part])] for k in range(3)] for n in (0, 1) for part in (0, 1)]


def test_spread_keeps_the_ends() -> None:
    assert pictures.spread(3, 12) == [0, 1, 2]
    assert pictures.spread(50, 4) == [0, 16, 33, 49]
    assert pictures.spread(1, 5) == [0]
