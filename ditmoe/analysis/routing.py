"""Who serves what: a model's routing by layer, time step, class and position, counted, and in numbers.

Shapes: L layers with experts, B time bins, Y classes, n images of each, T tokens of an image, E experts, K of a token.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..config.sections import ObjectiveConfig
from ..data.sets import ImageSet
from ..generate.pictures import spread
from ..model import DiTMoETransformer2DModel, tokens_per_image
from ..moe import Routing
from ..objective import Objective

Array = NDArray[Any]

FORWARD = 128  # images in one forward pass of the count


def chosen_classes(data: ImageSet, most: int) -> list[int]:
    """At most so many classes that have images, evenly spaced; [0] of a set without labels."""
    present = [c for c in range(max(1, len(data.id2label))) if (data.labels == c).any()]
    return [present[k] for k in spread(len(present), most)]


def batch_a_class(data: ImageSet, classes: Sequence[int], n: int, seed: int) -> tuple[list[int], Tensor]:
    """Those of the classes that have images, and n of each, (Y, n, C, H, W), repeated where there are fewer."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(data.labels == c) for c in classes]
    rows = [data.readable(rng.permutation(m)[: 2 * n].tolist()) for m in members]
    kept = [(label, (r * n)[:n]) for label, r in zip(classes, rows, strict=True) if r]
    return [label for label, _ in kept], torch.stack([data.tensors(r) for _, r in kept])


@torch.no_grad()
def passes(
    net: DiTMoETransformer2DModel, config: ObjectiveConfig, x: Tensor, classes: Sequence[int], num_bins: int, seed: int
) -> Iterator[tuple[int, Tensor, list[Routing]]]:
    """Clean images pass through the network, noised to every time bin: (bin, images, a record a layer), a batch a time.

    Images are numbers in 0..Y n - 1. The arguments are those of `count_experts`.
    """
    (Y, n, *size), objective = x.shape, Objective(config)
    noise = torch.randn((Y, n, *size), generator=torch.Generator().manual_seed(seed))
    y = torch.arange(Y).repeat_interleave(n)
    labels = torch.tensor(classes)[y].to(net.device) if net.null_label is not None else None
    for b in range(num_bins):
        t = ((b + (torch.arange(n) + 0.5) / n) * (1000 / num_bins)).floor().clamp_min(1).repeat(Y)
        x_t, _ = objective.corrupt(x.flatten(0, 1), t, noise.flatten(0, 1))
        for rows in torch.arange(Y * n).split(FORWARD):
            some = None if labels is None else labels[rows.to(net.device)]
            yield b, rows, net(x_t[rows].to(net.device), t[rows].to(net.device), some, return_dict=False)[1]


def count_experts(
    net: DiTMoETransformer2DModel, config: ObjectiveConfig, x: Tensor, classes: Sequence[int], num_bins: int, seed: int
) -> Array:
    """Assignments of tokens to experts while clean images, noised to every time bin, pass through the network.

    Args:
        net: in eval mode; its routing must not depend on the batch.
        config: how x_t is made.
        x: (Y, n, C, H, W), n images of each class.
        classes: their labels, which the network is given if it was trained with labels.
        num_bins: B bins of the 0..1000 time axis; the n images of a class are spread over each bin.
        seed: of the noise.

    Returns:
        int64 (L, B, Y, T, E); every (l, b, y, t) sums to n * K.
    """
    (Y, n), T, total = x.shape[:2], tokens_per_image(net), list[Tensor]()
    y = torch.arange(Y).repeat_interleave(n)
    for b, rows, routing in passes(net, config, x, classes, num_bins, seed):
        for layer, record in enumerate(routing):
            served = record.served().cpu().expand(len(rows), T, -1)  # (rows, T, E)
            if layer == len(total):
                total.append(torch.zeros(num_bins, Y, *served.shape[1:], dtype=torch.int64))
            total[layer][b].index_add_(0, y[rows], served)
    return torch.stack(total).numpy()


def relative_load(counts: Array) -> Array:
    """Counts (..., E) as share / even share: 1 everywhere when the load is even; nan where nothing was counted."""
    with np.errstate(invalid="ignore"):
        load: Array = counts * counts.shape[-1] / counts.sum(axis=-1, keepdims=True)
    return load


def routing_summary(counts: Array) -> list[dict[str, float]]:
    """For each layer of counts (L, B, Y, T, E): how even the load is, and what the choice of expert depends on.

    `busiest` is the largest load over the even load, `idle` the number of experts that got nothing, and
    `bits_time`, `bits_class`, `bits_position` the mutual information between expert and time bin, class or position,
    in bits: 0 when the choice does not depend on it, at most log2 of the number of experts or of the bins.
    """
    rows = []
    for layer in counts:
        load = relative_load(layer.sum(axis=(0, 1, 2)))
        rows.append({
            "busiest": float(load.max()), "idle": int((load == 0).sum()),
            "bits_time": mutual_information(layer.sum(axis=(1, 2))),
            "bits_class": mutual_information(layer.sum(axis=(0, 2))),
            "bits_position": mutual_information(layer.sum(axis=(0, 1))),
        })  # fmt: skip
    return rows


def mutual_information(counts: Array) -> float:
    """Between the rows and columns of a table of counts, in bits: sum of p log2 p / (p_row p_column)."""
    p = counts / counts.sum()
    even = p.sum(axis=1, keepdims=True) * p.sum(axis=0, keepdims=True)
    seen = p > 0
    return max(0.0, float((p[seen] * np.log2(p[seen] / even[seen])).sum()))
