"""The mixture-of-experts layer, slow and obvious: one token, one expert at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ditmoe.moe import MoELayer


def expert(x: Tensor, w_in: Tensor, w_out: Tensor, activation: str) -> Tensor:
    """One expert on one token x (D,)."""
    h = w_in @ x
    if activation == "swiglu":
        gate, up = h.split(len(h) // 2)
        h = F.silu(gate) * up
    else:
        h = F.gelu(h, approximate="tanh")
    return w_out @ h


def moe(layer: MoELayer, x: Tensor) -> Tensor:
    """What `layer` should give for x (N, T, D)."""
    rule, bias = layer.rule, layer.router.expert_bias
    out = torch.zeros_like(x)
    for n, image in enumerate(x):
        for t, token in enumerate(image):
            logits = layer.router.weight @ (token if layer.router.positions is None else layer.router.positions[t])
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
