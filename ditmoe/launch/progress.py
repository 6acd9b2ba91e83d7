"""How far long work has come: a bar on a terminal, a plain line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

EVERY = 10.0  # seconds between two lines of a log


@contextmanager
def progress(total: int, what: str, unit: str = "images", *, shown: bool = True) -> Iterator[Callable[[int], object]]:
    """A function that is told how many more of `total` are done, and shows them, with their rate, on stderr."""
    if not shown or sys.stderr.isatty():
        with tqdm(total=total, desc=what, unit=f" {unit}", disable=not shown) as bar:
            yield bar.update
        return
    done, started = 0, time.monotonic()
    said = started

    def tell(more: int) -> None:
        nonlocal done, said
        done += more
        now = time.monotonic()
        if now - said >= EVERY:
            said, speed = now, f"{done / (now - started):.3g} a second"
            print(f"{what}: {done} of {total} {unit}, {speed}", file=sys.stderr, flush=True)

    yield tell
