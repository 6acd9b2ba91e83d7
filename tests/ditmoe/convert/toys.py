"""Small models to change, and how far two are apart."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ditmoe.config.sections import Config, ModelConfig, MoEConfig
from ditmoe.model import DiTMoETransformer2DModel, build

Net = DiTMoETransformer2DModel
MODEL = ModelConfig(sample_size=8, patch_size=2, hidden_size=32, depth=4, num_heads=2, ffn_width=96)
IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
BATCH = (IMAGES, torch.tensor([3.0, 100.0, 400.5, 700.0, 900.0, 999.0]), torch.arange(6))


def network(seed: int = 0, activation: str = "swiglu", **moe: Any) -> Net:
    config = Config(model=replace(MODEL, activation=activation), moe=MoEConfig(**moe))
    torch.manual_seed(seed)
    net = build(config, 10).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return net


@torch.no_grad()
def drawn(net: Net) -> Tensor:
    out: Tensor = net(*BATCH).sample
    return out


def off(a: Tensor, b: Tensor) -> float:
    """How far a is from b, relatively."""
    return float((a - b).norm() / b.norm())
