"""Images in tables: parquet files, folders that `datasets` saved, sets of the Hub; the library `datasets` reads them.

Shapes: n images asked for, C channels, H W size; pixels are uint8 (n, H, W, C).
"""

import io
import os
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..config.sections import DataConfig
from .below import counted, files_below, is_image, is_saved, left_out
from .columns import labelled
from .folders import FolderImages, mode_of

WINDOW = 2**28  # bytes of images among which a streamed set is shuffled, and which a reader holds
_HELD_OUT = ("test", "validation", "valid", "val")  # splits for scores: the first that is there


class TableImages(FolderImages):
    """Images of a column that holds image files (their bytes, or paths), with the classes of another.

    Args:
        config: Its `path`, `subset`, `split`, columns, and whether to `stream`.
        size, channels: As of `FolderImages`.
        held_out: Take the split for scores, which is none that is trained on; ValueError where there is none.

    Raises:
        ValueError: Nothing there that `datasets` reads; no such split; a column that is missing, or one of several.
    """

    def __init__(self, config: DataConfig, size: int, channels: int, *, held_out: bool = False) -> None:
        self.size, self.mode, self.fit = size, mode_of(channels), config.fit
        trained = TableImages(config, size, channels) if held_out else None
        self.table, split, others = _opened(config, held_out)
        self._roots = _roots(config)
        features, self._place = self.table.features, f"{config.path}:{split}"
        images = [name for name, feature in features.items() if _holds_images(feature)]
        self._column = _one_of(self._place, "image", config.image_column, images, features)
        classes = [name for name, feature in features.items() if hasattr(feature, "names")]
        classes = classes or [name for name in ("label", "labels", "class") if name in features]
        asked, known = (trained.label_column, trained.id2label) if trained else (config.label_column, None)
        self.label_column: str | None = None
        if asked is None and (trained or not classes):
            self.labels, self.id2label, said = np.zeros(len(self.table), np.int64), {}, ""
            if rest := [name for name in features if name != self._column]:
                said = f"; none of the columns {', '.join(rest)} is of classes, unless --data.label-column says so"
        else:
            self.label_column = label = _one_of(self._place, "label", asked, classes, features)
            names = getattr(features[label], "names", None)
            self.labels, self.id2label, said = labelled(self._place, label, self.table.values(label), names, known)
        if not len(self):
            raise ValueError(f"data.path {self._place} holds no rows")
        self.source = f"{counted(len(self), len(self.id2label))} in {self._place}{said}{others}"

    @cached_property
    def inventory(self) -> list[tuple[str, int]]:
        """Sizes in bytes, of every image or, where they are streamed, of every group of rows."""
        return self.table.inventory(self._column)  # type: ignore[no-any-return]

    def name(self, row: int) -> str:
        """The set, its split, and the number of the row there."""
        return f"{self._place} row {row}"

    def order(self, rng: np.random.Generator, domain: int | None = None) -> NDArray[np.int64]:
        """The rows in random order; of a streamed set see `_Groups`."""
        stream = isinstance(self.table, _Groups)
        return self.table.order(rng, self._column) if stream else super().order(rng, domain)

    def check_headers(self) -> dict[int, str]:
        """Nothing: images are looked at when they are read."""
        return {}

    def _content(self, row: int) -> BinaryIO:
        cell = self.table.cell(self._column, row)
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        file = Path(os.path.abspath(os.path.join(self._roots[0], path or "")))
        if content is None and not (file.is_file() and any(map(file.is_relative_to, self._roots))):  # a pipe would wait
            lost = f"is empty, or of a file that is not there or outside {self._roots[0]} ({path!r:.80})"
            raise ValueError(f"{self.name(row)} {lost}; remove the row")
        return io.BytesIO(file.read_bytes() if content is None else content)


class _Rows:
    """A table on this machine, every row at hand: Arrow files that are mapped into memory."""

    def __init__(self, table: Any) -> None:
        self.features, self._arrow = table.features, table.with_format("arrow")

    def __len__(self) -> int:
        return len(self._arrow)

    def values(self, column: str) -> list[Any]:
        return self._arrow.select_columns([column])[:].column(column).to_pylist()  # type: ignore[no-any-return]

    def cell(self, column: str, row: int) -> Any:
        return self._arrow[row].column(column)[0].as_py()

    def inventory(self, column: str) -> list[tuple[str, int]]:
        import pyarrow.compute as pc

        cells = self._arrow.select_columns([column])[:].column(column)
        stored = pc.struct_field(cells, "bytes") if hasattr(cells.type, "fields") else cells
        sizes = pc.binary_length(stored).to_pylist()
        if None not in sizes:
            return [("", size) for size in sizes]
        paths = [str((self.cell(column, row) or {}).get("path")) for row in range(len(self))]
        return [(os.path.basename(p), os.path.getsize(p) if os.path.isfile(p) else -1) for p in paths]


class _Groups:
    """Parquet files, here or on the Hub, of which a group of rows is read when one of its rows is asked for.

    An epoch takes the groups in random order and shuffles the rows of as many as hold WINDOW bytes together: any place
    of it is known without reading what comes before, so a run that is resumed reads one window again, and nothing else.
    """

    def __init__(self, files: Sequence[str]) -> None:
        import datasets
        import fsspec
        import pyarrow.parquet as pq

        self._names, self._held = files, OrderedDict[int, list[Any]]()
        self._open = [partial(fsspec.open, file, "rb") for file in files]  # anew each time: readers are other processes
        self._read, self._footers = pq.ParquetFile, []
        for opened in self._open:
            with opened() as file:
                self._footers.append(pq.read_metadata(file))
        every = [datasets.Features.from_arrow_schema(footer.schema.to_arrow_schema()) for footer in self._footers]
        self.features, differs = every[0], [features != every[0] for features in every]
        if any(differs):
            raise ValueError(f"{files[differs.index(True)]} has other columns or classes than {files[0]}; mend it")
        self._groups = [(f, g) for f, footer in enumerate(self._footers) for g in range(footer.num_row_groups)]
        self._ends = np.cumsum([0, *(self._footers[f].row_group(g).num_rows for f, g in self._groups)])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def values(self, column: str) -> list[Any]:
        return [value for group in range(len(self._groups)) for value in self._values(column, group)]

    def cell(self, column: str, row: int) -> Any:
        group = int(np.searchsorted(self._ends, row, side="right")) - 1
        if group not in self._held:
            sizes = [size for _, size in self.inventory(column)]
            while self._held and sum(sizes[g] for g in [*self._held, group]) > WINDOW + max(sizes):
                self._held.popitem(last=False)
            self._held[group] = self._values(column, group)
        self._held.move_to_end(group)
        return self._held[group][row - int(self._ends[group])]

    def inventory(self, column: str) -> list[tuple[str, int]]:
        found = []
        for f, g in self._groups:
            group = self._footers[f].row_group(g)
            parts = [group.column(c) for c in range(group.num_columns)]
            size = sum(p.total_uncompressed_size for p in parts if p.path_in_schema.split(".")[0] == column)
            found.append((os.path.basename(self._names[f]), size))
        return found

    def order(self, rng: np.random.Generator, column: str) -> NDArray[np.int64]:
        sizes = [size for _, size in self.inventory(column)]
        windows: list[list[NDArray[np.int64]]] = [[]]
        held = 0
        for group in rng.permutation(len(sizes)).tolist():
            if held >= WINDOW:
                windows, held = [*windows, []], 0
            windows[-1].append(np.arange(*self._ends[group : group + 2]))
            held += sizes[group]
        return np.concatenate([rng.permutation(np.concatenate(window)) for window in windows])

    def _values(self, column: str, group: int) -> list[Any]:
        f, g = self._groups[group]
        with self._open[f]() as file:
            table = self._read(file, metadata=self._footers[f]).read_row_group(g, [column], use_threads=False)
        return table.column(column).to_pylist()  # type: ignore[no-any-return]


def held_out_split(config: DataConfig, splits: Iterable[str] | None = None) -> str | None:
    """The split for scores beside the one that is trained on, if a set has one. ValueError as `TableImages`."""
    splits = _splits(config)[0] if splits is None else splits
    return next((name for name in _HELD_OUT if name in splits and name != config.split), None)


def _opened(config: DataConfig, held_out: bool) -> tuple[Any, str, str]:
    """The table of a split, the split's name, and what is said of files that are no part of the set."""
    splits, said = _splits(config)
    split = held_out_split(config, splits) if held_out else config.split
    if split is None or split not in splits:
        what = f"has no split {split or 'for scores'}, but {', '.join(map(str, splits))}"
        raise ValueError(f"data.path {config.path} {what}; give one with --data.split")
    from datasets import load_dataset

    found = splits[split]
    with _told(config):
        if isinstance(found, list):  # no other split is prepared: one that is broken is for whoever asks for it
            groups = _Groups(found)
            if config.stream or not len(groups):
                return groups, split, said
            found = load_dataset("parquet", data_files={split: found}, split=split)
        return _Rows(found), split, said


def _splits(config: DataConfig) -> tuple[dict[str, Any], str]:
    """The splits by name, each a table of `datasets` or its parquet files; what is said of files beside them."""
    try:
        import datasets
        from datasets.data_files import DataFilesDict, get_data_patterns
    except ImportError as error:
        raise ValueError("data.name hf needs the library datasets: pip install 'ditmoe[data]'") from error
    path = config.path
    assert path is not None
    if not path.exists() and (":" in path.name or path.is_absolute() or len(path.parts) > 2 or path.parts[0] == ".."):
        fix = "PATH and --data.split, as PATH:SPLIT is for scores" if ":" in path.name else "a folder of parquet files"
        raise ValueError(f"data.path {path} is not there, and no OWNER/NAME of the Hub; give {fix}")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with _told(config):
        if is_saved(path):
            if config.stream or config.subset:
                raise ValueError("save_to_disk made it, so stream and subset do not apply; leave them out")
            saved = datasets.load_from_disk(str(path))
            return (dict(saved) if isinstance(saved, datasets.DatasetDict) else {config.split: saved}), ""
        if path.exists() and config.subset:
            raise ValueError("a subset is of the Hub; give the folder of its files as --data.path")
        if path.is_file():
            return {"train": [str(path)]}, ""
        below = files_below(path) if path.is_dir() else []
        if path.is_dir():
            if not any(file.suffix == ".parquet" for file in below):
                images = "image files, which are read as they lie; give --data.name folder"
                raise ValueError(f"it holds {images if any(map(is_image, below)) else 'no .parquet files'}")
            patterns = get_data_patterns(str(path))  # by names, never by a README.md, which may name any file
            listed = DataFilesDict.from_patterns(patterns, str(path), allowed_extensions=[".parquet"])
        else:
            builder = datasets.load_dataset_builder(str(path), config.subset)
            if not config.stream:
                builder.download_and_prepare()
                return dict(builder.as_dataset()), ""
            listed = builder.config.data_files or {}
        files = {str(name): list(map(str, of)) for name, of in listed.items()}
        every = [file for of in files.values() for file in of]
        if other := next((file for file in every if not file.endswith(".parquet")), None):
            raise ValueError(f"it is of other files than parquet ({other}); leave out --data.stream")
        used = set(map(os.path.realpath, every))  # by links it may have been reached
        return files, left_out(f.relative_to(path) for f in below if os.path.realpath(f) not in used)


def _roots(config: DataConfig) -> list[str]:
    """Where the files may lie that a table names: in its folder, or of a set of the Hub in the caches."""
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    path = Path(os.path.abspath(config.path or ""))
    return [str(path if path.is_dir() else path.parent)] if path.exists() else [str(HF_DATASETS_CACHE), HF_HUB_CACHE]


@contextmanager
def _told(config: DataConfig) -> Iterator[None]:
    """What the library raises becomes one sentence."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, DatasetsError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the library says that something failed; what did is below
            cause = cause.__cause__
        why = " ".join(str(cause).split())[:200] or type(cause).__name__
        here = "" if config.path and config.path.exists() else ", of the Hub as it is not here,"
        raise ValueError(f"data.path {config.path}{here} cannot be read as a data set: {why}") from error


def _holds_images(feature: Any) -> bool:
    """Whether a column is of images: by its type, or as bytes of files, alone or beside their paths."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _one_of(place: str, kind: str, asked: str | None, fitting: Sequence[str], features: Iterable[str]) -> str:
    """The column that is asked for, or the only one that fits."""
    option = f"--data.{kind}-column"
    if asked is not None and asked not in features:
        raise ValueError(f"data.path {place} has no column {asked!r}, but {', '.join(features)}; see {option}")
    if kind == "image" and asked is not None and asked not in fitting:
        raise ValueError(f"data.path {place}: column {asked} holds no images, but {', '.join(fitting) or 'none does'}")
    if asked is None and len(fitting) != 1:
        found = ", ".join(fitting or features)
        what = f"columns that may be the {kind}: {found}" if fitting else f"no {kind}, but {found}"
        raise ValueError(f"data.path {place} has {what}; name it with {option}")
    return asked or fitting[0]
