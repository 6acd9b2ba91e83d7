"""DINOv2's vision transformer without registers (Oquab et al., 2023, arXiv:2304.07193), up to its class token.

Shapes: N batch, C channels, H W size, D width, T tokens (the class token, then H/14 x W/14 patches row by row).
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 14
TABLE_SIDE = 37  # patches a side that the position table was trained for: 518 pixels
EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al., 2017); queries, keys and values from one matrix, in that order."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, T, D) -> (N, T, D)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (N, heads, T, D / heads)
        mixed: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class LayerScale(nn.Module):
    """x * gamma, one factor a channel (Touvron et al., 2021, arXiv:2103.17239)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, T, D) -> (N, T, D)."""
        return x * self.gamma


class Block(nn.Module):
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x)))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width))
        )
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, T, D) -> (N, T, D)."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return x


class DinoV2(nn.Module):
    """The network, ViT-L/14 by default, with the tensor names of `dinov2_vitl14_pretrain.pth` (343 tensors)."""

    def __init__(self, width: int = 1024, depth: int = 24, heads: int = 16) -> None:
        super().__init__()
        self.width = width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + TABLE_SIDE**2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # of training only; here because the file has it
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, PATCH, stride=PATCH)))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Class token (N, D) after the last norm, of x float32 (N, 3, H, W), H and W multiples of 14."""
        patches = self.patch_embed(x)  # (N, D, H / 14, W / 14)
        rows, columns = patches.shape[2:]
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        features: Tensor = self.norm(self.blocks(tokens + self.positions(rows, columns)))[:, 0]
        return features

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embedding (1, T, D) of that many patches: the table resized bicubically, without antialiasing.

        The published features come from `scale_factor` = (patches + 0.1) / 37, and `interpolate` then samples at
        steps of 37 / (patches + 0.1), not of 37 / patches: the offset is part of the network.
        """
        if rows == columns == TABLE_SIDE:
            return self.pos_embed
        table = self.pos_embed[:, 1:].unflatten(1, (TABLE_SIDE, TABLE_SIDE)).permute(0, 3, 1, 2)
        factors = [(rows + 0.1) / TABLE_SIDE, (columns + 0.1) / TABLE_SIDE]
        resized = F.interpolate(table, scale_factor=factors, mode="bicubic", recompute_scale_factor=False)
        assert resized.shape[2:] == (rows, columns), (resized.shape, rows, columns)
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)
