"""Images per second and peak memory of the whole training step: with experts, and the dense twin, in the same run.

    python -m benchmarks.train_step [--preset fashion] [--batch-size N] [--rounds 9]

A preset of latents takes random ones of its shape. The peak memory is a fresh process's own (`--peak VARIANT` measures
one); the share of matrix products is of the profiler's self CPU time. For CPUs.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import machine, round_robin
from ditmoe.config.presets import PRESETS
from ditmoe.config.sections import Config
from ditmoe.data.latents import Latents
from ditmoe.data.open import open_data
from ditmoe.data.sets import ImageSet
from ditmoe.launch import start
from ditmoe.launch.signals import Signals
from ditmoe.training.parallel import Parallel
from ditmoe.training.state import State, new_state, update_ema
from ditmoe.training.step import Run, optimise

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_convolution", "aten::convolution_backward"}
PRODUCTS |= {f"aten::_scaled_dot_product_flash_attention_for_cpu{s}" for s in ("", "_backward")}


def variants(preset: str, batch: int | None) -> dict[str, Config]:
    moe = PRESETS[preset]
    moe = replace(moe, train=replace(moe.train, batch_size=batch or moe.train.batch_size))
    dense = replace(moe, moe=replace(moe.moe, blocks="none"))
    both = {"experts": moe, "dense twin": dense}
    return {
        f"{name}, {precision}": replace(config, train=replace(config.train, precision=precision))
        for precision in ("bf16", "fp32")
        for name, config in both.items()
    }


def one_step(config: Config) -> Callable[[], object]:
    """A function that makes one training step of a configuration."""
    return prepared(config).step


class Prepared(NamedTuple):
    """A function that makes a training step, what it trains, and with what."""

    step: Callable[[], object]
    state: State
    run: Run


def prepared(config: Config, data: ImageSet | None = None) -> Prepared:
    """What trains on these images, or on the configuration's own."""
    data = images(config) if data is None else data
    parallel = Parallel(start.launched(config.train), config.parallel, config.moe.num_experts)
    state = new_state(config, len(data.id2label), parallel)
    run = Run.of(config, data, parallel, state, Signals(), {})

    def step() -> None:
        optimise(run, 0)
        update_ema(state.ema, state.model, 0.999)

    return Prepared(step, state, run)


def images(config: Config) -> ImageSet:
    """The data of a configuration; random latents, 1,000 of 1,000 classes, where those would be files."""
    size, channels = config.model.sample_size, config.model.in_channels
    if config.data.name != "latents":
        return open_data(config.data, size=size, channels=channels)
    values = torch.randn(1000, channels, size, size, generator=torch.Generator().manual_seed(0))
    return Latents(values, np.arange(1000), {i: str(i) for i in range(1000)}, "random")


def product_share(step: Callable[[], object]) -> float:
    with profile(activities=[ProfilerActivity.CPU]) as record:  # CPU time: meant for a machine without a GPU
        step()
    rows = record.key_averages()
    products = sum(row.self_cpu_time_total for row in rows if row.key in PRODUCTS)
    return float(products / sum(row.self_cpu_time_total for row in rows))


def peak_resident() -> float:
    """This process's own largest resident size so far, MB (Linux; getrusage would inherit the parent's)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def peak_megabytes(options: list[str], name: str) -> float:
    """Of a process that makes three steps and nothing else."""
    command = [sys.executable, "-m", "benchmarks.train_step", *options, "--peak", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="fashion")
    parser.add_argument("--batch-size", type=int, help="instead of the preset's")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peak")
    args = parser.parse_args()
    configs = variants(args.preset, args.batch_size)
    if args.peak:
        before = peak_resident()
        step = one_step(configs[args.peak])
        for _ in range(3):
            step()
        print(peak_resident() - before)
        return
    steps = {name: one_step(config) for name, config in configs.items()}
    batch = next(iter(configs.values())).train.batch_size
    options = ["--preset", args.preset, "--batch-size", str(batch)]
    print(f"{machine()}; preset {args.preset}, batch {batch}, medians of {args.rounds} rounds\n")
    times = round_robin(steps, args.rounds)
    print("| variant | images/s | of the dense twin | matrix products | peak memory MB |\n|---|---|---|---|---|")
    for name, step in steps.items():
        twin = times[f"dense twin, {name.split(', ')[1]}"]
        share, peak = product_share(step), peak_megabytes(options, name)
        print(
            f"| {name} | {batch / times[name]:.3g} | {twin / times[name]:.2f} | {share:.0%} | {peak:.0f} |", flush=True
        )


if __name__ == "__main__":
    main()
