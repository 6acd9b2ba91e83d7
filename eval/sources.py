"""Sets of images to score: folder, zip, .npz, named data set, array; and saved statistics.

Every source of images yields uint8 batches (n, H, W, C), C = 1 or 3, one size throughout.
Imports no torch. Every fault of a file is a ValueError of one sentence that names the file.
"""

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image

from eval.arrays import DAMAGE, ReadBatches, UInt8Array, open_idx, open_npz_images, read_npz_arrays
from eval.frechet import Gaussian

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF")
DIGITS_FILE = Path(__file__).resolve().parent.parent / "ditmoe" / "data_files" / "digits.npz"
FASHION_FOLDERS = (Path("data/FashionMNIST/raw"), Path("/usr/share/datasets/fashion-mnist"))
FASHION_FILES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}


@dataclass(frozen=True)
class Images:
    """At least two images of one size, read in batches in a fixed order."""

    kind: str  # folder | zip | npz | dataset | array
    path: str  # as the user wrote it
    count: int
    shape: tuple[int, int, int]  # (H, W, C)
    read: ReadBatches

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[UInt8Array]:
        """Batches uint8 (n, H, W, C), n <= batch_size, of the first `limit` images, or of all."""
        return self.read(self.count if limit is None else limit, batch_size)


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance from a file: features of images that are no longer there."""

    kind: str  # stats
    path: str
    gaussian: Gaussian
    sha256: str  # of the file


def open_source(source: str | Path | UInt8Array) -> Images | Statistics:
    """The images (or statistics) that `source` names: the kinds are in this module's first line.

    Looks at every image's header but decodes none. Raises ValueError when the source is missing,
    damaged, of an unknown kind, empty, a single image, or has images of different sizes.
    """
    if isinstance(source, np.ndarray):
        opened: Images | Statistics = _array(source)
    elif Path(source).is_dir():
        opened = _folder(Path(source), str(source))
    elif Path(source).exists():
        opened = _file(Path(source), str(source))
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


def _in_memory(kind: str, path: str, array: UInt8Array) -> Images:
    def read(limit: int, batch_size: int) -> Iterator[UInt8Array]:
        for start in range(0, limit, batch_size):
            yield array[start : min(start + batch_size, limit)]

    height, width, channels = array.shape[1:]
    return Images(kind, path, len(array), (height, width, channels), read)


def _file(file: Path, path: str) -> Images | Statistics:
    suffix = file.suffix.lower()
    if suffix == ".npz":
        return _npz(file, path)
    if suffix == ".zip":
        return _zip(file, path)
    raise ValueError(f"{path}: a file that is neither .zip nor .npz; give a folder of images, a .zip or an .npz")


# ------------------------------------------------------------------------------ .npz


def _npz(file: Path, path: str) -> Images | Statistics:
    """ADM's layout: arr_0 uint8 (N, H, W, C); or statistics `mu` (D,) and `sigma` (D, D)."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except DAMAGE as error:
        raise ValueError(f"{path}: not a readable .npz ({error}); write it again") from error
    if "arr_0" in names:
        count, shape, read = open_npz_images(file, "arr_0")
        return Images("npz", path, count, shape, read)
    if {"mu", "sigma"} <= names:
        arrays = read_npz_arrays(file, ("mu", "sigma"))
        mean, covariance = (_as_float64(arrays[name], name, path) for name in ("mu", "sigma"))
        with file.open("rb") as handle:
            sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
        return Statistics("stats", path, Gaussian(mean, covariance), sha256)
    raise ValueError(f"{path}: holds {sorted(names)}; expected arr_0 (images) or mu and sigma (statistics)")


def _as_float64(array: npt.NDArray[np.generic], name: str, path: str) -> npt.NDArray[np.float64]:
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{path}: {name} is {array.dtype}; expected float64")
    return array.astype(np.float64)


# ----------------------------------------------------------------- folders and zips


def _folder(folder: Path, path: str) -> Images:
    files = [file for file in folder.rglob("*") if file.is_file()]
    names = _image_names(file.relative_to(folder).as_posix() for file in files)
    return _image_files("folder", path, names, lambda name: (folder / name).open("rb"))


def _zip(file: Path, path: str) -> Images:
    try:
        archive = zipfile.ZipFile(file)
    except DAMAGE as error:
        raise ValueError(f"{path}: not a readable zip ({error}); write it again") from error
    if any(info.flag_bits & 1 for info in archive.infolist()):
        raise ValueError(f"{path}: the zip is encrypted; write it again without a password")
    return _image_files("zip", path, _image_names(archive.namelist()), archive.open)


def _image_names(names: Iterator[str] | Sequence[str]) -> list[str]:
    """Names with an image's suffix, sorted; hidden files and macOS's resource forks left out."""
    return sorted(
        name
        for name in names
        if PurePosixPath(name).suffix.lower() in SUFFIXES
        and not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)
    )


def _image_files(kind: str, path: str, names: list[str], open_file: Callable[[str], IO[bytes]]) -> Images:
    """Images decoded to RGB one by one; all headers are read now, so that faults come early."""
    if not names:
        raise ValueError(f"{path}: no images ({', '.join(sorted(SUFFIXES))}); is the path right?")
    sizes: dict[str, tuple[int, int]] = {}
    bad: list[str] = []
    for name in names:
        try:
            with open_file(name) as file, Image.open(file, formats=FORMATS) as image:
                sizes[name] = image.size
        except DAMAGE as error:
            bad.append(f"{name} ({type(error).__name__})")
    if bad:
        raise ValueError(
            f"{path}: {len(bad)} of {len(names)} images cannot be read, "
            f"remove or replace them: {', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}"
        )
    width, height = sizes[names[0]]
    for name, size in sizes.items():
        if size != (width, height):
            raise ValueError(
                f"{path}: {name} is {size[0]}x{size[1]} but {names[0]} is {width}x{height}; "
                "resize or crop all images to one size"
            )

    def read(limit: int, batch_size: int) -> Iterator[UInt8Array]:
        for start in range(0, limit, batch_size):
            chosen = names[start : min(start + batch_size, limit)]
            yield np.stack([_decode(path, name, open_file) for name in chosen])

    return Images(kind, path, len(names), (height, width, 3), read)


def _decode(path: str, name: str, open_file: Callable[[str], IO[bytes]]) -> UInt8Array:
    """One image as RGB (H, W, 3); grey is copied to three channels."""
    try:
        with open_file(name) as file, Image.open(file, formats=FORMATS) as image:
            image.load()
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"{path}: {name} is not 8-bit (mode {image.mode}); save it as 8-bit")
            if image.has_transparency_data:
                alpha = image.convert("RGBA").getchannel("A")
                if alpha.getextrema() != (255, 255):
                    raise ValueError(f"{path}: {name} has transparent pixels; flatten it first")
            return np.asarray(image.convert("RGB"))
    except (*DAMAGE, SyntaxError) as error:
        raise ValueError(f"{path}: cannot decode {name} ({error}); remove or replace it") from error


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
    array = read_npz_arrays(DIGITS_FILE, (f"{split}_images",))[f"{split}_images"]
    return _in_memory("dataset", path, array[..., None].astype(np.uint8))


def _fashion(path: str, split: str) -> Images:
    for folder in FASHION_FOLDERS:
        for suffix in ("", ".gz"):
            file = folder / (FASHION_FILES[split] + suffix)
            if file.is_file():
                count, shape, read = open_idx(file)
                return Images("dataset", path, count, shape, read)
    folders = " or ".join(str(folder) for folder in FASHION_FOLDERS)
    raise ValueError(
        f"{path}: {FASHION_FILES[split]}[.gz] is not in {folders}; install Debian's "
        "dataset-fashion-mnist or put torchvision's download there"
    )
