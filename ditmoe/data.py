"""Where images come from: every set gives uint8 images (or latents) and labels, and says which source was taken.

Shapes: n images asked for, C channels, H W size. Pixels are uint8 (n, H, W, C); the model's x is float32 (n, C, H, W),
x = pixel / 127.5 - 1 in [-1, 1].
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .config import DataConfig
from .folders import BadImage, FolderImages
from .latent_sets import Latents, LatentShards, open_latents
from .objective import sample_rng

DIGITS_FILE = Path(__file__).parent / "data_files" / "digits.npz"
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_IN_MEMORY_BYTES = 2 * 2**30


class ImageSet(Protocol):
    """A finite, ordered set of labelled images."""

    id2label: dict[int, str]
    """Class names; empty for a set without labels."""
    source: str
    """A sentence for the log: what was read, and from where."""
    is_latent: bool
    """True when the images are latents, not pixels."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(len,) int64; zeros for a set without labels."""
        ...

    def __len__(self) -> int: ...

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """(n, H, W, C) uint8."""
        ...

    def tensors(self, indices: Sequence[int]) -> Tensor:
        """(n, C, H, W) float32, the model's x."""
        ...


@dataclass
class ArrayImages:
    """Images held in memory: pixels (len, H, W, C) uint8, labels (len,) int64; `bad` says what is wrong by row."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    id2label: dict[int, str]
    source: str
    is_latent: bool = False
    bad: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """(n, H, W, C) uint8. Raises BadImage at the first row that is bad."""
        for row in indices if self.bad else []:
            if row in self.bad:
                raise BadImage(row, self.bad[row])
        chosen: NDArray[np.uint8] = self.pixels[np.asarray(indices)]
        return chosen

    def tensors(self, indices: Sequence[int]) -> Tensor:
        """(n, C, H, W) float32 in [-1, 1]."""
        return torch.from_numpy(self.images(indices)).permute(0, 3, 1, 2).float() / 127.5 - 1


def open_data(config: DataConfig, *, size: int, channels: int, split: str = "train") -> ImageSet:
    """The data set of a configuration.

    Args:
        config: Which set, and where.
        size: Height and width that the model takes.
        channels: Channels that the model takes.
        split: "train" or "test"; folders and latents have no test split.

    Raises:
        ValueError: Files that are missing, truncated, or do not fit the model; it names the file and the fix.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; it must be train or test")
    if config.name in ("folder", "latents"):
        if config.path is None:
            raise ValueError(f"the data set {config.name} needs --data.path FOLDER")
        if split == "test":
            raise ValueError(f"the data set {config.name} has no test split")
        is_folder = config.name == "folder"
        folder = _open_folder(config, size, channels) if is_folder else open_latents(config.path, flip=config.flip)
        found = (channels, size, size) if config.name == "folder" else tuple(folder.tensors([0]).shape[1:])
    else:
        folder = _open_digits(split) if config.name == "digits" else _open_fashion(config, split)
        found = (folder.pixels.shape[3], *folder.pixels.shape[1:3])
    if found != (channels, size, size):
        raise ValueError(
            f"{config.name} has images of (C, H, W) = {found}, the model takes {(channels, size, size)}; "
            f"set --model.in-channels {found[0]} --model.sample-size {found[1]}"
        )
    classes = max(len(folder.id2label), 1)
    wrong = folder.labels[(folder.labels < 0) | (folder.labels >= classes)]
    if len(wrong):
        raise ValueError(f"{folder.source}: label {wrong[0]} is out of range, the set has classes 0..{classes - 1}")
    return folder


def reference(config: DataConfig, data: ImageSet, seed: int) -> str | NDArray[np.uint8]:
    """What samples are scored against: a name that `eval` knows, or training images (at random, at most 10,000)."""
    if config.name in ("digits", "fashion") and config.path is None:
        return f"{config.name}:train"
    rows = sample_rng(seed, 5, 0).permutation(len(data))[:10_000].tolist()
    return data.images(readable(data, rows))


def pixel_variance(data: ImageSet, seed: int) -> float:
    """Mean over training images (at most 2,000, drawn by the seed) of their unbiased variance over all values.

    Images with values that are not finite are left out; where there are no others it is 0. Noise of level 1 - alpha_bar
    makes of it alpha_bar v + 1 - alpha_bar, which calibrates time-shift sampling.
    """
    rows = readable(data, sample_rng(seed, 6, 0).permutation(len(data))[:2000].tolist())
    parts = [data.tensors(rows[i : i + 100]) for i in range(0, len(rows), 100)]
    variances = torch.cat([x.flatten(1).double().var(dim=1) for x in parts])
    return float(variances[variances.isfinite()].mean().nan_to_num())


def tensors(data: ImageSet, rows: Sequence[int], mirrored: Sequence[bool]) -> Tensor:
    """(n, C, H, W) float32, the model's x; of `mirrored` images that of their mirror image."""
    if isinstance(data, LatentShards):
        return data.tensors(rows, mirrored)
    x = data.tensors(rows)
    return torch.where(torch.tensor(mirrored).view(-1, 1, 1, 1), x.flip(3), x)


def readable(data: ImageSet, rows: Sequence[int]) -> list[int]:
    """Those of the rows whose images can be used."""
    if not isinstance(data, FolderImages):
        bad = getattr(data, "bad", {})
        return [row for row in rows if row not in bad]
    good = []
    for row in rows:
        try:
            data.images([row])
            good.append(row)
        except BadImage:
            pass  # training names and counts it
    return good


def fingerprint(data: ImageSet) -> str:
    """A hash of the classes, of every label in order, and of the images: their values, or names and sizes of files."""
    known = hashlib.sha256(json.dumps([len(data), data.id2label], sort_keys=True).encode() + data.labels.tobytes())
    if isinstance(data, FolderImages):
        known.update(json.dumps(data.inventory).encode())
    elif isinstance(data, LatentShards):
        known.update(json.dumps([data.index[name] for name in ("vae", "mean", "std", "shards")]).encode())
    elif isinstance(data, Latents):
        known.update(data.values.contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(data, ArrayImages):
        known.update(np.ascontiguousarray(data.pixels).data)
    return known.hexdigest()[:16]


# --------------------------------------------------------------------------------------------- readers


def _open_folder(config: DataConfig, size: int, channels: int) -> ArrayImages | FolderImages:
    """A folder small enough is decoded once, which also finds every bad file before training starts."""
    assert config.path is not None
    folder = FolderImages(config.path, size, channels, config.fit)
    small = len(folder) * size**2 * channels <= _IN_MEMORY_BYTES
    pixels = np.zeros((len(folder) if small else 0, size, size, channels), np.uint8)
    bad = {} if small else folder.check_headers()
    for row in range(len(pixels)):
        try:
            pixels[row] = folder.images([row])[0]
        except BadImage as error:
            bad[row] = str(error)
    check_bad(list(bad.values()), config.max_bad)
    if len(bad) == len(folder):
        raise ValueError(f"data.path {config.path}: none of {len(folder)} images can be used; the first: {bad[0]}")
    return ArrayImages(pixels, folder.labels, folder.id2label, folder.source, bad=bad) if small else folder


def check_bad(sentences: Sequence[str], max_bad: int, option: str = "data.max_bad") -> None:
    """Raise ValueError where more images are bad than are to be left out, as `option` says."""
    if len(sentences) > max_bad:
        how = f"{len(sentences)} images cannot be used, {option} is {max_bad}: " if max_bad else ""
        raise ValueError(f"{how}{sentences[max_bad]}, or let it be left out: --{option.replace('_', '-')} N")


def _open_digits(split: str) -> ArrayImages:
    with np.load(DIGITS_FILE, allow_pickle=False) as file:
        pixels, labels = file[f"{split}_images"], file[f"{split}_labels"]
    names = {i: str(i) for i in range(10)}
    source = f"{len(labels)} real 8x8 digits ({split}), bundled"
    return ArrayImages(pixels[..., None], labels.astype(np.int64), names, source)


def _open_fashion(config: DataConfig, split: str) -> ArrayImages:
    stem = "train" if split == "train" else "t10k"
    names = (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")
    cache = Path("data")
    places = [config.path] if config.path else [DEBIAN_FASHION, cache / "FashionMNIST" / "raw"]

    def files_in(place: Path) -> list[Path]:
        found = [next((f for f in (place / n, place / f"{n}.gz") if f.is_file()), None) for n in names]
        return [f for f in found if f]

    if config.download and not any(len(files_in(place)) == 2 for place in places):
        _download_fashion(cache)
    for place in places:
        files = files_in(place)
        if len(files) == 2:
            pixels, labels = read_idx(files[0]), read_idx(files[1])
            if pixels.ndim != 3 or labels.shape != pixels.shape[:1]:
                raise ValueError(f"{files[0]} and {files[1]} do not belong together")
            source = f"{len(labels)} Fashion-MNIST images ({split}) in {place}"
            return ArrayImages(pixels[..., None], labels.astype(np.int64), dict(enumerate(FASHION_CLASSES)), source)
    raise ValueError(
        f"Fashion-MNIST ({names[0]}[.gz]) is not in {' or '.join(map(str, places))}; install the Debian package "
        f"dataset-fashion-mnist, or give --data.path FOLDER, or --data.download"
    )


def _download_fashion(cache: Path) -> None:
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(cache), download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"Fashion-MNIST could not be downloaded ({error}); give --data.path FOLDER") from error


def read_idx(file: Path) -> NDArray[np.uint8]:
    """The uint8 array of an IDX file (MNIST's format), gzipped or not.

    Raises:
        ValueError: The file is truncated or is no IDX file of unsigned bytes.
    """
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{file} is damaged or truncated ({error}); fetch it again") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{file} is not an IDX file of unsigned bytes")
    dims = raw[3]
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims))
    if len(raw) != 4 + 4 * dims + math.prod(shape):
        raise ValueError(f"{file} is truncated: {shape} needs {math.prod(shape)} bytes of data; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)
