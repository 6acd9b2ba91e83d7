"""Attention with experts, slow and obvious: one image, one head, one token, one expert at a time."""

import torch
from torch import Tensor

from ditmoe.model.layers import Attention, rotate


def gated(scores: Tensor, top_k: int) -> list[tuple[int, Tensor]]:
    """(expert, gate) of one token in one head: the largest of scores (E,)."""
    best = sorted(range(len(scores)), key=lambda e: -float(scores[e]))[:top_k]
    return [(e, scores[e]) for e in best]


def attention(layer: Attention, x: Tensor, rotary: tuple[Tensor, Tensor] | None, dense: bool = False) -> Tensor:
    """What `layer` should give for x (N, T, D).

    `dense`: of one expert a head, by matrices as wide as all heads: V = (s * W_V x), out = W_O (d * A V).
    """
    maps, (N, T, D) = layer.maps, x.shape
    H, E, d = maps.num_heads, maps.num_experts, maps.w_v.shape[1]
    q, k = (part.view(N, T, H, d).transpose(1, 2) for part in layer.qk(x).split(H * d, dim=-1))
    q, k = layer.q_norm(q), layer.k_norm(k)
    if rotary is not None:
        q, k = rotate(q, *rotary), rotate(k, *rotary)
    looks = (q @ k.transpose(-1, -2) / d**0.5).softmax(-1)  # (N, H, T, T)
    source, destination = (x @ maps.router.weight.T).sigmoid().view(N, T, 2, H, E).unbind(2)  # (N, T, H, E)
    if dense:
        assert E == 1
        v = (x @ maps.w_v.reshape(H * d, D).T).view(N, T, H, d) * source
        seen = (looks @ v.transpose(1, 2)).transpose(1, 2) * destination
        return seen.reshape(N, T, H * d) @ maps.w_o.transpose(1, 2).reshape(H * d, D)
    images = []
    for n in range(N):
        out = [torch.zeros(D, dtype=x.dtype) for _ in range(T)]
        for h in range(H):
            values = []
            for t in range(T):
                parts = [g * (maps.w_v[h * E + e] @ x[n, t]) for e, g in gated(source[n, t, h], maps.top_k)]
                values.append(torch.stack(parts).sum(0))
            seen = looks[n, h] @ torch.stack(values)  # (T, d)
            for t in range(T):
                for e, g in gated(destination[n, t, h], maps.top_k):
                    out[t] = out[t] + g * (maps.w_o[h * E + e] @ seen[t])
        images.append(torch.stack(out))
    return torch.stack(images)
