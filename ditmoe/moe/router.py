"""The router: one logit for every token and expert, in float32 whatever the model's precision.

Shapes: S tokens laid flat, D width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Router(nn.Module):
    """Linear router, logits = x W^T.

    W starts with variance 1 / D, logits of about 1 for a normalised token, and wants a learning rate of its own,
    D^-1/2 times that of the rest: Adam moves every weight by the same amount a step, and a router whose weights turn
    over in a few dozen steps hands tokens from expert to expert before any of them has learnt something.

    Args:
        hidden_size: Width D of a token.
        num_experts: Experts E.
        with_bias: Keep a balancing bias (see `losses.balanced_bias`) as the buffer `expert_bias`.
    """

    expert_bias: Tensor | None

    def __init__(self, hidden_size: int, num_experts: int, *, with_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("expert_bias", torch.zeros(num_experts) if with_bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / D."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x (S, D), any float dtype -> logits (S, E) float32 (float64 stays float64)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))
