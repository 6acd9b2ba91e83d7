"""How far do the images that a sampler passes through stray from those that the network was trained on?

    python -m ditmoe exposure MODEL [--samplers ddim ts-ddim ...] [--steps 20] [--num 256] [--out exposure.png]

Exposure bias: in training the network sees clean images with noise, in sampling its own results. The meter sets the
images' mean variance over pixels, step by step, against the training marginal ``signal^2 v + noise^2``, v being that of
clean training images: above 1 the images are too noisy for their timestep, below 1 too smooth.
"""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samplers.catalog import prediction_type_of
from samplers.criterion import check_data_variance
from samplers.loop import sample
from samplers.noise import image_generators, initial_noise

from ..config.sample import ExposureArgs
from ..generate.pictures import load_matplotlib
from ..pipeline import load


class Reading(NamedTuple):
    """What the meter reads before one network call."""

    timestep: float  # as scheduled
    variance: float  # mean over the images of their unbiased variance over the pixels
    expected: float  # the same of training images at that timestep

    @property
    def ratio(self) -> float:
        """Measured over expected: 1 without exposure bias."""
        return self.variance / self.expected


def measure(
    model: Any, scheduler: Any, data_variance: float, *, num_images: int, num_inference_steps: int, seed: int = 0,
    batch_size: int = 64, guidance_scale: float = 1.0, epsilon_scale: float = 1.0,
) -> list[Reading]:  # fmt: skip
    """One `Reading` before every network call.

    ``model`` is a network with the config of ours (sample_size, in_channels, num_classes, which is the null label too),
    ``data_variance`` the mean over clean training images of their variance over the pixels. Classes are taken in turn;
    image i depends on (seed, i). Raises ValueError for what `samplers.sample` refuses, and FloatingPointError for
    images that are not finite.
    """
    times, sums = dict[int, float](), defaultdict[int, float](float)

    def note(k: int, t: Tensor, x_t: Tensor, _x0: Tensor | None) -> None:
        variance = float(x_t.flatten(1).float().var(dim=1, unbiased=True).double().sum())
        if not math.isfinite(variance):
            raise FloatingPointError(
                f"the images at timestep {float(t):.0f} are not finite: the weights are damaged, or guidance_scale "
                f"{guidance_scale} and epsilon_scale {epsilon_scale} are too much for them; use values near 1"
            )
        sums[k] += variance
        times[k] = float(t)

    c = model.config
    for start in range(0, num_images, batch_size):
        indices = range(start, min(start + batch_size, num_images))
        generators = image_generators(seed, indices)
        sample(
            model, scheduler, initial_noise(generators, (c.in_channels, c.sample_size, c.sample_size), model.device),
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, epsilon_scale=epsilon_scale,
            class_labels=torch.tensor([i % c.num_classes for i in indices]) if c.num_classes else None,
            null_label=c.num_classes or None, generators=generators, callback=note,
        )  # fmt: skip
    return [
        Reading(t, sums[k] / num_images, training_variance(scheduler, t, data_variance))
        for k, t in sorted(times.items())
    ]


def training_variance(scheduler: Any, timestep: float, data_variance: float) -> float:
    """Expected variance over the pixels of a training image at ``timestep``: signal^2 v + noise^2."""
    if prediction_type_of(scheduler.config) == "flow_prediction":
        s = timestep / scheduler.config.num_train_timesteps
        return float((1 - s) ** 2 * data_variance + s**2)
    alpha_bar = float(scheduler.alphas_cumprod[int(timestep)])
    return alpha_bar * data_variance + 1 - alpha_bar


def table(readings: dict[str, list[Reading]]) -> str:
    """Markdown: for each sampler its worst step, and a table with a row a network call."""
    lines = []
    for name, rows in readings.items():
        worst = max(rows, key=lambda row: abs(math.log(row.ratio)))
        lines += [
            f"{name}: variance over that of training, worst {worst.ratio:.3f} at t = {worst.timestep:.0f}", "",
            "| t | variance | expected | ratio |", "|---|---|---|---|",
            *(f"| {r.timestep:.0f} | {r.variance:.4f} | {r.expected:.4f} | {r.ratio:.3f} |" for r in rows), "",
        ]  # fmt: skip
    return "\n".join(lines)


def plot(readings: dict[str, list[Reading]], path: Path) -> None:
    """A picture of the ratios over the timesteps, one line a sampler."""
    load_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, rows in readings.items():
        axes.plot([r.timestep for r in rows], [r.ratio for r in rows], marker=".", label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.invert_xaxis()
    axes.set(xlabel="timestep (noise to data)", ylabel="variance of x_t / that of training images")
    axes.legend()
    figure.savefig(path, dpi=120)


def run(args: ExposureArgs) -> None:
    """Measure, print the table, write the plot. Errors as of `pipeline.load` and `measure`."""
    pipe = load(args.model, fast=True)
    variance = pipe.scheduler.config.get("data_variance") if args.data_variance is None else args.data_variance
    if variance is None:
        raise ValueError("data_variance is not known; give --data-variance, the mean variance of training images")
    check_data_variance(variance)
    readings = {}
    schedulers = {name: pipe.scheduler_for(name, args.steps) for name in args.samplers}  # every one is checked first
    for name, scheduler in schedulers.items():
        readings[name] = measure(
            pipe.transformer, scheduler, variance, num_images=args.num, num_inference_steps=args.steps, seed=args.seed,
            batch_size=args.batch_size, guidance_scale=args.cfg, epsilon_scale=args.epsilon_scale,
        )  # fmt: skip
    print(table(readings))
    plot(readings, args.out)
    print(f"wrote {args.out}")
