"""Images drawn from images: from a noise level on, or anew where a mask says so.

Shapes: N images, C channels, H W size; pixels are x in [-1, 1].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from samplers.loop import StepEnd, check_start, noised

from ..data.decode import encode
from ..data.pixels import from_pixels, upright
from .asked import is_number


@dataclass(frozen=True)
class Edit:
    """What is drawn from, see `DiTMoEPipeline.image_to_image` and `inpaint`.

    Attributes:
        image: See `pixels_of`.
        strength: Share of the steps that are taken, above 0; at 1 all, from noise alone.
        mask: See `mask_of`; None: everywhere.
    """

    image: Any
    strength: float
    mask: Any = None

    def skipped(self, steps: int) -> int:
        """How many of the steps are left out, as in diffusers. ValueError where none is left."""
        if not is_number(self.strength) or not 0 < self.strength <= 1:
            raise ValueError(
                f"strength is {self.strength!r}; it must be above 0 and at most 1, which starts from noise"
            )
        if (taken := int(steps * self.strength)) < 1:
            least = math.ceil(1000 / steps) / 1000
            raise ValueError(f"strength {self.strength} of {steps} steps is none; give {least} or more")
        return steps - taken

    def begin(self, pipe: Any, noise: Tensor, scheduler: Any, first: int) -> "Known":
        """The images of a call with this noise (N, C, H, W), from the scheduler's timestep number `first` on."""
        check_start(scheduler, first)
        N, (C, H, W), times = len(noise), pipe.image_shape, scheduler.timesteps
        pixels = pixels_of(self.image, N, (C, H, W)).to(noise.device)
        anew = None if self.mask is None else mask_of(self.mask, N, (H, W)).to(noise.device)
        x0 = encode(pipe.vae, pixels, pipe.config.latents)

        def at(i: int) -> Tensor:
            return noised(scheduler, x0, noise, times[i]) if i < len(times) else x0

        return Known(pixels, anew, at, at(first) if first else noise, first)


class Known:
    """The images that a call is drawn from, on their way through its steps.

    Args:
        pixels: (N, C, H, W).
        anew: bool (N, 1, H, W), where something new is drawn; None: everywhere.
        at: i -> what they are as the network's x at the noise of the scheduler's timestep number i.
        start: Where the first step of the call starts from.
        first: The number of its timestep.
    """

    def __init__(
        self, pixels: Tensor, anew: Tensor | None, at: Callable[[int], Tensor], start: Tensor, first: int
    ) -> None:
        self.pixels, self.anew, self.at, self.start, self.first = pixels, anew, at, start, first

    def after(self, then: StepEnd) -> StepEnd:
        """`then`, and after it the known region put back as it is at the noise there."""

        def end(k: int, t: Tensor, x: Tensor) -> Tensor:
            x = then(k, t, x)
            if self.anew is None:
                return x
            return torch.where(adaptive_max_pool2d(self.anew.float(), x.shape[2:]) > 0, x, self.at(self.first + k + 1))

        return end

    def pasted(self, x: Tensor) -> Tensor:
        """Decoded images, with the known region to the bit."""
        return x if self.anew is None else torch.where(self.anew, x, self.pixels)


def pixels_of(image: Any, N: int, shape: tuple[int, int, int]) -> Tensor:
    """Images as x in [-1, 1], (N, C, H, W) float32; one is meant for all N.

    Args:
        image: PIL images, uint8 (n, H, W, C), floats in [0, 1] likewise, or a tensor (n, C, H, W) in [-1, 1]: what a
            call gives as "pil", "np" and "pt"; n is N or 1, or of a single image left out.
        N: How many there must be.
        shape: (C, H, W).
    """
    mode = {1: "L", 3: "RGB"}.get(shape[0])
    if isinstance(image, Image.Image):
        image = [image]
    if isinstance(image, list | tuple) and image and all(isinstance(one, Image.Image) for one in image):
        if deep := next((one.mode for one in image if one.mode.startswith(("I", "F"))), None):
            raise ValueError(f"image is of mode {deep}, which has more than 8 bits; convert it")
        image = [upright(one) for one in image]
        if len({one.size for one in image}) > 1:
            raise ValueError("images are of several sizes; bring them to the model's")
        image = np.stack([np.asarray(one.convert(mode)).reshape(one.height, one.width, -1) for one in image])
    if isinstance(image, Tensor) and not image.is_floating_point():
        raise ValueError(f"image is a tensor of {image.dtype}; give floats in [-1, 1], or a uint8 array (n, H, W, C)")
    if isinstance(image, np.ndarray) and image.dtype != np.uint8 and image.dtype.kind != "f":
        raise ValueError(f"image is an array of {image.dtype}; give uint8, or floats in [0, 1]")
    if isinstance(image, np.ndarray):
        image = image[None] if image.ndim == 3 else image
        x = from_pixels(image) if image.dtype == np.uint8 else torch.as_tensor(image).movedim(-1, 1).float() * 2 - 1
    elif isinstance(image, Tensor):
        x = (image[None] if image.ndim == 3 else image).float()
    else:
        raise ValueError(f"image is {type(image).__name__}; give PIL images, an array (n, H, W, C) or a tensor")
    if x.ndim != 4 or len(x) not in (1, N) or tuple(x.shape[1:]) != shape:
        C, H, W = shape
        raise ValueError(f"images are (n, C, H, W) = {tuple(x.shape)}; they must be {_one_or(N)} of {C} x {H} x {W}")
    if not bool((x.abs() <= 1).all()):
        raise ValueError("images have values outside of [-1, 1] as a tensor, or [0, 1] as an array; bring them there")
    return x.expand(N, -1, -1, -1)


def _one_or(N: int) -> str:
    return "1" if N == 1 else f"{N} or 1"


def mask_of(mask: Any, N: int, size: tuple[int, int]) -> Tensor:
    """Where to repaint, bool (N, 1, H, W): a PIL image or numbers that are above half white, or a bool mask."""
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L")) / 255
    kind = getattr(mask, "dtype", None)
    if kind in (torch.uint8, np.uint8) and mask.max() == 1:
        raise ValueError("mask_image is uint8 with no value above 1, where 255 is white; give bools, or 0 and 255")
    if kind is not None and "complex" in str(kind):
        raise ValueError(f"mask_image is {kind}; give bools, uint8 or numbers in [0, 1]")
    found = torch.as_tensor(mask) if isinstance(mask, Tensor | np.ndarray) else torch.empty(0)
    found = found if found.dtype == torch.bool else found.float() / (255 if found.dtype == torch.uint8 else 1) > 0.5
    found = found.reshape(-1, 1, *found.shape[-2:]) if found.ndim >= 2 else found
    if isinstance(mask, Tensor | np.ndarray) and bool(torch.as_tensor(mask).isnan().any()):
        raise ValueError("mask_image has values that are no numbers (nan)")
    if tuple(found.shape[2:]) != size or len(found) not in (1, N):
        raise ValueError(f"mask_image is not {_one_or(N)} of {size[0]} x {size[1]}; white (True) is what is drawn anew")
    return found.expand(N, -1, -1, -1)
