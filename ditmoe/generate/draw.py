"""Draw images from a trained model, for a picture or a report. Large sets that go to disk: `image_sets`.

Shapes: N images, C channels, H W size; pictures are uint8 (N, H, W, C).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ..data.pixels import to_pixels
from ..pipeline import DiTMoEPipeline


def balanced_labels(pipe: DiTMoEPipeline, num: int) -> list[int] | None:
    """`num` labels, the trained classes in turn; None for a model without labels."""
    if not pipe.transformer.config.num_classes:
        return None
    classes = sorted(pipe.id2label) or list(range(pipe.transformer.config.num_classes))
    return [classes[i % len(classes)] for i in range(num)]


def draw(
    pipe: DiTMoEPipeline,
    labels: Sequence[int] | None,
    num: int,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    cfg: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    more: Mapping[str, Any] | None = None,
) -> NDArray[np.uint8]:
    """Images 0..num-1 of a seed, uint8 (num, H, W, C); the batch size changes nothing but speed and memory.

    `more`: further arguments of the pipeline's call, such as {"eta": 1.0}.
    """
    options = {"sampler": sampler, "num_inference_steps": steps, "guidance_scale": cfg, "seed": seed, **(more or {})}
    return draw_all(pipe, labels, num, options, batch_size)


def draw_all(
    pipe: DiTMoEPipeline, labels: Sequence[int] | None, num: int, options: Mapping[str, Any], batch_size: int
) -> NDArray[np.uint8]:
    """Images 0..num-1, uint8 (num, H, W, C), under a progress bar; `options` are arguments of the pipeline's call."""
    starts = tqdm(range(0, num, batch_size), desc="sampling", unit="batch", disable=None)
    return np.concatenate(
        [draw_some(pipe, labels, range(start, min(start + batch_size, num)), options) for start in starts]
    )


def draw_some(
    pipe: DiTMoEPipeline, labels: Sequence[int] | None, indices: Sequence[int], options: Mapping[str, Any]
) -> NDArray[np.uint8]:
    """The images of these indices, uint8 (n, H, W, C); labels are those of the whole set.

    `options`: arguments of the pipeline's call.
    """
    pipe.set_progress_bar_config(disable=True)
    x = pipe(
        None if labels is None else [labels[i] for i in indices],
        num_images=len(indices) if labels is None else None,
        indices=indices,
        output_type="pt",
        **options,
    ).images
    pixels: NDArray[np.uint8] = to_pixels(x)
    return pixels
