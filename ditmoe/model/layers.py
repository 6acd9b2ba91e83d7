"""The parts around the experts: patches, time and label embeddings, positions, attention, adaLN modulation.

Shapes: N images, C channels, H W size, T tokens of an image, D width. Names are those of the official DiT.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Image to tokens: a convolution with kernel and stride `patch_size`, row by row."""

    def __init__(self, in_channels: int, patch_size: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> (N, T, D)."""
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens.contiguous()  # all that follows keeps the order in memory, and a token's channels lie together


def unpatchify(x: Tensor, patch_size: int, channels: int) -> Tensor:
    """Tokens (N, T, patch_size^2 * channels) of a square image -> (N, channels, H, W)."""
    N, T, _ = x.shape
    side = math.isqrt(T)
    x = x.view(N, side, side, patch_size, patch_size, channels)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (N, channels, side, patch_size, side, patch_size)
    return x.reshape(N, channels, side * patch_size, side * patch_size)


class Refiner(nn.Module):
    """Convolutions over pixels that end the network: a patch is drawn from one token, and does not see its neighbours.

    y = p + conv(silu(conv(silu(conv([p, f, x_t]))))), 3x3 each, `width` channels within: p is what the tokens predict,
    f `FEATURES` channels that they say besides. The last one starts at zero, so that the network starts as without.

    Args:
        in_channels: Channels of x_t.
        out_channels: Of the prediction.
        width: Channels within.
    """

    FEATURES = 8

    def __init__(self, in_channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.conv1 = nn.Conv2d(out_channels + self.FEATURES + in_channels, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = ConvToFew(width, out_channels)

    def forward(self, drawn: Tensor, x_t: Tensor) -> Tensor:
        """drawn (N, out_channels + FEATURES, H, W), x_t (N, in_channels, H, W) -> (N, out_channels, H, W)."""
        pixels = torch.cat([drawn, x_t.to(drawn.dtype)], dim=1)
        watched = self.conv1._forward_hooks or self.conv2._forward_hooks
        over = not torch.is_grad_enabled() and not watched  # in place of what nobody reads again
        h = F.silu(self.conv1(pixels.contiguous(memory_format=torch.channels_last)), over)  # 1.4 times as fast on a CPU
        h = F.silu(self.conv2(h), over)
        y: Tensor = drawn[:, : self.out_channels] + self.conv3(h)
        return y


class ConvToFew(nn.Conv2d):
    """A 3x3 convolution to few channels.

    In float32 on a CPU it is a product for its 9 taps and their shifted sum: 0.4 of torch's time, 0.6 with gradients.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W), channels last where it is to be fast -> (N, K, H, W)."""
        plain = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
        if not plain or torch.is_autocast_enabled("cpu"):
            y: Tensor = super().forward(x)
            return y
        assert self.bias is not None
        (N, C, H, W), K = x.shape, self.out_channels
        weight = self.weight.flatten().view_as(self.weight)  # so that its gradient lies as it does
        taps = F.pad(weight.permute(1, 2, 3, 0).reshape(C, 9 * K), (0, -9 * K % 16))  # odd widths are slow
        each = (x.permute(0, 2, 3, 1).reshape(-1, C) @ taps)[:, : 9 * K].unflatten(0, (N, H, W)).unflatten(3, (9, K))
        y = each.new_zeros(N, H + 2, W + 2, K)
        for tap in range(9):
            row, column = divmod(tap, 3)
            y[:, 2 - row : 2 - row + H, 2 - column : 2 - column + W] += each[..., tap, :]
        return (y[:, 1:-1, 1:-1] + self.bias).permute(0, 3, 1, 2)


class LocalConv(nn.Conv2d):
    """x + a 3x3 depthwise convolution of the grid of tokens, which starts at zero.

    Source: CMT (arXiv 2107.06263) eq. 1, its local perception unit.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, hidden_size, 3, padding=1, groups=hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, T, D) of a square grid -> (N, T, D)."""
        grid = x.transpose(1, 2).unflatten(2, (math.isqrt(x.shape[1]),) * 2)
        return x + super().forward(grid).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoids of t, then a two-layer network.

    emb(t) = [cos(t f_j), sin(t f_j)], f_j = 10000^(-j / (half - freq_shift)), half = 128; t on the 0..1000 scale.
    Source: DiT (arXiv 2212.09748) and its release (frequency shift 0); diffusers' DiT has frequency shift 1.
    """

    FREQUENCIES = 256

    def __init__(self, hidden_size: int, freq_shift: int = 0) -> None:
        super().__init__()
        self.freq_shift = freq_shift
        self.mlp = nn.Sequential(
            nn.Linear(self.FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t (N,), any real dtype -> (N, D), computed in `dtype` from the sinusoids on."""
        half = self.FREQUENCIES // 2
        f = torch.exp(
            torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000) / (half - self.freq_shift))
        )
        angles = t.float().unsqueeze(-1) * f  # (N, half)
        emb = torch.cat([angles.cos(), angles.sin()], dim=-1)
        out: Tensor = self.mlp(emb.to(dtype))
        return out


class LabelEmbedder(nn.Module):
    """A vector a class; row `num_classes` is the null label of classifier-free guidance."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """y (N,) int64 in [0, num_classes] -> (N, D)."""
        out: Tensor = self.embedding_table(y)
        return out


def _grid(side: int, span: int | None) -> tuple[Tensor, Tensor]:
    """Rows and columns (T,) of a side x side grid, in tokens of one of `span` tokens that has the same extent."""
    places = torch.arange(side)
    if span is not None and span != side:
        places = (places.double() + 0.5) * (span / side) - 0.5
    row, column = torch.meshgrid(places, places, indexing="ij")
    return row.flatten(), column.flatten()


def sincos_positions(hidden_size: int, side: int, span: int | None = None) -> Tensor:
    """DiT's fixed positions for a side x side grid, (1, T, D) float32: half of D for the column, half for the row.

    `span`: of another grid, whose places these are between.
    """

    def axis(position: Tensor) -> Tensor:
        omega = 10000.0 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size / 4))
        angles = position.double().outer(omega)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (T, D / 2)

    row, column = _grid(side, span)
    return torch.cat([axis(column), axis(row)], dim=-1).float().unsqueeze(0)


def rotary_positions(head_dim: int, side: int, span: int | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of 2-D rotary positions, each (T, head_dim) float32; `span` as in `sincos_positions`.

    The sines of a pair's first channels are negative, as `rotate` wants them.

    The first half of a head turns with the row, the second with the column; within a half, channel j and channel
    j + head_dim / 4 are one pair with frequency 100^(-4 j / head_dim); not text's 10,000: a grid has
    tens of positions an axis, not thousands. Source: RoFormer (arXiv 2104.09864), axial form.
    """
    pairs = head_dim // 4
    frequency = 100.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = [p.double().outer(frequency).repeat(1, 2) for p in _grid(side, span)]
    both = torch.cat(angles, dim=-1)  # (T, head_dim)
    sign = torch.tensor([-1.0, 1.0], dtype=torch.float32).repeat_interleave(pairs).repeat(2)
    return both.cos().float(), both.sin().float() * sign


def position_tables(
    kind: str, hidden_size: int, head_width: int, side: int, span: int | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What is added to the tokens of a grid, or what turns them in attention (cos, sin), by `kind`; else None."""
    if kind == "sincos":
        return sincos_positions(hidden_size, side, span), None, None
    return None, *rotary_positions(head_width, side, span)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of x (N, heads, T, head_dim) by the angles of `rotary_positions`."""
    a, b, c, d = x.chunk(4, dim=-1)
    return torch.addcmul(x * cos.to(x.dtype), torch.cat([b, a, d, c], dim=-1), sin.to(x.dtype))


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of one image.

    Args:
        hidden_size: Width D.
        num_heads: Heads.
        qk_norm: "rms" or "layer" normalises each query and key over head_dim; "none" does not.
        maps: Instead of dense maps to values and to the output: x (N, T, D) -> values (N, heads, T, head_dim), and a
            function that makes of attended ones y (N, T, D).
        head_width: Channels head_dim of a head; None: D / num_heads.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, qk_norm: Literal["rms", "layer", "none"], maps: nn.Module | None = None,
        head_width: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        head_dim = head_width or hidden_size // num_heads
        self.heads = num_heads, head_dim
        if maps is None:
            self.qkv = nn.Linear(hidden_size, 3 * num_heads * head_dim)
        else:
            self.qk = nn.Linear(hidden_size, 2 * num_heads * head_dim)
        self.q_norm, self.k_norm = (_head_norm(qk_norm, head_dim) for _ in range(2))
        self.maps = maps
        if maps is None:
            self.proj = nn.Linear(num_heads * head_dim, hidden_size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """x (N, T, D) -> (N, T, D); rotary: cos and sin of the positions, or None."""
        N, T, _ = x.shape
        if self.maps is None:
            q, k, v = self.qkv(x).view(N, T, 3, *self.heads).unbind(2)  # each (N, T, heads, head_dim)
            v = v.transpose(1, 2)
        else:
            q, k = self.qk(x).view(N, T, 2, *self.heads).unbind(2)
            v, project = self.maps(x)
        q, k = (y.to(v.dtype).transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k)))  # (N, heads, T, head_dim)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        out = attend(q, k, v)
        y: Tensor = self.proj(out.transpose(1, 2).flatten(2)) if self.maps is None else project(out)
        return y


class RMSNorm(nn.RMSNorm):
    """RMS norm whose weight follows the input's dtype; the statistics are float32 all the same."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., head_dim) -> the same shape and dtype."""
        assert self.weight is not None
        assert self.eps is not None
        plain = x.device.type == "cpu" and x.dtype == torch.float32
        if plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y = x.clone(memory_format=torch.contiguous_format)  # 0.3 to 0.6 of the time of rows that lie apart
            mean = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(x.shape[-1])
            return y.mul_(mean.add_(self.eps).rsqrt_()).mul_(self.weight.to(x.dtype))
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def _head_norm(kind: str, head_dim: int) -> nn.Module:
    if kind == "rms":
        return RMSNorm(head_dim, eps=1e-6)
    return nn.LayerNorm(head_dim, eps=1e-6) if kind == "layer" else nn.Identity()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v over (N, heads, T, head_dim), softmax in float32.

    torch's fused kernel, except for bfloat16 on a CPU, where three plain products are several times faster forward and
    backward (torch 2.14; docs/results.md).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (N, heads, T, T)
        y: Tensor = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v
        return y
    return F.scaled_dot_product_attention(q, k, v)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (N, T, D) * (1 + scale) + shift, with one shift and scale (N, D) an image."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))
