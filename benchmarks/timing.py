"""Timing of rivals in the same run: round robin, so that a slow minute of the machine hits all of them alike."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch


def turns(
    rivals: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each rival in every round, after one warm-up each; every round begins with another."""
    for run in rivals.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    order = list(rivals.items())
    for k in range(rounds):
        first = k % len(order)
        for name, run in order[first:] + order[:first]:
            start = clock()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return seconds


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median of what values are drawn from lies, 19 times in 20 (order statistics); of 3 or 4 less often."""
    values, n = sorted(values), len(values)
    low = max(0, int((n - 1.96 * n**0.5) / 2))
    return values[low], values[n - 1 - low]


def round_robin(
    rivals: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each rival over the rounds of `turns`."""
    return {name: median(values) for name, values in turns(rivals, rounds, clock).items()}


def machine() -> str:
    """One line: processor, threads, torch."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return f"{gpu or cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo") as file:
            return file.readlines()
    except OSError:
        return []
