"""What the network repeats and ends with: blocks of attention and a feed-forward layer, and the final layer.

Shapes: N images, C channels, H W size, T tokens of an image, D width, K heads of the final layer.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..moe import Condition, FeedForward, MoELayer, Router, Routing, decide
from .layers import Attention, LocalConv, modulate


class DiTBlock(nn.Module):
    """Attention and a feed-forward layer, each modulated and gated by the condition (adaLN-Zero).

    Exactly one of `moe` and `mlp` is there. Source: DiT (arXiv 2212.09748) Figure 3. Before them, where asked for: x +
    W early, with W = 0 at the start (long skip connections, U-ViT, arXiv 2209.12152), and a `LocalConv`.
    """

    def __init__(
        self, hidden_size: int, attn: Attention, feed_forward: MoELayer | FeedForward, norm2_eps: float = 1e-6,
        skips: bool = False, local_conv: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.skip = nn.Linear(hidden_size, hidden_size) if skips else None
        self.local_conv = LocalConv(hidden_size) if local_conv else None
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=norm2_eps)
        if isinstance(feed_forward, MoELayer):
            self.moe = feed_forward
        else:
            self.mlp = feed_forward
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self, hidden_states: Tensor, condition: Condition, rotary: tuple[Tensor, Tensor] | None, routed: bool = True,
        early: Tensor | None = None, alone: bool = False,
    ) -> Any:  # fmt: skip
        """x (N, T, D) -> x (N, T, D), and the routing record where the block has experts, which are `routed` to.

        early: (N, T, D), what an earlier block began with, for a block that `skips`.
        alone: Without the record, as the hooks of diffusers' caches want it, which go by the name `hidden_states`.
        """
        x = hidden_states
        if self.skip is not None:
            x = x + self.skip(early)
        if self.local_conv is not None:
            x = self.local_conv(x)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition.c).chunk(6, dim=1)
        x = torch.addcmul(x, gate1.unsqueeze(1), self.attn(modulate(self.norm1(x), shift1, scale1), rotary))
        plain = self.norm2(x)
        h = modulate(plain, shift2, scale2)
        routing = None
        if not hasattr(self, "moe"):
            y = self.mlp(h)
        elif routed:
            y, routing = self.moe(h, condition._replace(plain=plain))
        else:
            y = self.moe.without_routed(h)
        x = torch.addcmul(x, gate2.unsqueeze(1), y)
        return x if alone else (x, routing)

    def by_place(self, x: Tensor) -> Routing | None:
        """What its router decides of x (N, T, D) at any time and of any image; None where there is no such decision.

        That is where it sees the place alone. None, too, where hooks bring weights just before they are used.
        """
        layer = getattr(self, "moe", None)
        if not isinstance(layer, MoELayer) or layer.router is None or layer.router.per_image:
            return None
        if any(hasattr(part, name) for part in (self, layer, layer.router) for name in ("_diffusers_hook", "_hf_hook")):
            return None
        return decide(layer.router, layer.rule, x, None, layer.capacity)


def to_compile(block: nn.Module, *, moving: bool = False) -> nn.Module:
    """What torch.compile is asked of: a block, or its attention alone where it would compile anew every step.

    That is where experts serve other numbers of rows in each, also because training is `moving` their capacity.
    """
    moe, attention = getattr(block, "moe", None), block.attn
    assert isinstance(attention, Attention)
    return attention if isinstance(moe, MoELayer) and (moving or not moe.rule.steady) else block


class Heads(NamedTuple):
    """What the K heads of a final layer say: `gates` (N, K), float32, and `predictions` (N, K, C or 2C, H, W).

    The prediction is the sum of g_k p_k; what refines it, if anything does, comes after.
    """

    gates: Tensor
    predictions: Tensor


@dataclass
class DiTMoEOutput(BaseOutput):  # type: ignore[misc]
    """What one forward pass gives.

    Attributes:
        sample: (N, C, H, W) the prediction; (N, 2C, H, W) with `learn_sigma`: prediction, then variance values.
        routing: One record for every block with experts, in order; none where they are left out.
        heads: What each head of the final layer says, where there are several.
    """

    sample: Tensor
    routing: list[Routing]
    heads: Heads | None = None


class FinalLayer(nn.Module):
    """Modulated norm and a linear map from tokens to patches, or several, K heads: sum_k g_k p_k of their p_k.

    g = softmax(W c) of the normalised condition c, one for all tokens of an image, by a `Router`: it starts with logits
    of about 1, without which all heads, which start at zero, would stay alike.
    """

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, heads: int = 0) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, max(1, heads) * patch_size * patch_size * out_channels)
        self.router = Router(hidden_size, heads) if heads > 1 else None
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """x (N, T, D), c (N, D) -> (N, T, patch_size^2 * out_channels); of several heads gates (N, K), each's likewise.

        The sum is float32, of the dtype of what is summed.
        """
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        y: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        if self.router is None:
            return y, None
        logits, _ = self.router([nn.functional.layer_norm(c.float(), c.shape[-1:]).unsqueeze(1)])
        gates, each = logits[:, 0].softmax(dim=-1), y.unflatten(-1, (logits.shape[-1], -1)).transpose(1, 2)
        return (gates[..., None, None] * each.float()).sum(dim=1).to(y.dtype), (gates, each)
