"""Micro-batches until the run ends or is asked to stop."""

import sys
from contextlib import suppress

from accelerate import Accelerator

from ..data.order import Batch, Batches
from ..data.sets import check_bad
from ..launch import agree
from ..launch.signals import Interrupted, Signals


class Watch:
    """Takes micro-batches from the stream; `bad`: sentences about images that were skipped, at most `max_bad`."""

    def __init__(self, accelerator: Accelerator, signals: Signals, max_bad: int, bad: list[str]) -> None:
        self.accelerator, self.signals, self.max_bad, self.bad = accelerator, signals, max_bad, bad

    def stopped(self) -> bool:
        """Whether one of the processes was asked to stop; all must call it."""
        return bool(agree.total(self.accelerator, [float(bool(self.signals.received))])[0])

    def take(self, batches: Batches) -> Batch | None:
        """The next micro-batch, or None on every process when one of them was asked to stop.

        Raises:
            ValueError: On every process, when more images than `max_bad` could not be used.
            RuntimeError: A process that reads data died.
        """
        batch: Batch | None = None
        with suppress(Interrupted), self.signals.raising():
            batch = next(batches)
        own = batch.bad if batch else []
        stop, fresh = agree.total(self.accelerator, [float(bool(self.signals.received)), float(len(own))])
        if fresh:
            found = dict.fromkeys(agree.everything(self.accelerator, own))
            new = [sentence for sentence in found if sentence not in self.bad]
            self.bad += new
            for sentence in new if self.accelerator.is_main_process else ():
                print(f"skipped: {sentence}", file=sys.stderr, flush=True)
            check_bad(self.bad, self.max_bad)
        return None if stop else batch
