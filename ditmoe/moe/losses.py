"""Losses: pure functions of what a layer's router did. They return values; nothing is injected into a graph.

Shapes: E experts, K experts per token, I inputs of the router of width D.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer import Routing


def balance_loss(routing: Routing, counts: Tensor | None = None) -> Tensor:
    """Expert-level balance loss of one layer, a float32 scalar: 1 at even load, up to E / K when K experts take all.

    L = E * sum_e f_e P_e, where f_e is expert e's share of the assignments (no gradient) and P_e the mean of its
    score, normalised over the experts of a token; a score below 0, which a cosine may be, counts as 0.

    Args:
        routing: The layer's record.
        counts: (E,) assignments over the global batch, when this process holds a part of it; default: the record's.

    Source: DiT-MoE (arXiv 2407.11633) eq. 5-6, over the batch instead of one sequence. The weight (the paper's
    alpha, 0.005) is the caller's.
    """
    return _imbalance(_mean_share(routing), routing.counts if counts is None else counts)


def whole_balance_loss(routing: Sequence[Routing], counts: Tensor | None = None) -> Tensor:
    """The same over L layers together, as if expert e of all of them were one: a layer may be uneven, their sum not.

    Args:
        routing: The layers' records.
        counts: (L, E) of the global batch.

    Source: Time-MoE (arXiv 2409.16040), the released code, which joins the logits of all layers.
    """
    counts = torch.stack([record.counts for record in routing]) if counts is None else counts
    return _imbalance(torch.stack([*map(_mean_share, routing)]).mean(dim=0), counts.sum(dim=0))


def _mean_share(routing: Routing) -> Tensor:
    """(E,) mean over rows of the scores, normalised in each row: softmax scores stay as they are."""
    scores = routing.scores.clamp_min(0)
    return (scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-20)).mean(dim=0)


def _imbalance(share: Tensor, counts: Tensor) -> Tensor:
    """E sum_e f_e P_e of mean shares P (E,) and assignments (E,)."""
    return len(share) * (counts.to(share.dtype) / counts.sum().clamp_min(1) * share).sum()


def contrastive_loss(
    routing: Routing, temperature: float, sums: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """Routing contrastive loss of one layer with prototypes p, a float32 scalar: small where p_e is alone near m_e.

    L = mean over e of -log softmax_j(cos(p_e, m_j) / temperature)[e], with m_j the mean of what the router saw of the
    tokens that expert j serves. Experts without tokens are left out. The gradient goes to prototypes and to tokens.

    Args:
        routing: The layer's record, of a prototype router.
        temperature: ProMoE's configurations have 0.07.
        sums: (E, I D) as the record's, over the global batch, when this process holds a part of it. As the loss is
            not linear in them, they are to carry the gradient of all processes' losses.
        counts: (E,) of the global batch likewise.

    Source: ProMoE (arXiv 2510.24711), the released code: all K experts of a token count, as if it had one.
    """
    sums, counts = routing.sums if sums is None else sums, routing.counts if counts is None else counts
    assert sums is not None, "the router has no prototypes"
    assert routing.prototypes is not None, "the router has no prototypes"
    served = counts > 0  # (E,)
    cosines = routing.prototypes @ F.normalize(sums, dim=1).T  # (E, E): prototype, mean
    right = (cosines / temperature).masked_fill(~served, -1e30).log_softmax(dim=1).diagonal()
    return -torch.where(served, right, 0.0).sum() / served.sum().clamp_min(1)


def domain_loss(routing: Routing, domain: Tensor, num_domains: int) -> Tensor:
    """Domain loss of one layer, a float32 scalar: 0 where routers are sure of experts of their own domain's set.

    L = mean over rows of -log sum_{e in set(d)} softmax(logits)_e, where expert e is in set(d) if e D // E = d: the E
    experts cut into D equal sets, if D divides E. It is log D while the logits are even. Bias and score play no part.

    Args:
        routing: The layer's record, of a router whose decisions are not shared by images.
        domain: (N,) int64 in 0..D-1, of each image.
        num_domains: D, at most E.

    Source: DAMEX (arXiv 2311.04894), whose domains have one expert each; its weight, 0.1, is the caller's.
    """
    R, E = routing.logits.shape
    assert routing.images == len(domain), "images share decisions, which then cannot know their domains"
    owner = torch.arange(E, device=domain.device) * num_domains // E  # (E,)
    own = owner == domain.repeat_interleave(R // len(domain))[:, None]  # (R, E): rows of an image follow each other
    log_probs = routing.logits.log_softmax(dim=-1)
    return -log_probs.masked_fill(~own, -math.inf).logsumexp(dim=-1).mean()


def z_loss(routing: Routing) -> Tensor:
    """Router z-loss, mean over tokens of (logsumexp of the logits)^2: keeps logits small.

    Source: ST-MoE (arXiv 2202.08906) eq. 5.
    """
    return routing.logits.logsumexp(dim=-1).square().mean()


def balanced_bias(bias: Tensor, counts: Tensor, rate: float, wanted: float | None = None) -> Tensor:
    """The balancing bias after one optimiser step, (E,) float32, with mean 0 unless a load is `wanted`.

    b_e <- b_e + rate * sign(mean load - load_e), then minus the mean of b. Where a load is wanted, as where
    a token may have any number of experts, it stands for the mean, and nothing is subtracted: of experts that take all
    scores above a threshold, threshold - b_e then tracks the quantile that lets so many pass.

    Args:
        bias: (E,) the bias now.
        counts: (E,) assignments of the whole global batch of the step.
        rate: Step size (DeepSeek-V3: 0.001).
        wanted: Assignments that each expert is to have, or None: as many as the others.

    Source: Auxiliary-loss-free load balancing (arXiv 2408.15664), Algorithm 1; the zero mean is ours, it leaves the
    choice unchanged and keeps the numbers small. Thresholds that follow the load: DiffMoE (arXiv 2503.14487), whose
    running quantile this is, without the choice over a batch.
    """
    load = counts.to(bias.dtype)
    if wanted is not None:
        return bias + rate * torch.sign(wanted - load)
    moved = bias + rate * torch.sign(load.mean() - load)
    return moved - moved.mean()
