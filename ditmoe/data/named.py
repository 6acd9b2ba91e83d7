"""The data sets that are known by name: digits (bundled) and Fashion-MNIST."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..config.sections import DataConfig
from .sets import ArrayImages

DIGITS_FILE = Path(__file__).parents[1] / "data_files" / "digits.npz"
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def open_digits(split: str) -> ArrayImages:
    """The 8 x 8 digits that come with the package; `split` is "train" or "test"."""
    with np.load(DIGITS_FILE, allow_pickle=False) as file:
        pixels, labels = file[f"{split}_images"], file[f"{split}_labels"]
    source, names = f"{len(labels)} real 8x8 digits ({split}), bundled", dict(enumerate("0123456789"))
    return ArrayImages(pixels[..., None], labels.astype(np.int64), names, source, f"digits:{split}")


def open_fashion(config: DataConfig, split: str) -> ArrayImages:
    """Fashion-MNIST, 28 x 28, from `config.path`, the Debian package or ./data, into which it may be downloaded.

    Raises ValueError where its files are nowhere, or damaged.
    """
    stem = "train" if split == "train" else "t10k"
    names, cache = (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"), Path("data")
    places = [config.path] if config.path else [DEBIAN_FASHION, cache / "FashionMNIST" / "raw"]

    def files_in(place: Path) -> list[Path]:
        found = [next((f for f in (place / n, place / f"{n}.gz") if f.is_file()), None) for n in names]
        return [f for f in found if f]

    if config.download and not any(len(files_in(place)) == 2 for place in places):
        from torchvision.datasets import FashionMNIST

        try:
            FashionMNIST(str(cache), download=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"Fashion-MNIST could not be downloaded ({error}); give --data.path FOLDER") from error
    place = next((place for place in places if len(files_in(place)) == 2), None)
    if place is None:
        way = "give another --data.path, or leave it out and" if config.path else "give --data.path FOLDER, or"
        fix = f"{way} install the Debian package dataset-fashion-mnist, or add --data.download"
        raise ValueError(f"Fashion-MNIST ({names[0]}[.gz]) is not in {' or '.join(map(str, places))}; {fix}")
    files = files_in(place)
    pixels, labels = map(read_idx, files)
    if pixels.ndim != 3 or labels.shape != pixels.shape[:1]:
        raise ValueError(f"{files[0]} and {files[1]} do not belong together")
    source = f"{len(labels)} Fashion-MNIST images ({split}) in {place}"
    classes, name = dict(enumerate(FASHION_CLASSES)), None if config.path else f"fashion:{split}"
    return ArrayImages(pixels[..., None], labels.astype(np.int64), classes, source, name)


def read_idx(file: Path) -> NDArray[np.uint8]:
    """The uint8 array of an IDX file (MNIST's format), gzipped or not. ValueError where it is truncated or none."""
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix.lower() == ".gz" else file.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{file} is damaged or truncated ({error}); fetch it again") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{file} is not an IDX file of unsigned bytes")
    dims = raw[3]
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims))
    if len(raw) != 4 + 4 * dims + math.prod(shape):
        raise ValueError(f"{file} is truncated: {shape} needs {math.prod(shape)} bytes of data; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)
