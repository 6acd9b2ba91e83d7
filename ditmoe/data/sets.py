"""What a set of images says of itself, and the one that is held in memory.

Shapes: n images asked for, C channels, H W size. Pixels are uint8 (n, H, W, C); the model's x is float32 (n, C, H, W).
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .pixels import from_pixels

MOST_LABELS = 1_000_000  # a larger label is a mistake


class ImageSet(ABC):
    """A finite, ordered set of labelled images: all that training, reports and scores ask of one.

    A kind of set gives `labels`, `id2label`, `source`, `images` and `contents`; the other answers are here, as for
    pixels in files, and are given anew where they differ.
    """

    labels: NDArray[np.int64]
    """(len,); zeros for a set without labels."""
    id2label: dict[int, str]
    """Class names; empty for a set without labels."""
    source: str
    """A sentence for the log: what was read, and from where."""
    is_latent = False
    """True when the images are latents, not pixels."""
    in_memory = False
    """True when many images can be asked for at once: none is read from a file."""
    eval_name: str | None = None
    """The name by which `eval` knows the same images, if it does."""
    weights: tuple[int, ...] = (1,)
    """Of the sets that this one is a mixture of, in lowest terms: their shares of the training samples."""
    normalization: dict[str, Any] | None = None
    """Of latents that say so: `mean` and `std` (C values each), with x = (latents - mean) / std, and which `vae`."""

    def __len__(self) -> int:
        return len(self.labels)

    def order(self, rng: np.random.Generator, domain: int | None = None) -> NDArray[np.int64]:
        """All rows in random order, or those of one of the sets that this one is a mixture of."""
        starts = [0, *np.cumsum(self.sizes).tolist()]
        first, end = (0, len(self)) if domain is None else starts[domain : domain + 2]
        return rng.permutation(end - first) + first

    @property
    def sizes(self) -> tuple[int, ...]:
        """Images of each of the sets that this one is a mixture of, in the order of its rows."""
        return (len(self),)

    @abstractmethod
    def images(self, rows: Sequence[int]) -> NDArray[np.uint8]:
        """(n, H, W, C) uint8. Raises BadImage at the first one that cannot be used; ValueError for latents."""

    @abstractmethod
    def contents(self) -> bytes | memoryview:
        """What the images are told from others by: their values, or names and sizes of files."""

    def check_labels(self) -> None:
        """ValueError unless they are int64 (len,) and lie in 0..Y-1, the keys of `id2label`; without any, all are 0."""
        labels, classes = np.asarray(self.labels), max(len(self.id2label), 1)
        if labels.dtype != np.int64 or labels.ndim != 1 or set(self.id2label) - set(range(classes)):
            what = f"labels are {labels.dtype} {labels.shape} and the classes {sorted(self.id2label)[:5]}"
            raise ValueError(f"{self.source}: {what}; give int64 (n,) and classes numbered from 0")
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise ValueError(f"{self.source}: label {wrong[0]} is out of range, the set has classes 0..{classes - 1}")

    def tensors(self, rows: Sequence[int], mirrored: Sequence[bool] | None = None) -> Tensor:
        """(n, C, H, W) float32, the model's x; of `mirrored` images that of their mirror image. Raises as `images`."""
        return from_pixels(self.images(rows), mirrored)

    def taught(self, rows: Sequence[int], mirrored: Sequence[bool] | None = None) -> Tensor:
        """What training shows of them: the same, or of a mixture of sizes, in the size of the set that all are of."""
        return self.tensors(rows, mirrored)

    def readable(self, rows: Sequence[int]) -> list[int]:
        """Those of the rows whose images can be used."""
        good = []
        for row in rows:
            with suppress(BadImage):  # training names and counts it
                self.images([row])
                good.append(row)
        return good

    def in_proportion(self, order: Sequence[int], most: int) -> list[int]:
        """The first rows of an order, at most so many: what stands for the images that training shows."""
        return [int(row) for row in order[:most]]

    def name(self, row: int) -> str:
        """The file of an image, or its number in the set."""
        return f"image {row}"

    def fingerprint(self) -> str:
        """A hash of the classes, of every label in order, and of the images' `contents`."""
        known = hashlib.sha256(json.dumps([len(self), self.id2label], sort_keys=True).encode() + self.labels.tobytes())
        known.update(self.contents())
        return known.hexdigest()[:16]


@dataclass
class ArrayImages(ImageSet):
    """Images held in memory: pixels (len, H, W, C) uint8, labels (len,) int64; `bad` says what is wrong by row."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    id2label: dict[int, str]
    source: str
    eval_name: str | None = None
    bad: dict[int, str] = field(default_factory=dict)
    in_memory = True

    def images(self, rows: Sequence[int]) -> NDArray[np.uint8]:
        """(n, H, W, C) uint8. Raises BadImage at the first row that is bad."""
        for row in rows if self.bad else []:
            if row in self.bad:
                raise BadImage(row, self.bad[row])
        chosen: NDArray[np.uint8] = self.pixels[np.asarray(rows)]
        return chosen

    def contents(self) -> memoryview:
        """The pixels."""
        return np.ascontiguousarray(self.pixels).data

    def readable(self, rows: Sequence[int]) -> list[int]:
        """Those of the rows that are not bad."""
        return [row for row in rows if row not in self.bad]


def check_bad(sentences: Sequence[str], max_bad: int, option: str = "data.max_bad") -> None:
    """Raise ValueError where more images are bad than are to be left out, as `option` says."""
    if len(sentences) > max_bad:
        how = f"{len(sentences)} images cannot be used, {option} is {max_bad}: " if max_bad else ""
        raise ValueError(f"{how}{sentences[max_bad]}, or let it be left out: --{option.replace('_', '-')} N")


def check_classes(data: ImageSet, usable: NDArray[np.int64]) -> None:
    """Raise ValueError where a class has images and none that can be used, whose labels are `usable`."""
    there, left = (np.bincount(labels, minlength=len(data.id2label)) > 0 for labels in (data.labels, usable))
    if lost := [name for label, name in sorted(data.id2label.items()) if there[label] and not left[label]]:
        what = f"none of the images of class {lost[0]!r} can be used, and it would be drawn like the others"
        raise ValueError(f"{data.source}: {what}; mend its images, or remove its folder")


class BadImage(ValueError):  # noqa: N818 - what is raised is the image
    """An image file that cannot be used; `row` is its number in the set."""

    def __init__(self, row: int, sentence: str) -> None:
        super().__init__(sentence)
        self.row = row
