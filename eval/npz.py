"""Images and statistics in .npz files, ADM's layout, read without loading them whole."""

import hashlib
import json
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.arrays import DAMAGE, open_npz_images, read_npz_arrays
from eval.frechet import Gaussian
from eval.images import Images, Statistics


def open_npz(file: Path, path: str) -> Images | Statistics:
    """ADM's layout: arr_0 uint8 (N, H, W, C), arr_1 labels; statistics `mu` (D,) and `sigma` (D, D); or both.

    Raises ValueError for anything else, and for a damaged file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            fingerprint = members(archive)
    except DAMAGE as error:
        raise ValueError(f"{path}: not a readable .npz ({error}); write it again") from error
    statistics = _statistics(file, path, names) if {"mu", "sigma"} <= names else None
    if "arr_0" in names:
        count, shape, read = open_npz_images(file, "arr_0")
        labels = read_npz_arrays(file, ("arr_1",))["arr_1"] if "arr_1" in names else None
        if labels is not None and (labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer)):
            raise ValueError(
                f"{path}: arr_1 is {labels.dtype} {labels.shape}; expected one integer an image ({count},)"
            )
        facts = _facts(file, path, names)
        labels = None if labels is None else labels.astype(np.int64)
        return Images("npz", path, count, shape, read, fingerprint, labels, facts, statistics)
    if statistics is not None:
        return statistics
    raise ValueError(f"{path}: holds {sorted(names)}; expected arr_0 (images) or mu and sigma (statistics)")


def _statistics(file: Path, path: str, names: set[str]) -> Statistics:
    gaussians = []
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if {mu, sigma} <= names:
            arrays = read_npz_arrays(file, (mu, sigma))
            gaussians.append(Gaussian(*(_as_float64(arrays[name], name, path) for name in (mu, sigma))))
    with file.open("rb") as handle:
        sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    features = read_npz_arrays(file, ("features",))["features"] if "features" in names else None
    if features is not None and (features.ndim != 2 or features.dtype != np.float32):
        raise ValueError(f"{path}: features is {features.dtype} {features.shape}; expected float32 (m, D)")
    for gaussian in gaussians:
        if gaussian.mean.ndim != 1 or gaussian.covariance.shape != (len(gaussian.mean),) * 2:
            shapes = f"{gaussian.mean.shape} and {gaussian.covariance.shape}"
            raise ValueError(f"{path}: mu and sigma have shapes {shapes}; expected (D,) and (D, D)")
    spatial = gaussians[1] if len(gaussians) > 1 else None
    facts = _facts(file, path, names)
    if facts and not _is_made_by_us(facts):
        raise ValueError(f"{path}: facts does not say what made these statistics; write the file again")
    return Statistics("stats", path, gaussians[0], spatial, features, sha256, facts)


def _is_made_by_us(facts: dict[str, Any]) -> bool:
    """Whether the facts are those that `eval.statistics.write_statistics` writes."""
    extractor, images, count = facts.get("extractor"), facts.get("images"), facts.get("count")
    return (
        isinstance(extractor, dict)
        and all(isinstance(extractor.get(name), str) for name in ("name", "version", "sha256", "resize"))
        and isinstance(images, dict)
        and all(isinstance(images.get(name), str) for name in ("path", "sha256"))
        and type(count) is int
        and count >= 2
    )


def _facts(file: Path, path: str, names: set[str]) -> dict[str, Any]:
    """The JSON object in the member `facts`, a string."""
    if "facts" not in names:
        return {}
    text = read_npz_arrays(file, ("facts",))["facts"]
    try:
        facts = json.loads(str(text)) if text.dtype.kind == "U" and text.ndim == 0 else None
    except json.JSONDecodeError:
        facts = None
    if not isinstance(facts, dict):
        raise ValueError(f"{path}: facts is not a JSON object; write the file again")
    return facts


def members(archive: zipfile.ZipFile) -> str:
    """Names, checksums and sizes of what a zip holds. ValueError for a name that leads out of it."""
    for name in archive.namelist():
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive:
            raise ValueError(f"{archive.filename}: holds the name {name!r}, which leads out of the archive")
    return repr([(info.filename, info.CRC, info.file_size) for info in archive.infolist()])


def _as_float64(array: npt.NDArray[np.generic], name: str, path: str) -> npt.NDArray[np.float64]:
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{path}: {name} is {array.dtype}; expected float64")
    return array.astype(np.float64)
