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


def moe(layer: MoELayer, x: Tensor, condition: Condition | None = None) -> Tensor:
    """What `layer` should give for x (N, T, D)."""
    rule, bias = layer.rule, layer.router.expert_bias
    out = torch.zeros_like(x)
    for n, image in enumerate(x):
        for t, token in enumerate(image):
            logits = layer.router.weight @ seen(layer, x, condition, n, t)
            scores = logits.softmax(0) if rule.score == "softmax" else logits.sigmoid()
            ranked = scores if bias is None else scores + bias
            chosen = sorted(range(len(scores)), key=lambda e: -float(ranked[e]))[: rule.top_k]
            total = sum(scores[e] for e in chosen) if rule.renormalize else 1.0
            for e in chosen:
                y = expert(token, layer.experts.w_in[e], layer.experts.w_out[e], layer.experts.activation)
                out[n, t] = out[n, t] + rule.scale * scores[e] / total * y
            if layer.shared is not None:
                out[n, t] = out[n, t] + layer.shared(token)
    return out
