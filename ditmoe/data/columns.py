"""The classes of images by a column: of a table, or of the metadata.jsonl that lies in a folder of images."""

import csv
import io
import json
import posixpath
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.checks import plural

METADATA = ("metadata.jsonl", "metadata.csv")  # a row an image: its `file_name`, and what is known of it


def labelled(
    place: object, column: str, values: Sequence[Any], names: Sequence[str] | None = None,
    known: Mapping[int, str] | None = None,
) -> tuple[NDArray[np.int64], dict[int, str], str]:  # fmt: skip
    """Labels (n,), the names of the classes, and what a set's `source` says where a label is not what one may expect.

    `names` are those of the classes that the values number; without them each value, a text or a whole number, is a
    class, in their order. ValueError at a row without a class, and where each row has one of its own. Of held-out
    images the classes are those `known` of the training images, by name; ValueError at another one.
    """
    for row, value in enumerate(values):
        if names is not None and value is not None and not 0 <= value < len(names):
            raise ValueError(f"{place} row {row} has {column} {value!r:.80}, the set has classes 0..{len(names) - 1}")
        if not isinstance(value, str | int) or value == "":
            raise ValueError(f"{place} row {row} has {column} {value!r:.80}; a class is a text or a whole number")
        if type(value) is not type(values[0]):  # 1, True and "1" would be classes of one name
            raise ValueError(f"{place} has {column} {values[0]!r:.80} and {value!r:.80}; make all texts or all numbers")
    if known is not None:
        by_name = {name: label for label, name in known.items()}
        called = [str(value if names is None else names[value]) for value in values]
        if (strange := next((name for name in called if name not in by_name), None)) is not None:
            raise ValueError(f"{place} has {column} {strange!r:.80}, which no training image has; remove its rows")
        return np.asarray([by_name[name] for name in called], np.int64), dict(known), ""
    if names is not None:
        labels = np.asarray(values, np.int64)
        empty = len(names) - len(np.unique(labels))
        return labels, dict(enumerate(names)), f"; {empty} of the classes have no image" if empty else ""
    classes = sorted(set(values), key=lambda value: (isinstance(value, str), value))
    if len(classes) == len(values) > 1:
        raise ValueError(f"{place} has another {column} in every row: it is no column of classes; give another one")
    numbers = {value: label for label, value in enumerate(classes)}
    labels = np.asarray([numbers[value] for value in values], np.int64)
    return labels, {i: str(v) for i, v in enumerate(classes)}, misnumbered("values", classes)


def misnumbered(what: str, classes: Iterable[Any]) -> str:
    """For a set's `source`: that a class named by a number has another label; nothing where none has."""
    wrong = [(label, c) for label, c in enumerate(classes) if str(c).isdecimal() and int(c) != label]
    return f"; labels go by the order of {what}: label {wrong[0][0]} is {wrong[0][1]!r}" if wrong else ""


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
        cells = csv.DictReader(io.StringIO(text, newline=""))
        read = list(cells) if file.suffix == ".csv" else _lines(file, text)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} cannot be read as rows of UTF-8 ({error})") from error
    for number, row in enumerate(read, 1):
        name = _place(str(row.get("file_name") or "")) if isinstance(row, dict) else ""
        if not name or name in rows or None in row:
            what = "has more cells than the first line" if name else "has no file_name"
            what = f"names {name} a second time" if name in rows else what
            raise ValueError(f"{file}: row {number} {what}; each image has one row")
        rows[name] = row
    return rows


def column_of(file: Path, column: str | None, names: Sequence[str]) -> list[Any]:
    """The values of a column for these images. ValueError where there is none, and where images and rows differ."""
    rows = read_metadata(file)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row if name != "file_name"))
    if column not in columns:
        raise ValueError(f"{file} has no column {column!r} but {', '.join(columns) or 'none'}; see --data.label-column")
    names = [_place(name) for name in names]
    if bare := next((name for name in names if name not in rows), None):
        what = f"{plural(len(rows), 'row')} and none for {bare}, one of {plural(len(names), 'image')}"
        raise ValueError(f"{file} has {what}; add one")
    if lost := min(rows.keys() - set(names), default=None):
        raise ValueError(f"{file} has a row for {lost}, and there is no such image; remove the row or bring the image")
    return [rows[name].get(column) for name in names]


def _place(name: str) -> str:
    """A file below a folder by one spelling: of `./a.png`, `b\\a.png`, and of letters with accents in two parts."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/"))) if name else ""


def _lines(file: Path, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: line {number} is no JSON object ({error})") from error
    return rows
