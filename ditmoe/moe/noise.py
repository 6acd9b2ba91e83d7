"""Random numbers that are functions of an image's own time, so that resume and batch mates change nothing.

Shapes: n images.
"""

import math

import torch
from torch import Tensor

_MASK = 2**31 - 1  # products of two 31-bit numbers fit into 64 bits


def keys_of(timestep: Tensor, salt: int = 0) -> Tensor:
    """(n,) int64, of the bits of times (n,) as float32, others for every salt: in training each image draws its own."""
    return (timestep.float().contiguous().view(torch.int32).to(torch.int64) + salt * 0x9E3779B1) & _MASK


def uniform(keys: Tensor, shape: tuple[int, ...], salt: int = 0) -> Tensor:
    """Uniform numbers in [0, 1), (n, *shape) float32: the same for the same key (n,) int64, place and salt.

    Three rounds of multiplying and folding the bits of key and place, on any device alike.
    """
    place = torch.arange(math.prod(shape), device=keys.device) * 2 + 1
    x = (keys.unsqueeze(1) * 0x5BD1E995 + place * 0x27D4EB2F + salt * 0x165667B1) & _MASK
    for factor in (0x2C1B3C6D, 0x297A2D39, 0x5BD1E995):
        x = ((x ^ (x >> 15)) * factor) & _MASK
    return ((x ^ (x >> 16)).float() / 2**31).clamp(max=1 - 2**-24).view(len(keys), *shape)
