"""Several processes that score one set of images together, as torchrun or accelerate launch starts them."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED = 143  # exit code of a program that a signal stopped
GRACE = 2.0  # launchers hand on the signals that they get: one request may arrive twice


class Processes(NamedTuple):
    """This process among those that work together; the methods do nothing where it is alone.

    Attributes:
        rank: Its number.
        world: How many there are.
    """

    rank: int = 0
    world: int = 1

    def total(self, values: FloatArray) -> FloatArray:
        """The sum over processes, float64 in and out, the same bits in every process."""
        if self.world == 1:
            return values
        import torch

        summed = torch.from_numpy(np.array(values, dtype=np.float64))  # a copy
        torch.distributed.all_reduce(summed)
        return summed.numpy()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank."""
        if self.world == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values


def join() -> Processes:
    """Join the processes that the launcher announces in the environment (RANK, WORLD_SIZE, ...), over gloo.

    A process that was started by itself is alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    import torch.distributed

    if not torch.distributed.is_initialized():
        # One process may finish its share hours before another, or wait while the first writes a large file.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=1))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())


def together(work: Callable[[Processes], None]) -> int:
    """Join, work, leave; the exit code: 0 done, 2 the user's mistake, a sentence on stderr from the first process.

    143: stopped by SIGTERM, SIGINT or SIGUSR1. A bug keeps its traceback.
    """
    processes = Processes()
    try:
        with stoppable():
            try:
                processes = join()
                work(processes)
            finally:
                leave(processes)
    except ValueError as error:
        if not processes.rank:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return STOPPED
    return 0


class Stopped(BaseException):
    """A signal asked the program to stop; like KeyboardInterrupt it passes by whoever handles errors."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, the first signal raises Stopped; one that comes more than GRACE seconds later ends the process at once.

    Where Python runs no handlers, in a thread other than the main one, it does nothing.
    """
    first: list[float] = []

    def stop(number: int, frame: object) -> None:
        first.append(time.monotonic())
        if len(first) == 1:
            raise Stopped(f"stopped by {signal.Signals(number).name}")
        if first[-1] - first[0] > GRACE:
            os._exit(STOPPED)

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, stop) for number in SIGNALS} if main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(processes: Processes) -> None:
    """Leave the group, if there is one: gloo may abort at interpreter exit otherwise."""
    if processes.world > 1:
        import torch.distributed

        torch.distributed.destroy_process_group()
