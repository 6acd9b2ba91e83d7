"""What the processes of a launch agree on. With one process each function is its plain form."""

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ..config.file import differences
from .signals import REQUEST, Interrupted, Signals

T = TypeVar("T")
_POLL = 0.2  # seconds


def total(accelerator: Accelerator, values: list[float]) -> list[float]:
    """The sums over processes."""
    if accelerator.num_processes == 1:
        return values
    found: list[float] = accelerator.reduce(torch.tensor(values, device=accelerator.device), "sum").tolist()
    return found


def everything(accelerator: Accelerator, values: list[T]) -> list[T]:
    """The values of all processes, in the order of their ranks."""
    return values if accelerator.num_processes == 1 else list(gather_object(values))


def decided_by_first(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What `decide` returns on the first process, on all of them; its ValueError is raised on all of them too."""
    answer: list[Any] = [agreed(accelerator, lambda: decide() if accelerator.is_main_process else None)]
    decided: T = broadcast_object_list(answer)[0]
    return decided


def agreed(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """`work` on every process; where it raises ValueError on one, it does so on all of them."""
    if accelerator.num_processes == 1:
        return work()
    done: list[T] = []
    mistakes: list[str] = []
    try:
        done.append(work())
    except ValueError as error:
        mistakes.append(str(error))
    if found := everything(accelerator, mistakes):
        raise ValueError(found[0])
    return done[0]


def check_alike(accelerator: Accelerator, facts: Mapping[str, Any]) -> None:
    """ValueError on every process, where they do not all have the same JSON values."""
    found = everything(accelerator, [facts])
    for rank, other in enumerate(found):
        if changed := differences(dict(found[0]), dict(other)):
            run = f"process {rank} was started for another run than process 0 ({'; '.join(changed[:5])})"
            raise ValueError(f"{run}; give all of them the same options and the same images")


def first_works(accelerator: Accelerator, work: Callable[[], None], signals: Signals, name: str) -> None:
    """`work` on the first process; the others wait, however long it takes. `name` is unique in a run.

    A signal to any of them ends it: it is raised in the work, and noted, so that the loop stops at its next look.
    """
    if accelerator.num_processes == 1:
        with suppress(Interrupted), signals.raising():
            work()
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    if accelerator.is_main_process:
        finished = threading.Event()

        def watch() -> None:
            while not finished.wait(_POLL):
                if store.check([f"{name}/stop"]):
                    return os.kill(os.getpid(), REQUEST)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            with suppress(Interrupted), signals.raising():
                work()
        finally:
            finished.set()
            watcher.join()
            store.set(f"{name}/done", "1")
    else:
        while not store.check([f"{name}/done"]):
            if signals.received:
                store.set(f"{name}/stop", "1")
            time.sleep(_POLL)
