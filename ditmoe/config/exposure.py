"""What `exposure` is asked. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class ExposureArgs:
    """How far do the images that a sampler passes through stray from those that the network was trained on?

    Prints, for every sampler and step, the variance of the images over that of training images, and plots it.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """A run folder, or a pipeline folder such as models/fashion."""
    samplers: tuple[str, ...] = ("ddim",)
    """Names of samplers.SAMPLERS."""
    steps: int = 20
    """Sampling steps."""
    num: int = 256
    """Number of images, classes in turn."""
    cfg: float = 1.0
    """Classifier-free guidance scale; 1 is none."""
    epsilon_scale: float = 1.0
    """Epsilon scaling: the predicted noise is divided by this; 1 is off, 1.005 typical."""
    seed: int = 0
    """Image i depends on (seed, i, its label) alone."""
    batch_size: int = 64
    """Images drawn at once; does not change them."""
    data_variance: float | None = None
    """Mean variance over the pixels of clean training images; default: saved with the model."""
    out: Path = Path("exposure.png")
    """The plot, a .png, .pdf or .svg file."""

    def __post_init__(self) -> None:
        for name in ("num", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        a_file = self.out.suffix in (".png", ".pdf", ".svg") and not self.out.is_dir()
        if not a_file or not self.out.absolute().parent.is_dir():
            raise ValueError(f"out {self.out} must be a .png, .pdf or .svg file in a folder that exists")
