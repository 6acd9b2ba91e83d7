"""How far do the images that a sampler passes through stray from those that the network was trained on?

    python -m ditmoe.analysis.exposure MODEL [--samplers ddim ts-ddim ...] [--steps 20] [--num 256] [--out exposure.png]

Exposure bias: in training the network sees clean images with noise, in sampling its own results. The meter follows
the mean over images of their variance over pixels, step by step, and sets it against the training marginal
``signal^2 v + noise^2``, v being the mean variance of clean training images: above 1 the images are too noisy for
their timestep, below 1 too smooth.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from torch import Tensor

from samplers.catalog import SAMPLERS, prediction_type_of, scheduler_for
from samplers.criterion import check_data_variance
from samplers.loop import sample
from samplers.noise import image_generators, initial_noise

from ..files import read_object
from ..handed_in import check_no_code, check_scheduler, check_weights
from ..launch.start import best_device

NETWORKS = ("diffusers", "ditmoe.model")  # modules that a pipeline folder may name


class Reading(NamedTuple):
    """What the meter reads before one network call.

    Attributes:
        timestep: the scheduled timestep.
        variance: mean over the images of their unbiased variance over the pixels.
        expected: the same of training images at that timestep.
    """

    timestep: float
    variance: float
    expected: float

    @property
    def ratio(self) -> float:
        """Measured over expected: 1 without exposure bias."""
        return self.variance / self.expected


def measure(
    model: Any,
    scheduler: Any,
    data_variance: float,
    *,
    num_images: int,
    num_inference_steps: int,
    seed: int = 0,
    batch_size: int = 64,
    guidance_scale: float = 1.0,
    epsilon_scale: float = 1.0,
) -> list[Reading]:
    """One `Reading` before every network call.

    ``model`` is a network with diffusers' config (sample_size, in_channels, and num_classes or, of the stock DiT,
    num_embeds_ada_norm, which is the null label too), ``data_variance`` the mean over clean training images of their
    variance over the pixels. Classes are taken in turn; image i depends on (seed, i). Raises ValueError for what
    `samplers.sample` refuses, and FloatingPointError for images that are not finite.
    """
    sums: dict[int, float] = {}
    times: dict[int, float] = {}

    def note(k: int, t: Tensor, x_t: Tensor, _x0: Tensor | None) -> None:
        variance = float(x_t.flatten(1).float().var(dim=1, unbiased=True).double().sum())
        if not math.isfinite(variance):
            raise FloatingPointError(
                f"the images at timestep {float(t):.0f} are not finite: the weights are damaged, or guidance_scale "
                f"{guidance_scale} and epsilon_scale {epsilon_scale} are too much for them; use values near 1"
            )
        sums[k] = sums.get(k, 0.0) + variance
        times[k] = float(t)

    c = model.config
    classes = getattr(c, "num_classes", None) or getattr(c, "num_embeds_ada_norm", None) or 0
    for start in range(0, num_images, batch_size):
        indices = range(start, min(start + batch_size, num_images))
        generators = image_generators(seed, indices)
        sample(
            model,
            scheduler,
            initial_noise(generators, (c.in_channels, c.sample_size, c.sample_size), model.device),
            num_inference_steps=num_inference_steps,
            class_labels=torch.tensor([i % classes for i in indices]) if classes else None,
            null_label=classes if classes else None,
            guidance_scale=guidance_scale,
            epsilon_scale=epsilon_scale,
            generators=generators,
            callback=note,
        )
    return [
        Reading(times[k], sums[k] / num_images, training_variance(scheduler, times[k], data_variance))
        for k in sorted(sums)
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
        lines += [f"{name}: variance over that of training, worst {worst.ratio:.3f} at t = {worst.timestep:.0f}", ""]
        lines += ["| t | variance | expected | ratio |", "|---|---|---|---|"]
        lines += [f"| {r.timestep:.0f} | {r.variance:.4f} | {r.expected:.4f} | {r.ratio:.3f} |" for r in rows]
        lines.append("")
    return "\n".join(lines)


def plot(readings: dict[str, list[Reading]], path: Path) -> None:
    """A picture of the ratios over the timesteps, one line a sampler."""
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


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ditmoe.analysis.exposure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="a pipeline folder, or a run folder with model/ in it")
    parser.add_argument("--samplers", nargs="+", default=["ddim"], help=f"of {', '.join(SAMPLERS)}")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--num", type=int, default=256, help="images")
    parser.add_argument("--cfg", type=float, default=1.0, help="guidance scale; 1 is none")
    parser.add_argument("--epsilon-scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--data-variance", type=float, help="default: saved with the model")
    parser.add_argument("--out", type=Path, default=Path("exposure.png"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and plot; the exit code, which is 2 for the user's mistakes, 1 for images that are not finite."""
    args = arguments(argv)
    try:
        readings = _read(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(readings))
    plot(readings, args.out)
    print(f"wrote {args.out}")
    return 0


def _read(args: argparse.Namespace) -> dict[str, list[Reading]]:
    for name in ("num", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}; it must be 1 or more")
    a_file = args.out.suffix in (".png", ".pdf", ".svg") and not args.out.is_dir()
    if not a_file or not args.out.absolute().parent.is_dir():
        raise ValueError(f"out {args.out} must be a .png, .pdf or .svg file in a folder that exists")
    folder = args.model if (args.model / "model_index.json").is_file() else args.model / "model"
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{args.model} holds no model: neither model_index.json nor model/model_index.json is there")
    model = load_network(folder).float().to(best_device())
    check_scheduler(folder / "scheduler")
    config = read_object(folder / "scheduler" / "scheduler_config.json")
    variance = config.get("data_variance") if args.data_variance is None else args.data_variance
    if variance is None:
        raise ValueError("data_variance is not known; give --data-variance, the mean variance of training images")
    check_data_variance(variance)
    schedulers = {
        name: scheduler_for(name, config, args.steps) for name in args.samplers
    }  # every name is checked first
    return {
        name: measure(
            model, scheduler, variance, num_images=args.num, num_inference_steps=args.steps, seed=args.seed,
            batch_size=args.batch_size, guidance_scale=args.cfg, epsilon_scale=args.epsilon_scale,
        )
        for name, scheduler in schedulers.items()
    }  # fmt: skip


def load_network(folder: Path) -> Any:
    """The network of a pipeline folder, without the pipeline's own class.

    Raises ValueError when it is of a library that is not known: a model folder does not decide what is imported; and
    when its weights cannot be read.
    """
    entry = read_object(folder / "model_index.json").get("transformer")
    library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, entry)
    if library not in NETWORKS:
        raise ValueError(f"{folder}: its transformer is of {library!r}, which is not one of {', '.join(NETWORKS)}")
    found: Any = getattr(import_module(library), str(name), None)
    is_network = isinstance(found, type) and issubclass(found, ModelMixin)
    if not is_network:
        raise ValueError(f"{folder}: {library} has no network {name!r}")
    if list(signature(found.forward).parameters)[2:4] != ["timestep", "class_labels"]:
        raise ValueError(
            f"{folder}: {name} takes more than images, timesteps and class labels; the meter cannot ask it"
        )
    check_no_code(folder)
    check_weights(found, folder / "transformer", renamed=library == "diffusers")
    try:
        return found.from_pretrained(folder / "transformer", local_files_only=True, use_safetensors=True).eval()
    except (OSError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{folder / 'transformer'} cannot be loaded: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    sys.exit(main())
