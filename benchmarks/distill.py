"""What teachers are worth: two specialists into one student, and the repair of a model that lost experts.

    python -m benchmarks.distill specialists --out runs/specialists [--steps 2200]
    python -m benchmarks.distill repair --out runs/repair [--model models/fashion --prune 12 --steps 180]
    python -m benchmarks.distill speed --models models/fashion models/fashion-4

`specialists`: digits 0 to 4 and 5 to 9 as two sets; a model of each is trained for half of the steps, and students of
both for all of them, with and without the teachers. `repair`: a model is pruned and trained on, with and without the
whole one as teacher. Errors are those of held-out images, with the same noise and times for every model. Runs that are
there are not made again. `speed`: processor time of 64 images as each model draws by itself, in turns.
"""

import argparse
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.held_out import held_out_errors
from benchmarks.timing import machine, round_robin
from ditmoe import pipeline
from ditmoe.config.file import trained_by
from ditmoe.config.sections import DataConfig
from ditmoe.data.open import open_data, open_held_out
from ditmoe.data.sets import ImageSet


@torch.inference_mode()
def errors(model: Path, data: ImageSet, first: int = 0) -> Tensor:
    """Of each image; the model's label 0 is their label `first`, and what it says of classes it lacks is nothing."""
    net = pipeline.load(model).transformer

    def say(x: Tensor, t: Tensor, y: Tensor) -> Any:
        return net(x, t, (y - first).clamp(0, net.config.num_classes - 1))

    return held_out_errors(say, trained_by(model).objective, data, min(5000, len(data)))


def train(out: Path, *words: object) -> Path:
    """A run, unless it is finished."""
    if not (out / "index.html").exists():
        argv = [*map(str, words), "--out", str(out), "--sample.num", "50"]
        subprocess.run([sys.executable, "train.py", *argv], check=True)
    return out


def specialists(args: argparse.Namespace) -> list[str]:
    """A line of the table for each half: the specialist's error, the students'."""
    data, test = open_data(DataConfig(), size=8, channels=1), open_held_out(DataConfig(), size=8, channels=1)
    assert test is not None
    halves = {"low": range(5), "high": range(5, 10)}
    for row, (label, pixels) in enumerate(zip(data.labels, data.images(range(len(data))), strict=True)):
        folder = args.out / ("low" if label in halves["low"] else "high") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[..., 0]).save(folder / f"{row:04}.png")
    sets = [args.out / name for name in halves]
    half, whole = length(args.steps // 2, args.seed), length(args.steps, args.seed)
    alone = [
        train(args.out / f"of-{place.name}", "digits", *half, "--data.name", "folder", "--data.path", place)
        for place in sets
    ]
    both = ("digits", *whole, "--data.mixture", *sets)
    plain = train(args.out / "plain", *both)
    taught = train(args.out / "taught", *both, "--distill.teachers", *alone, "--distill.by", "domain")
    lines = ["| digits | specialist | student | of it | student without teachers | of it |", "|---" * 6 + "|"]
    for specialist, (name, labels) in zip(alone, halves.items(), strict=True):
        rows = torch.tensor([label in labels for label in test.labels])
        own = float(errors(specialist, test, labels[0])[rows].mean())
        first, second = (float(errors(model, test)[rows].mean()) for model in (taught, plain))
        lines.append(f"| {name} | {own:.4f} | {first:.4f} | {first / own:.3f} | {second:.4f} | {second / own:.3f} |")
    return lines


def repair(args: argparse.Namespace) -> list[str]:
    """A line of the table for the whole, the pruned, and those that were trained on."""
    pruned = args.out / "pruned"
    if not pruned.exists():
        words = ["convert", str(args.model), str(pruned), "--prune", str(args.prune)]
        subprocess.run([sys.executable, "-m", "ditmoe", *words], check=True)
    more = (pruned / "training.json", *length(args.steps, args.seed), "--train.learning-rate", args.rate)
    more += ("--train.warmup-steps", 10, "--train.ema-decay", 0.98)
    models = {
        "whole": args.model, "pruned": pruned, "trained on": train(args.out / "plain", *more),
        "with the whole as teacher": train(args.out / "taught", *more, "--distill.teachers", args.model),
        "half and half": train(args.out / "half", *more, "--distill.teachers", args.model, "--distill.weight", 0.5),
    }  # fmt: skip
    test = open_held_out(trained_by(args.model).data, size=28, channels=1)
    assert test is not None
    found = {name: float(errors(model, test).mean()) for name, model in models.items()}
    lines = ["| | held-out error | of the whole |", "|---|---|---|"]
    return lines + [f"| {name} | {value:.5f} | {value / found['whole']:.4f} |" for name, value in found.items()]


def speed(args: argparse.Namespace) -> list[str]:
    """A line of the table for each model."""
    pipes = {str(model): pipeline.load(model) for model in args.models}

    def drawn(pipe: Any) -> None:
        pipe.set_progress_bar_config(disable=True)
        pipe([i % pipe.transformer.config.num_classes for i in range(64)], output_type="latent")

    seconds = round_robin({name: partial(drawn, pipe) for name, pipe in pipes.items()}, 3, time.process_time)
    lines = ["| model | calls | images/s |", "|---|---|---|"]
    return lines + [f"| {name} | {pipes[name].network_calls()} | {64 / value:.1f} |" for name, value in seconds.items()]


def length(steps: int, seed: int) -> tuple[object, ...]:
    """Of a run whose learning rate ends at zero; and its seed."""
    return "--max-steps", steps, "--train.decay-steps", steps, "--seed", seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["specialists", "repair", "speed"])
    parser.add_argument("--out", type=Path, help="of specialists and repair: folder of what is made")
    parser.add_argument("--models", type=Path, nargs="+", help="speed")
    parser.add_argument("--steps", type=int, help="default: 2,200 of digits, 180 of the repair")
    parser.add_argument("--seed", type=int, default=0, help="of training; give each its own --out")
    parser.add_argument("--model", type=Path, default=Path("models/fashion"), help="repair")
    parser.add_argument("--prune", type=int, default=12, help="repair: experts that stay")
    parser.add_argument("--rate", type=float, default=2e-3, help="repair: learning rate")
    args = parser.parse_args()
    if args.part == "speed":
        lines = speed(args)
    else:
        args.steps = args.steps or {"specialists": 2200, "repair": 180}[args.part]
        args.out.mkdir(parents=True, exist_ok=True)
        lines = {"specialists": specialists, "repair": repair}[args.part](args)
    print("\n".join([machine(), "", *lines]))


if __name__ == "__main__":
    main()
