"""The mixture-of-experts layer, slow and obvious: one token, one expert at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ditmoe.moe import Condition, MoELayer


def expert(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> Tensor:
    """One expert on one token x (D,)."""
    h = w_in @ x
    if activation == "swiglu":
        gate, up = h.split(len(h) // 2)
        h = F.silu(gate) * up
    else:
        h = F.gelu(h, approximate="tanh")
    return w_out @ h


def seen(layer: MoELayer, x: Tensor, condition: Condition | None, n: int, t: int) -> Tensor:
    """What the router sees of one token: all of its inputs, one after the other."""
    vectors = []
    for kind in layer.router.inputs:
        if kind == "token":
            vectors.append(x[n, t])
        elif kind == "position":
            vectors.append(layer.router.positions[t])
        elif kind == "plain":
            vectors.append(condition.plain[n, t])
        else:
            vector = (condition.t if kind == "time" else condition.y)[n]
            vectors.append((vector - vector.mean()) / (vector.var(unbiased=False) + 1e-5).sqrt())
    return torch.cat(vectors)


def logits_of(layer: MoELayer, z: Tensor) -> Tensor:
    """(E,) of one token of which the router sees z."""
    router = layer.router
    if router.kind == "linear":
        return router.weight @ z
    return torch.stack([router.cosine_scale * (z @ p) / (z @ z).sqrt() / (p @ p).sqrt() for p in router.weight])


def scores_of(layer: MoELayer, logits: Tensor) -> Tensor:
    """(E,) of one token."""
    if layer.rule.score == "identity":
        return logits
    return logits.softmax(0) if layer.rule.score == "softmax" else logits.sigmoid()


def chosen_by(layer: MoELayer, scores: Tensor) -> list[int]:
    """Experts of one token, best first."""
    bias = layer.router.expert_bias
    ranked = scores if bias is None else scores + bias
    return sorted(range(len(scores)), key=lambda e: -float(ranked[e]))[: layer.rule.top_k]


def contrastive(layer: MoELayer, x: Tensor, condition: Condition | None, temperature: float) -> Tensor:
    """The routing contrastive loss of `layer` for x (N, T, D), without experts that have no token."""
    served: dict[int, list[Tensor]] = {}
    for n in range(x.shape[0]):
        for t in range(x.shape[1]):
            z = seen(layer, x, condition, n, t)
            for e in chosen_by(layer, scores_of(layer, logits_of(layer, z))):
                served.setdefault(e, []).append(z)
    means = {e: torch.stack(vectors).mean(0) for e, vectors in served.items()}
    losses = []
    for e in means:
        p = layer.router.weight[e]
        cosines = {j: (p @ m) / p.norm() / m.norm() for j, m in means.items()}
        total = sum((c / temperature).exp() for c in cosines.values())
        losses.append(-((cosines[e] / temperature).exp() / total).log())
    return torch.stack(losses).mean()


def moe(layer: MoELayer, x: Tensor, condition: Condition | None = None) -> Tensor:
    """What `layer` should give for x (N, T, D)."""
    rule = layer.rule
    out = torch.zeros_like(x)
    for n, image in enumerate(x):
        for t, token in enumerate(image):
            scores = scores_of(layer, logits_of(layer, seen(layer, x, condition, n, t)))
            chosen = chosen_by(layer, scores)
            total = sum(scores[e] for e in chosen) if rule.renormalize else 1.0
            for e in chosen:
                y = expert(token, layer.experts.w_in[e], layer.experts.w_out[e], layer.experts.activation)
                out[n, t] = out[n, t] + rule.scale * scores[e] / total * y
            if layer.shared is not None:
                out[n, t] = out[n, t] + layer.shared(token)
    return out
