"""Draw images from a trained model: a set that was asked for, in memory or batch by batch.

Image i is a function of (seed, i, its label) alone, so a set does not depend on the batch size, on the number of
processes, or on how often it was interrupted. Shapes: N images, C channels, H W size; pictures are uint8 (N, H, W, C).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.pixels import to_pixels
from ..launch.progress import progress
from ..pipeline import DiTMoEPipeline

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class RequestedSet:
    """`num` images that a pipeline is asked for, with `labels`, one an image, or None of a model without labels.

    `options` are arguments of the pipeline's call; `sampler` is its name, steps, network calls and options, `made` who
    guides and how the network is run, as a report has them. `batch_size` are drawn at once; where they are `filled` a
    smaller batch is drawn with its last image repeated, as a compiled network wants one size.
    """

    pipe: DiTMoEPipeline
    labels: Sequence[int] | None
    num: int
    options: Mapping[str, Any]
    sampler: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    made: Mapping[str, Any] = field(default_factory=dict)
    filled: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the pictures."""
        channels, height, width = self.pipe.image_shape
        return height, width, channels

    @property
    def are_latents(self) -> bool:
        """Whether the model makes latents and has no VAE to decode them, so that they are no pictures."""
        return self.pipe.vae is None and (self.pipe.config.latents is not None or self.shape[2] not in (1, 3))

    def batch(self, indices: Sequence[int]) -> Pixels:
        """The images of these indices, uint8 (n, H, W, C)."""
        self.pipe.set_progress_bar_config(disable=True)
        more = max(0, self.batch_size - len(indices)) if self.filled else 0
        drawn = [*indices, *[indices[-1]] * more]
        labels = None if self.labels is None else [self.labels[i] for i in drawn]
        x = self.pipe(labels, num_images=len(drawn), indices=drawn, output_type="pt", **self.options).images
        return to_pixels(x[: len(indices)])

    def whole(self, batch_size: int) -> Pixels:
        """All N images in memory, uint8 (N, H, W, C)."""
        return np.concatenate([self.batch(indices) for indices in batches(self.num, batch_size)])

    def read(self, limit: int, batch_size: int, rank: int, world: int) -> Iterator[tuple[NDArray[np.int64], Pixels]]:
        """A process's share of the first `limit` images: indices (n,) and pictures (n, H, W, C)."""
        for indices in batches(limit, batch_size, rank, world, shown=False):
            yield np.array(indices), self.batch(indices)


def balanced_labels(pipe: DiTMoEPipeline, num: int) -> list[int] | None:
    """`num` labels, the trained classes in turn; None for a model without labels."""
    classes = sorted(pipe.id2label) or range(pipe.transformer.config.num_classes)
    return [classes[i % len(classes)] for i in range(num)] if pipe.transformer.config.num_classes else None


def draw(
    pipe: DiTMoEPipeline, labels: Sequence[int] | None, num: int, *, sampler: str | None = None,
    steps: int | None = None, cfg: float | None = None, seed: int = 0, batch_size: int = 64,
    more: Mapping[str, Any] | None = None,
) -> Pixels:  # fmt: skip
    """Images 0..num-1 of a seed, uint8 (num, H, W, C); the batch size changes nothing but speed and memory.

    `more`: further arguments of the pipeline's call, such as {"eta": 1.0}.
    """
    options = {"sampler": sampler, "num_inference_steps": steps, "guidance_scale": cfg, "seed": seed, **(more or {})}
    return RequestedSet(pipe, labels, num, options).whole(batch_size)


def batches(num: int, batch_size: int, rank: int = 0, world: int = 1, *, shown: bool = True) -> Iterator[range]:
    """The indices of a process's batches; the first process shows how far it is, a batch being done at the next."""
    mine = [range(num)[start : start + batch_size] for start in range(rank * batch_size, num, world * batch_size)]
    with progress(sum(map(len, mine)), "sampling", shown=shown and not rank) as done:
        for batch in mine:
            yield batch
            done(len(batch))
