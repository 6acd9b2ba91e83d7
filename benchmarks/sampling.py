"""Images a second: the plain path, bfloat16, compiled, a cache between steps, the dense twin, diffusers' DiTPipeline.

    python -m benchmarks.sampling [fashion | s] --rounds 5 --threads 1

One run, in turns; images a second are medians, ratios the medians of each round's. `plain` is what `sample.py` did
before it had the options: float32, nothing compiled or kept. `fashion` is models/fashion without its guide, `s` the
preset with random weights and 256 tokens; the twin, which a row is compared with as compiled as it is itself, and
diffusers' DiT are random too, the latter of our heads and patches, and of our width and depth, or of as many parameters
as are active in ours, or as ours has, or of as many operations as the twin, which has ours. All draw with DDIM and
guidance over all steps. The differences are of pixels, 0 to 255, from the plain path's. `--cpu-time` counts processor
seconds, of one thread, where others use the machine.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rival_models import _dit_shapes
from benchmarks.timing import interval, machine, turns
from ditmoe import pipeline
from ditmoe.config.presets import PRESETS
from ditmoe.config.sample import SampleArgs
from ditmoe.config.sections import Config
from ditmoe.generate.draw import Pixels, RequestedSet, balanced_labels
from ditmoe.generate.speed import batch_size, prepare
from ditmoe.model import build, count_parameters
from ditmoe.pipeline import DiTMoEPipeline

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"precision": "bf16"},
    "compiled": {"compile": True},
    "compiled, bf16": {"precision": "bf16", "compile": True},
    "cached": {"cache": "taylor:2"},
    "compiled and cached": {"compile": True, "cache": "taylor:2"},
    "compiled, cached by 3": {"compile": True, "cache": "taylor:3"},
    "dense twin": {},
    "dense twin, bf16": {"precision": "bf16"},
    "dense twin, compiled": {"compile": True},
    "dense twin, compiled, bf16": {"precision": "bf16", "compile": True},
}


def random_pipe(config: Config, dense: bool) -> DiTMoEPipeline:
    """With random weights everywhere, where a new network has gates and outputs of zero."""
    config = replace(config, moe=replace(config.moe, blocks="none")) if dense else config
    classes = config.model.num_classes or 10
    torch.manual_seed(0)
    net = build(config, classes)
    for weight in net.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    return pipeline.assemble(net.eval(), config, {i: str(i) for i in range(classes)})


WIDTH, OPERATIONS = "DiTPipeline", "DiTPipeline, operations"
RIVALS = (WIDTH, "DiTPipeline, active parameters", "DiTPipeline, all parameters", OPERATIONS)


class Identity(torch.nn.Module):
    """Stands where DiTPipeline has a VAE."""

    config, device, dtype = SimpleNamespace(scaling_factor=1.0), torch.device("cpu"), torch.float32

    def decode(self, x: torch.Tensor) -> Any:
        """x itself."""
        return SimpleNamespace(sample=x)


def operations(net: torch.nn.Module, config: Config) -> int:
    """Floating-point operations of a pass of one image; a product and a sum are two."""
    x = torch.zeros(1, config.model.in_channels, config.model.sample_size, config.model.sample_size)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        net(x, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    return int(counted.get_total_flops())


def stock(config: Config, name: str, active: int, total: int) -> DiTPipeline:
    """Diffusers' own, of our heads and patches: of our width and depth, or nearest to so many parameters or operations.

    Parameters are counted on the meta device, operations on the CPU.
    """
    model = config.model

    def make(depth: int, head: int) -> DiTTransformer2DModel:
        return DiTTransformer2DModel(
            num_attention_heads=model.num_heads, attention_head_dim=head, in_channels=model.in_channels,
            out_channels=model.in_channels, num_layers=depth, sample_size=model.sample_size,
            patch_size=model.patch_size, num_embeds_ada_norm=1000,
        ).eval()  # fmt: skip

    def parameters(shape: tuple[int, ...]) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in make(*shape).parameters())

    target = active if "active" in name else total
    shapes = list(_dit_shapes(model, target))
    if name == WIDTH:
        shape: tuple[int, ...] = model.depth, model.hidden_size // model.num_heads
    elif name == OPERATIONS:
        twin = operations(random_pipe(config, dense=True).transformer, config)
        shape = min(shapes, key=lambda each: abs(operations(make(*each), config) - twin))
    else:
        shape = min(shapes, key=lambda each: abs(parameters(each) - target))
    net = make(*shape)
    size = f"depth {shape[0]}, head {shape[1]}, {parameters(shape) / 1e6:.1f} M parameters"
    print(f"{name}: {size}, {operations(net, config) / 1e6:.0f} M operations an image")
    pipe = DiTPipeline(net, Identity(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def share(rival: list[float], took: list[float]) -> str:
    """The rival's time over that taken, the median of the rounds, in each of which a machine is as fast for both.

    In brackets where that median is, 19 times in 20.
    """
    ratios = [theirs / ours for theirs, ours in zip(rival, took, strict=True)]
    low, high = interval(ratios)
    return f"{median(ratios):.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", choices=["fashion", "s"], default="fashion")
    parser.add_argument("--num", type=int, help="images of a turn, one batch; default: what sample.py draws at once")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--only", nargs="+", choices=[*WAYS, *RIVALS], default=[*WAYS, *RIVALS])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = PRESETS[args.preset]
    own = pipeline.load(Path("models/fashion")) if args.preset == "fashion" else random_pipe(config, dense=False)
    num = args.num or batch_size(own)
    options = {"sampler": "ddim", "num_inference_steps": args.steps, "guidance_scale": args.cfg, "seed": 0}
    options |= {"guide": "none", "guidance_interval": (0, 1000)}
    ways: dict[str, Callable[[], object]] = {}
    drawn: dict[str, Pixels] = {}

    def turn(name: str, images: RequestedSet) -> Callable[[], None]:
        def draw() -> None:
            drawn[name] = images.batch(range(num))

        return draw

    for name in [name for name in args.only if name in WAYS]:
        pipe = random_pipe(config, dense=True) if "dense" in name else own
        pipe = DiTMoEPipeline(copy.deepcopy(pipe.transformer), pipe.scheduler, id2label=pipe.config.id2label)
        prepare(pipe, None, replace(SampleArgs(Path("models/fashion"), precision="fp32"), **WAYS[name]))
        ways[name] = turn(name, RequestedSet(pipe, balanced_labels(pipe, num), num, options))
    total, active = count_parameters(own.transformer)
    labels = [i % 10 for i in range(num)]
    how = {"num_inference_steps": args.steps, "output_type": "np"}
    for name in [name for name in args.only if name in RIVALS]:
        ways[name] = partial(stock(config, name, active, total), labels, args.cfg, **how)
    clock = time.process_time if args.cpu_time else time.perf_counter
    seconds = turns(ways, args.rounds, clock)
    words = f"{num} images, {args.steps} steps of ddim, guidance {args.cfg}, median of {args.rounds}"
    print(f"{args.preset}: {words}{', processor time' if args.cpu_time else ''}; {machine()}\n")
    columns = "images/s", "of plain", "of the dense twin alike", "of DiTPipeline", "active", "all", "operations"
    print(f"| | {' | '.join(columns)} | differs by | at most |")
    print("|---" * 10 + "|")
    for name, took in seconds.items():
        alike = next((twin for twin in WAYS if "dense" in twin and WAYS[twin] == WAYS.get(name)), "dense twin")
        rivals = ("plain", alike, *RIVALS)
        shares = [share(seconds[rival], took) if rival in seconds else "" for rival in rivals]
        far = ["", ""]
        if name in WAYS and "dense" not in name and "plain" in drawn:
            difference = np.abs(drawn[name].astype(int) - drawn["plain"])
            far = [f"{difference.mean():.2f}", f"{difference.max()}"]
        print(f"| {name} | {num / median(took):.3g} | " + " | ".join([*shares, *far]) + " |", flush=True)


if __name__ == "__main__":
    main()
