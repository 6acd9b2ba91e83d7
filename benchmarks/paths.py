"""Can the experts that an image passes tell what it shows? Logistic regression of attributes from paths (RAPHAEL).

    python -m benchmarks.paths MODEL [MODEL ...] --num 4000

The path of a held-out image is how many of its tokens each expert of each layer serves, at each of --bins noise levels.
Once its label is given to the network, as RAPHAEL's paths are chosen by the words of a prompt, and once not.
Attributes: the class, and whether the image is brighter than the median, which no label says. Fitted on one half of the
images, told of the other. Source: RAPHAEL (arXiv 2305.18295).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import machine
from ditmoe import pipeline
from ditmoe.analysis.routing import passes
from ditmoe.config.file import trained_by
from ditmoe.config.sections import ObjectiveConfig
from ditmoe.data.open import open_held_out
from ditmoe.model import DiTMoETransformer2DModel, tokens_per_image


@torch.no_grad()
def paths(
    net: DiTMoETransformer2DModel, objective: ObjectiveConfig, x: Tensor, labels: Sequence[int], bins: int
) -> Tensor:
    """Of images x (Y, n, C, H, W) with a label a row the share of tokens by bin, layer and expert: (Y n, bins L E)."""
    found: list[list[Tensor]] = [[] for _ in range(bins)]
    for b, rows, routing in passes(net, objective, x, labels, bins, 0):
        T = tokens_per_image(net)
        served = [record.served().expand(len(rows), T, -1).float().mean(dim=1) for record in routing]
        found[b].append(torch.cat(served, dim=1).cpu())
    return torch.cat([torch.cat(parts) for parts in found], dim=1)


def told(features: Tensor, answers: Tensor) -> float:
    """The share of the second half whose answer (N,) multinomial logistic regression on the first half gives."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    fit, test = order.chunk(2)
    z = features - features[fit].mean(dim=0)
    z = z / z[fit].std(dim=0).clamp_min(1e-3)
    linear = torch.nn.Linear(z.shape[1], int(answers.max()) + 1)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    solver = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = torch.nn.functional.cross_entropy(linear(z[fit]), answers[fit])
        value = value + 1e-3 * linear.weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return float((linear(z[test]).argmax(dim=1) == answers[test]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--num", type=int, default=4000, help="held-out images")
    parser.add_argument("--bins", type=int, default=4, help="noise levels, evenly over the times")
    args = parser.parse_args()
    print(f"{machine()}\n\n| model | class, label given | class, not given | brightness, given | not given |")
    print("|---|---|---|---|---|")
    for model in args.models:
        net, config = pipeline.load(model).transformer.eval(), trained_by(model)
        assert net.null_label is not None, f"{model} knows no classes"
        data = open_held_out(config.data, size=net.config.sample_size, channels=net.config.in_channels)
        assert data is not None, f"{model} has no held-out images"
        classes = sorted(data.id2label)
        n = min(args.num // len(classes), *(int((data.labels == c).sum()) for c in classes))
        rows = [np.flatnonzero(data.labels == c)[:n].tolist() for c in classes]
        x = torch.stack([data.tensors(some) for some in rows])
        light = x.flatten(0, 1).mean(dim=(1, 2, 3))
        answers = torch.arange(len(classes)).repeat_interleave(n), (light > light.median()).long()
        given = paths(net, config.objective, x, classes, args.bins)
        bare = paths(net, config.objective, x, [net.null_label] * len(classes), args.bins)
        shares = [told(features, answer) for answer in answers for features in (given, bare)]
        print(f"| {model} | {' | '.join(f'{share:.1%}' for share in shares)} |", flush=True)


if __name__ == "__main__":
    main()
