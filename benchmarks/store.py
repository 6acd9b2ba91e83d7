"""Drawing with experts that stay on the disk: time, memory, and how often an expert was there.

    python -m benchmarks.store --preset s --num-experts 32 --top-k 2 --cached 1 8 16 32 --steps 10
    systemd-run --scope -p MemoryMax=6G python -m benchmarks.store --preset dit-moe-xl/2-8e2a --cached 2 --bf16

writes a model of random bfloat16 weights into `--out` unless it is there, and draws one image of it (DDIM, no guidance)
in a process of its own for each number of experts that have room. *Cold*: the system's cache of the files is dropped
first. After the first step: *there*, experts that were in memory when a layer asked for them; *in time*, or were being
read when their turn came. Room for 1 is loading on demand, for all the memory of a resident model.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from benchmarks.timing import machine
from ditmoe import pipeline
from ditmoe.config.experts import RouterInput
from ditmoe.config.presets import PRESETS
from ditmoe.model import build, count_parameters
from ditmoe.objective import scheduler_config
from ditmoe.pipeline import save
from ditmoe.store.experts import StoredExperts
from samplers import make_scheduler


def weights(net: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """Random tensors of a network on the meta device, one at a time, small enough that activations stay finite."""
    generator = torch.Generator().manual_seed(0)
    for name, value in net.state_dict().items():
        fan = value.shape[-1] if value.ndim > 1 else 1e4
        yield {name: (torch.randn(value.shape, generator=generator) * fan**-0.5).bfloat16()}


def write(args: argparse.Namespace) -> None:
    """The model folder."""
    config = PRESETS[args.preset]
    asked = {name: getattr(args, name) for name in ("num_experts", "top_k", "router_input") if getattr(args, name)}
    moe = replace(config.moe, **asked)
    config = replace(config, moe=moe)
    with torch.device("meta"):
        net = build(config, 1000)
    print("writing {:,} parameters, {:,} activated".format(*count_parameters(net)), flush=True)
    scheduler = make_scheduler("ddim", scheduler_config(config.objective))
    save(pipeline.DiTMoEPipeline(net, scheduler), args.out, weights(net))


def one(args: argparse.Namespace, cached: int) -> None:
    """Load, draw, print a row."""
    begun = time.perf_counter()
    pipe = pipeline.load(args.out, cached_experts=cached)
    loaded = time.perf_counter() - begun
    layers = [m for m in pipe.transformer.modules() if isinstance(m, StoredExperts)]
    ends: list[float] = []

    def after_step(*_: object) -> None:
        ends.append(time.perf_counter())
        if len(ends) == 1:  # when everything was read for the first time
            for layer in layers:
                layer.asked = layer.absent = layer.waited = 0

    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        pipe([1], sampler="ddim", num_inference_steps=args.steps, guidance_scale=1.0, output_type="latent",
             callback=after_step)  # fmt: skip
    asked, absent, waited = (sum(getattr(m, name) for m in layers) for name in ("asked", "absent", "waited"))
    room = sum(w.nbytes for m in layers for pair in m._room for w in pair) / 2**20
    peak = int(next(v for v in Path("/proc/self/status").read_text().splitlines() if v.startswith("VmHWM")).split()[1])
    seconds = (ends[-1] - ends[0]) / (args.steps - 1)
    print(
        f"| {cached} | {'cold' if args.cold else 'warm'} | {loaded:.0f} | {seconds:.2f} | {1 - absent / asked:.1%} "
        f"| {1 - waited / asked:.1%} | {room:.0f} | {peak / 2**10:.0f} |",
        flush=True,
    )


def drop(folder: Path) -> None:
    """Let the system forget what it has read of the files."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="s")
    parser.add_argument("--num-experts", type=int)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--router-input", choices=get_args(RouterInput), help="what chooses an image's experts")
    parser.add_argument("--cached", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/store"))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        return one(args, args.one)
    if not args.out.exists():
        write(args)
    print(machine())
    print("| room for | files | load s | step s | there | in time | experts' memory MB | process, peak MB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for cached in args.cached:
        if args.cold:
            drop(args.out)
        subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "benchmarks.store", *sys.argv[1:], "--one", str(cached)], check=True
        )
    return None


if __name__ == "__main__":
    main()
