"""Images in tables: a .parquet file, a folder of them, or what `save_to_disk` made; the library `datasets` reads them.

The splits, the column and the files that a cell may name are those of `ditmoe.data.tables`, in words of its own;
`tests/contract/test_images.py` holds the two equal.
"""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

SAVED = (("dataset_dict.json",), ("state.json", "dataset_info.json"))  # what `save_to_disk` leaves


class Table(NamedTuple):
    """Rows by name, how the image file of one is opened, whether all are inside the table, and the files it is of."""

    names: list[str]
    open_file: Callable[[str], IO[bytes]]
    whole: bool
    files: list[str]


def open_table(place: Path, split: str, shown: str) -> Table:
    """The only column of images of a split. ValueError where `datasets` reads none, and where there are several.

    `shown` is what sentences on its splits call the place.
    """
    try:
        import datasets
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(f"{place} is a table: it needs the library datasets: pip install 'ditmoe[data]'") from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with _told(place):
        splits, files = _splits(place)
    if split not in splits:
        what = f"{shown} has no split {split!r}, but {', '.join(map(str, splits))}"
        raise ValueError(f"{what}; write {shown}:{next(iter(splits), 'SPLIT')}")
    found = splits[split]
    if isinstance(found, list):
        with _told(place):
            rows = sum(pq.read_metadata(file).num_rows for file in found)
        if not rows:
            raise ValueError(f"{shown}:{split} holds no rows")
        with _told(place):
            found = datasets.load_dataset("parquet", data_files={split: found}, split=split)
    kinds = [f"{name} ({getattr(feature, 'dtype', 'nested')})" for name, feature in found.features.items()]
    columns = [name for name, feature in found.features.items() if _holds_images(feature)]
    if len(columns) != 1:
        what = f"columns of images: {', '.join(columns)}" if columns else f"no images, but {', '.join(kinds)}"
        raise ValueError(f"{shown}:{split} has {what}; save it with one column of images")
    stored, arrow = found.data.column(columns[0]), found.with_format("arrow")
    stored = pc.struct_field(stored, "bytes") if hasattr(stored.type, "fields") else stored
    root = os.path.abspath(place if place.is_dir() else place.parent)

    def open_file(name: str) -> IO[bytes]:
        cell = arrow[int(name.removeprefix("row "))].column(columns[0])[0].as_py()
        content, inside = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if content is not None:
            return io.BytesIO(content)
        file = Path(os.path.abspath(os.path.join(root, inside or "")))
        if not (file.is_file() and file.is_relative_to(root)):  # to open a pipe would be to wait
            raise FileNotFoundError(f"it is empty, or of a file that is not there or outside {root}")
        return file.open("rb")

    return Table([f"row {i}" for i in range(len(found))], open_file, not stored.null_count, files)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` made it."""
    return any(all((folder / name).is_file() for name in names) for names in SAVED)


@contextmanager
def _told(place: Path) -> Iterator[None]:
    """What the library raises becomes one sentence."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, DatasetsError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the library says that something failed; what did is below
            cause = cause.__cause__
        why = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise ValueError(f"{place} cannot be read as a data set: {why}") from error


def _splits(place: Path) -> tuple[dict[str, Any], list[str]]:
    """The splits by name, each a table of `datasets` or its parquet files; and all files that they are of."""
    import datasets
    from datasets.data_files import DataFilesDict, get_data_patterns

    if is_saved(place):
        saved = datasets.load_from_disk(str(place))
        of_all = [str(file) for file in sorted(place.rglob("*")) if file.is_file()]
        return (dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}), of_all
    if place.is_file():
        return {"train": [str(place)]}, [str(place)]
    patterns = get_data_patterns(str(place))  # by names, never by a README.md, which may name any file
    listed = DataFilesDict.from_patterns(patterns, str(place), allowed_extensions=[".parquet"])
    files = {str(name): list(map(str, of)) for name, of in listed.items()}
    return dict(files), [file for of in files.values() for file in of]


def _holds_images(feature: Any) -> bool:
    """Whether a column is of images: by its type, or as bytes of files, alone or beside their paths."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", None) in ("binary", "large_binary")
