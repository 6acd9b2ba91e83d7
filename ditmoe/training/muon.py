"""Muon: momentum whose matrices are made orthogonal before they move the weights; AdamW for everything else.

A weight W moves by -lr * 0.2 sqrt(max(out, in)) * O(u), with m <- beta m + (1 - beta) g, u = beta m + (1 - beta) g
(Nesterov), and O(u) about the nearest orthogonal matrix, by five Newton-Schulz steps. The factor gives the update the
root mean square that AdamW's has, so that AdamW's learning rate carries over. Source: Jordan et al. 2024
(kellerjordan.github.io/posts/muon); Liu et al. 2025, "Muon is scalable for LLM training" (arXiv 2502.16982) eq. 4.

Shapes: a weight holds M matrices of (out, in): stacked experts E, gate and up two, query, key and value three.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..model.blocks import DiTBlock
from ..model.layers import Attention
from ..moe import AttentionExperts, Experts, FeedForward

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: singular values of 0.01 to 1 end in 0.68 to 1.13
MOMENTUM = 0.95


class Muon(torch.optim.AdamW):
    """AdamW, in which the groups that have `parts` are moved by Muon.

    Args:
        groups: Parameter groups as AdamW's; `parts` of one says of how many matrices, stacked in its rows, each of its
            weights (or of each of the E matrices of a three-dimensional one) is made up.
        lr, weight_decay: Of both, where a group has none of its own.
        betas: AdamW's.
        dtype: Of the products that make momentum orthogonal: bfloat16 where the run multiplies in it.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__(groups, lr, betas, weight_decay=weight_decay, fused=True)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every weight that has a gradient."""
        assert closure is None
        groups = self.param_groups
        self.param_groups = [group for group in groups if "parts" not in group]
        try:
            super().step()
        finally:
            self.param_groups = groups
        self._orthogonal([group for group in groups if "parts" in group])

    def _orthogonal(self, groups: list[dict[str, Any]]) -> None:
        """The step of Muon's weights; those with matrices of one shape and device are worked on together."""
        shapes: dict[Any, list[tuple[Tensor, Tensor, Tensor, dict[str, Any]]]] = defaultdict(list)
        for group in groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(p)
                state["step"] += 1  # AdamW asks for it where it takes a state up
                momentum: Tensor = state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
                shape = (p.shape[-2] // group["parts"], p.shape[-1])
                shapes[shape, p.device].append((p, p.grad, momentum, group))
        for (shape, _), found in shapes.items():
            us = [grad.lerp(momentum, MOMENTUM).view(-1, *shape) for _, grad, momentum, _ in found]
            moves = orthogonal(torch.cat(us), self.dtype).split([len(u) for u in us])
            for (p, _, _, group), move in zip(found, moves, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(move.reshape(p.shape), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonal(u: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(M, out, in) -> about U V^T of each matrix U S V^T, float32, by products in `dtype`."""
    a, b, c = COEFFICIENTS
    x = u.float()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).float()


def matrices(model: nn.Module, *, experts: bool) -> dict[str, int]:
    """Names of the weights that Muon moves, and of how many matrices, stacked in its rows, each is made up.

    Those of attention (of its experts too, which are never split), of long skips, and of dense and shared feed-forward
    layers, with `experts` of routed experts too. Embeddings, adaLN, routers, the final layer, convolutions, norms and
    biases are AdamW's.
    """
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            dense = module.maps is None
            found |= {f"{name}.qkv.weight": 3, f"{name}.proj.weight": 1} if dense else {f"{name}.qk.weight": 2}
        elif isinstance(module, AttentionExperts):
            found |= {f"{name}.w_v": 1, f"{name}.w_o": 1}
        elif isinstance(module, DiTBlock) and module.skip is not None:
            found[f"{name}.skip.weight"] = 1
        elif isinstance(module, FeedForward):
            found |= {f"{name}.fc1.weight": 2 if module.activation == "swiglu" else 1, f"{name}.fc2.weight": 1}
        elif isinstance(module, Experts) and experts:
            found |= {f"{name}.w_in": 2 if module.activation == "swiglu" else 1, f"{name}.w_out": 1}
    return found


def work(model: nn.Module, *, experts: bool) -> tuple[int, int, int]:
    """What Muon has to do in one step: how many weights it moves, in how many matrices, with how many operations.

    Operations are floating-point ones of products (a multiply-add is two): 5 (4 s^2 l + 2 s^3) of a matrix of s by l,
    s <= l. `model` may be on "meta".
    """
    weights, count, operations = 0, 0, 0
    for name, parts in matrices(model, experts=experts).items():
        p = model.get_parameter(name)
        short, long = sorted((p.shape[-2] // parts, p.shape[-1]))
        many = p.numel() // (short * long)
        weights, count = weights + p.numel(), count + many
        operations += many * STEPS * (4 * short**2 * long + 2 * short**3)
    return weights, count, operations
