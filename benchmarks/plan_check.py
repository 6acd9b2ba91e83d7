"""The planner's memory against real training steps: peak resident memory of fresh processes on one CPU, in fp32.

    python -m benchmarks.plan_check [--case NAME] [--default]

Each process makes steps of a tiny model first, so that libraries have what they take once, and then two steps of the
case; what its peak grew by is the measurement (`--measure NAME` makes one). glibc is told to give back what is freed:
by default (--default) it keeps freed blocks of up to 32 MB, and a process is larger.
"""

import argparse
import ctypes
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.timing import machine
from benchmarks.train_step import peak_resident, prepared
from ditmoe import plan
from ditmoe.config import Config, ModelConfig, MoEConfig, PlanConfig, TrainConfig
from ditmoe.model import build

ONE = PlanConfig(devices=1)
_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD


def case(width: int, depth: int, batch: int, *, experts: int = 0, again: bool = False, parts: int = 1) -> Config:
    """Digits in tokens of one pixel (64 an image)."""
    return Config(
        model=ModelConfig(
            sample_size=8, patch_size=1, hidden_size=width, depth=depth, num_heads=4, ffn_width=3 * width,
            qk_norm="layer", gradient_checkpointing=again, num_classes=10,
        ),
        moe=MoEConfig(
            blocks="every-second" if experts else "none", num_experts=experts or 8, top_k=2, expert_width=width,
            shared_width=width, backend="grouped",
        ),
        train=TrainConfig(batch_size=batch, accumulation=parts, precision="fp32"),
        plan=ONE,
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
}


def predicted(config: Config) -> plan.Needs:
    """What the planner says, in bytes."""
    with torch.device("meta"):
        model = build(config, 10)
    total = sum(p.numel() for p in model.parameters())
    images = config.train.batch_size // config.train.accumulation
    again = config.model.gradient_checkpointing
    return plan.needs(config, total, plan.blocks(config, model), "DDP", 1, images, again)


def measured(config: Config, *, default: bool = False) -> float:
    """Bytes by which this process's peak grows in two training steps. To be called once in a process."""
    if not default:
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 65536)
    prepared(WARM)[0]()
    before = peak_resident()
    step = prepared(config)[0]
    for _ in range(2):
        step()
    return (peak_resident() - before) * 2**20


def in_fresh_process(name: str, *, default: bool) -> float:
    command = [sys.executable, "-m", "benchmarks.plan_check", "--measure", name, *(["--default"] if default else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--measure", choices=CASES)
    parser.add_argument("--default", action="store_true")
    args = parser.parse_args()
    if args.measure:
        print(measured(CASES[args.measure], default=args.default))
        return
    print(f"{machine()}; MB (10^6 bytes)\n")
    print("| case | parameters M | weights to average | activations | predicted peak | measured | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name in [args.case] if args.case else CASES:
        need = predicted(CASES[name])
        found = in_fresh_process(name, default=args.default)
        print(
            f"| {name} | {need.weights / 4e6:.1f} | {sum(need[:4]) / 1e6:.0f} | {need.activations / 1e6:.0f} "
            f"| {need.peak / 1e6:.0f} | {found / 1e6:.0f} | {found / need.peak:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
