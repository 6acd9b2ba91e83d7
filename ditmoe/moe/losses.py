"""Balance: pure functions of what a layer's router did. They return values; nothing is injected into a graph.

Shapes: E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layer import Routing


def balance_loss(routing: Routing, counts: Tensor | None = None) -> Tensor:
    """Expert-level balance loss of one layer, a float32 scalar: 1 at even load, up to E / K when K experts take all.

    L = E * sum_e f_e P_e, where f_e is expert e's share of the assignments (no gradient) and P_e the mean of its
    score, normalised over the experts of a token.

    Args:
        routing: The layer's record.
        counts: (E,) assignments over the global batch, when this process holds a part of it; default: the record's.

    Source: DiT-MoE (arXiv 2407.11633) eq. 5-6, over the batch instead of one sequence. The weight (the paper's
    alpha, 0.005) is the caller's.
    """
    counts = routing.counts if counts is None else counts
    scores = routing.scores
    probs = scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-20)  # softmax scores stay as they are
    load = counts.to(probs.dtype) / counts.sum().clamp_min(1)  # (E,)
    return probs.shape[-1] * (load * probs.mean(dim=0)).sum()


def z_loss(routing: Routing) -> Tensor:
    """Router z-loss, mean over tokens of (logsumexp of the logits)^2: keeps logits small.

    Source: ST-MoE (arXiv 2202.08906) eq. 5.
    """
    return routing.logits.logsumexp(dim=-1).square().mean()


def balanced_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """The balancing bias after one optimiser step, (E,) float32 with mean 0.

    b_e <- b_e + rate * sign(mean load - load_e), then minus the mean of b.

    Args:
        bias: (E,) the bias now.
        counts: (E,) assignments of the whole global batch of the step.
        rate: Step size (DeepSeek-V3: 0.001).

    Source: Auxiliary-loss-free load balancing (arXiv 2408.15664), Algorithm 1; the zero mean is ours, it leaves the
    choice unchanged and keeps the numbers small.
    """
    load = counts.to(bias.dtype)
    moved = bias + rate * torch.sign(load.mean() - load)
    return moved - moved.mean()
