"""Where images come from: every set gives uint8 images (or latents) and labels, and says which source was taken.

Shapes: n images asked for, C channels, H W size. Pixels are uint8 (n, H, W, C); the model's x is float32 (n, C, H, W),
x = pixel / 127.5 - 1 in [-1, 1].
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config.sections import DataConfig
from ..rng import sample_rng
from .folders import FolderImages
from .latents import Latents, LatentShards, open_latents
from .named import _open_digits, _open_fashion
from .sets import ArrayImages, BadImage, ImageSet, check_bad

_IN_MEMORY_BYTES = 2 * 2**30


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
