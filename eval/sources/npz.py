"""Images and statistics in .npz files, ADM's layout, read without loading them whole."""

import hashlib
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from eval import strict_json
from eval.metrics.frechet import Gaussian
from eval.sources.arrays import DAMAGE, Float32Array, IndexArray, open_npz_images, read_npz_arrays, read_npz_header
from eval.sources.images import Images, Statistics

# Some kilobytes of zeros unpack to gigabytes: what a file's headers may ask for.
MAX_FEATURES = 4096
MAX_ROWS = 100_000
MAX_FACTS = 1 << 22  # characters
MADE = {  # what `eval.statistics.write_statistics` says
    "extractor": dict.fromkeys(("name", "version", "sha256", "resize"), str),
    "images": {"path": str, "sha256": str},
    "count": int,
}


def open_zip(file: Path, path: str, kind: str) -> tuple[zipfile.ZipFile, str]:
    """An archive and what it holds: names, checksums, sizes. ValueError for damage, a name that leads out of it."""
    try:
        archive = zipfile.ZipFile(file)
    except PermissionError:
        raise  # there is nothing wrong with the file
    except (*DAMAGE, ValueError) as error:
        raise ValueError(f"{path}: not a readable {kind} ({error}); write it again") from error
    for name in archive.namelist():
        inside = PurePosixPath(name.replace("\\", "/"))
        if inside.is_absolute() or ".." in inside.parts or PureWindowsPath(name).drive:
            raise ValueError(f"{path}: holds the name {name!r}, which leads out of the archive")
    return archive, repr([(info.filename, info.CRC, info.file_size) for info in archive.infolist()])


def open_npz(file: Path, path: str) -> Images | Statistics:
    """ADM's layout: arr_0 uint8 (N, H, W, C), arr_1 labels; statistics `mu` (D,) and `sigma` (D, D); or both.

    Raises ValueError for anything else, and for a damaged file.
    """
    archive, fingerprint = open_zip(file, path, ".npz")
    with archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
    statistics = _statistics(file, path, names) if {"mu", "sigma"} <= names else None
    if "arr_0" in names:
        count, shape, read = open_npz_images(file, "arr_0")
        labels = _labels(file, path, count) if "arr_1" in names else None
        facts = _facts(file, path, names)
        return Images("npz", path, count, shape, read, fingerprint, labels, facts, statistics)
    if statistics is None:
        raise ValueError(f"{path}: holds {sorted(names)}; expected arr_0 (images) or mu and sigma (statistics)")
    return statistics


def _labels(file: Path, path: str, count: int) -> IndexArray:
    header = read_npz_header(file, "arr_1")
    if header.shape != (count,) or not np.issubdtype(header.dtype, np.integer):
        raise ValueError(f"{path}: arr_1 is {header.dtype} {header.shape}; expected one integer an image ({count},)")
    return read_npz_arrays(file, "arr_1")[0].astype(np.int64)


def _statistics(file: Path, path: str, names: set[str]) -> Statistics:
    gaussian = _gaussian(file, path, "mu", "sigma")
    spatial = _gaussian(file, path, "mu_s", "sigma_s") if {"mu_s", "sigma_s"} <= names else None
    features = _features(file, path, len(gaussian.mean)) if "features" in names else None
    with file.open("rb") as handle:
        sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    facts = _facts(file, path, names)
    if facts:
        try:
            strict_json.check(facts, MADE if facts.get("rows") is None else MADE | {"rows": {"sha256": str}}, "facts")
            if facts["count"] < 2:
                raise ValueError("no covariance is of fewer than 2 images")
        except ValueError as error:
            raise ValueError(f"{path}: facts does not say what made these statistics; write the file again") from error
    return Statistics("stats", path, gaussian, spatial, features, sha256, facts)


def _gaussian(file: Path, path: str, mu: str, sigma: str) -> Gaussian:
    """Mean (D,) and covariance (D, D), read once their headers are found good."""
    mean, covariance = (read_npz_header(file, name) for name in (mu, sigma))
    for name, header in ((mu, mean), (sigma, covariance)):
        if not np.issubdtype(header.dtype, np.floating):
            raise ValueError(f"{path}: {name} is {header.dtype}; expected float64")
    if len(mean.shape) != 1 or covariance.shape != mean.shape * 2:
        shapes = f"{mean.shape} and {covariance.shape}"
        raise ValueError(f"{path}: {mu} and {sigma} have shapes {shapes}; expected (D,) and (D, D)")
    if mean.shape[0] > MAX_FEATURES:
        raise ValueError(f"{path}: {mu} has {mean.shape[0]} values; more than {MAX_FEATURES} are not read")
    return Gaussian(*(array.astype(np.float64, copy=False) for array in read_npz_arrays(file, mu, sigma)))


def _features(file: Path, path: str, size: int) -> Float32Array:
    """Rows (m, D), read once their header is found good."""
    header = read_npz_header(file, "features")
    if len(header.shape) != 2 or header.shape[1] != size or header.dtype != np.float32:
        raise ValueError(f"{path}: features is {header.dtype} {header.shape}; expected float32 (m, {size})")
    if header.shape[0] > MAX_ROWS:
        raise ValueError(f"{path}: features has {header.shape[0]} rows; more than {MAX_ROWS} are not read")
    return read_npz_arrays(file, "features")[0]


def _facts(file: Path, path: str, names: set[str]) -> dict[str, Any]:
    """The JSON object in the member `facts`, a string."""
    if "facts" not in names:
        return {}
    header = read_npz_header(file, "facts")
    if header.dtype.kind != "U" or header.shape or header.dtype.itemsize > 4 * MAX_FACTS:
        raise ValueError(f"{path}: facts is {header.dtype} {header.shape}, not a text; write the file again")
    (text,) = read_npz_arrays(file, "facts")
    try:
        facts = strict_json.parse(str(text))
    except ValueError as error:
        raise ValueError(f"{path}: facts is {error}; write the file again") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path}: facts is not a JSON object; write the file again")
    return facts
