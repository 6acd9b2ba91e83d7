"""What a run says about itself while it trains: metrics.jsonl, a progress bar or plain lines, TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ..config.sections import Config, TrainConfig


class StepResult(NamedTuple):
    """One optimiser step.

    Attributes:
        losses: Means over its micro-batches.
        grad_norm: Of the whole gradient, before clipping.
        counts: (L, E) assignments over all processes.
        faults: What was not finite, in words; the step was then skipped.
        skipped: Steps of the run that were skipped so far.
    """

    losses: dict[str, Tensor]
    grad_norm: Tensor
    counts: Tensor | None
    faults: Sequence[str] = ()
    skipped: int = 0


def learning_rate(train: TrainConfig, step: int) -> float:
    """Linear warm-up over `warmup_steps`, then constant, or linear down to zero at `decay_steps`."""
    warm = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    if train.decay_steps is None:
        return train.learning_rate * warm
    left = (train.decay_steps - step) / (train.decay_steps - train.warmup_steps)
    return train.learning_rate * min(warm, max(0.0, left))


class Log:
    """metrics.jsonl, a progress bar on a terminal, plain lines elsewhere, TensorBoard when asked."""

    def __init__(self, config: Config, first_step: int, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.every = 1 if config.max_steps <= 200 else config.train.log_every
        self.first_step = first_step

    def __enter__(self) -> Log:
        self.file: TextIO | None = None
        self.board: Any = None
        main = self.accelerator.is_main_process
        if main:
            self.file = _reopen(self.config.out / "metrics.jsonl", self.first_step)
        if main and self.config.train.tensorboard:
            self.board = _tensorboard(self.config.out)
        total = self.config.max_steps
        self.bar = tqdm(total=total, initial=self.first_step, desc="training", disable=None if main else True)
        self.mark, self.images, self.spoken = time.perf_counter(), 0, -math.inf
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        if self.file:
            with suppress(OSError):
                self.file.close()
        if self.board:
            self.board.close()

    def paused(self) -> _Pause:
        """Time spent inside does not count as training time."""
        return _Pause(self)

    def row(self, step: int, result: StepResult) -> None:
        """Note one step; every `log_every` steps, write its row. A skipped step's row has the loss null and why."""
        self.images += self.config.train.batch_size
        self.bar.update()
        if result.faults:
            return self._write({"step": step, "loss": None, "skipped_steps": result.skipped, "faults": result.faults})
        if step % self.every and step != self.config.max_steps:
            return
        names = list(result.losses)
        values = torch.stack([*result.losses.values()])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, "mean")
        losses = dict(zip(names, values.tolist(), strict=True))
        now = time.perf_counter()
        row = {
            "step": step,
            "loss": losses.pop("total"),
            **losses,
            "grad_norm": float(result.grad_norm),
            "lr": learning_rate(self.config.train, step - 1),
            "images_per_second": round(self.images / (now - self.mark), 2),
            "skipped_steps": result.skipped,
            **expert_load(result.counts),
        }
        self.mark, self.images = now, 0
        self._write(row)

    def _write(self, row: dict[str, Any]) -> None:
        if self.file is None:
            return
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()  # what a full disk refuses stays in the buffer, for the next row
        except OSError as error:
            print(f"warning: metrics.jsonl could not be written ({error})", flush=True)
        if row["loss"] is None:
            return
        if self.board:
            for name, value in row.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, row["step"])
        self.bar.set_postfix(loss=f"{row['loss']:.4f}")
        last = row["step"] == self.config.max_steps
        if self.bar.disable and (last or time.perf_counter() - self.spoken > 10):
            self.spoken = time.perf_counter()
            print(
                f"step {row['step']}/{self.config.max_steps} loss {row['loss']:.4f} "
                f"grad {row['grad_norm']:.3f} {row['images_per_second']:.0f} images/s",
                flush=True,
            )


class _Pause:
    def __init__(self, log: Log) -> None:
        self.log = log

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.log.mark += time.perf_counter() - self.start


def expert_load(counts: Tensor | None) -> dict[str, list[float]]:
    """Per MoE layer, from (L, E) assignments: max over mean load, experts without a token, entropy in 0..1."""
    if counts is None:
        return {}
    share = counts.double() / counts.sum(dim=1, keepdim=True)
    entropy = -(share * share.clamp_min(1e-12).log()).sum(dim=1) / math.log(max(2, counts.shape[1]))
    return {
        "load_max_over_mean": [round(v, 4) for v in (share.amax(dim=1) * counts.shape[1]).tolist()],
        "dead_experts": (counts == 0).sum(dim=1).tolist(),
        "load_entropy": [round(v, 4) for v in entropy.tolist()],
    }


def _reopen(path: Path, first_step: int) -> TextIO:
    """The metrics file, without rows of steps that are about to be done again."""
    kept = [line for line, row in read_lines(path) if row["step"] <= first_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    temporary.replace(path)
    return path.open("a")


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of metrics.jsonl and their rows, without those that a kill or the disk has torn; none without it."""
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            text = line.decode()
            row = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and "loss" in row:
            yield text, row


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("train.tensorboard needs TensorBoard: pip install 'ditmoe[track]'") from error
    return SummaryWriter(str(out / "tensorboard"))


pass


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
