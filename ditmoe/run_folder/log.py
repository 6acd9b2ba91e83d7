"""What a run says about itself while it trains: metrics.jsonl, a progress bar or plain lines."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TextIO

from tqdm.auto import tqdm

from ..config.sections import Config
from ..files import write_text
from .place import METRICS


class Log:
    """metrics.jsonl, a progress bar on a terminal, plain lines elsewhere.

    `first_step` steps were done before; the first one of several processes writes it, and is alone `shown`. `track`
    is told each row that is written, but those of skipped steps.
    """

    def __init__(
        self, config: Config, first_step: int, *, shown: bool, track: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self.track = track
        self.config, self.first_step, self.shown = config, first_step, shown
        self.every = 1 if config.max_steps <= 200 else config.train.log_every
        self.turns = len(config.data.mixture) if config.data.alternate else 1  # rows in a row: of each set one

    def __enter__(self) -> Self:
        config, hidden = self.config, None if self.shown else True
        self.file = _reopen(config.out / METRICS, self.first_step) if self.shown else None
        self.bar = tqdm(total=config.max_steps, initial=self.first_step, desc="training", disable=hidden)
        self.mark, self.images, self.spoken = time.perf_counter(), 0, -math.inf
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        if self.file:
            with suppress(OSError):
                self.file.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count as training time."""
        start = time.perf_counter()
        yield
        self.mark += time.perf_counter() - start

    def count(self, step: int) -> bool:
        """Count a step that is done; whether its row is due, as that of every `log_every`-th and the last one is.

        Where steps are of one set in turn, those that make up the turn are due.
        """
        self.images += self.config.train.batch_size
        self.bar.update()
        since = step % self.every
        return since < min(step, self.turns) or step == self.config.max_steps

    def write(self, row: dict[str, Any]) -> None:
        """One row: JSON values with "step" and "loss", which is null for a step that was skipped.

        Others get images_per_second: since the last such row, pauses left out.
        """
        if row["loss"] is not None:
            now = time.perf_counter()
            row = {**row, "images_per_second": round(self.images / (now - self.mark), 2)}
            self.mark, self.images = now, 0
        if self.file is None:
            return
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()  # what a full disk refuses stays in the buffer, for the next row
        except OSError as error:
            print(f"warning: {METRICS} could not be written ({error})", flush=True)
        if row["loss"] is not None:
            self._show(row)

    def _show(self, row: dict[str, Any]) -> None:
        if self.track:
            self.track(row)
        step, steps, loss = row["step"], self.config.max_steps, f"{row['loss']:.4f}"
        self.bar.set_postfix(loss=loss)
        if self.bar.disable and (step == steps or time.perf_counter() - self.spoken > 10):
            self.spoken = time.perf_counter()
            speed = f"grad {row['grad_norm']:.3f} {row['images_per_second']:.0f} images/s"
            print(f"step {step}/{steps} loss {loss} {speed}", flush=True)


def _reopen(path: Path, first_step: int) -> TextIO:
    """The metrics file, without rows of steps that are about to be done again."""
    write_text(path, "".join(f"{line}\n" for line, row in read_lines(path) if row["step"] <= first_step))
    return path.open("a")


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of metrics.jsonl and their rows, without those that a kill or the disk has torn; none without it."""
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError, RecursionError):
            row = json.loads(text := line.decode())
            if isinstance(row, dict) and isinstance(row.get("step"), int) and "loss" in row:
                yield text, row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, oldest first, without torn ones and those of skipped steps; none without the file.

    Raises:
        ValueError: A row is none of ours.
    """
    rows = [row for _, row in read_lines(path) if row["loss"] is not None]
    for row in rows:
        if not all(isinstance(row.get(name), int | float) for name in ("loss", "images_per_second")):
            raise ValueError(f"{path} has a row for step {row['step']} without a loss or images_per_second")
    return rows
