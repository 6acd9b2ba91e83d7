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


def unlabelled_test(root: Path) -> Path:
    """Parquet whose test split has the label -1 throughout, as sets of the Hub have."""
    import datasets

    made = parquet(root)
    (made / "test-00000-of-00001.parquet").unlink()
    plain = table(3).cast_column("label", datasets.Value("int64")).map(lambda row: {"label": -1})
    plain.cast_column("label", datasets.ClassLabel(names=NAMES)).to_parquet(made / "test.parquet")
    return made


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
        ({"label": ["a", "", "a"]}, {}, "row 1 has label ''; a class is a text"),
        ({"label": [0.5] * 3, "text": ["x" * 999] * 3}, {"label_column": "image"}, r"has image .{70,90}; a class is"),
        ({}, {"subset": "en"}, "a subset is of the Hub"),
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
    for place in (tmp_path / "set:test", Path("set:test")):
        with pytest.raises(ValueError, match="set:test is not there, .*; give PATH and --data.split, as PATH:SPLIT"):
            opened(place)
    with pytest.raises(ValueError, match="has no split dev, but train, test; give one with --data.split"):
        opened(parquet(tmp_path / "set"), split="dev", stream=True)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"bad.parquet cannot be read as a data set"):
        opened(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match="needs --data.path PLACE"):
        open_data(DataConfig(name="hf"), size=8, channels=1)
    with pytest.raises(ValueError, match="stream works with the data set hf, not folder"):
        DataConfig(name="folder", path=tmp_path, stream=True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("trained", "held_out", "labels", "sentence"),
    [
        (["ant", "bee", "cat", "cat"], ["cat", "bee"], [2, 1], ""),
        ([3, 5, 7, 7], [7, 5], [2, 1], ""),
        (["ant", "bee", "bee"], ["bee", "dog"], [], "test has kind 'dog', which no training image has"),
        (["ant", "bee", "bee"], [], [], "test holds no rows"),
    ],
)
def test_held_out_classes_have_the_numbers_of_training(
    stream: bool, trained: Any, held_out: Any, labels: Any, sentence: str, tmp_path: Path
) -> None:
    table(len(trained), kind=trained).to_parquet(tmp_path / "train.parquet")
    table(2, kind=held_out or ["a", "b"]).select(range(len(held_out))).to_parquet(tmp_path / "test.parquet")
    config = hf(tmp_path, label_column="kind", stream=stream)
    if sentence:
        with pytest.raises(ValueError, match=sentence):
            open_held_out(config, size=8, channels=1)
    else:
        found = open_held_out(config, size=8, channels=1)
        assert found is not None
        assert found.labels.tolist() == labels
        assert list(found.id2label.values()) == [str(value) for value in trained[:3]]


def test_a_held_out_split_that_is_broken_is_no_matter_of_training(tmp_path: Path) -> None:
    (parquet(tmp_path / "set") / "test-00000-of-00001.parquet").write_bytes(b"PAR1 nothing")
    assert len(opened(tmp_path / "set")) == 12
    with pytest.raises(ValueError, match="cannot be read as a data set: .*[Pp]arquet"):  # not "An error occurred"
        open_held_out(hf(tmp_path / "set"), size=8, channels=1)


@pytest.mark.parametrize("place", ["../out.parquet", "https://example.org/x.parquet"])
def test_a_readme_names_no_files(place: str, tmp_path: Path) -> None:
    table(5).to_parquet(tmp_path / "out.parquet")
    listed = f"- config_name: default\n  data_files:\n  - split: train\n    path: {place}\n"
    (parquet(tmp_path / "set") / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    assert "12 images of 3 classes" in opened(tmp_path / "set").source


def test_a_cell_names_no_file_outside_the_folder(tmp_path: Path, from_files: None) -> None:
    import datasets

    for place in ("set", "."):
        (tmp_path / place).mkdir(exist_ok=True)
        Image.fromarray(PIXELS[0]).save(tmp_path / place / "a.png")
    paths = ["a.png", str(tmp_path / "a.png"), "../a.png"]
    cells: Any = {"image": [{"bytes": None, "path": path} for path in paths]}
    kinds = datasets.Features(image={"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
    datasets.Dataset.from_dict(cells, kinds).to_parquet(tmp_path / "set" / "a.parquet")
    data = opened(tmp_path / "set", max_bad=2)
    assert np.array_equal(data.images([0])[0, ..., 0], PIXELS[0])
    for row in (1, 2):
        with pytest.raises(BadImage, match=r"that is not there or outside .*set \("):
            data.images([row])


@pytest.mark.parametrize("stream", [False, True])
def test_files_of_other_columns_are_refused(stream: bool, tmp_path: Path) -> None:
    table(4).to_parquet(tmp_path / "train-0.parquet")
    table(4, kind=["a", "b"] * 2).to_parquet(tmp_path / "train-1.parquet")
    with pytest.raises(ValueError, match="train-1.parquet has other columns"):
        opened(tmp_path, stream=stream)


def test_files_beside_the_table_are_counted(tmp_path: Path) -> None:
    (parquet(tmp_path / "set") / "notes.txt").write_text("x")
    assert "1 other file left out, such as notes.txt" in opened(tmp_path / "set").source


def test_a_table_that_is_reached_by_a_link_is_not_left_out(tmp_path: Path) -> None:
    made, folder = parquet(tmp_path / "set"), tmp_path / "links"
    (tmp_path / "link").symlink_to(made)
    folder.mkdir()
    (folder / "train.parquet").symlink_to(made / "train-00000-of-00001.parquet")
    for place in (tmp_path / "link", folder):
        assert "left out" not in opened(place).source


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


def test_metadata_and_folder_may_spell_a_name_otherwise(tmp_path: Path) -> None:
    root = metadata(tmp_path, *({**row, "file_name": f"./{row['file_name']}"} for row in ROWS[1:]),
                    {"file_name": "b/cafe\u0301.png", "kind": "dog"})  # fmt: skip
    (root / "b").mkdir()
    (root / "a" / "0.png").rename(root / "b" / "caf\u00e9.png")
    data = open_data(DataConfig(name="folder", path=root, label_column="kind"), size=8, channels=1)
    assert [data.id2label[label] for label in data.labels.tolist()] == ["cat", "dog", "ant", "dog"]


@pytest.mark.parametrize(
    ("rows", "column", "sentence"),
    [
        ([*ROWS, {**ROWS[0], "file_name": "./a/0.png"}], "kind", "row 5 names a/0.png a second time"),
        (ROWS, "sort", "has no column 'sort' but kind; see --data.label-column"),
        (ROWS[:3], "kind", "has 3 rows and none for a/3.png, one of 4 images"),
        ([*ROWS, {"file_name": "b.png", "kind": "x"}], "kind", "has a row for b.png, and there is no such image"),
        ([*ROWS, *({"file_name": f"{c}.png", "kind": "x"} for c in "zbyxc")], "kind", "has a row for b.png, and there"),
        ([*ROWS, ROWS[0]], "kind", "row 5 names a/0.png a second time"),
        ([*ROWS, {"kind": "x"}], "kind", "row 5 has no file_name"),
        ([*ROWS[:3], {"file_name": "a/3.png"}], "kind", "row 3 has kind None"),
        ([*ROWS, {"file_name": "a\\0.png", "kind": "x"}], "kind", "row 5 names a/0.png a second time"),
        ([{**ROWS[0], "kind": 1}, {**ROWS[1], "kind": True}, *ROWS[2:]], "kind", "has kind 1 and True; make all"),
    ],
)
def test_metadata_that_is_wrong(rows: Any, column: str, sentence: str, tmp_path: Path) -> None:
    metadata(tmp_path, *rows)
    with pytest.raises(ValueError, match=sentence):
        open_data(DataConfig(name="folder", path=tmp_path, label_column=column), size=8, channels=1)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("file_name,kind\na/0.png,x,z", "row 1 has more cells than the first line"),
        ("file_name,kind\na/0.png," + "x" * 200_000, "field larger than field limit"),
        ("file_name,kind\na/0.png,\na/1.png,x\na/2.png,x\na/3.png,x", "row 0 has kind ''"),
        ("[" * 200_000, "line 1 is no JSON object .maximum recursion"),
    ],
)
def test_metadata_that_is_malformed(text: str, sentence: str, tmp_path: Path) -> None:
    (metadata(tmp_path) / "metadata.jsonl").unlink()
    (tmp_path / f"metadata.{'jsonl' if text.startswith('[') else 'csv'}").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        open_data(DataConfig(name="folder", path=tmp_path, label_column="kind"), size=8, channels=1)


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_line_ends_within_a_cell_are_kept(form: str, tmp_path: Path) -> None:
    (metadata(tmp_path) / "metadata.jsonl").unlink()
    end = "\n" if form == "csv" else "\u2028\x85"
    rows = [f'a/{i}.png,"{kind}"' for i, kind in enumerate(["x" + end + "y", "b", "xy", "b"])]
    lines = [
        json.dumps(dict(zip(["file_name", "kind"], r.replace('"', "").split(","), strict=True)), ensure_ascii=False)
        for r in rows
    ]
    text = "\n".join(["file_name,kind", *rows] if form == "csv" else lines)
    (tmp_path / f"metadata.{form}").write_text(text, "utf-8")
    data = open_data(DataConfig(name="folder", path=tmp_path, label_column="kind"), size=8, channels=1)
    assert [data.id2label[label] for label in data.labels.tolist()] == [f"x{end}y", "b", "xy", "b"]
