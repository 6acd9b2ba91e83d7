"""What a set of images says of itself, and the one that is held in memory.

Shapes: n images asked for, C channels, H W size. Pixels are uint8 (n, H, W, C); the model's x is float32 (n, C, H, W),
x = pixel / 127.5 - 1 in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


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


def check_bad(sentences: Sequence[str], max_bad: int, option: str = "data.max_bad") -> None:
    """Raise ValueError where more images are bad than are to be left out, as `option` says."""
    if len(sentences) > max_bad:
        how = f"{len(sentences)} images cannot be used, {option} is {max_bad}: " if max_bad else ""
        raise ValueError(f"{how}{sentences[max_bad]}, or let it be left out: --{option.replace('_', '-')} N")


class BadImage(ValueError):  # noqa: N818 - what is raised is the image
    """An image file that cannot be used.

    Attributes:
        row: Its number in the set.
    """

    def __init__(self, row: int, sentence: str) -> None:
        super().__init__(sentence)
        self.row = row
