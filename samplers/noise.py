"""Where a sampler's randomness comes from: one CPU generator per image.

Image i of a run depends on (seed, i) alone, so the same image comes out of any batch size, process
count or device: everything is drawn on the generator's device (the CPU), in float32, one image at a
time, and moved afterwards.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None

# torch's CPU generator is a Mersenne twister seeded with 32 bits: it ignores the upper half.
_SEEDS = 2**32
_STRIDE = 0x9E3779B1  # odd, so index -> seed is a bijection of the 32-bit integers


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One freshly seeded CPU generator per image index of the run ``seed``, in the order given.

    ``seed`` is 0..2^64-1, each index 0..2^32-1; no two indices of one run share a stream. Anything
    outside those ranges raises ValueError.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, but a seed is an integer from 0 to 2^64 - 1")
    start = _mix(seed)
    generators = []
    for index in indices:
        if not 0 <= index < _SEEDS:
            raise ValueError(f"image index {index} is not an integer from 0 to 2^32 - 1")
        image_seed = (start + int(index) * _STRIDE) % _SEEDS
        generators.append(torch.Generator("cpu").manual_seed(image_seed))
    return generators


def initial_noise(
    generators: Sequence[torch.Generator],
    shape: tuple[int, int, int],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal (N, C, H, W) on ``device``: image n is drawn from ``generators[n]`` alone."""
    return draw_noise((len(generators), *shape), generators, device).to(dtype)


def draw_noise(shape: Sequence[int], generator: Generators, device: torch.device | str) -> Tensor:
    """Standard normal of ``shape``, float32, on ``device``.

    A sequence must hold one generator per image (else ValueError) and each draws its own image; a
    single generator draws the whole batch; None uses torch's global generator of ``device``.
    """
    if generator is None:
        return torch.randn(*shape, device=device, dtype=torch.float32)
    if isinstance(generator, torch.Generator):
        return _draw(shape, generator).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators were given for {shape[0]} images; give one per image")
    return torch.cat([_draw((1, *shape[1:]), g) for g in generator]).to(device)


def _draw(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=torch.float32)


def _mix(seed: int) -> int:
    """SplitMix64 of ``seed`` (Steele et al. 2014): neighbouring seeds land far apart."""
    z = (seed + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)
