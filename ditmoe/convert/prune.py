"""Fewer experts: those that a measure of use, or chance, leaves in each layer.

Shapes: N images, L layers with experts, E experts, Z null experts behind them.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..analysis.tally import norms_of
from ..model import DiTMoETransformer2DModel
from .rebuild import per_expert, rebuilt, routed_layers, same_tau

Batches = Iterable[tuple[Tensor, Tensor, Tensor | None]]


class Usage(NamedTuple):
    """Of every layer's experts (L, E), float64: tokens that they serve, and sums over those of |w_e Expert_e(x)|."""

    load: Tensor
    contribution: Tensor


@torch.no_grad()
def usage(net: DiTMoETransformer2DModel, batches: Batches) -> Usage:
    """What the experts do for some noisy images: x_t (N, C, H, W), t (N,) on 0..1000, labels (N,) or None, a batch.

    `net` is in eval mode. ValueError where it has no experts of their own matrices, or there are no images.
    """
    layers, load = routed_layers(net, "prune"), torch.zeros((), dtype=torch.float64)
    with norms_of(layers) as norms:
        for x_t, t, y in batches:
            records = net(*(None if v is None else v.to(net.device) for v in (x_t, t, y)), return_dict=False)[1]
            load = load + torch.stack([r.counts[: net.config.num_experts].cpu().double() for r in records])
    if not load.any():
        raise ValueError("no image was given to measure experts by")
    return Usage(load, torch.stack([*map(torch.as_tensor, norms)]))


def by_chance(net: DiTMoETransformer2DModel, seed: int) -> Tensor:
    """(L, E) random numbers to prune by, for comparison."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(routed_layers(net, "prune")), net.config.num_experts, generator=generator)


def prune(net: DiTMoETransformer2DModel, keep: int, scores: Tensor) -> DiTMoETransformer2DModel:
    """The network with `keep` experts of every layer, those with the highest scores, in their order; `net` stays.

    Where all layers share one router they lose the same ones, those lowest in the sum of the layers' scores. Tokens
    still have K experts. Kept all, it is the same to the bit. By load pruning is little better than by chance where
    training has made loads even; contribution tells more.

    Args:
        net: With stacked experts.
        keep: Experts to keep of each layer, K or more.
        scores: (L, E): one of `Usage`, or `by_chance`.

    Raises:
        ValueError: The numbers do not fit, or experts are factorised, or in groups.

    Source: by use, and at random: DeepSpeed-MoE multitask (arXiv 2109.10465); by contribution: ours.
    """
    layers, c = routed_layers(net, "prune"), net.config
    check_keep(net, keep)
    assert scores.shape == (len(layers), c.num_experts), "a score an expert of each layer"
    assert bool(scores.isfinite().all()), "scores are numbers"
    if net.router is not None:
        scores = scores.sum(dim=0, keepdim=True).expand_as(scores)
    kept = [best.sort().values for best in scores.cpu().argsort(dim=1, descending=True, stable=True)[:, :keep]]
    nulls = torch.arange(c.num_experts, c.num_experts + c.null_experts)
    paths = [path for path, module in net.named_modules() if any(module is layer for layer in layers)]
    of = dict(zip(paths, kept, strict=True)) | {"router": kept[0]}
    weights = {}
    for name, value in per_expert(net).items():
        chosen = next(rows for path, rows in of.items() if name.startswith(f"{path}."))
        weights[name] = value[chosen if ".experts." in name else torch.cat([chosen, nulls])]
    return rebuilt(net, weights, {**same_tau(net), "num_experts": keep, "top_k": min(keep, c.top_k)})


def check_keep(net: DiTMoETransformer2DModel, keep: int) -> None:
    """ValueError unless so many experts can be kept of each layer: K or more, where a token has K."""
    routed_layers(net, "prune")
    c = net.config
    least = 1 if c.router_select in ("relative", "top_p", "threshold") else c.top_k
    if c.router_bias and c.router_select in ("relative", "top_p"):  # which hold K, in the training that follows
        least = 2 if c.router_select == "relative" else max(2, int((c.top_k - 1) / (c.router_tau or 0.5)) + 1)
    if not least <= keep <= c.num_experts:
        between = f"{least} to {c.num_experts}"
        raise ValueError(f"{keep} experts cannot be kept of {c.num_experts} with top_k {c.top_k}; give {between}")
    if c.router_groups > 1 and keep < c.num_experts:
        raise ValueError(
            f"the experts form {c.router_groups} groups (as --more makes), which pruning would make unequal"
        )
