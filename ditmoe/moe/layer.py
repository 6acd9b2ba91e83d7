"""The mixture-of-experts layer: router, selection, experts, shared expert, and a record of what was decided.

Shapes: N images, T tokens of an image, S = N * T tokens laid flat, D width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor, nn

from .experts import Experts, FeedForward
from .kernels import autocast_dtype
from .router import Router
from .select import RoutingRule, select


class Routing(NamedTuple):
    """What one layer's router did with one batch. Losses, logs and pictures are functions of it.

    It has R rows, one a decision: R = S, every token, or R = T, every place, for all images alike.

    Attributes:
        logits: (R, E) float32.
        scores: (R, E) float32, softmax or sigmoid of the logits.
        expert_ids: (R, K) int64, best first.
        weights: (R, K) float32.
        counts: (E,) int64, assignments of each expert; they sum to S * K.
    """

    logits: Tensor
    scores: Tensor
    expert_ids: Tensor
    weights: Tensor
    counts: Tensor


class MoELayer(nn.Module):
    """y = sum_k w_k Expert_{i_k}(x) + Shared(x), for every token x.

    Args:
        hidden_size: Width D.
        num_experts: Routed experts E.
        expert_width: Hidden width of a routed expert.
        shared_width: Hidden width of the shared expert; 0 for none.
        rule: The routing rule.
        activation: Of all experts.
        positions: (T, D), lets a token's place decide instead of the token, see `Router`.
        with_bias: Keep a balancing bias in the router.
        backend: Expert kernels, see `Experts`.

    Raises:
        ValueError: More or fewer experts a token than there are.

    Source: DiT-MoE (arXiv 2407.11633) eq. 3-4; shared experts: DeepSeekMoE (arXiv 2401.06066).
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int,
        expert_width: int,
        shared_width: int,
        rule: RoutingRule,
        activation: Literal["swiglu", "gelu"] = "swiglu",
        positions: Tensor | None = None,
        with_bias: bool = False,
        backend: Literal["auto", "grouped", "loop"] = "auto",
    ) -> None:
        super().__init__()
        if not 1 <= rule.top_k <= num_experts:
            raise ValueError(f"top_k is {rule.top_k}; it must be between 1 and num_experts {num_experts}")
        self.rule = rule
        self.router = Router(hidden_size, num_experts, positions=positions, with_bias=with_bias)
        self.experts = Experts(hidden_size, num_experts, expert_width, activation, backend)
        self.shared = FeedForward(hidden_size, shared_width, activation) if shared_width else None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x (N, T, D) -> y (N, T, D) of x's dtype or autocast's, and the record. Changes no state."""
        if self.router.positions is not None:
            return self._by_place(x)
        N, T, D = x.shape
        logits = self.router(x).flatten(0, 1)  # (S, E)
        chosen = select(logits, self.rule, self.router.expert_bias)
        y = self.experts(x.reshape(N * T, 1, D), chosen.plan).view(N, T, D)
        return self._with_shared(x, y), Routing(logits, *chosen[:3], chosen.plan.counts)

    def _by_place(self, x: Tensor) -> tuple[Tensor, Routing]:
        """One plan for the T places of an image, carried out on all N images at once."""
        logits = self.router(x[:1]).squeeze(0)  # (T, E)
        chosen = select(logits, self.rule, self.router.expert_bias)
        dtype = autocast_dtype(x)
        rows = x.transpose(0, 1).to(dtype).contiguous()  # (T, N, D)
        if self.experts.joins(*chosen.expert_ids.shape):
            y = self.experts.joined(rows, chosen.expert_ids, chosen.weights)
        else:
            y = self.experts(rows, chosen.plan)
        y = self._with_shared(rows, y).transpose(0, 1)
        return y, Routing(logits, *chosen[:3], chosen.plan.counts * len(x))

    def _with_shared(self, x: Tensor, y: Tensor) -> Tensor:
        return y if self.shared is None else y + self.shared(x)
