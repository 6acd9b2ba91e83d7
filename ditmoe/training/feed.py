"""Micro-batches until the run ends or is asked to stop."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress

from accelerate import Accelerator

from ..data.order import Batch, Batches
from ..data.sets import check_bad
from ..launch import agree
from ..launch.signals import Interrupted, Signals


class Watch:
    """Takes micro-batches from the stream until the run ends or is asked to stop.

    Args:
        accelerator: The processes.
        signals: Those of this process.
        max_bad: Images that may be skipped.
        bad: Sentences about those that were skipped so far; added to.
    """

    def __init__(self, accelerator: Accelerator, signals: Signals, max_bad: int, bad: list[str]) -> None:
        self.accelerator, self.signals, self.max_bad, self.bad = accelerator, signals, max_bad, bad
        self._fresh: list[str] = []

    def take(self, batches: Batches) -> Batch | None:
        """The next micro-batch, or None on every process when one of them was asked to stop.

        Raises:
            ValueError: On every process, when more images than `max_bad` could not be used.
            RuntimeError: A process that reads data died.
        """
        batch: Batch | None = None
        with suppress(Interrupted), self.signals.raising():
            batch = next(batches)
            self._fresh = batch.bad
        return None if self._settle() else batch

    def _settle(self) -> bool:
        """Whether any process was asked to stop; and note the images that were skipped."""
        stop, fresh = agree.total(self.accelerator, [float(bool(self.signals.received)), float(len(self._fresh))])
        if fresh:
            self._note(agree.everything(self.accelerator, self._fresh))
        return bool(stop)

    def _note(self, sentences: Sequence[str]) -> None:
        for sentence in sentences:
            if sentence not in self.bad:
                self.bad.append(sentence)
                if self.accelerator.is_main_process:
                    print(f"skipped: {sentence}", file=sys.stderr, flush=True)
        self._fresh = []
        check_bad(self.bad, self.max_bad)
