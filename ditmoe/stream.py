"""The order of training: which image every sample of a run is, and the micro-batches of one process.

Shapes: n images of a micro-batch, C channels, H W size.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .config import Config
from .data import ImageSet
from .objective import sample_rng


class Batch(NamedTuple):
    """A micro-batch: running numbers of its samples, x (n, C, H, W) float32, y (n,) int64."""

    indices: list[int]
    x: Tensor
    y: Tensor


class _Stream(Dataset[Batch]):
    """Sample number i of a run: image `permutation(epoch)[position]`, perhaps mirrored; a function of (seed, i)."""

    def __init__(self, data: ImageSet, seed: int, flip: bool) -> None:
        self.data, self.seed, self.flip = data, seed, flip
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, indices: list[int]) -> Batch:
        rows = [self._image_of(i) for i in indices]
        x = self.data.tensors(rows)
        if self.flip:
            mirrored = [bool(sample_rng(self.seed, 3, i).integers(2)) for i in indices]
            x = torch.where(torch.tensor(mirrored).view(-1, 1, 1, 1), x.flip(3), x)
        return Batch(indices, x, torch.from_numpy(self.data.labels[rows]))

    def _image_of(self, index: int) -> int:
        epoch, position = divmod(index, len(self.data))
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                sample_rng(self.seed, 4, epoch).permutation(len(self.data)),
            )
        return int(self._order[position])


def _ignore_signals(_: int) -> None:
    """Readers outlive a signal to the whole process group: the training process saves, then ends them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _MicroBatches:
    """The running numbers of this process's samples, one list a micro-batch."""

    def __init__(self, numbers: range, rank: int, num_processes: int, size: int) -> None:
        self.numbers, self.rank, self.num_processes, self.size = numbers, rank, num_processes, size

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.numbers:
            start = (number * self.num_processes + self.rank) * self.size
            yield list(range(start, start + self.size))

    def __len__(self) -> int:
        return len(self.numbers)


def stream(config: Config, data: ImageSet, *, first_step: int, rank: int, num_processes: int) -> Iterator[Batch]:
    """The micro-batches of one process, from `first_step` to the end of the run.

    Global batch s holds samples s * batch_size ... (s + 1) * batch_size - 1 of the run; accumulation and processes
    cut it into equal consecutive parts, so that the samples of a step do not depend on how it is cut.

    Raises:
        ValueError: batch_size does not divide into accumulation * num_processes equal parts.
    """
    train = config.train
    parts = train.accumulation * num_processes
    if train.batch_size % parts:
        raise ValueError(
            f"train.batch_size {train.batch_size} is not a multiple of accumulation {train.accumulation} * "
            f"{num_processes} processes"
        )
    size = train.batch_size // parts
    starts = range(first_step * train.accumulation, config.max_steps * train.accumulation)
    micro_batches = _MicroBatches(starts, rank, num_processes, size)
    workers = config.data.num_workers
    loader = DataLoader(
        _Stream(data, config.seed, config.data.flip),
        sampler=micro_batches,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_signals,
    )
    return iter(loader)
