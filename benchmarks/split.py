"""What a process holds and sends when a model is split over two processes: bytes that are there, not estimates.

    python -m benchmarks.split

Trains a few steps of a small network (8 experts of width 512 in every block) as DDP, with split experts, sharded, and
both, on 2 processes each (torchrun, gloo), and prints for the second process the bytes of expert and other weights,
gradients and moments, the peak of its resident memory, and what it sent to exchange tokens beside what the planner
says.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.timing import machine
from ditmoe.config.sections import Config, ModelConfig, MoEConfig, ParallelConfig, PlanConfig, TrainConfig

WAYS = {
    "DDP": ParallelConfig(),
    "experts over 2": ParallelConfig(experts=2),
    "sharded": ParallelConfig(shard=True),
    "experts over 2, rest sharded": ParallelConfig(experts=2, shard=True),
}
STEPS = 5


def config_of(way: str) -> Config:
    return Config(
        model=ModelConfig(hidden_size=256, depth=4, num_heads=4, ffn_width=512),
        moe=MoEConfig(blocks="all", num_experts=8, top_k=2, expert_width=512, shared_width=256, balance_weight=0.02),
        train=TrainConfig(batch_size=64, precision="fp32", warmup_steps=1),
        parallel=WAYS[way],
        plan=PlanConfig(devices=2),
    )


def one_process(way: str) -> dict[str, Any]:
    """Called by torchrun: train, and say what this process has."""
    import torch
    from torch.distributed.tensor import DTensor

    from benchmarks.train_step import peak_resident, prepared
    from ditmoe.analysis import budget
    from ditmoe.launch import start
    from ditmoe.model import build
    from ditmoe.training.parallel import expert_names

    config = config_of(way)
    before = peak_resident()
    step, state, run = prepared(config)
    names = expert_names(state.model)
    found: dict[str, Any] = {}

    def size(tensors: Any) -> int:
        return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)

    clip = run.parallel.clip

    def watched(model: Any, norm: float) -> Any:  # where all gradients are there
        for kind, wanted in (("experts", True), ("others", False)):
            grads = [p.grad for name, p in model.named_parameters() if (name in names) == wanted]
            found[f"{kind}, gradients"] = size(g for g in grads if g is not None)
        return clip(model, norm)

    run.parallel.clip = watched
    step()
    sent = run.parallel.bytes_sent
    for _ in range(STEPS):
        step()
    sent = (run.parallel.bytes_sent - sent) / STEPS
    for kind, wanted in (("experts", True), ("others", False)):
        chosen = [p for name, p in state.model.named_parameters() if (name in names) == wanted]
        found[kind] = size(chosen)
        found[f"{kind}, moments"] = size(v for p in chosen for v in state.optimizer.state[p].values() if v.ndim)
    with torch.device("meta"):
        whole = build(config, 10)
    way = "FSDP2" if config.parallel.shard else "DDP"
    need = budget.needs(config, whole, way, config.parallel.experts, config.train.batch_size // 2)
    found |= {"peak": peak_resident() - before, "sent": sent, "planned": need.all_to_all}
    start.shutdown()
    return found


def launched(way: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "benchmarks.split", "--way", way]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=list(WAYS))
    args = parser.parse_args()
    if args.way:
        found = one_process(args.way)
        if os.environ["RANK"] == "1":  # the first one also builds the whole network
            assert os.environ["WORLD_SIZE"] == "2"
            print(json.dumps(found))
        return
    print(f"{machine()}; 2 processes, MB of the second\n")
    columns = ["experts", "experts, gradients", "experts, moments", "others", "others, gradients", "others, moments"]
    print("| | " + " | ".join(columns) + " | peak resident | sent a step | planned |\n" + "|---" * 10 + "|")
    for way in WAYS:
        found = launched(way)
        cells = [f"{found[name] / 1e6:.2f}" for name in columns]
        cells += [f"{found['peak']:.0f}", f"{found['sent'] / 1e6:.2f}", f"{found['planned'] / 1e6:.2f}"]
        print(f"| {way} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
