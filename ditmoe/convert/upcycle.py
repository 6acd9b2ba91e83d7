"""A dense model as one with experts, which computes the same until it is trained.

Shapes: D width, E experts, K of a token, F hidden units of an expert, H of a dense layer.
"""

from typing import Literal

import torch
from torch import Tensor

from ..config.experts import RouterInput
from ..model import DiTMoETransformer2DModel
from ..moe import FeedForward
from .rebuild import dense_layers, with_experts


def upcycle(
    net: DiTMoETransformer2DModel, num_experts: int, top_k: int, *, blocks: Literal["all", "every-second"] = "all",
    copies: bool = False, router_input: RouterInput = "token", seed: int = 0,
) -> DiTMoETransformer2DModel:  # fmt: skip
    """The dense network with experts in its blocks. The same function, up to the order of sums; `net` stays.

    Slices: the H hidden units of a dense layer are those of K experts, of F = H / (K + 1) units each, rounded down to a
    multiple of 8 where it can be, and of a shared one, so a token costs what it did but for the router. There are E / K
    such sets of K experts, each another random cut of the units, and experts of a set have the same row in the router:
    the K best are a whole set, with weights of 1 (scale K, renormalised). Experts differ from the start, and gradients
    part the rows at the first step. The shared expert has the units with the largest |first row| |second column|.

    Copies: every expert is the whole layer, whose K renormalised weights sum to 1; it costs K times as much. They
    differ by the tokens that a random router sends them, and only once trained.

    Args:
        net: Without experts. With gelu, experts have biases, and the shared one the output's (of copies it is silent).
        num_experts: E, for slices a multiple of K.
        top_k: K, 2 or more: a single renormalised weight is 1, and a router would not learn of it.
        blocks: Which get experts.
        copies: Copies instead of slices.
        router_input: What routers look at.
        seed: Of cuts and routers.

    Raises:
        ValueError: The network has experts, or the numbers do not fit.

    Source: Sparse upcycling (arXiv 2212.05055) for copies; slices with equal rows as in the virtual groups of He et al.
    (arXiv 2410.07524), with other cuts for every set, and a shared expert.
    """
    layers, E, K = dense_layers(net, blocks), num_experts, top_k
    if not 2 <= K <= E:
        raise ValueError(f"top_k is {K}; to upcycle to {E} experts it must be between 2 and {E}")
    H = int(net.config.ffn_width)
    always = 0 if copies else H - K * _width(H, E, K)
    generator, cuts, routers = torch.Generator().manual_seed(seed), [], {}
    wide = len(router_input.split("+")) * int(net.config.hidden_size)
    for name, layer in layers.items():
        order = _by_size(layer)
        units = torch.arange(H).expand(E, H) if copies else _cuts(order[always:], E, K, generator)
        rows = torch.randn(E if copies else E // K, wide, generator=generator) * wide**-0.5
        routers[f"{name}.moe.router.weight"] = rows if copies else rows.repeat_interleave(K, dim=0)
        cuts.append((units, order[:always]))
    settings = {
        "top_k": K, "router_input": router_input, "router_bias": False, "router_renormalize": True,
        "router_scale": 1.0 if copies else float(K),
    }  # fmt: skip
    return with_experts(net, blocks, cuts, routers, settings)


def _width(H: int, E: int, K: int) -> int:
    """F of slices."""
    if E % K:
        raise ValueError(f"num_experts is {E}; slices of a dense layer come in sets of top_k {K}, so give a multiple")
    F = H // (K + 1)
    if F < 1:
        raise ValueError(f"ffn_width {H} is too small to be cut into top_k {K} experts and a shared one")
    return F - (F % 8 if F > 8 else 0)


def _by_size(layer: FeedForward) -> Tensor:
    """The hidden units (H,), those first that matter most by the sizes of their weights."""
    H = layer.fc2.weight.shape[1]
    rows: Tensor = layer.fc1.weight.detach().view(-1, H, layer.fc1.weight.shape[1]).norm(dim=(0, 2))
    sizes: Tensor = rows * layer.fc2.weight.detach().norm(dim=0)
    return sizes.argsort(descending=True, stable=True).cpu()


def _cuts(units: Tensor, E: int, K: int, generator: torch.Generator) -> Tensor:
    """(E, F): E / K random cuts of the units (K F,) into K parts."""
    orders = [units[torch.randperm(len(units), generator=generator)] for _ in range(E // K)]
    return torch.cat(orders).view(E, -1)
