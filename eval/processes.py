"""Several processes that score one set of images together, as torchrun or accelerate launch starts them."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Found = TypeVar("Found")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED = 143  # exit code of a program that a signal stopped
GRACE = 2.0  # launchers hand on the signals that they get: one request may arrive twice


class Processes(NamedTuple):
    """This process among those that work together; the methods do nothing where it is alone."""

    rank: int = 0  # its number
    world: int = 1  # how many there are

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

    def agree(self, work: Callable[[], Found]) -> Found:
        """What `work()` gives here, once all have done theirs; where it fails in one process, every process raises.

        Raises:
            SharedError: Somewhere it was the user's mistake; the sentence is that of the first process that met one.
            RuntimeError: Elsewhere it was a bug, which keeps its traceback there.
        """
        if self.world == 1:
            return work()
        error, mine = None, None
        try:
            found = work()
        except Exception as caught:
            error, mine = caught, (isinstance(caught, ValueError) and is_ours(caught), str(caught) or repr(caught))
        failed = [(rank, *each) for rank, each in enumerate(self.gather(mine)) if each is not None]
        if error is not None and mine and not mine[0]:
            raise error
        for _, mistake, sentence in failed:
            if mistake:
                raise SharedError(sentence) from error
        if failed:
            raise RuntimeError(f"process {failed[0][0]} failed: {failed[0][2]}")
        return found


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """Inside, the processes that the launcher announces in the environment (RANK, WORLD_SIZE, ...), over gloo."""
    world = os.environ.get("WORLD_SIZE", "1")
    if int(world) == 1:
        yield ALONE
        return
    import torch.distributed

    if not torch.distributed.is_initialized():
        # One process may finish its share hours before another, or wait while the first writes a large file.
        try:
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=1))
        except ValueError as error:
            raise ValueError(f"WORLD_SIZE is {world}, but {error}; use torchrun or accelerate launch") from error
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        yield Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())
    finally:
        torch.distributed.destroy_process_group()  # gloo may abort at interpreter exit otherwise


def together(work: Callable[[Processes], None]) -> int:
    """Join, work, leave; the exit code: 0 done, 2 the user's mistake, a sentence on stderr.

    A mistake that all have agreed on is told by the first process, any other by the process that met it.
    143: stopped by SIGTERM, SIGINT or SIGUSR1. A bug, a library's ValueError too, keeps its traceback.
    """
    processes = ALONE
    try:
        with stoppable(), joined() as processes:
            work(processes)
    except ValueError as error:
        if not is_ours(error):
            raise
        if not (processes.rank and isinstance(error, SharedError)):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return STOPPED
    return 0


class SharedError(ValueError):
    """A mistake of the user's that every process knows of."""


def is_ours(error: ValueError) -> bool:
    """Whether this package raised it, and so meant it for the user; a library's ValueError is a bug of ours."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is None or Path(__file__).parent in Path(trace.tb_frame.f_code.co_filename).parents


class Stopped(BaseException):
    """A signal asked the program to stop; like KeyboardInterrupt it passes by whoever handles errors."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, the first signal raises Stopped; one that comes more than GRACE seconds later ends the process at once.

    A process that waits for others runs no handlers, so a thread looks out for the second one: the interpreter writes
    the numbers of signals into a pipe the moment they come. In a thread other than the main one it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    come, written = os.pipe()
    os.set_blocking(written, False)
    stopped: list[int] = []

    def stop(number: int, frame: object) -> None:
        stopped.append(number)
        if len(stopped) == 1:
            raise Stopped(f"stopped by {signal.Signals(number).name}")

    def watch() -> None:
        came: list[float] = []
        while number := os.read(come, 1):
            came += [time.monotonic()] if number[0] in SIGNALS else []
            if came and came[-1] - came[0] > GRACE:
                os.write(2, b"stopped at once by a second signal; nothing more was saved\n")
                os._exit(STOPPED)
        os.close(come)

    threading.Thread(target=watch, daemon=True).start()
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    old = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(written)
