"""The held-out error of some models, with the same noise and times for all: a row each, and its ratio to the first.

    python -m benchmarks.held_out MODEL [MODEL ...] --num 5000

A MODEL is a run or a model folder. "feed-forward" is the share of the first model's width that a token has, on average;
then the time of these layers, in turns.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import machine
from ditmoe import pipeline
from ditmoe.config.experts import has_experts
from ditmoe.config.file import trained_by
from ditmoe.config.sections import ObjectiveConfig
from ditmoe.data.open import open_held_out
from ditmoe.data.sets import ImageSet
from ditmoe.model import DiTMoETransformer2DModel
from ditmoe.objective import Objective


@torch.inference_mode()
def held_out_errors(net: Any, objective: ObjectiveConfig, data: ImageSet, num: int = 5000) -> Tensor:
    """Mean squared errors (num,) of held-out images (fewer ones again), with the same noise and times for all."""
    drawn, errors = Objective(objective), []
    for start in range(0, num, 250):
        numbers = list(range(start, min(start + 250, num)))
        rows = [number % len(data) for number in numbers]
        x = data.tensors(rows)
        draws = drawn.draw(12345, numbers, (x.shape[1], x.shape[2], x.shape[3]))
        x_t, target = drawn.corrupt(x, draws.t, draws.noise)
        labels = torch.from_numpy(data.labels[rows]) if data.id2label else None
        sample = net(x_t, draws.t, labels).sample[:, : x.shape[1]]
        errors.append((sample - target).square().mean(dim=(1, 2, 3)))
    return torch.cat(errors)


def width(net: DiTMoETransformer2DModel) -> float:
    """Hidden units of a token, a mean over blocks, where as many experts as the rule says serve it."""
    c = net.config
    served = c.shared_width + net.rule.active(c.num_experts) * c.expert_width
    routed = sum(has_experts(c.moe_blocks, i) for i in range(c.depth)) / c.depth
    return float(routed * served + (1 - routed) * c.ffn_width)


def feed_forward_seconds(nets: Sequence[DiTMoETransformer2DModel], test: ImageSet, rounds: int = 9) -> list[float]:
    """Of each network the time of a pass of 64 images in its feed-forward layers: medians, in turns."""
    x, t = test.tensors(range(64)), torch.linspace(0, 999, 64)
    labels = torch.from_numpy(test.labels[:64]) if test.id2label else None
    spent = [0.0] * len(nets)
    for number, net in enumerate(nets):

        def begin(*_: object, number: int = number) -> None:
            spent[number] -= time.perf_counter()

        def end(*_: object, number: int = number) -> None:
            spent[number] += time.perf_counter()

        for block in net.blocks:
            layer: Any = getattr(block, "moe", None) or block.mlp
            layer.register_forward_pre_hook(begin)
            layer.register_forward_hook(end)
    found: list[list[float]] = [[] for _ in nets]
    for _ in range(rounds):
        for number, net in enumerate(nets):
            spent[number] = 0.0
            net(x, t, labels)
            found[number].append(spent[number])
    return [median(values) for values in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--num", type=int, default=5000)
    args = parser.parse_args()
    print(f"{machine()}\n\n| model | feed-forward | held-out error | of the first |\n|---|---|---|---|")
    first: tuple[float, float] | None = None
    nets, test = [], None
    for folder in args.models:
        net, config = pipeline.load(folder).transformer.eval(), trained_by(folder)
        test = open_held_out(config.data, size=net.config.sample_size, channels=net.config.in_channels)
        assert test is not None, "the data set has no held-out images"
        now = width(net), float(held_out_errors(net, config.objective, test, min(args.num, len(test))).mean())
        first = first or now
        print(f"| {folder} | {now[0] / first[0]:.0%} | {now[1]:.5f} | {now[1] / first[1]:.4f} |", flush=True)
        nets.append(net)
    assert test is not None
    with torch.inference_mode():
        seconds = feed_forward_seconds(nets, test)
    print("\n| model | feed-forward, ms | of the first |\n|---|---|---|")
    for folder, value in zip(args.models, seconds, strict=True):
        print(f"| {folder} | {1e3 * value:.1f} | {value / seconds[0]:.2f} |")


if __name__ == "__main__":
    main()
