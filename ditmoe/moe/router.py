"""The router: one logit for every token and expert, in float32 whatever the model's precision.

Shapes: N images, T tokens of an image, D width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Router(nn.Module):
    """Linear router, logits = z W^T, where z is the token, or the vector of its place in the image.

    W starts with variance 1 / D, logits of about 1 for a normalised token, and wants a learning rate of its own,
    D^-1/2 times that of the rest: Adam moves every weight by the same amount a step, and a router whose weights turn
    over in a few dozen steps hands tokens from expert to expert before any of them has learnt something.

    Args:
        hidden_size: Width D of a token.
        num_experts: Experts E.
        positions: (T, D) one vector a place, of about unit variance: the place decides, whatever the token shows, so
            that a place has the same experts in every image and at every noise level. None: the token decides.
        with_bias: Keep a balancing bias (see `losses.balanced_bias`) as the buffer `expert_bias`.
    """

    expert_bias: Tensor | None
    positions: Tensor | None

    def __init__(
        self, hidden_size: int, num_experts: int, *, positions: Tensor | None = None, with_bias: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("expert_bias", torch.zeros(num_experts) if with_bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / D."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, T, D), any float dtype -> logits (N, T, E) float32 (float64 stays float64).

        Raises:
            ValueError: Another number of tokens than there are positions.
        """
        if self.positions is not None and x.shape[1] != len(self.positions):
            raise ValueError(f"the router has positions for {len(self.positions)} tokens an image, got {x.shape[1]}")
        z = x if self.positions is None else self.positions
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(z.to(dtype), self.weight.to(dtype))
        return logits.expand(*x.shape[:2], -1)
