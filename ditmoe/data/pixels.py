"""uint8 pixels to the model's x in [-1, 1] and back.

Shapes: N images, C channels, H W size.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

QUANTIZE = "floor(127.5 x + 128), clamped"  # rounds half up


def from_pixels(pixels: NDArray[np.uint8], mirrored: Sequence[bool] | None = None) -> Tensor:
    """uint8 (N, H, W, C) -> the model's x = pixel / 127.5 - 1, float32 (N, C, H, W); of `mirrored` images mirrored."""
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
        raise ValueError(f"images are {pixels.dtype} {pixels.shape}; a set gives uint8 (n, H, W, C)")
    x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x if mirrored is None else torch.where(torch.tensor(mirrored).view(-1, 1, 1, 1), x.flip(3), x)


def to_pixels(x: Tensor) -> NDArray[np.uint8]:
    """x (N, C, H, W) in [-1, 1] -> uint8 array (N, H, W, C), by QUANTIZE. FloatingPointError unless all are finite."""
    if not bool(x.isfinite().all()):
        why = "the weights are damaged, or guidance_scale or epsilon_scale are too much for them"
        raise FloatingPointError(f"images are not finite: {why}")
    pixels = (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def to_pil(image: NDArray[Any]) -> Image.Image:
    """uint8 (H, W, C) as a picture, grey for C = 1."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; what is transparent becomes white."""
    turned = ImageOps.exif_transpose(image)
    turned.load()
    if not turned.has_transparency_data:
        return turned
    return Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned.convert("RGBA"))


def visible(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images with 1 or 3 channels: of others (latents without a decoder), the first 3, or the first of 2."""
    channels = images.shape[-1]
    return images if channels in (1, 3) else images[..., : 3 if channels > 3 else 1]
