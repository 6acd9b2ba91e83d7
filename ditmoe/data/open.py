"""Where images come from: the set that a configuration asks for, and what is drawn of it once."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..config.sections import DataConfig
from ..rng import sample_rng
from .below import is_table
from .columns import METADATA, metadata_of
from .folders import FolderImages, cropped
from .latents import open_latents
from .mixture import Mixture
from .named import open_digits, open_fashion
from .sets import ArrayImages, BadImage, ImageSet, check_bad, check_classes
from .tables import TableImages, held_out_split

_IN_MEMORY_BYTES = 2 * 2**30
_WITHOUT_TEST = ("folder", "latents")  # hf: see `held_out_split`


def open_data(config: DataConfig, *, size: int, channels: int, split: str = "train") -> ImageSet:
    """The data set of a configuration, for a model of images (channels, size, size).

    `split` is "train" or "test", which folders and latents do not have. Raises ValueError, with the file and the fix,
    for files that are missing, truncated, or do not fit the model.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; it must be train or test")
    if config.mixture:
        return _open_mixture(config, size, channels, split)
    if config.name in (*_WITHOUT_TEST, "hf") and config.path is None:
        raise ValueError(f"the data set {config.name} needs --data.path {'PLACE' if config.name == 'hf' else 'FOLDER'}")
    if config.name in _WITHOUT_TEST and split == "test":
        raise ValueError(f"the data set {config.name} has no test split")
    data: ImageSet
    found: tuple[int, ...] = (channels, size, size)
    if config.name == "folder":
        assert config.path is not None
        data = _checked(config, FolderImages(config.path, size, channels, config.fit, config.label_column), channels)
    elif config.name == "hf":
        data = _checked(config, TableImages(config, size, channels, held_out=split == "test"), channels)
    elif config.name == "latents":
        assert config.path is not None
        data = open_latents(config.path, flip=config.flip)
        found = tuple(data.tensors([0]).shape[1:])
    else:
        data = arrays = open_digits(split) if config.name == "digits" else open_fashion(config, split)
        if config.fit == "crop" and channels in (1, 3):
            data = arrays = _fitted(arrays, size, channels)
        found = (arrays.pixels.shape[3], *arrays.pixels.shape[1:3])
    if found != (wanted := (channels, size, size)):
        fix = f"set --model.in-channels {found[0]} --model.sample-size {found[1]}"
        if config.fit == "exact" and config.name != "latents" and channels in (1, 3):
            fix += ", or add --data.fit crop to resize them"
        raise ValueError(f"{config.name} has images of (C, H, W) = {found}, the model takes {wanted}; {fix}")
    data.check_labels()
    return data


def open_held_out(config: DataConfig, *, size: int, channels: int) -> ImageSet | None:
    """The test split of a configuration's set; None of one that has none. Raises ValueError as `open_data`."""
    for part, _ in config.sets():
        if part.name in _WITHOUT_TEST or (part.name == "hf" and held_out_split(part) is None):
            return None
    return open_data(config, size=size, channels=channels, split="test")


def reference(data: ImageSet, seed: int) -> str | NDArray[np.uint8]:
    """What samples are scored against: a name that `eval` knows, or training images (at random, at most 10,000).

    Of a mixture, images of each set in proportion to its share, as many as the smallest set allows.
    """
    if data.eval_name is not None:
        return data.eval_name
    order = data.order(sample_rng(seed, 5, 0)).tolist()
    return data.images(data.readable(data.in_proportion(order, 10_000)))


def pixel_variance(data: ImageSet, seed: int) -> float:
    """Mean over training images (at most 2,000, drawn by the seed) of their unbiased variance over all values.

    Images with values that are not finite are left out; where there are no others it is 0. Noise of level 1 - alpha_bar
    makes of it alpha_bar v + 1 - alpha_bar, which calibrates time-shift sampling.
    """
    order = data.order(sample_rng(seed, 6, 0)).tolist()
    rows = data.readable(data.in_proportion(order, 2000))
    if not rows:
        return 0.0
    parts = [data.tensors(rows[i : i + 100]) for i in range(0, len(rows), 100)]
    variances = torch.cat([x.flatten(1).double().var(dim=1) for x in parts])
    return float(variances[variances.isfinite()].mean().nan_to_num())


def _open_mixture(config: DataConfig, size: int, channels: int, split: str) -> Mixture:
    """The sets one after another. ValueError where one of them is not of images, or does not fit the model."""
    sets, names, weights, columns = [], [], [], False
    sizes = [own or size for own in config.resolutions()]
    for (part, weight), own in zip(config.sets(), sizes, strict=True):
        if part.name == "folder" and part.path is not None:
            part = _folder_of_mixture(part, part.path)
        columns |= part.label_column is not None
        sets.append(open_data(part, size=own, channels=channels, split=split))
        names.append((part.path.resolve().name if part.path else part.name) + (f"@{own}" if own != size else ""))
        weights.append(weight)
    if config.label_column is not None and not columns:
        what = f"data.label_column is {config.label_column}, and no set of the mixture has {' or '.join(METADATA)}"
        raise ValueError(f"{what} or is a table; leave it out")
    bad = [sentence for one in sets if isinstance(one, ArrayImages) for sentence in one.bad.values()]
    check_bad(bad, config.max_bad)
    resized = None if {*sizes} == {size} else lambda pixels: cropped(pixels, size, channels)
    return Mixture(sets, names, weights, resized)


def _folder_of_mixture(part: DataConfig, path: Path) -> DataConfig:
    """A folder of a mixture, whose classes are of a column where it has one. ValueError where it is none of images."""
    if not path.is_dir() and not is_table(path):
        what = "neither digits nor fashion nor a folder of images nor hf:PLACE"
        raise ValueError(f"data.mixture has {path}, which is {what}")
    if next(path.glob("*.safetensors"), None):
        raise ValueError(f"data.mixture takes images, and {path} holds latents; encode the images of all sets")
    return part if metadata_of(path) else replace(part, label_column=None)


def _fitted(arrays: ArrayImages, size: int, channels: int) -> ArrayImages:
    """Images resized and converted for the model; the same ones where they are of its size."""
    if arrays.pixels.shape[1:] == (size, size, channels):
        return arrays
    height, width = arrays.pixels.shape[1:3]
    source = f"{arrays.source}, resized from {height}x{width} to {size}x{size}"
    return replace(arrays, pixels=cropped(arrays.pixels, size, channels), source=source, eval_name=None)


def _checked(config: DataConfig, images: FolderImages, channels: int) -> ArrayImages | FolderImages:
    """Few enough images are decoded once, which also finds every bad one before training starts."""
    size = images.size
    small = len(images) * size**2 * channels <= _IN_MEMORY_BYTES
    pixels = np.zeros((len(images) if small else 0, size, size, channels), np.uint8)
    bad = {} if small else images.check_headers()
    for row in range(len(pixels)):
        try:
            pixels[row] = images.images([row])[0]
        except BadImage as error:
            bad[row] = str(error)
    check_bad(list(bad.values()), config.max_bad)
    if len(bad) == len(images):
        raise ValueError(f"data.path {config.path}: none of {len(images)} images can be used; the first: {bad[0]}")
    check_classes(images, np.delete(images.labels, list(bad)))
    return ArrayImages(pixels, images.labels, images.id2label, images.source, bad=bad) if small else images
