"""Images per second and peak memory of the whole training step: with experts, and the dense twin, in the same run.

    python -m benchmarks.train_step [--preset fashion] [--rounds 9]

The peak memory is a fresh process's own (`--peak VARIANT` measures one); the share of matrix products is of the
profiler's self CPU time. For CPUs.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import machine, round_robin
from ditmoe.config.presets import PRESETS
from ditmoe.config.sections import Config
from ditmoe.data.open import open_data
from ditmoe.launch import start
from ditmoe.launch.signals import Signals
from ditmoe.training.parallel import Parallel
from ditmoe.training.state import State, new_state, update_ema
from ditmoe.training.step import Run, optimise

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_convolution", "aten::convolution_backward"}
PRODUCTS |= {f"aten::_scaled_dot_product_flash_attention_for_cpu{s}" for s in ("", "_backward")}


def variants(preset: str) -> dict[str, Config]:
    moe = PRESETS[preset]
    dense = replace(moe, moe=replace(moe.moe, blocks="none"))
    both = {"experts": moe, "dense twin": dense}
    return {
        f"{name}, {precision}": replace(config, train=replace(config.train, precision=precision))
        for precision in ("bf16", "fp32")
        for name, config in both.items()
    }


def one_step(config: Config) -> Callable[[], object]:
    """A function that makes one training step of a configuration."""
    return prepared(config)[0]


def prepared(config: Config) -> tuple[Callable[[], object], State, Run]:
    """The same, what it trains, and with what."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # one process holds steps of both precisions
    data = open_data(config.data, size=config.model.sample_size, channels=config.model.in_channels)
    parallel = Parallel(start.launched(config.train), config.parallel, config.moe.num_experts)
    state = new_state(config, len(data.id2label), parallel)
    run = Run.of(config, data, parallel, state, Signals(), {})

    def step() -> None:
        optimise(run, 0)
        update_ema(state.ema, state.model, 0.999)

    return step, state, run


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


def peak_megabytes(preset: str, name: str) -> float:
    """Of a process that makes three steps and nothing else."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--preset", preset, "--peak", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="fashion")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peak")
    args = parser.parse_args()
    configs = variants(args.preset)
    if args.peak:
        before = peak_resident()
        step = one_step(configs[args.peak])
        for _ in range(3):
            step()
        print(peak_resident() - before)
        return
    steps = {name: one_step(config) for name, config in configs.items()}
    batch = PRESETS[args.preset].train.batch_size
    print(f"{machine()}; preset {args.preset}, batch {batch}, medians of {args.rounds} rounds\n")
    times = round_robin(steps, args.rounds)
    print("| variant | images/s | of the dense twin | matrix products | peak memory MB |\n|---|---|---|---|---|")
    for name, step in steps.items():
        twin = times[f"dense twin, {name.split(', ')[1]}"]
        share, peak = product_share(step), peak_megabytes(args.preset, name)
        print(
            f"| {name} | {batch / times[name]:.0f} | {twin / times[name]:.2f} | {share:.0%} | {peak:.0f} |", flush=True
        )


if __name__ == "__main__":
    main()
