"""From router logits to a plan: which experts serve which row, and with what weight.

A row is what shares one decision: a token, or all tokens of a place, of an image, of a batch.

Shapes: R rows, n images with t rows each; E experts and Z null experts behind them; P (row, expert) pairs; K experts of
a row where all have as many, P = R * K; C rows that an expert takes of one image.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..config.rule import RouterScore, RoutingRule
from .noise import uniform


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

    @property
    def unserved(self) -> Tensor:
        """Share of the rows that have no pair, a float32 scalar."""
        ends = torch.cat([self.starts[1:], self.starts.new_tensor([len(self.row)])])
        return (ends == self.starts).float().mean()


class Selection(NamedTuple):
    """What became of logits.

    Attributes:
        scores: (R, E + Z) float32.
        plan: Who serves whom; None where all experts serve all rows by their scores, which no list of pairs need say.
        counts: (E + Z,) int64, rows that chose each, those included that overflow and null experts leave unserved.
    """

    scores: Tensor
    plan: Plan | None
    counts: Tensor


class _Entmax(torch.autograd.Function):
    """1.5-entmax over the last dimension: p = max(z / 2 - tau, 0)^2 with tau such that sum p = 1, found by sorting.

    For every size k of the support tau_k = m - ((1 / k) - v)^1/2, with the mean m and the variance v of the k largest
    z / 2; the largest k whose smallest is above tau_k is right. Source: Peters et al. 2019 (arXiv 1905.05702), alg. 2.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        half = (logits - logits.amax(dim=-1, keepdim=True)) / 2
        best = half.sort(dim=-1, descending=True).values
        k = torch.arange(1, best.shape[-1] + 1, device=best.device, dtype=best.dtype)
        mean = best.cumsum(dim=-1) / k
        variance = best.square().cumsum(dim=-1) / k - mean.square()
        tau = mean - (1 / k - variance).clamp_min(0).sqrt()
        size = (tau <= best).sum(dim=-1, keepdim=True)
        p = (half - tau.gather(-1, size - 1)).clamp_min(0).square()
        ctx.save_for_backward(p)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        root: Tensor = p.sqrt()
        mean = (grad * root).sum(dim=-1, keepdim=True) / root.sum(dim=-1, keepdim=True)
        return (grad - mean) * root


def entmax(logits: Tensor) -> Tensor:
    """(..., E) -> 1.5-entmax over the last dimension: sums to 1, and is exactly 0 for logits far below the largest."""
    p: Tensor = _Entmax.apply(logits)
    return p


def select(
    logits: Tensor, rule: RoutingRule, bias: Tensor | None = None, *, images: int = 1, keys: Tensor | None = None,
    tau: Tensor | None = None, capacity: float | None = None, policy: Tensor | None = None,
) -> Selection:  # fmt: skip
    """Scores and plan: the experts of every row and their weights.

    w_e = scale * s_e / (sum of the row's chosen s if renormalize else 1), with s = softmax, 1.5-entmax or sigmoid of
    the logits, or they themselves, or 1 (`weights` one); of dense of logits made mean 0, variance 1 (muMoE's released
    code). The bias moves the choice, never the weights.

    Args:
        logits: (R, E + Z) float32, the t rows of each image one after the other.
        rule: The routing rule.
        bias: (E + Z,) float32 added to the scores for the choice alone, or None.
        images: n. What compares rows does so inside one of them.
        keys: (n,) int64, what the random overflow of an image depends on.
        tau: (R, 1), instead of the rule's.
        capacity: Instead of the rule's.
        policy: (E + Z,), of logits that were `steered` by it: experts at -inf are never chosen, those at +inf always.
            Of dense the logits are as they were, and weights at -inf are 0, the others what they are without it.

    Source: DiT-MoE (arXiv 2407.11633) eq. 4: softmax, not renormalised; DeepSeek-V3 (arXiv 2412.19437) eq. 12-16:
    sigmoid, renormalised, scaled, with a bias; ProMoE (arXiv 2510.24711) Table 8: identity, of cosines.
    """
    R, E = logits.shape[0], logits.shape[1] - rule.null_experts
    if rule.kind == "dense":
        scores = _scores(F.layer_norm(logits, logits.shape[-1:]), rule.score)
        scores = scores if policy is None else scores.masked_fill(policy == -math.inf, 0.0)
        return Selection(scores, None, (scores > 0).sum(dim=0))
    scores = _scores(logits, rule.score)
    worth = scores if rule.weights == "scores" else 1 + 0 * scores  # a gradient of 0: the router stays
    choice = scores.detach() if bias is None else scores.detach() + bias
    if policy is not None:
        choice = choice.masked_fill(policy == -math.inf, -1e6)
        choice = choice.masked_fill((policy == math.inf) & (rule.kind == "topk"), 1e9)  # among the K of its groups
    if rule.kind == "topk" and rule.overflow == "none" and not rule.null_experts:
        experts = _best(choice, rule)  # (R, K), best first
        weights = worth.gather(-1, experts)
        if rule.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        if rule.scale != 1.0:
            weights = weights * rule.scale
        starts = torch.arange(0, R * rule.top_k, rule.top_k, device=logits.device)
        plan = plan_of(experts.flatten(), weights.flatten(), starts, E, rule.top_k)
        return Selection(scores, plan, plan.counts)
    chosen = _chosen(choice, rule, images, tau, capacity)
    if policy is not None:
        chosen = (chosen & (policy > -math.inf)) | (policy == math.inf)
    counts, chosen = chosen.sum(dim=0), chosen[:, :E]
    weights = worth[:, :E] * rule.scale if rule.scale != 1.0 else worth[:, :E]
    if rule.renormalize:
        weights = weights / (scores[:, :E] * chosen).sum(dim=-1, keepdim=True).clamp_min(1e-20)
    if rule.overflow != "none":
        chosen = chosen & _within_capacity(chosen, rule, images, keys, capacity)
    _, expert = chosen.nonzero(as_tuple=True)  # row after row
    starts = chosen.sum(dim=1).cumsum(0).roll(1)
    starts[:1] = 0
    return Selection(scores, plan_of(expert, weights[chosen], starts, E), counts)


def _scores(logits: Tensor, score: RouterScore) -> Tensor:
    if score in ("identity", "entmax"):
        return logits if score == "identity" else entmax(logits)
    return torch.softmax(logits, dim=-1) if score == "softmax" else torch.sigmoid(logits)


def _best(choice: Tensor, rule: RoutingRule) -> Tensor:
    """The K best experts of every row (R, K), best first, of the best groups where there are some."""
    if rule.groups > 1:
        parts = choice.view(len(choice), rule.groups, choice.shape[1] // rule.groups)
        value = parts.topk(min(2, parts.shape[2]), dim=-1).values.sum(dim=-1)  # (R, G)
        seen = torch.zeros_like(value, dtype=torch.bool)
        seen.scatter_(1, value.topk(rule.top_groups, dim=-1).indices, True)
        choice = parts.masked_fill(~seen.unsqueeze(-1), -math.inf).flatten(1)
    return choice.topk(rule.top_k, dim=-1).indices


def _chosen(choice: Tensor, rule: RoutingRule, images: int, tau: Tensor | None, capacity: float | None) -> Tensor:
    """Who is chosen before any capacity cuts, bool (R, E + Z)."""
    R, E = choice.shape
    if rule.kind == "topk":
        return torch.zeros_like(choice, dtype=torch.bool).scatter_(1, _best(choice, rule), True)
    if rule.kind == "expert_choice":
        by_expert = choice.view(images, R // max(1, images), E).transpose(1, 2)  # (n, E, t)
        C = rule.rows_taken(by_expert.shape[2], E, capacity)
        taken = torch.zeros_like(by_expert, dtype=torch.bool).scatter_(2, by_expert.topk(C, dim=-1).indices, True)
        return taken.transpose(1, 2).reshape(R, E)
    if rule.kind == "threshold":
        return choice >= (rule.least(E - rule.null_experts) if tau is None else tau)
    share = rule.share if tau is None else tau
    if rule.kind == "relative":
        best = choice.amax(dim=-1, keepdim=True)
        return choice >= ((1 - share) * best).minimum(best)  # by biases it may be below 0
    ordered, experts = choice.sort(dim=-1, descending=True)
    ordered = ordered.clamp_min(0)  # by biases some are below
    before = ordered.cumsum(dim=-1) - ordered  # what those before it have
    wanted = before < share * ordered.sum(dim=-1, keepdim=True)
    wanted[:, :1] = True
    return torch.zeros_like(wanted).scatter_(1, experts, wanted)


def _within_capacity(
    chosen: Tensor, rule: RoutingRule, images: int, keys: Tensor | None, capacity: float | None
) -> Tensor:
    """Of the chosen (R, E) those that an expert takes, bool: C of each image."""
    R, E = chosen.shape
    grid = chosen.view(images, R // max(1, images), E)
    n, t, _ = grid.shape
    if rule.overflow == "order":
        first = torch.arange(t, 0, -1.0, device=chosen.device).view(1, t, 1).expand(n, t, E)
    else:
        assert keys is not None, "overflow random needs keys"
        first = uniform(keys, (t, E)) + 1.0
    first = first.masked_fill(~grid, 0.0)
    C = rule.rows_taken(t, E, capacity)
    kept = torch.zeros_like(grid).scatter_(1, first.topk(C, dim=1).indices, True)
    return kept.view(R, E)


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
