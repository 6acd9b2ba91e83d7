"""What SIGTERM, SIGINT and SIGUSR1 do: ask the program to stop, once; a second one ends it at once.

Launchers hand on the signals that they get, so one request may arrive twice: within GRACE seconds of the first it
counts as the same. Both ways out have exit code 143.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REQUEST = signal.SIGUSR2  # to itself, for another process that got one of these; it does not count as a first one
EXIT_CODE = 143
GRACE = 2.0


class Interrupted(BaseException):
    """A signal asked the program to stop. Like KeyboardInterrupt, no `except Exception` on its way swallows it."""


class Signals:
    """While entered, a signal is noted in `received` (its name), or raises Interrupted where `raising` is on.

    In a thread other than the main one, where Python runs no handlers, it does nothing.
    """

    def __init__(self, *, raising: bool = False) -> None:
        self.received, self._raising = "", raising

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()
        outer = getattr(signal.getsignal(STOPPING[0]), "__self__", None)
        self._outer = outer if main and isinstance(outer, Signals) else None
        if self._outer:  # what it noted and could not say, as in a finaliser, is not lost
            self.received = self._outer.received
        self._old = {number: signal.signal(number, self._note) for number in (*STOPPING, REQUEST)} if main else {}
        self._end = _watch_for_a_second() if main and not self._outer else None
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if self._end:
            self._end()
        if self._outer and self.received and not self._outer.received:  # it came when nobody looked any more
            self._outer.received = self.received
            if self._outer._raising and exception[0] is None:
                raise Interrupted(f"stopped by {self.received}")

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Inside, a signal raises Interrupted wherever the program is; one that came before raises it here."""
        self._raising = True
        try:
            if self.received:
                raise Interrupted(f"stopped by {self.received}")
            yield
        finally:
            self._raising = False

    def _note(self, number: int, frame: object) -> None:
        if not self.received:
            self.received = signal.Signals(number).name
            if self._raising:
                raise Interrupted(f"stopped by {self.received}")


def _watch_for_a_second() -> Callable[[], None]:
    """Leave at once when a second signal comes, wherever the program is; what is returned ends the watch.

    Python runs handlers between its own instructions alone, and a process that waits for others runs none. So a thread
    reads the numbers of the signals from a pipe, into which the interpreter writes them the moment they come.
    """
    come, written = os.pipe()
    os.set_blocking(written, False)
    old = signal.set_wakeup_fd(written, warn_on_full_buffer=False)

    def watch() -> None:
        came: list[float] = []
        while number := os.read(come, 1):
            came += [time.monotonic()] if number[0] in STOPPING else []
            if came and came[-1] - came[0] > GRACE:
                os.write(2, b"stopped at once by a second signal; nothing more was saved\n")
                os._exit(EXIT_CODE)
        os.close(come)

    threading.Thread(target=watch, daemon=True).start()

    def end() -> None:
        signal.set_wakeup_fd(old)
        os.close(written)

    return end


def ignored_here(_: int = 0) -> None:
    """For processes that read data: they outlive a signal to the whole group, and not the training process."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)


def end_with_parent(number: int) -> None:
    """Get this signal when the process that started this one ends (Linux; elsewhere nothing happens).

    An orphan would keep its files and connections open, and other processes waiting for an answer.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG
