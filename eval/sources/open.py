"""Sets of images to score: folder, zip, .npz, table, named data set, array; and saved statistics.

Images are uint8 batches (n, H, W, C), C = 1 or 3, one size throughout. Imports no torch.
"""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from eval import strict_json
from eval.sources.arrays import DAMAGE, IndexArray, UInt8Array, open_idx, read_npz_arrays
from eval.sources.images import Images, Statistics
from eval.sources.npz import open_npz, open_zip
from eval.sources.tables import is_saved, open_table

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
HIDDEN = (".", "__MACOSX", "@eaDir")  # names that begin so are left out; all as in `ditmoe.data.below`
NOTE = "sampling.json"  # what `sample.py` says of the images beside it
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF")
DIGITS_FILE = Path(__file__).resolve().parents[2] / "ditmoe" / "data_files" / "digits.npz"
FASHION_FOLDERS = (Path("data/FashionMNIST/raw"), Path("/usr/share/datasets/fashion-mnist"))
OpenFile = Callable[[str], IO[bytes]]
DATASETS = ("digits", "fashion")
CLASSES = ("metadata.jsonl", "metadata.csv")  # of the images of a folder; a score asks for none
FASHION_FILES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}


def open_source(source: str | Path | UInt8Array | Images, skip_bad: int = 0) -> Images | Statistics:
    """The images (or statistics) that `source` names: the kinds are in this module's first line.

    Looks at every image's header but decodes none. Up to `skip_bad` images of a folder or zip may be
    unreadable: they are left out and named in `Images.bad`. Raises ValueError when the source is missing,
    damaged, closed to the reader, of an unknown kind, empty, a single image, or has images of different sizes.
    """
    opened = source if isinstance(source, Images) else _open(source, skip_bad)
    if isinstance(opened, Images):
        height, width, channels = opened.shape
        if opened.count < 2:
            raise ValueError(f"{opened.path}: holds {opened.count} image; a covariance needs at least 2, give more")
        if channels not in (1, 3) or height < 1 or width < 1:
            raise ValueError(f"{opened.path}: images of shape (H, W, C) = {opened.shape}; C must be 1 or 3")
    return opened


def _open(source: str | Path | UInt8Array, skip_bad: int) -> Images | Statistics:
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 4:
            raise ValueError(f"array is {source.dtype} {source.shape}; expected uint8 (N, H, W, C)")
        return _in_memory("array", "array", source)
    path, place = str(source), Path(source)
    if not path:
        raise ValueError("the path is empty; give a folder, a .zip, an .npz or NAME:SPLIT")
    try:
        table, _, split = path.rpartition(":")
        if table in DATASETS or not (place.exists() or (table and Path(table).exists())):
            return _dataset(path)
        if not place.exists():
            if not is_table(Path(table)):
                raise ValueError(f"{path}: PATH:SPLIT is for a table, and {table} is none; give {table} alone")
            return _table(Path(table), split, skip_bad)
        if is_table(place):
            return _table(place, "train", skip_bad)
        if place.is_dir():
            return _folder(place, path, skip_bad)
        if place.suffix.lower() == ".npz":
            return open_npz(place, path)
        if place.suffix.lower() == ".zip":
            return _zip(place, path, skip_bad)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{path[:200]}: cannot be read ({reason}); is the path right, and may you read it?") from error
    kinds = "neither .zip nor .npz nor .parquet; give a folder of images, a .zip, an .npz or a .parquet"
    raise ValueError(f"{path}: a file that is {kinds}")


def _in_memory(
    kind: str, path: str, array: UInt8Array, fingerprint: str = "", labels: IndexArray | None = None
) -> Images:
    def read(limit: int, batch_size: int, rank: int, world: int) -> Iterator[tuple[IndexArray, UInt8Array]]:
        for start in range(rank * batch_size, limit, world * batch_size):
            end = min(start + batch_size, limit)
            yield np.arange(start, end), array[start:end]

    height, width, channels = array.shape[1:]
    return Images(kind, path, len(array), (height, width, channels), read, fingerprint, labels)


def _folder(folder: Path, path: str, skip_bad: int) -> Images:
    names, left_out = _image_names(_files_below(folder, path), path)
    note = folder / NOTE
    facts = strict_json.read(note) if note.is_file() else {}
    if not isinstance(facts, dict):
        raise ValueError(f"{note}: not a JSON object; remove it")
    fingerprint = repr([str(folder.resolve()), facts, *((name, *_stamp(folder / name)) for name in names)])

    def open_file(name: str) -> IO[bytes]:
        if not (folder / name).is_file():  # to open a pipe would be to wait
            raise FileNotFoundError(f"{name} is no file")
        return (folder / name).open("rb")

    return _image_files("folder", path, names, open_file, skip_bad, fingerprint, facts, left_out)


def is_table(place: Path) -> bool:
    """Whether it is for `datasets`: a .parquet file, what save_to_disk made, a folder of such files without images."""
    if not place.is_dir():
        return place.suffix.lower() == ".parquet" and place.is_file()
    if is_saved(place):
        return True
    found = False
    for name in _files_below(place, str(place)):
        suffix = "" if name.split("/")[-1].startswith(HIDDEN) else PurePosixPath(name).suffix
        if suffix.lower() in SUFFIXES:
            return False
        found |= suffix == ".parquet"
    return found


def _table(place: Path, split: str, skip_bad: int) -> Images:
    shown = f"./{place}" if str(place) in DATASETS else str(place)  # the bare name with a split is the data set
    names, open_file, whole, files = open_table(place, split, shown)
    path, used = f"{shown}:{split}", set(map(os.path.realpath, files))
    below = [*_files_below(place, path)] if place.is_dir() else []
    _, left_out = _image_names((name for name in below if os.path.realpath(place / name) not in used), shown)
    stamps = [str(place.resolve()), split, *((file, *_stamp(Path(file))) for file in files)]
    fingerprint = repr(stamps) if whole else ""  # files that cells name may change
    return _image_files("table", path, names, open_file, skip_bad, fingerprint, {}, left_out)


def _files_below(folder: Path, path: str) -> Iterator[str]:
    """Names of all files below a folder, links followed; a link that leads nowhere is a file too."""

    def stop(error: OSError) -> None:
        raise ValueError(f"{path}: {error.filename} cannot be listed ({error.strerror}); may you read it?") from error

    met: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(place)
        if real in met:
            raise ValueError(f"{path}: {place} is a link to a folder that has been met already; remove the link")
        met.add(real)
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        inside = PurePath(place).relative_to(folder)
        yield from ((inside / name).as_posix() for name in files)


def _zip(file: Path, path: str, skip_bad: int) -> Images:
    archive, fingerprint = open_zip(file, path, "zip")
    if any(info.flag_bits & 1 for info in archive.infolist()):
        raise ValueError(f"{path}: the zip is encrypted; write it again without a password")
    names, left_out = _image_names((info.filename for info in archive.infolist() if not info.is_dir()), path)
    return _image_files("zip", path, names, archive.open, skip_bad, fingerprint, {}, left_out)


def _image_names(names: Iterable[str], path: str) -> tuple[list[str], str]:
    """Names with an image's suffix, sorted, and a sentence on the others; hidden files are neither."""
    shown = sorted(n for n in names if not any(part.startswith(HIDDEN) for part in PurePosixPath(n).parts))
    kinds = {name: PurePosixPath(name).suffix.lower() for name in shown}
    others = [name for name in shown if kinds[name] not in SUFFIXES and name not in (NOTE, *CLASSES)]
    counts = Counter(kinds[name] or PurePosixPath(name).name for name in others).most_common(5)
    such = f"such as {others[0]} ({', '.join(f'{n} {kind}' for kind, n in counts)})" if others else ""
    many = f"{len(others)} other files of {path} were" if len(others) > 1 else f"1 other file of {path} was"
    sentence = f"{many} left out, {such}" if others else ""
    return [name for name in shown if kinds[name] in SUFFIXES], sentence


def _stamp(file: Path) -> tuple[int, ...]:
    """What changes with a file: size, times of writing and of any change, inode; () of a link that leads nowhere."""
    if not file.exists():
        return ()
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _image_files(
    kind: str, path: str, names: list[str], open_file: OpenFile, skip_bad: int, fingerprint: str, facts: dict[str, Any],
    left_out: str,
) -> Images:  # fmt: skip
    """Images decoded to RGB one by one; all headers are read now, so that faults come early."""
    if not names:
        raise ValueError(f"{path}: no images ({', '.join(sorted(SUFFIXES))}); is the path right?")
    sizes: dict[str, tuple[int, int]] = {}
    faults: dict[str, str] = {}
    for name in names:
        try:
            with _opened(open_file, name) as image:
                sizes[name] = _upright_size(image)
        except (*DAMAGE, ValueError) as error:
            faults[name] = f"{name} ({type(error).__name__})"
    if len(faults) > skip_bad or not sizes:
        few = ", ".join([*faults.values()][:5]) + (", ..." if len(faults) > 5 else "")
        raise ValueError(f"{path}: {len(faults)} of {len(names)} images cannot be read, remove or replace them: {few}")
    left, bad = list(sizes), list(faults)
    width, height = sizes[left[0]]
    for name, size in sizes.items():
        if size != (width, height):
            differ = f"{name} is {size[0]}x{size[1]} but {left[0]} is {width}x{height}"
            raise ValueError(f"{path}: {differ}; resize or crop all images to one size")

    def read(limit: int, batch_size: int, rank: int, world: int) -> Iterator[tuple[IndexArray, UInt8Array]]:
        for start in range(rank * batch_size, limit, world * batch_size):
            found = {}
            for i in range(start, min(start + batch_size, limit)):
                try:
                    found[i] = _decode(path, left[i], open_file, (width, height))
                except ValueError:
                    bad.append(left[i])
                    if len(bad) > skip_bad:
                        raise
            if found:
                yield np.array(list(found)), np.stack(list(found.values()))

    shape = (height, width, 3)
    return Images(kind, path, len(left), shape, read, fingerprint, None, facts, None, skip_bad, bad, left_out)


@contextmanager
def _opened(open_file: OpenFile, name: str) -> Iterator[ImageFile.ImageFile]:
    """An image of which only the header has been read. Pillow's warning of too many pixels is an error."""
    with open_file(name) as file, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=FORMATS) as image:
            yield image


def _upright_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """Width and height once turned as the EXIF orientation says. No PNG is decoded to find one behind its pixels."""
    noted = image.format != "PNG" or {"exif", "XML:com.adobe.xmp"} & image.info.keys()
    turned = noted and image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) > 4
    return image.size[::-1] if turned else image.size


def _decode(path: str, name: str, open_file: OpenFile, size: tuple[int, int]) -> UInt8Array:
    """One image as RGB (H, W, 3), upright; grey is copied to three channels."""
    try:
        with _opened(open_file, name) as image:
            deep = _is_deep(image)
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a camera's preview is no frame
            picture = ImageOps.exif_transpose(image)
            picture.load()
            alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
            opaque = alpha is None or alpha.getextrema() == (255, 255)
            pixels = np.asarray(picture.convert("RGB"))
    except (*DAMAGE, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: cannot decode {name} ({error}); remove or replace it") from error
    if deep or picture.mode.startswith(("I", "F")):
        raise ValueError(f"{path}: {name} is not 8-bit (mode {picture.mode}); save it as 8-bit")
    if frames > 1:
        raise ValueError(f"{path}: {name} has {frames} frames; save the one that counts")
    if not opaque:
        raise ValueError(f"{path}: {name} has transparent pixels; flatten it first")
    if picture.size != size:
        raise ValueError(f"{path}: {name} is {picture.width}x{picture.height} once it is upright; save it as it looks")
    return pixels


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether the file has more than 8 bits a value, which Pillow cuts off without a word where the mode is RGB."""
    stored = [tile[3] for tile in image.tile]  # as they lie in the file: "RGB;16B", ("RGB", largest value)
    if image.format == "PPM":
        return any(isinstance(args, tuple) and isinstance(args[-1], int) and args[-1] > 255 for args in stored)
    return image.format in ("PNG", "TIFF") and any(";16" in str(args) for args in stored)


def _dataset(path: str) -> Images:
    """NAME:SPLIT, for the data sets that need no download."""
    name, _, split = path.partition(":")
    if name not in DATASETS:
        known = "digits:train, digits:test, fashion:train, fashion:test"
        raise ValueError(f"{path!r} does not exist; give a folder, a .zip, an .npz, a table, or {known}")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split in {path!r}; write {name}:train or {name}:test")
    return _digits(path, split) if name == "digits" else _fashion(path, split)


def _digits(path: str, split: str) -> Images:
    images, labels = read_npz_arrays(DIGITS_FILE, f"{split}_images", f"{split}_labels")
    pixels, fingerprint = images[..., None].astype(np.uint8), path + repr(_stamp(DIGITS_FILE))
    return _in_memory("dataset", path, pixels, fingerprint, labels.astype(np.int64))


def _fashion(path: str, split: str) -> Images:
    name = FASHION_FILES[split]
    for file in (folder / (name + suffix) for folder in FASHION_FOLDERS for suffix in ("", ".gz")):
        if file.is_file():
            count, shape, read = open_idx(file)
            return Images("dataset", path, count, shape, read, path + repr((str(file), *_stamp(file))))
    hint = "install Debian's dataset-fashion-mnist or put torchvision's download there"
    raise ValueError(f"{path}: {name}[.gz] is not in {' or '.join(map(str, FASHION_FOLDERS))}; {hint}")
