"""The order of training: which image every sample of a run is, and the micro-batches of one process.

Shapes: n images of a micro-batch, C channels, H W size.
"""

import copy
import multiprocessing
from functools import partial
from multiprocessing.queues import Queue
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config.sections import Config, micro_batch_size
from ..launch.signals import ignored_here
from ..rng import sample_rng
from .mixture import turn
from .sets import BadImage, ImageSet, check_classes


class Batch(NamedTuple):
    """A micro-batch: running numbers of its samples, x (n, C, H, W) float32, y (n,) int64, what was skipped, and the
    sets that its images are of, domain (n,) int64: 0 but of a mixture."""

    indices: list[int]
    x: Tensor
    y: Tensor
    bad: list[str]
    domain: Tensor


class _Stream(Dataset[Batch]):
    """The `size` samples of a run from a number on; i is image `order(epoch)[position]`, perhaps mirrored.

    Of a mixture, `unit` samples in a row are of one set, each set with epochs and permutations of its own. In the place
    of an image that cannot be used comes the next one of the permutation that can.
    """

    def __init__(self, data: ImageSet, seed: int, flip: bool, size: int, unit: int) -> None:
        self.data, self.seed, self.flip, self.size, self.unit = data, seed, flip, size, unit
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}  # by set: its epoch, and the rows in order
        self._bad: set[int] = set()

    def __getitem__(self, start: int) -> Batch:
        x, rows, bad, indices = None, [], [], list(range(start, start + self.size))
        mirrored = [bool(sample_rng(self.seed, 3, i).integers(2)) for i in indices] if self.flip else None
        while x is None:
            rows = [self.image_of(i) for i in indices]
            try:
                x = self.data.taught(rows, mirrored)
            except BadImage as error:
                self._bad.add(error.row)
                bad.append(str(error))
                check_classes(self.data, np.delete(self.data.labels, list(self._bad)))
        domain = torch.tensor([self.turn_of(i)[0] for i in indices])
        return Batch(indices, x, torch.from_numpy(self.data.labels[rows]), bad, domain)

    def turn_of(self, index: int) -> tuple[int, int]:
        """The set that a sample is of, and how many samples of that set were before it."""
        unit, place = divmod(index, self.unit)
        domain, before = turn(unit, self.data.weights)
        return domain, before * self.unit + place

    def image_of(self, index: int) -> int:
        """The row of the data that a sample is."""
        sizes, (domain, number) = self.data.sizes, self.turn_of(index)
        epoch, position = divmod(number, sizes[domain])
        known, order = self._orders.get(domain, (-1, None))
        if order is None or known != epoch:
            order = self.data.order(sample_rng(self.seed, 4, epoch * len(sizes) + domain), domain)
            self._orders[domain] = epoch, order
        if len(self._bad) >= len(order) and self._bad.issuperset(order.tolist()):
            raise ValueError(f"none of the images can be used: {self.data.source}")
        while int(order[position]) in self._bad:
            position = (position + 1) % len(order)
        return int(order[position])


_FIX = "enlarge /dev/shm (docker run --shm-size 8g), memory or ulimit -n, or take --data.num-workers 0"


class _Sent(Queue):  # type: ignore[type-arg]
    """What readers put in comes out at the other end, or a sentence about why it could not be sent.

    A thread of the reader sends it (shared memory, descriptors, a pipe); of what fails there Python tells nobody else.
    """

    def _on_queue_feeder_error(self, e: Exception, obj: Any) -> None:
        why = f"a reader could not send its batch to the training process ({type(e).__name__}: {e})"
        self.put((obj[0], f"{why}; {_FIX}"))


def _readers() -> Any:
    """How processes are started here, with such queues between them."""
    context: Any = copy.copy(multiprocessing.get_context(multiprocessing.get_start_method()))
    context.Queue = partial(_Sent, ctx=context)
    return context


class Batches:
    """The micro-batches of one process, from `first_step` to the end of the run.

    Global batch s holds samples s * batch_size ... (s + 1) * batch_size - 1 of the run; accumulation and processes
    cut it into equal consecutive parts (ValueError where they cannot), so that its samples do not depend on the cut.
    ValueError too where readers cannot be started, or what they have read cannot be sent.
    """

    def __init__(self, config: Config, data: ImageSet, *, first_step: int, rank: int, num_processes: int) -> None:
        train, workers = config.train, config.data.num_workers
        size = micro_batch_size(train, num_processes)
        first, end = (step * train.batch_size + rank * size for step in (first_step, config.max_steps))
        self._starts = range(first, end, num_processes * size)  # of this process's micro-batches
        unit = train.batch_size if config.data.alternate else 1
        self._stream = _Stream(data, config.seed, config.data.flip, size, unit)
        self._ahead = max(1, 2 * workers)  # micro-batches that the readers may be at
        self._given = 0
        loader = DataLoader(
            self._stream, sampler=self._starts, batch_size=None, num_workers=workers, persistent_workers=workers > 0,
            worker_init_fn=ignored_here, multiprocessing_context=_readers() if workers else None,
        )  # fmt: skip
        try:
            self._batches: Any = iter(loader)
        except OSError as error:
            raise ValueError(f"data.num_workers {workers}: readers could not be started ({error}); {_FIX}") from error

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        try:
            batch: Batch | str = next(self._batches)
        except RuntimeError as error:
            if "Too many open files" not in str(error):
                raise
            batch = f"a batch of a reader could not be received (Too many open files); {_FIX}"
        if isinstance(batch, str):
            raise ValueError(f"data.num_workers {self._ahead // 2}: {batch}")
        self._given += 1
        return batch

    def close(self) -> None:
        """End the readers. They ignore the signal with which a program that exits would end them."""
        if shutdown := getattr(self._batches, "_shutdown_workers", None):  # what torch itself calls when collected
            shutdown()
            for worker in self._batches._workers:
                worker.kill()

    def awaited(self) -> str:
        """The images that are being read, for a message."""
        stream, starts = self._stream, self._starts[self._given : self._given + self._ahead]
        names = [stream.data.name(stream.image_of(i)) for start in starts for i in range(start, start + stream.size)]
        return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
