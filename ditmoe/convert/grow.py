"""More experts: those of two models in one, or twins, which compute the same until they are trained, at the same cost.

Shapes: E experts.
"""

import torch

from ..model import DiTMoETransformer2DModel
from .rebuild import per_expert, rebuilt, routed_layers, same_tau

_OWN = {"num_experts", "backend", "other_sizes"}  # settings in which the two may differ
HAIR = 1e-5  # by which twins' rows in the router differ, of the rows' own size


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
    doubled, theirs, weights = per_expert(a), b.state_dict(), {}
    halved = a.config.router_score in ("softmax", "entmax")  # scores of twice as many: biases weigh as much as before
    for name, value in a.state_dict().items():
        other = theirs[name].to(value.device)
        weights[name] = torch.cat([value, other]) if name in doubled else torch.lerp(value, other, 0.5)
        if halved and name.endswith("expert_bias"):
            weights[name] = weights[name] / 2
    return rebuilt(a, weights, {**same_tau(a), "num_experts": a.config.num_experts + b.config.num_experts})


def more(net: DiTMoETransformer2DModel, seed: int = 0) -> DiTMoETransformer2DModel:
    """The network with 2 E experts, the old ones and twins of them; `net` stays. The same function to about `HAIR`.

    Twins are a group of their own, and a token sees the better of the two groups (`RoutingRule.groups`): so it has the
    K experts that it had, as old ones or as twins, never one of each, at the cost that it had. Which of the groups
    depends on a random difference of the rows, relatively `HAIR`, too small to change weights and enough to send about
    every other token to the twins, who from then on learn of other tokens. (Without groups a token's K best would be
    both twins of K / 2 experts; K would have to be doubled, and the cost with it.)

    Raises:
        ValueError: The network has no experts, or they are factorised, in groups, or not chosen by topk, or beside null
            experts, or its scores are of all experts together and not renormalised.
    """
    routed_layers(net, "double")
    c = net.config
    for name, usual in (("router_select", "topk"), ("router_groups", 1), ("null_experts", 0)):
        if c[name] != usual:
            why = "twins are a second group of experts of select topk"
            raise ValueError(f"{why}, and the model has {name} {c[name]} ({usual} is needed): it cannot be doubled")
    if c.router_score in ("softmax", "entmax") and not c.router_renormalize and c.router_weights == "scores":
        raise ValueError(f"twins would halve the weights of router_score {c.router_score}, which is not renormalised")
    if c.router_overflow != "none":
        raise ValueError(f"twins have room of their own under router_overflow {c.router_overflow}; leave it out")
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, value in per_expert(net).items():
        twin = value
        if name.endswith("router.weight"):
            noise = torch.randn(value.shape, generator=generator).to(value)
            twin = value + HAIR * value.square().mean().sqrt() * noise
        weights[name] = torch.cat([value, twin])
    return rebuilt(net, weights, {"num_experts": 2 * c.num_experts, "router_groups": 2, "router_top_groups": 1})
