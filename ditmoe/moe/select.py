"""From router logits to a plan: which experts serve which token, and with what weight.

Shapes: S tokens laid flat, E experts, K experts per token, P = S * K (token, expert) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingRule:
    """Token-choice top-K routing.

    Args:
        top_k: Experts that serve one token, K.
        score: How logits become scores: "softmax" over the experts, or an independent "sigmoid" each.
        renormalize: Divide a token's K chosen scores by their sum.
        scale: Factor on the weights.
    """

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = False
    scale: float = 1.0


class Plan(NamedTuple):
    """The pairs that the experts have to compute, sorted by expert and then by token.

    Attributes:
        token: (P,) int64, the pair's token.
        expert: (P,) int64, the pair's expert, ascending.
        weight: (P,) float32, the factor on the expert's output.
        counts: (E,) int64, pairs of each expert.
        slot: (S, K) int64, where a token's K pairs stand in the lists above: the inverse of `token`.
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    counts: Tensor
    slot: Tensor


class Selection(NamedTuple):
    """What `select` decided, token by token, and the plan that carries it out.

    Attributes:
        scores: (S, E) float32.
        expert_ids: (S, K) int64, best first.
        weights: (S, K) float32.
        plan: The same pairs, sorted by expert.
    """

    scores: Tensor
    expert_ids: Tensor
    weights: Tensor
    plan: Plan


def select(logits: Tensor, rule: RoutingRule, bias: Tensor | None = None) -> Selection:
    """The K experts of every token and their weights.

    w_k = scale * s_k / (sum_j s_j if renormalize else 1), with s = softmax(logits) or sigmoid(logits) and the K
    largest s + bias chosen. The bias moves the choice, never the weights.

    Args:
        logits: (S, E) float32.
        rule: The routing rule.
        bias: (E,) float32 added to the scores for the choice alone, or None.

    Source: DiT-MoE (arXiv 2407.11633) eq. 4: softmax, not renormalised; DeepSeek-V3 (arXiv 2412.19437) eq. 12-16:
    sigmoid, renormalised, scaled, with a bias.
    """
    scores = logits.softmax(dim=-1) if rule.score == "softmax" else logits.sigmoid()
    choice = scores.detach() if bias is None else scores.detach() + bias
    expert_ids = choice.topk(rule.top_k, dim=-1).indices  # (S, K)
    weights = scores.gather(-1, expert_ids)
    if rule.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-20)
    if rule.scale != 1.0:
        weights = weights * rule.scale
    return Selection(scores, expert_ids, weights, _sort_by_expert(expert_ids, weights, logits.shape[-1]))


def _sort_by_expert(expert_ids: Tensor, weights: Tensor, num_experts: int) -> Plan:
    S, K = expert_ids.shape
    expert, order = expert_ids.flatten().sort(stable=True)  # (P,)
    slot = torch.empty_like(order)
    slot[order] = torch.arange(S * K, device=order.device)
    # The ends of each expert's run instead of bincount: static shapes, no host synchronisation on a GPU.
    bounds = torch.searchsorted(expert, torch.arange(num_experts + 1, device=expert.device))
    return Plan(
        token=order // K,
        expert=expert,
        weight=weights.flatten()[order],
        counts=bounds.diff(),
        slot=slot.view(S, K),
    )
