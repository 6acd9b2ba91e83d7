"""DiT, SiT and DiT-MoE with the names of their releases, slow and obvious, on a dict of their tensors.

They differ in little: SiT's time is in [0, 1] and its output loses its second half; DiT-MoE has experts, and in the
layout of its large models other names in attention and norms of queries and keys.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def positions(width: int, side: int) -> Tensor:
    """(1, side^2, width) float64, token by token."""
    rows = []
    for row in range(side):
        for column in range(side):
            halves = []
            for place in (column, row):
                angles = [place / 10000 ** (k / (width / 4)) for k in range(width // 4)]
                halves += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(halves)
    return torch.tensor([rows], dtype=torch.float64)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()


def attention(w: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    """One image x (T, D), one head at a time."""
    flash = f"{name}.Wqkv.weight" in w
    q, k, v = linear(w, f"{name}.Wqkv" if flash else f"{name}.qkv", x).chunk(3, dim=1)
    out = []
    for a, b, c in zip(q.chunk(heads, dim=1), k.chunk(heads, dim=1), v.chunk(heads, dim=1), strict=True):
        if flash:
            a = norm(a) * w[f"{name}.q_norm.weight"] + w[f"{name}.q_norm.bias"]
            b = norm(b) * w[f"{name}.k_norm.weight"] + w[f"{name}.k_norm.bias"]
        out.append((a @ b.T / math.sqrt(a.shape[1])).softmax(dim=1) @ c)
    return linear(w, f"{name}.out_proj" if flash else f"{name}.proj", torch.cat(out, dim=1))


def swiglu(w: Weights, name: str, x: Tensor) -> Tensor:
    gate, up, down = (w[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return down @ (F.silu(gate @ x) * (up @ x))


def feed_forward(w: Weights, name: str, x: Tensor, top_k: int) -> Tensor:
    """One image x (T, D): DiT's layer, or token by token the best experts by plain softmax, and the shared."""
    if f"{name}.mlp.fc1.weight" in w:
        return linear(w, f"{name}.mlp.fc2", F.gelu(linear(w, f"{name}.mlp.fc1", x), approximate="tanh"))
    out = []
    for token in x:
        scores = (w[f"{name}.moe.gate.weight"] @ token).softmax(dim=0)
        best = scores.argsort(descending=True)[:top_k].tolist()
        routed = sum(scores[e] * swiglu(w, f"{name}.moe.experts.{e}", token) for e in best)
        out.append(routed + swiglu(w, f"{name}.moe.shared_experts", token))
    return torch.stack(out)


def network(weights: Weights, x: Tensor, t: float, y: int, *, heads: int, top_k: int = 2) -> Tensor:
    """The output (channels, H, W) for one image x (C, H, W), in float64; t is what the embedding sees."""
    w = {name: value.double() for name, value in weights.items()}
    p = w["x_embedder.proj.weight"].shape[-1]
    tokens = F.conv2d(x.double()[None], w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p)[0]
    side = tokens.shape[-1]
    h = tokens.flatten(1).T + positions(tokens.shape[0], side)[0]
    f = [10000 ** (-j / 128) for j in range(128)]
    emb = torch.tensor([math.cos(t * a) for a in f] + [math.sin(t * a) for a in f], dtype=torch.float64)
    time = linear(w, "t_embedder.mlp.2", F.silu(linear(w, "t_embedder.mlp.0", emb)))
    c = F.silu(time + w["y_embedder.embedding_table.weight"][y])
    for i in range(sum(name.endswith("adaLN_modulation.1.bias") for name in w) - 1):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(w, f"{name}.adaLN_modulation.1", c).chunk(6)
        h = h + gate1 * attention(w, f"{name}.attn", norm(h) * (1 + scale1) + shift1, heads)
        h = h + gate2 * feed_forward(w, name, norm(h) * (1 + scale2) + shift2, top_k)
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", c).chunk(2)
    out = linear(w, "final_layer.linear", norm(h) * (1 + scale) + shift)  # (T, p p channels)
    image = out.new_zeros(out.shape[1] // p**2, side * p, side * p)
    for token, patch in enumerate(out):
        row, column = divmod(token, side)
        image[:, row * p : row * p + p, column * p : column * p + p] = patch.view(p, p, -1).permute(2, 0, 1)
    return image


def sit(weights: Weights, x: Tensor, t: float, y: int, *, heads: int) -> Tensor:
    """SiT's velocity data - noise (C, H, W) at its t in [0, 1], of x_t = t data + (1 - t) noise."""
    return network(weights, x, t, y, heads=heads)[: len(x)]
