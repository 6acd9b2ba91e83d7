"""Tables of images: what comes out of each form, in which order, and every way that columns can be wrong."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ditmoe.config.sections import Config, DataConfig
from ditmoe.data import open as opening
from ditmoe.data import tables
from ditmoe.data.open import open_data, open_held_out
from ditmoe.data.order import Batches
from ditmoe.data.sets import ArrayImages, BadImage
from ditmoe.rng import sample_rng

Tiny = Callable[..., Config]
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8), np.uint8)
NAMES = ["ant", "bee", "cat"]


def table(rows: int = 12, **columns: Any) -> Any:
    """Images with a column of named classes, or with others."""
    import datasets

    classes = not columns
    columns = columns or {"label": [i % 3 for i in range(rows)]}
    kinds = {str: datasets.Value("string"), int: datasets.Value("int64"), float: datasets.Value("float32")}
    features = {name: kinds[type(values[0])] for name, values in columns.items()}
    if classes:
        features["label"] = datasets.ClassLabel(names=NAMES)
    images = [Image.fromarray(PIXELS[i % 12]) for i in range(rows)]
    features = datasets.Features(image=datasets.Image(), **features)
    return datasets.Dataset.from_dict({"image": images, **columns}, features)


def parquet(root: Path, *, rows: int = 12, group: int = 4) -> Path:
    root.mkdir(exist_ok=True)
    table(rows).to_parquet(root / "train-00000-of-00001.parquet", batch_size=group)
    table(3).to_parquet(root / "test-00000-of-00001.parquet")
    return root


def hf(path: Path, **options: Any) -> DataConfig:
    return DataConfig(name="hf", path=path, **options)


def opened(path: Path, **options: Any) -> Any:
    return open_data(hf(path, **options), size=8, channels=1)


@pytest.fixture
def from_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_IN_MEMORY_BYTES", 0)


@pytest.mark.parametrize("form", ["parquet", "file", "streamed", "saved", "saved-splits"])
def test_every_form_gives_the_same_images(form: str, tmp_path: Path, from_files: None) -> None:
    import datasets

    root = tmp_path / "set"
    if form == "saved":
        table().save_to_disk(root)
    elif form == "saved-splits":
        datasets.DatasetDict(train=table(), validation=table(3)).save_to_disk(root)
    else:
        parquet(root)
    path = root / "train-00000-of-00001.parquet" if form == "file" else root
    data = opened(path, stream=form == "streamed")
    assert np.array_equal(data.images([11, 0, 5])[..., 0], PIXELS[[11, 0, 5]])
    assert data.labels.tolist() == [i % 3 for i in range(12)]
    assert data.id2label == dict(enumerate(NAMES))
    assert f"12 images of 3 classes in {path}:train" in data.source
    held_out = open_held_out(hf(path), size=8, channels=1)
    assert (held_out is None) == (form in ("file", "saved"))
    assert held_out is None or len(held_out) == 3


def test_the_fingerprint_is_of_the_images_and_not_of_the_place(tmp_path: Path, from_files: None) -> None:
    one, same = parquet(tmp_path / "one"), parquet(tmp_path / "same")
    assert opened(one).fingerprint() == opened(same).fingerprint()
    assert opened(one, stream=True).fingerprint() == opened(same, stream=True).fingerprint()
    other = parquet(tmp_path / "other", rows=11)
    assert opened(other).fingerprint() != opened(one).fingerprint()
    assert opened(other, stream=True).fingerprint() != opened(one, stream=True).fingerprint()


def test_a_small_set_is_held_in_memory(tmp_path: Path) -> None:
    assert isinstance(opened(parquet(tmp_path / "set"), stream=True), ArrayImages)


def test_a_streamed_epoch_is_every_row_once_in_windows_of_groups(
    tmp_path: Path, from_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = opened(parquet(tmp_path / "set", rows=40), stream=True)
    sizes = [size for _, size in data.inventory]
    assert len(sizes) == 10
    monkeypatch.setattr(tables, "WINDOW", max(sizes) + 1)  # two groups a window
    read: list[int] = []
    values = tables._Groups._values
    monkeypatch.setattr(tables._Groups, "_values", lambda s, c, g: (read.append(g), values(s, c, g))[1])
    order = data.order(sample_rng(3, 4, 0))
    assert sorted(order) == list(range(40))
    assert {len({int(row) // 4 for row in order[i : i + 8]}) for i in range(0, 40, 8)} == {2}
    assert order[:8].tolist() != sorted(order[:8])
    assert not np.array_equal(order, data.order(sample_rng(3, 4, 1)))
    for row in order:
        assert np.array_equal(data.images([int(row)])[0, ..., 0], PIXELS[row % 12])
    assert sorted(read) == list(range(10))  # each group once in an epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_set_goes_on_where_it_stopped(workers: int, tiny: Tiny, tmp_path: Path, from_files: None) -> None:
    config = tiny()
    options = replace(config.data, name="hf", path=parquet(tmp_path / "set", rows=40), stream=True, num_workers=workers)
    config = replace(config, data=options, max_steps=12)
    data = open_data(config.data, size=8, channels=1)
    whole = list(Batches(config, data, first_step=0, rank=0, num_processes=1))
    again = open_data(config.data, size=8, channels=1)
    rest = list(Batches(config, again, first_step=7, rank=0, num_processes=1))
    assert len(whole) == 12 * config.train.accumulation
    assert len(rest) == 5 * config.train.accumulation
    for a, b in zip(whole[-len(rest) :], rest, strict=True):
        assert a.indices == b.indices
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)


def test_a_picture_in_a_table_is_turned_upright_and_damage_is_named(tmp_path: Path, from_files: None) -> None:
    import datasets

    picture, exif, file = Image.fromarray(PIXELS[0]), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # a quarter turn
    picture.save(file, "PNG", exif=exif)
    cells = [{"bytes": file.getvalue(), "path": None}, {"bytes": b"no image", "path": None}, None]
    made = datasets.Dataset.from_dict({"image": cells}, datasets.Features(image=datasets.Image(decode=False)))
    made.to_parquet(tmp_path / "turned.parquet")
    data = opened(tmp_path / "turned.parquet", max_bad=2)
    assert np.array_equal(data.images([0])[0, ..., 0], np.rot90(PIXELS[0], -1))
    with pytest.raises(BadImage, match="turned.parquet:train row 1 is not a readable image"):
        data.images([1])
    with pytest.raises(BadImage, match="row 2 is empty"):
        data.images([2])


def test_texts_and_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    words = ["dog", "cat", "dog", "ant"]
    table(4, kind=words, label=[7, 3, 3, 7]).to_parquet(tmp_path / "set.parquet")
    data = opened(tmp_path / "set.parquet", label_column="kind")
    assert [data.id2label[label] for label in data.labels.tolist()] == words
    data = opened(tmp_path / "set.parquet")  # a column called label is taken
    assert data.labels.tolist() == [1, 0, 0, 1]
    assert "label 0 is 3" in data.source
    table(4, kind=words).to_parquet(tmp_path / "bare.parquet")
    data = opened(tmp_path / "bare.parquet")
    assert data.id2label == {}
    assert "none of the columns kind is of classes, unless --data.label-column says so" in data.source


@pytest.mark.parametrize(
    ("columns", "options", "sentence"),
    [
        ({}, {"label_column": "breed"}, "has no column 'breed', but image, label"),
        ({}, {"image_column": "label"}, "column label holds no images, but image"),
        ({}, {"split": "dev"}, "has no split dev, but train; give one with --data.split"),
        ({"label": ["a", None, "a"]}, {}, "row 1 has label None; a class is a text or a whole number"),
        ({"label": [0.5, 1, 1]}, {}, "row 0 has label 0.5; a class is a text or a whole number"),
        ({"text": ["a", "b", "c"]}, {"label_column": "text"}, "has another text in every row"),
        ({"label": [0, 1, 1], "class": [0, 1, 1]}, {}, "has columns that may be the label: label, class"),
    ],
)
def test_columns_that_are_wrong(columns: Any, options: Any, sentence: str, tmp_path: Path) -> None:
    table(3, **columns).to_parquet(tmp_path / "set.parquet")
    with pytest.raises(ValueError, match=sentence):
        opened(tmp_path / "set.parquet", **options)


def test_places_that_are_no_table(tmp_path: Path) -> None:
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="give --data.name folder"):
        opened(tmp_path)
    with pytest.raises(ValueError, match="is not there, and no OWNER/NAME"):
        opened(tmp_path / "none")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"bad.parquet cannot be read as a data set"):
        opened(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="needs --data.path PLACE"):
        open_data(DataConfig(name="hf"), size=8, channels=1)
    with pytest.raises(ValueError, match="stream works with the data set hf, not folder"):
        DataConfig(name="folder", path=tmp_path, stream=True)


def test_files_beside_the_table_are_counted(tmp_path: Path) -> None:
    (parquet(tmp_path / "set") / "notes.txt").write_text("x")
    assert "1 other files left out, such as notes.txt" in opened(tmp_path / "set").source


def metadata(root: Path, *rows: Any, end: str = "\n") -> Path:
    for i in range(4):
        (root / "a").mkdir(exist_ok=True)
        Image.fromarray(PIXELS[i]).save(root / "a" / f"{i}.png")
    (root / "metadata.jsonl").write_bytes("".join(json.dumps(row) + end for row in rows).encode("utf-8-sig"))
    return root


ROWS = [{"file_name": f"a/{i}.png", "kind": word} for i, word in enumerate(["dog", "cat", "dog", "ant"])]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_classes_by_metadata(end: str, tmp_path: Path) -> None:
    root = metadata(tmp_path, *reversed(ROWS), end=end)
    data = open_data(DataConfig(name="folder", path=root, label_column="kind"), size=8, channels=1)
    assert [data.id2label[label] for label in data.labels.tolist()] == ["dog", "cat", "dog", "ant"]
    assert np.array_equal(data.images([1])[0, ..., 0], PIXELS[1])
    assert "left out" not in data.source
    data = open_data(DataConfig(name="folder", path=root), size=8, channels=1)
    assert data.id2label == {0: "a"}
    assert "a class may be in metadata.jsonl: --data.label-column" in data.source


def test_classes_by_a_csv_of_windows(tmp_path: Path) -> None:
    root = metadata(tmp_path)
    (root / "metadata.jsonl").unlink()
    lines = ["file_name,kind", *(f"a\\{i}.png,{row['kind']}" for i, row in enumerate(ROWS))]
    (root / "metadata.csv").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    data = open_data(DataConfig(name="folder", path=root, label_column="kind"), size=8, channels=1)
    assert [data.id2label[label] for label in data.labels.tolist()] == ["dog", "cat", "dog", "ant"]


@pytest.mark.parametrize(
    ("rows", "column", "sentence"),
    [
        (ROWS, "sort", "has no column 'sort' but kind; see --data.label-column"),
        (ROWS[:3], "kind", "has 3 rows and none for a/3.png, one of 4 images"),
        ([*ROWS, {"file_name": "b.png", "kind": "x"}], "kind", "has a row for b.png, and there is no such image"),
        ([*ROWS, ROWS[0]], "kind", "row 5 names a/0.png a second time"),
        ([*ROWS, {"kind": "x"}], "kind", "row 5 has no file_name"),
        ([*ROWS[:3], {"file_name": "a/3.png"}], "kind", "row 3 has kind None"),
    ],
)
def test_metadata_that_is_wrong(rows: Any, column: str, sentence: str, tmp_path: Path) -> None:
    metadata(tmp_path, *rows)
    with pytest.raises(ValueError, match=sentence):
        open_data(DataConfig(name="folder", path=tmp_path, label_column=column), size=8, channels=1)
