"""The classes of images by a column: of a table, or of the metadata.jsonl that lies in a folder of images."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

METADATA = ("metadata.jsonl", "metadata.csv")  # a row an image: its `file_name`, and what is known of it


def labelled(
    place: object, column: str, values: Sequence[Any], names: Sequence[str] | None = None
) -> tuple[NDArray[np.int64], dict[int, str], str]:
    """Labels (n,), the names of the classes, and what a set's `source` says where a label is not what one may expect.

    `names` are those of the classes that the values number; without them each value, a text or a whole number, is a
    class, in their order. ValueError at a row without a class, and where each row has one of its own.
    """
    for row, value in enumerate(values):
        if names is not None and value is not None and not 0 <= value < len(names):
            raise ValueError(f"{place} row {row} has {column} {value}, the set has classes 0..{len(names) - 1}")
        if value is None or isinstance(value, float) or not isinstance(value, str | int):
            raise ValueError(f"{place} row {row} has {column} {value!r}; a class is a text or a whole number")
    if names is not None:
        labels = np.asarray(values, np.int64)
        empty = len(names) - len(np.unique(labels))
        return labels, dict(enumerate(names)), f"; {empty} of the classes have no image" if empty else ""
    classes = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    if len(classes) == len(values) > 1:
        raise ValueError(f"{place} has another {column} in every row: it is no column of classes; give another one")
    numbers = {value: label for label, value in enumerate(classes)}
    wrong = next(
        ((label, value) for value, label in numbers.items() if str(value).isdecimal() and int(value) != label), None
    )
    said = f"; labels go by the order of values: label {wrong[0]} is {wrong[1]!r}" if wrong else ""
    return np.asarray([numbers[value] for value in values], np.int64), {i: str(v) for i, v in enumerate(classes)}, said


def metadata_of(root: Path) -> Path | None:
    """The file of a folder that has a row an image. ValueError where there are two."""
    found = [root / name for name in METADATA if (root / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{root} holds {' and '.join(METADATA)}; remove one of them")
    return found[0] if found else None


def read_metadata(file: Path) -> dict[str, dict[str, Any]]:
    """The rows of such a file by `file_name`. ValueError, with the line, where it cannot be read or names one twice."""
    rows: dict[str, dict[str, Any]] = {}
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8 ({error})") from error
    read = csv.DictReader(text.splitlines()) if file.suffix == ".csv" else _lines(file, text)
    for number, row in enumerate(read, 1):
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or name in rows:
            what = f"names {name} a second time" if name in rows else "has no file_name"
            raise ValueError(f"{file}: row {number} {what}; each image has one row")
        rows[name.replace("\\", "/")] = row
    return rows


def column_of(file: Path, column: str | None, names: Sequence[str]) -> list[Any]:
    """The values of a column for these images. ValueError where there is none, and where images and rows differ."""
    rows = read_metadata(file)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row if name != "file_name"))
    if column not in columns:
        raise ValueError(f"{file} has no column {column!r} but {', '.join(columns) or 'none'}; see --data.label-column")
    if bare := next((name for name in names if name not in rows), None):
        raise ValueError(f"{file} has {len(rows)} rows and none for {bare}, one of {len(names)} images; add one")
    if lost := next(iter(rows.keys() - set(names)), None):
        raise ValueError(f"{file} has a row for {lost}, and there is no such image; remove the row or bring the image")
    return [rows[name].get(column) for name in names]


def _lines(file: Path, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"{file}: line {number} is no JSON object ({error})") from error
    return rows
