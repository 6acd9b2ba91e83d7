"""Between the network's x and pixels: by a VAE, or the identity where there is none.

Shapes: N images, C channels, H W size of pixels or latents.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .latents import denormalize, normalize

_AT_ONCE = 16  # images; a VAE needs about a gigabyte for each of 256 x 256


def decode(vae: Any, x: Tensor, known: Mapping[str, Any] | None) -> Tensor:
    """The network's x (N, C, H, W) -> pixels about [-1, 1]; `known`: see `ditmoe.pipeline.DiTMoEPipeline`."""
    if vae is None:
        return x
    latents = x / vae.config.scaling_factor + _shift(vae) if known is None else denormalize(x, known)
    with torch.inference_mode():
        parts = latents.to(vae.dtype).split(_AT_ONCE)
        return torch.cat([vae.decode(part).sample.float() for part in parts])


def encode(vae: Any, pixels: Tensor, known: Mapping[str, Any] | None) -> Tensor:
    """Pixels (N, C, H, W) in [-1, 1] -> the network's x, by the modes of the VAE."""
    if vae is None:
        return pixels
    with torch.inference_mode():
        parts = pixels.to(vae.dtype).split(_AT_ONCE)
        latents = torch.cat([vae.encode(part).latent_dist.mode().float() for part in parts])
    return (latents - _shift(vae)) * vae.config.scaling_factor if known is None else normalize(latents, known)


def image_shape(vae: Any, network: Any) -> tuple[int, int, int]:
    """(C, H, W) of the pixels of a network's x, by its config."""
    side = network.sample_size * (1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1))
    return (network.in_channels if vae is None else vae.config.out_channels), side, side


def _shift(vae: Any) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0
