"""Tensors of a component's `.safetensors` files, read whole or one slice of the first axis at a time.

Read, not mapped: pages of a mapped file count as memory of the process, and nothing says when they go.
"""

import json
import os
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..files import weight_files

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}


class Place(NamedTuple):
    """Where a tensor is: an open file, the byte it begins at, its dtype and shape."""

    file: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Slices:
    """The tensors of a folder by name. The files stay open.

    Raises:
        ValueError: A tensor is of another kind than floating point or int8.
    """

    def __init__(self, folder: Path) -> None:
        self.places: dict[str, Place] = {}
        self._opened = [file.open("rb") for file in weight_files(folder)]
        for opened in self._opened:
            length = int.from_bytes(opened.read(8), "little")
            for name, entry in json.loads(opened.read(length)).items():
                if name == "__metadata__":
                    continue
                if entry["dtype"] not in DTYPES:
                    raise ValueError(
                        f"{opened.name} has {name} of {entry['dtype']}; it must be one of {', '.join(DTYPES)}"
                    )
                begin = 8 + length + entry["data_offsets"][0]
                self.places[name] = Place(opened.fileno(), begin, DTYPES[entry["dtype"]], tuple(entry["shape"]))

    def tensor(self, name: str) -> Tensor:
        """All of it."""
        place = self.places[name]
        out = torch.empty(place.shape, dtype=place.dtype)
        _fill(out, place.file, place.offset)
        return out

    def read(self, name: str, index: int, out: Tensor) -> None:
        """Number `index` along its first axis into `out`, contiguous, of that shape and dtype.

        Raises:
            OSError: The file has become shorter, or cannot be read.
        """
        place = self.places[name]
        assert (out.dtype, out.shape) == (place.dtype, place.shape[1:])
        _fill(out, place.file, place.offset + index * prod(place.shape[1:]) * place.dtype.itemsize)


def _fill(out: Tensor, file: int, offset: int) -> None:
    """Read so many bytes."""
    rest = memoryview(out.flatten().view(torch.uint8).numpy().data)
    while rest:
        got = os.preadv(file, [rest], offset)
        if not got:
            raise OSError("the file of the weights ends too early; it was changed since it was opened")
        rest, offset = rest[got:], offset + got
