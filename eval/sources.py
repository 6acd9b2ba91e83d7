"""Sets of images to score: folder, zip, .npz, named data set, array; and saved statistics.

Every source of images yields uint8 batches (n, H, W, C), C = 1 or 3, one size throughout.
Imports no torch. Every fault of a file is a ValueError of one sentence that names the file.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from PIL import Image

from eval.arrays import DAMAGE, IndexArray, UInt8Array, open_idx, read_npz_arrays, share
from eval.images import Images, Statistics
from eval.npz import members, open_npz

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF")
DIGITS_FILE = Path(__file__).resolve().parent.parent / "ditmoe" / "data_files" / "digits.npz"
FASHION_FOLDERS = (Path("data/FashionMNIST/raw"), Path("/usr/share/datasets/fashion-mnist"))
FASHION_FILES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}


def open_source(source: str | Path | UInt8Array | Images, skip_bad: int = 0) -> Images | Statistics:
    """The images (or statistics) that `source` names: the kinds are in this module's first line.

    Looks at every image's header but decodes none. Up to `skip_bad` images of a folder or zip may be
    unreadable: they are left out and named in `Images.bad`. Raises ValueError when the source is missing,
    damaged, of an unknown kind, empty, a single image, or has images of different sizes.
    """
    if isinstance(source, Images):
        opened: Images | Statistics = source
    elif isinstance(source, np.ndarray):
        opened = _array(source)
    elif Path(source).is_dir():
        opened = _folder(Path(source), str(source), skip_bad)
    elif Path(source).exists():
        opened = _file(Path(source), str(source), skip_bad)
    else:
        opened = _dataset(str(source))
    if isinstance(opened, Images):
        _check_images(opened)
    return opened


def _check_images(images: Images) -> None:
    height, width, channels = images.shape
    if images.count < 2:
        raise ValueError(f"{images.path}: holds {images.count} image; a covariance needs at least 2, give more")
    if channels not in (1, 3) or height < 1 or width < 1:
        raise ValueError(f"{images.path}: images of shape (H, W, C) = {images.shape}; C must be 1 or 3")


def _array(array: UInt8Array) -> Images:
    if array.dtype != np.uint8 or array.ndim != 4:
        raise ValueError(f"array is {array.dtype} {array.shape}; expected uint8 (N, H, W, C)")
    return _in_memory("array", "array", array)


def _in_memory(
    kind: str, path: str, array: UInt8Array, fingerprint: str = "", labels: IndexArray | None = None
) -> Images:
    def read(limit: int, batch_size: int, rank: int, world: int) -> Iterator[tuple[IndexArray, UInt8Array]]:
        starts = range(0, limit, batch_size)
        return share((array[start : min(start + batch_size, limit)] for start in starts), batch_size, rank, world)

    height, width, channels = array.shape[1:]
    return Images(kind, path, len(array), (height, width, channels), read, fingerprint, labels)


def _file(file: Path, path: str, skip_bad: int) -> Images | Statistics:
    suffix = file.suffix.lower()
    if suffix == ".npz":
        return open_npz(file, path)
    if suffix == ".zip":
        return _zip(file, path, skip_bad)
    raise ValueError(f"{path}: a file that is neither .zip nor .npz; give a folder of images, a .zip or an .npz")


# ----------------------------------------------------------------- folders and zips


def _folder(folder: Path, path: str, skip_bad: int) -> Images:
    files = [file for file in folder.rglob("*") if file.is_file()]
    names = _image_names(file.relative_to(folder).as_posix() for file in files)
    fingerprint = repr([str(folder.resolve()), *((name, *_stamp(folder / name)) for name in names)])
    images = _image_files("folder", path, names, lambda name: (folder / name).open("rb"), skip_bad, fingerprint)
    note = folder / "sampling.json"
    if note.is_file():
        try:
            images.facts.update(dict(json.loads(note.read_text(encoding="utf-8"))))
        except (ValueError, TypeError, OSError, RecursionError) as error:
            raise ValueError(f"{note}: not a JSON object ({error}); remove it") from error
    return images


def _zip(file: Path, path: str, skip_bad: int) -> Images:
    try:
        archive = zipfile.ZipFile(file)
    except DAMAGE as error:
        raise ValueError(f"{path}: not a readable zip ({error}); write it again") from error
    if any(info.flag_bits & 1 for info in archive.infolist()):
        raise ValueError(f"{path}: the zip is encrypted; write it again without a password")
    names = _image_names(archive.namelist())
    return _image_files("zip", path, names, archive.open, skip_bad, members(archive))


def _image_names(names: Iterator[str] | Sequence[str]) -> list[str]:
    """Names with an image's suffix, sorted; hidden files and macOS's resource forks left out."""
    return sorted(
        name
        for name in names
        if PurePosixPath(name).suffix.lower() in SUFFIXES
        and not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)
    )


def _stamp(file: Path) -> tuple[int, ...]:
    """What changes with a file: its size, times of writing and of any change, and its place on the disk."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _image_files(
    kind: str, path: str, names: list[str], open_file: Callable[[str], IO[bytes]], skip_bad: int, fingerprint: str
) -> Images:
    """Images decoded to RGB one by one; all headers are read now, so that faults come early."""
    if not names:
        raise ValueError(f"{path}: no images ({', '.join(sorted(SUFFIXES))}); is the path right?")
    sizes: dict[str, tuple[int, int]] = {}
    bad: list[str] = []
    for name in names:
        try:
            with open_file(name) as file, Image.open(file, formats=FORMATS) as image:
                sizes[name] = image.size
        except (*DAMAGE, ValueError) as error:
            bad.append(f"{name} ({type(error).__name__})")
    if len(bad) > skip_bad or not sizes:
        raise ValueError(
            f"{path}: {len(bad)} of {len(names)} images cannot be read, "
            f"remove or replace them: {', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}"
        )
    left = list(sizes)
    width, height = sizes[left[0]]
    for name, size in sizes.items():
        if size != (width, height):
            raise ValueError(
                f"{path}: {name} is {size[0]}x{size[1]} but {left[0]} is {width}x{height}; "
                "resize or crop all images to one size"
            )

    def read(limit: int, batch_size: int, rank: int, world: int) -> Iterator[tuple[IndexArray, UInt8Array]]:
        for start in range(rank * batch_size, limit, world * batch_size):
            found = {}
            for i in range(start, min(start + batch_size, limit)):
                try:
                    found[i] = _decode(path, left[i], open_file)
                except ValueError:
                    images.bad.append(left[i])
                    if len(images.bad) > skip_bad:
                        raise
            if found:
                yield np.array(list(found)), np.stack(list(found.values()))

    images = Images(kind, path, len(left), (height, width, 3), read, fingerprint, may_skip=skip_bad)
    images.bad.extend(name for name in names if name not in sizes)
    return images


def _decode(path: str, name: str, open_file: Callable[[str], IO[bytes]]) -> UInt8Array:
    """One image as RGB (H, W, 3); grey is copied to three channels."""
    try:
        with open_file(name) as file, Image.open(file, formats=FORMATS) as image:
            image.load()
            picture = image.copy()
    except (*DAMAGE, ValueError) as error:
        raise ValueError(f"{path}: cannot decode {name} ({error}); remove or replace it") from error
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"{path}: {name} is not 8-bit (mode {picture.mode}); save it as 8-bit")
    if picture.has_transparency_data:
        alpha = picture.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            raise ValueError(f"{path}: {name} has transparent pixels; flatten it first")
    return np.asarray(picture.convert("RGB"))


# ---------------------------------------------------------------------- named sets


def _dataset(path: str) -> Images:
    """NAME:SPLIT, for the data sets that need no download."""
    name, _, split = path.partition(":")
    if name not in ("digits", "fashion"):
        raise ValueError(
            f"{path!r} does not exist; give a folder, a .zip, an .npz, or "
            "digits:train, digits:test, fashion:train, fashion:test"
        )
    if split not in ("train", "test"):
        raise ValueError(f"unknown split in {path!r}; write {name}:train or {name}:test")
    return _digits(path, split) if name == "digits" else _fashion(path, split)


def _digits(path: str, split: str) -> Images:
    arrays = read_npz_arrays(DIGITS_FILE, (f"{split}_images", f"{split}_labels"))
    images, labels = arrays[f"{split}_images"][..., None], arrays[f"{split}_labels"].astype(np.int64)
    return _in_memory("dataset", path, images.astype(np.uint8), path + repr(_stamp(DIGITS_FILE)), labels)


def _fashion(path: str, split: str) -> Images:
    for folder in FASHION_FOLDERS:
        for suffix in ("", ".gz"):
            file = folder / (FASHION_FILES[split] + suffix)
            if file.is_file():
                count, shape, read = open_idx(file)
                return Images("dataset", path, count, shape, read, path + repr((str(file), *_stamp(file))))
    folders = " or ".join(str(folder) for folder in FASHION_FOLDERS)
    raise ValueError(
        f"{path}: {FASHION_FILES[split]}[.gz] is not in {folders}; install Debian's "
        "dataset-fashion-mnist or put torchvision's download there"
    )
