"""The mixture-of-experts layer: router, selection, experts, shared expert, and a record of what was decided.

Shapes: N images, T tokens of an image, D width, E experts; n images and t tokens with a decision of their own, each
all of them or 1; R = n * t rows that share a decision, B = N T / R tokens of each; I inputs of the router.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .experts import Experts, FeedForward
from .kernels import autocast_dtype
from .router import Condition, Input, Kind, Router
from .select import Plan, RoutingRule, select


class Routing(NamedTuple):
    """What one layer's router did with one batch. Losses, logs and pictures are functions of it.

    Attributes:
        logits: (R, E) float32, a row a decision.
        scores: (R, E) float32, softmax or sigmoid of the logits, or they themselves.
        plan: Who serves whom: (row, expert) pairs.
        counts: (E,) int64, tokens of each expert: its pairs times B.
        images: n, images with decisions of their own: N, or 1 where all share them.
        prototypes: (E, I D) float32, of length 1, where the router has such.
        sums: (E, I D) float32, where it has: of each expert's rows the sum of what the router saw. Its direction is
            their mean's.
    """

    logits: Tensor
    scores: Tensor
    plan: Plan
    counts: Tensor
    images: int
    prototypes: Tensor | None = None
    sums: Tensor | None = None

    def served(self) -> Tensor:
        """(n, t, E) int64: 1 where an expert serves a row."""
        R, E = self.logits.shape
        cells = torch.bincount(self.plan.row * E + self.plan.expert, minlength=R * E)
        return cells.view(self.images, -1, E)


class MoELayer(nn.Module):
    """y = sum over its experts e of w_e Expert_e(x) + Shared(x), for every token x.

    Args:
        hidden_size: Width D.
        num_experts: Routed experts E.
        expert_width: Hidden width of a routed expert.
        shared_width: Hidden width of the shared expert; 0 for none.
        rule: The routing rule.
        activation: Of all experts.
        kind: The router's, see `Router`.
        inputs: What the router looks at, which decides who shares a decision, see `Router`.
        positions: (T, D), for the router's input "position".
        with_bias: Keep a balancing bias in the router.
        backend: Expert kernels, see `Experts`.
        cosine_scale: Of a prototype router; None: 1 where cosines are weights themselves (score "identity"), else the
            router's default.

    Raises:
        ValueError: More or fewer experts a token than there are.

    Source: DiT-MoE (arXiv 2407.11633) eq. 3-4; shared experts: DeepSeekMoE (arXiv 2401.06066).
    """

    def __init__(
        self, hidden_size: int, *, num_experts: int, expert_width: int, shared_width: int, rule: RoutingRule,
        activation: Literal["swiglu", "gelu"] = "swiglu", kind: Kind = "linear", inputs: Sequence[Input] = ("token",),
        positions: Tensor | None = None, with_bias: bool = False,
        backend: Literal["auto", "grouped", "loop"] = "auto", cosine_scale: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 1 <= rule.top_k <= num_experts:
            raise ValueError(f"top_k is {rule.top_k}; it must be between 1 and num_experts {num_experts}")
        self.rule = rule
        self.router = Router(
            hidden_size,
            num_experts,
            kind=kind,
            inputs=inputs,
            positions=positions,
            with_bias=with_bias,
            cosine_scale=1.0 if cosine_scale is None and rule.score == "identity" else cosine_scale,
        )
        active = max(1, round(rule.scale * expert_width)) if rule.renormalize else expert_width  # K F at scale K
        self.experts = Experts(hidden_size, num_experts, expert_width, activation, backend, active)
        self.shared = FeedForward(hidden_size, shared_width, activation) if shared_width else None

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Routing]:
        """x (N, T, D) -> y (N, T, D) of x's dtype or autocast's, and the record. Changes no state."""
        N, T, D = x.shape
        seen = self.router.seen(x, condition)
        logits, prototypes = self.router(seen)
        n, t, E = logits.shape
        logits = logits.view(n * t, E)
        scores, plan = select(logits, self.rule, self.router.expert_bias)
        images, places = N // n if n else 1, T // t  # that share a decision
        tokens = x.to(autocast_dtype(x)).view(n, images, t, places, D)
        rows = tokens.transpose(1, 2).reshape(n * t, images * places, D).contiguous()  # (R, B, D): a copy by place
        y = self.experts(rows, plan, alike=not self.router.per_image)
        if self.shared is not None:
            y = y + self.shared(rows)
        y = y.view(n, t, images, places, D).transpose(1, 2).reshape(N, T, D)
        sums = None if prototypes is None else _sums(seen, plan, (n, t, E))
        return y, Routing(logits, scores, plan, plan.counts * rows.shape[1], n, prototypes, sums)

    def without_routed(self, x: Tensor) -> Tensor:
        """Shared(x) alone, x (N, T, D) -> (N, T, D): zero where there is none. Neither router nor experts are run."""
        x = x.to(autocast_dtype(x))
        y: Tensor = torch.zeros_like(x) if self.shared is None else self.shared(x)
        return y


def _sums(seen: Sequence[Tensor], plan: Plan, shape: tuple[int, int, int]) -> Tensor:
    """Of each expert's rows, the sum of what the router saw (each (n or 1, t or 1, D)): (E, I D)."""
    n, t, E = shape
    chosen = seen[0].new_zeros(n * t, E)
    chosen[plan.row, plan.expert] = 1.0
    with torch.autocast(chosen.device.type, enabled=False):
        return torch.cat([torch.einsum("nte,ntd->ed", chosen.view(shape), z) for z in seen], dim=1)
