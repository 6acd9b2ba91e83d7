"""The held-out error of some models, with the same noise and times for all: a row each, and its ratio to the first.

    python -m benchmarks.held_out MODEL [MODEL ...] --num 5000

A MODEL is a run or a model folder. "feed-forward" is the share of the first model's width that a token has, on average.
"""

import argparse
from pathlib import Path

import torch

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
def held_out_mse(net: DiTMoETransformer2DModel, config: ObjectiveConfig, test: ImageSet, num: int) -> float:
    """Mean squared error of the first `num` held-out images, with the same noise and times for every model."""
    objective, total = Objective(config), 0.0
    for start in range(0, num, 250):
        rows = list(range(start, min(start + 250, num)))
        x = test.tensors(rows)
        draws = objective.draw(12345, rows, tuple(x.shape[1:]))
        x_t, target = objective.corrupt(x, draws.t, draws.noise)
        labels = None if net.null_label is None else torch.from_numpy(test.labels[rows])
        out = net(x_t, draws.t, labels).sample[:, : x.shape[1]]
        total += float((out - target).square().mean(dim=(1, 2, 3)).sum())
    return total / num


def width(net: DiTMoETransformer2DModel) -> float:
    """Hidden units of a token, a mean over blocks, where as many experts as the rule says serve it."""
    c = net.config
    served = c.shared_width + net.rule.active(c.num_experts) * c.expert_width
    routed = sum(has_experts(c.moe_blocks, i) for i in range(c.depth)) / c.depth
    return float(routed * served + (1 - routed) * c.ffn_width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--num", type=int, default=5000)
    args = parser.parse_args()
    print(f"{machine()}\n\n| model | feed-forward | held-out error | of the first |\n|---|---|---|---|")
    first: tuple[float, float] | None = None
    for folder in args.models:
        net, config = pipeline.load(folder).transformer.eval(), trained_by(folder)
        test = open_held_out(config.data, size=net.config.sample_size, channels=net.config.in_channels)
        assert test is not None, "the data set has no held-out images"
        now = width(net), held_out_mse(net, config.objective, test, min(args.num, len(test)))
        first = first or now
        print(f"| {folder} | {now[0] / first[0]:.0%} | {now[1]:.5f} | {now[1] / first[1]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
