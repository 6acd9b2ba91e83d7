"""The planner's memory against real training steps: peak resident memory of fresh processes on a CPU, in fp32.

    python -m benchmarks.plan_check [--case NAME] [--default]

Each process makes steps of a tiny model first, so that libraries have what they take once, and then three steps of the
case (DDP fills its final buckets in the second); what its peak grew by is the measurement (`--measure NAME` makes one).
Of several processes (torchrun, gloo) the largest counts. glibc is told to give back what is freed: by default
(--default) it keeps freed blocks of up to 32 MB, and a process is larger.
"""

import argparse
import ctypes
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.timing import machine
from benchmarks.train_step import peak_resident, prepared
from ditmoe.analysis import budget
from ditmoe.config.sections import Config, ModelConfig, MoEConfig, ParallelConfig, PlanConfig, TrainConfig
from ditmoe.launch import start
from ditmoe.model import build

_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD


def case(
    width: int, depth: int, batch: int, *, experts: int = 0, again: bool = False, parts: int = 1, devices: int = 1,
    over: int = 1, shard: bool = False,
) -> Config:  # fmt: skip
    """Digits in tokens of one pixel (64 an image), `batch` of them a process; experts are split `over` processes."""
    return Config(
        model=ModelConfig(
            sample_size=8, patch_size=1, hidden_size=width, depth=depth, num_heads=4, ffn_width=3 * width,
            qk_norm="layer", gradient_checkpointing=again, num_classes=10,
        ),
        moe=MoEConfig(
            blocks="every-second" if experts else "none", num_experts=experts or 8, top_k=2, expert_width=width,
            shared_width=width, backend="grouped",
        ),
        train=TrainConfig(batch_size=batch * devices, accumulation=parts, precision="fp32"),
        parallel=ParallelConfig(experts=over, shard=shard),
        plan=PlanConfig(devices=devices),
    )  # fmt: skip


WARM = case(32, 2, 4, experts=4)
CASES = {
    "dense, activations": case(128, 8, 64),
    "dense, activations, checkpointing": case(128, 8, 64, again=True),
    "experts, activations": case(128, 8, 48, experts=8),
    "experts, activations, checkpointing": case(128, 8, 48, experts=8, again=True),
    "experts, activations, accumulation 2": case(128, 8, 96, experts=8, parts=2),
    "dense, weights": case(512, 8, 2),
    "experts, weights": case(256, 8, 4, experts=32),
    "experts, both": case(256, 8, 12, experts=16),
    "experts, both, accumulation 2": case(256, 8, 24, experts=16, parts=2),
    "experts, both, checkpointing": case(256, 8, 12, experts=16, again=True),
    "DDP over 2": case(256, 8, 12, experts=16, devices=2),
    "experts over 2": case(256, 8, 12, experts=16, devices=2, over=2),
    "experts over 2, weights": case(256, 8, 4, experts=32, devices=2, over=2),
    "sharded over 2": case(256, 8, 12, experts=16, devices=2, shard=True),
    "sharded over 2, weights": case(256, 8, 4, experts=32, devices=2, shard=True),
    "sharded over 2, checkpointing": case(256, 8, 12, experts=16, again=True, devices=2, shard=True),
    "sharded over 4, 2 experts": case(256, 8, 2, experts=2, devices=4, shard=True),
    "both over 2": case(256, 8, 12, experts=16, devices=2, over=2, shard=True),
    "both over 2, weights": case(256, 8, 4, experts=32, devices=2, over=2, shard=True),
    "both over 2, checkpointing": case(256, 8, 12, experts=16, again=True, devices=2, over=2, shard=True),
}


def predicted(config: Config) -> budget.Needs:
    """What the planner says, in bytes."""
    with torch.device("meta"):
        model = build(config, 10)
    images = config.train.batch_size // config.train.accumulation // config.plan.devices
    again, way = config.model.gradient_checkpointing, "FSDP2" if config.parallel.shard else "DDP"
    return budget.needs(config, model, way, config.parallel.experts, images, again)


def measured(config: Config, *, default: bool = False) -> float:
    """Bytes by which this process's peak grows in three training steps. To be called once in a process."""
    if not default:
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 65536)
    prepared(replace(WARM, parallel=config.parallel))[0]()
    before = peak_resident()
    step, _, run = prepared(config)
    assert run.parallel.world == config.plan.devices
    for _ in range(3):
        step()
    grown = (peak_resident() - before) * 2**20
    start.shutdown()
    return grown


def in_fresh_processes(name: str, *, default: bool) -> float:
    """The largest of a launch."""
    world = CASES[name].plan.devices
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    command = [sys.executable, *launch, "-m", "benchmarks.plan_check", "--measure", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *(["--default"] if default else [])],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1], env=environment,
    )  # fmt: skip
    return max(float(line) for line in re.findall(r"^grown by (\d+) bytes$", done.stdout, re.MULTILINE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--measure", choices=CASES)
    parser.add_argument("--default", action="store_true")
    args = parser.parse_args()
    if args.measure:
        print(f"grown by {measured(CASES[args.measure], default=args.default):.0f} bytes\n", end="", flush=True)
        return
    print(f"{machine()}; MB (10^6 bytes)\n")
    print("| case | parameters M | weights to average | activations | predicted peak | measured | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name in [args.case] if args.case else CASES:
        need = predicted(CASES[name])
        found = in_fresh_processes(name, default=args.default)
        print(
            f"| {name} | {need.weights / 4e6:.1f} | {sum(need[:4]) / 1e6:.0f} | {need.activations / 1e6:.0f} "
            f"| {need.peak / 1e6:.0f} | {found / 1e6:.0f} | {found / need.peak:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
