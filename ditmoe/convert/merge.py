"""Two models as one: the experts of both, and the mean of all else."""

from __future__ import annotations

import torch

from ..model import DiTMoETransformer2DModel
from .rebuild import per_expert, rebuilt, routed_layers, same_tau

_OWN = {"num_experts", "backend", "other_sizes"}  # settings in which the two may differ


def merge(a: DiTMoETransformer2DModel, b: DiTMoETransformer2DModel) -> DiTMoETransformer2DModel:
    """A network with a's experts and then b's in every layer, their routers' rows too; neither is changed.

    All else is the mean of both, which means something where both went on from one model (or is the same where their
    trunks are): train it on. Where the trunks are equal and b's experts are never chosen, it computes what a does.

    Raises:
        ValueError: The two are networks of different settings or trunks, or have no experts, or these are factorised,
            in groups, or beside null experts.

    Source: aggregation of experts: DeepSpeed-MoE multitask (arXiv 2109.10465).
    """
    for net in (a, b):
        routed_layers(net, "merge")
    named = sorted(name for name in a.config.keys() - _OWN if not name.startswith("_"))
    other = [f"{name} is {a.config[name]} and {b.config[name]}" for name in named if a.config[name] != b.config[name]]
    if other:
        raise ValueError(f"the two models cannot be merged, for their networks differ: {'; '.join(other[:5])}")
    for name, usual in (("router_groups", 1), ("null_experts", 0)):
        if a.config[name] != usual:
            raise ValueError(f"models with {name} {a.config[name]} cannot be merged: choices beside experts would mix")
    ours, theirs, theirs_each = per_expert(a), b.state_dict(), per_expert(b)
    weights = {name: torch.cat([value, theirs_each[name].to(value.device)]) for name, value in ours.items()}
    for name, value in a.state_dict().items():
        if name not in ours:
            weights[name] = torch.lerp(value, theirs[name].to(value.device), 0.5)
    return rebuilt(a, weights, {**same_tau(a), "num_experts": a.config.num_experts + b.config.num_experts})
