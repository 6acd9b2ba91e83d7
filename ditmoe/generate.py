"""Draw images from a trained model, for a picture or a report. Large sets that go to disk: `image_sets`.

Shapes: N images, C channels, H W size; pictures are uint8 (N, H, W, C).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from .config import Config
from .figures import sample_grid, visible
from .pipeline import DiTMoEPipeline, best_device, to_pixels


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


def progress(config: Config, step: int, pipe: DiTMoEPipeline, score: Callable[..., dict[str, Any]] | None) -> None:
    """What a run shows while it trains: progress/step-000500.png, and a row of progress/scores.jsonl.

    Always the same images of the run's seed, so that the pictures of two steps can be laid side by side.
    """
    pipe.to(best_device())
    labels = balanced_labels(pipe, config.sample.num)
    images = draw(
        pipe, labels, config.sample.num, steps=config.sample.steps, cfg=config.sample.cfg if labels else None,
        seed=config.seed, batch_size=config.sample.batch_size,
    )  # fmt: skip
    folder = config.out / "progress"
    folder.mkdir(exist_ok=True)
    shown = 8 * max(len(pipe.id2label), 1)
    write_grid(images[:shown], labels and labels[:shown], pipe.id2label, folder / f"step-{step:06d}.png")
    if score is not None:
        report = score(images)
        row = {"step": step, "metric": report["metric"], "value": report["value"], "num": len(images)}
        path = folder / "scores.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        rows = [old for old in rows if old["step"] < step] + [row]  # a resumed run comes by again
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(each) + "\n" for each in rows))
        temporary.replace(path)


def write_grid(images: NDArray[np.uint8], labels: Sequence[int] | None, id2label: dict[int, str], path: Path) -> None:
    """One picture: a row a class (rows of eight without labels)."""
    keys = [i // 8 for i in range(len(images))] if labels is None else list(labels)
    images = visible(images)
    rows = [images[[i for i, key in enumerate(keys) if key == row]] for row in sorted(set(keys))]
    width = max(len(row) for row in rows)
    blank = np.full_like(images[:1], 255)
    full = np.stack([np.concatenate([row, np.repeat(blank, width - len(row), axis=0)]) for row in rows])
    names = ["" if labels is None else id2label.get(row, str(row)) for row in sorted(set(keys))]
    sample_grid(full, names, path)
