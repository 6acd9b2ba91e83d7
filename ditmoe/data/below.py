"""What lies below a folder of data: every file is used, hidden by the one rule of names, or counted and named.

`eval.sources.open` goes by the same rule, in words of its own; `tests/contract/test_images.py` holds the two equal.
"""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePath

from ..config.checks import plural

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
HIDDEN = (".", "__MACOSX", "@eaDir")  # files and folders whose names begin so: other programs' notes, not the user's
SAVED = (("dataset_dict.json",), ("state.json", "dataset_info.json"))  # what `save_to_disk` of `datasets` leaves


def is_image(path: PurePath) -> bool:
    """Whether a file goes by the name of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def is_hidden(path: PurePath) -> bool:
    """Whether a path below a folder, or in an archive, leads through a hidden name."""
    return any(part.startswith(HIDDEN) and part != ".." for part in path.parts)


def is_table(path: Path) -> bool:
    """Whether it is for `datasets`: a .parquet file, what save_to_disk made, a folder of such files without images."""
    if not path.is_dir():
        return path.suffix.lower() == ".parquet" and path.is_file()
    if is_saved(path):
        return True
    shown = files_below(path)
    return not any(map(is_image, shown)) and any(file.suffix == ".parquet" for file in shown)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` made it."""
    return any(all((folder / name).is_file() for name in names) for names in SAVED)


def files_below(root: Path) -> list[Path]:
    """All files that are not hidden, in order, links followed; what is no file but has an image's name is among them.

    Raises ValueError at a folder that cannot be listed or is met twice, and at a link that leads nowhere: it may have
    been a folder, without which labels move.
    """

    def stop(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be listed ({error.strerror}); may you read it?") from error

    found: list[Path] = []
    met: set[str] = set()
    for place, folders, names in os.walk(root, onerror=stop, followlinks=True):
        if (real := os.path.realpath(place)) in met:
            raise ValueError(f"{place} is a link to a folder that has been met already; remove the link")
        met.add(real)
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        found += [Path(place, name) for name in names if not name.startswith(HIDDEN)]
    for file in found:
        if not is_image(file) and not file.exists():
            raise ValueError(f"{file.parent} holds {file.name}, a link that leads nowhere; mend or remove it")
    return sorted(found)


def counted(number: int, classes: int, noun: str = "image") -> str:
    """How many there are, for a set's `source`: 12 images of 3 classes."""
    return f"{plural(number, noun)} of {plural(classes, 'class')}"


def left_out(names: Iterable[PurePath]) -> str:
    """What a set's `source` says of files that are none of it, how many and of which kinds; nothing of none."""
    names = list(names)
    kinds = Counter(name.suffix.lower() or name.name for name in names)
    parts = [f"{count} {kind}" for kind, count in kinds.most_common(5)] + ["..."] * (len(kinds) > 5)
    return f"; {plural(len(names), 'other file')} left out, such as {names[0]} ({', '.join(parts)})" if names else ""
