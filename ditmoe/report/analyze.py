"""The command analyze: images through a model or several, what the experts did in tables, a picture and a JSON file."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..analysis.findings import Row, judge, layer_row, mean_rows, tables, values_of, verdicts
from ..analysis.routing import batch_a_class, chosen_classes
from ..analysis.tally import tally
from ..config.checks import plural
from ..config.file import trained_by
from ..config.sample import AnalyzeArgs
from ..config.sections import Config
from ..data.open import open_data, open_held_out
from ..data.sets import ImageSet
from ..files import write_json
from ..model import DiTMoETransformer2DModel, moe_layer_names
from ..pipeline import load
from .choices import draw_choices

MOST_CLASSES = 20  # evenly chosen ones of a set that has more
JSON, PICTURE = "analysis.json", "analysis.png"


def run(args: AnalyzeArgs) -> None:
    """Print the tables, write analysis.json and analysis.png.

    Raises:
        ValueError: A folder holds no model of ours, or one without experts; its data are gone or too few; the models
            differ in what is compared.
    """
    shapes = [shape_of(load(model).transformer, model) for model in args.models]  # every one is checked first
    for model, shape in zip(args.models, shapes, strict=True):
        if shape != shapes[0]:
            raise ValueError(f"{model} has {_said(shape)}, {args.models[0]} has {_said(shapes[0])}; give equal ones")
    runs = [_one(args, model) for model in args.models]
    rows, judged = mean_rows([r["layers"] for r in runs]), judge([r["findings"] for r in runs])
    timesteps = [(b + 0.5) * 1000 / args.bins for b in range(args.bins)]
    print(f"{_said(shapes[0])}; {args.bins} time bins, seed {args.seed}", end="\n\n")
    print(tables(rows, timesteps), end="\n\n")
    print(verdicts(judged))
    args.out.mkdir(parents=True, exist_ok=True)
    draw_choices([r["layers"] for r in runs], args.out / PICTURE, timesteps=timesteps)
    asked = {"num": args.num, "bins": args.bins, "seed": args.seed}
    found = {"asked": asked, "timesteps": timesteps, "runs": runs, "mean": rows[-1], "findings": judged}
    write_json(args.out / JSON, plain(found))
    print(f"\nwrote {args.out / JSON} and {args.out / PICTURE}")


def _one(args: AnalyzeArgs, model: Path) -> Row:
    """What there is to say of one model; announced in a line."""
    config, net = trained_by(model), load(model, fast=True).transformer.eval()
    data, source = images_of(args, config, net)
    classes, x = a_class_each(data, chosen_classes(data, MOST_CLASSES), args.num, args.seed)
    Y, n = x.shape[:2]
    print(f"{model}: {Y * n} images, {n} of each of {plural(Y, 'class')}, {source}", flush=True)
    counted = tally(net, config.objective, x, classes, args.bins, args.seed)
    layers = [layer_row(name, t, args.seed) for name, t in zip(moe_layer_names(net), counted, strict=True)]
    return {
        "model": str(model), "images": Y * n, "classes": [data.id2label.get(c, "all") for c in classes],
        "source": source, "layers": layers, "findings": values_of(layers),
    }  # fmt: skip


def images_of(args: AnalyzeArgs, config: Config, net: DiTMoETransformer2DModel) -> tuple[ImageSet, str]:
    """A run's held-out images, or where there are none those that it was trained on, and a sentence on which."""
    size, channels = net.config.sample_size, net.config.in_channels
    where = config.data if args.data_path is None else replace(config.data, path=args.data_path)
    held_out, kind = None, "training"
    try:
        held_out = open_held_out(where, size=size, channels=channels)
    except ValueError as error:
        kind = f"training (those held out cannot be used: {error})"
    data = open_data(where, size=size, channels=channels) if held_out is None else held_out
    if net.null_label is not None and len(data.id2label) > net.null_label:
        raise ValueError(f"{data.source}: {plural(len(data.id2label), 'class')}, but the model knows {net.null_label}")
    return data, f"{kind if held_out is None else 'held out'}: {data.source}"


def a_class_each(data: ImageSet, classes: Sequence[int], num: int, seed: int) -> tuple[list[int], Tensor]:
    """`num` images, as many of each class, fewer where one has fewer: see `batch_a_class`. ValueError for too few."""
    fewest = min((int((data.labels == c).sum()), c) for c in classes)
    if fewest[0] < 2:
        raise ValueError(f"{data.source}: class {fewest[1]} has one image, and two are needed; give other --data.path")
    if num < 2 * len(classes):
        raise ValueError(f"num is {num}; for {plural(len(classes), 'class')} it must be {2 * len(classes)} or more")
    return batch_a_class(data, classes, min(num // len(classes), fewest[0]), seed)


def shape_of(net: DiTMoETransformer2DModel, model: Path) -> tuple[list[str], int, int]:
    """What runs that are compared have in common: layers, experts, experts a token."""
    if not (layers := moe_layer_names(net)):
        raise ValueError(f"{model} has no experts (a dense model); give one with experts")
    E = net.config.num_experts
    return layers, E, E if net.rule.kind == "dense" else net.config.top_k


def _said(shape: tuple[Sequence[str], int, int]) -> str:
    layers, experts, top_k = shape
    numbers = [name.removeprefix("block ") for name in layers]
    where = f"blocks {', '.join(numbers)}" if len(numbers) <= 12 else f"{len(numbers)} blocks, the first {numbers[0]}"
    return f"{top_k} of {experts} experts a token in {where}"


def plain(value: Any) -> Any:
    """JSON values: arrays as lists, what is not finite as null."""
    text = json.dumps(value, default=lambda array: array.tolist())
    return json.loads(text, parse_constant=lambda _: None)
