"""From router logits to a plan: which experts serve which row, and with what weight.

A row is what shares one decision: a token, or all tokens of a place, of an image, of a batch.

Shapes: R rows, E experts, P (row, expert) pairs; K experts of a row where all have as many, P = R * K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Score = Literal["softmax", "sigmoid", "identity"]


@dataclass(frozen=True)
class RoutingRule:
    """Token-choice top-K routing.

    Args:
        top_k: Experts that serve one row, K.
        score: How logits become scores: "softmax" over the experts, an independent "sigmoid" each, or "identity", not
            at all: for cosines, which are bounded.
        renormalize: Divide a row's K chosen scores by their sum.
        scale: Factor on the weights.

    Raises:
        ValueError: Renormalised logits, whose sum may be 0 or below.
    """

    top_k: int
    score: Score = "softmax"
    renormalize: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.score == "identity" and self.renormalize:
            raise ValueError("score identity cannot be renormalised: the sum of K logits may be 0 or below")


class Plan(NamedTuple):
    """The pairs that the experts have to compute, sorted by expert and then by row, and the way back to the rows.

    Attributes:
        row: (P,) int64, the pair's row.
        expert: (P,) int64, the pair's expert, ascending.
        weight: (P,) float32, the factor on the expert's output.
        counts: (E,) int64, pairs of each expert.
        slot: (P,) int64, where the pairs stand in the lists above, row after row: row r's are slot[starts[r]] up to the
            next row's first. A row may have any number of pairs, none too.
        starts: (R,) int64, where each row's begin in `slot`.
        per_row: Pairs of each row where all have as many, K; else None.
    """

    row: Tensor
    expert: Tensor
    weight: Tensor
    counts: Tensor
    slot: Tensor
    starts: Tensor
    per_row: int | None = None


def select(logits: Tensor, rule: RoutingRule, bias: Tensor | None = None) -> tuple[Tensor, Plan]:
    """Scores (R, E) float32, and the plan: the K experts of every row and their weights.

    w_k = scale * s_k / (sum_j s_j if renormalize else 1), with s = softmax(logits), sigmoid(logits) or the logits, and
    the K largest s + bias chosen. The bias moves the choice, never the weights.

    Args:
        logits: (R, E) float32.
        rule: The routing rule.
        bias: (E,) float32 added to the scores for the choice alone, or None.

    Source: DiT-MoE (arXiv 2407.11633) eq. 4: softmax, not renormalised; DeepSeek-V3 (arXiv 2412.19437) eq. 12-16:
    sigmoid, renormalised, scaled, with a bias; ProMoE (arXiv 2510.24711) Table 8: identity, of cosines.
    """
    R, E = logits.shape
    scores = logits
    if rule.score != "identity":
        scores = logits.softmax(dim=-1) if rule.score == "softmax" else logits.sigmoid()
    choice = scores.detach() if bias is None else scores.detach() + bias
    experts = choice.topk(rule.top_k, dim=-1).indices  # (R, K), best first
    weights = scores.gather(-1, experts)
    if rule.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    if rule.scale != 1.0:
        weights = weights * rule.scale
    starts = torch.arange(0, R * rule.top_k, rule.top_k, device=logits.device)
    return scores, plan_of(experts.flatten(), weights.flatten(), starts, E, rule.top_k)


def plan_of(expert: Tensor, weight: Tensor, starts: Tensor, num_experts: int, per_row: int | None = None) -> Plan:
    """The plan of pairs that are given row after row.

    Args:
        expert: (P,) int64, weight: (P,) float32, of the pairs.
        starts: (R,) int64, ascending: where each row's pairs begin.
        num_experts: Experts E.
        per_row: K, where every row has K pairs.
    """
    expert, order = expert.sort(stable=True)  # (P,)
    slot = torch.empty_like(order)
    slot[order] = torch.arange(len(order), device=order.device)
    row = order // per_row if per_row else torch.searchsorted(starts, order, right=True) - 1
    # The ends of each expert's run instead of bincount: static shapes, no host synchronisation on a GPU.
    bounds = torch.searchsorted(expert, torch.arange(num_experts + 1, device=expert.device))
    return Plan(row, expert, weight[order], bounds.diff(), slot, starts, per_row)
