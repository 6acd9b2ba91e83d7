"""Draw many images from a trained model and write them where they are wanted.

Shapes: N images, C channels, H W size; pictures are uint8 (N, H, W, C).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from .cli import SampleArgs
from .config import Config
from .figures import sample_grid, visible
from .pipeline import DiTMoEPipeline, best_device, load, to_pixels

PIPELINE_OPTIONS = ("eta", "guidance_interval", "guidance_channels", "guidance_rule", "epsilon_scale")


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
    pipe.set_progress_bar_config(disable=True)
    parts = []
    for start in tqdm(range(0, num, batch_size), desc="sampling", unit="batch", disable=None):
        indices = range(start, min(start + batch_size, num))
        x = pipe(
            None if labels is None else [labels[i] for i in indices],
            num_images=len(indices) if labels is None else None,
            sampler=sampler,
            num_inference_steps=steps,
            guidance_scale=cfg,
            seed=seed,
            indices=indices,
            output_type="pt",
            **(more or {}),
        ).images
        parts.append(to_pixels(x))
    return np.concatenate(parts)


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
        path.write_text("".join(json.dumps(each) + "\n" for each in rows))


def run(args: SampleArgs) -> None:
    """What `sample.py` does: load, draw, write, say where.

    Raises:
        ValueError: A model that cannot be loaded, a value that does not fit it, or an output that exists.
    """
    pipe = load(args.model).to(best_device())
    if args.classes is not None:
        labels: list[int] | None = list(args.classes)
        num = len(args.classes)
    else:
        num = args.num or 8 * min(max(len(pipe.id2label), 1), 20)
        labels = balanced_labels(pipe, num)
    if args.out.suffix == ".jpg":
        raise ValueError(f"out {args.out}: give a .png or .npz file, or a folder of PNG files")
    if args.out.is_dir() and any(args.out.iterdir()):
        raise ValueError(f"--out {args.out} is not empty; give another folder")
    more = {name: getattr(args, name) for name in PIPELINE_OPTIONS} | {"sampler_options": args.sampler_options()}
    images = draw(
        pipe, labels, num, sampler=args.sampler, steps=args.steps, cfg=args.cfg, seed=args.seed,
        batch_size=args.batch_size, more=more,
    )  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.suffix == ".npz":
        write_npz(images, labels, args.out)
    elif args.out.suffix == ".png":
        write_grid(images, labels, pipe.id2label, args.out)
    else:
        write_folder(images, labels, args.out)
    sampler, steps = args.sampler or pipe.config.sampler, args.steps or pipe.config.num_inference_steps
    calls = pipe.network_calls(sampler, steps)
    print(f"{num} images in {args.out} ({sampler}, {steps} steps, {calls} network calls an image)")


def write_npz(images: NDArray[np.uint8], labels: Sequence[int] | None, path: Path) -> None:
    """ADM's layout: arr_0 uint8 (N, H, W, C) and, for a model with classes, arr_1 labels (N,) int64."""
    temporary = path.with_name(path.name + ".tmp")
    arrays = [images] if labels is None else [images, np.asarray(labels, dtype=np.int64)]
    with temporary.open("wb") as file:
        np.savez(file, *arrays)
    temporary.replace(path)


def write_folder(images: NDArray[np.uint8], labels: Sequence[int] | None, folder: Path) -> None:
    """One PNG an image: 000000.png, or 000000-class7.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(images):
        name = f"{i:06d}.png" if labels is None else f"{i:06d}-class{labels[i]}.png"
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(folder / name)


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
