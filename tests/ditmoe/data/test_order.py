"""Between a reader and training: whatever cannot be sent ends the run in a sentence, and none of it is waited for."""

import os
import resource
import time
from collections.abc import Callable

import pytest
import torch

from ditmoe.config.sections import Config
from ditmoe.data.open import open_data
from ditmoe.data.order import Batches
from ditmoe.data.sets import ArrayImages

Tiny = Callable[..., Config]


def no_room(x: torch.Tensor) -> torch.Tensor:
    """As with a full /dev/shm: a batch takes more bytes than a file may have."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    return x


def no_descriptors(x: torch.Tensor) -> torch.Tensor:
    free = os.dup(0)  # the lowest number that is left
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, free))
    return x


class NoMemory:
    """No memory is left where it is packed."""

    def __reduce__(self) -> None:
        raise MemoryError("no memory")


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (no_room, r"RuntimeError: .*/torch_"),
        (no_descriptors, "(OSError|RuntimeError): .*Too many open files"),
        (lambda x: NoMemory(), "MemoryError: no memory"),
        (lambda x: lambda: x, "(Attribute|Pickling)Error: .*pickle"),
    ],
)
def test_a_batch_that_cannot_be_sent_is_a_sentence(spoil, cause, tiny: Tiny, monkeypatch) -> None:
    config = tiny(max_steps=50, data={"num_workers": 1})
    data, tensors, began = open_data(config.data, size=8, channels=1), ArrayImages.tensors, time.monotonic()
    monkeypatch.setattr(ArrayImages, "tensors", lambda *args: spoil(tensors(*args)))
    batches = Batches(config, data, first_step=0, rank=0, num_processes=1)
    sentence = rf"^data.num_workers 1: a reader could not send its batch .*\({cause}.*shm-size.*--data.num-workers 0$"
    with pytest.raises(ValueError, match=sentence):
        next(batches)
    batches.close()
    assert time.monotonic() - began < 30


def test_a_batch_that_cannot_be_received_is_a_sentence(tiny: Tiny) -> None:
    config = tiny(max_steps=50, data={"num_workers": 1})
    batches = Batches(config, open_data(config.data, size=8, channels=1), first_step=0, rank=0, num_processes=1)
    kept, limits = [next(batches)], resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), limits[1]))
    sentence = r"^data.num_workers 1: a batch of a reader could not be received \(Too many open files\); .*ulimit -n"
    try:
        with pytest.raises(ValueError, match=sentence):
            kept += list(batches)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        batches.close()


def test_readers_that_cannot_be_started_are_a_sentence(tiny: Tiny, monkeypatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    config = tiny(max_steps=2, data={"num_workers": 1})
    data = open_data(config.data, size=8, channels=1)
    monkeypatch.setattr("multiprocessing.queues.Queue.__init__", full)
    with pytest.raises(ValueError, match=r"^data.num_workers 1: readers could not be started .*No space.*shm-size"):
        Batches(config, data, first_step=0, rank=0, num_processes=1)
