"""Every rule of routing against the dense twin and the default: equal activated parameters, steps, data and seeds.

    python -m benchmarks.rules --out runs/rules [--steps 600] [--seeds 0 1 2] [--shifts 0 4] [--only dense topk ...]
    python -m benchmarks.rules --preset digits --out runs/rules-digits --shifts 0 --num 0
    python -m benchmarks.rules --preset narrow --out runs/rules-narrow

The preset is `fashion`, `digits` or `narrow`, which is `fashion` of width 64 with experts in every block and without
convolutions and long skips, where experts by place have beaten the twin (docs/lab/experts-on-fashion.md), and with Muon
on experts as on the twin's layers; its steps take half of the time. The router looks at the token unless the rule says
otherwise; with a shift of 4 each image is moved by up to 4 pixels in each direction, once and for all, so that routing
by place cannot help. All see the same batches, noise and times. `heads` is topk with 4 output heads and their loss,
`heads-0` without it. A line of `rows.jsonl` is one (phase, preset, compiled or not, rule, shift, seed); lines that are
there are not made again, and two processes may share the file where none has a line of the other. The phase `speed`
times steps and drawing of all rules in turns, and wants a quiet machine. `--page` writes the table into docs/rules.md,
and its plot.
"""

import argparse
import os
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from benchmarks.held_out import held_out_errors
from benchmarks.rows import Row, Rows
from benchmarks.rules_page import findings, plot, table
from benchmarks.scoring import Scorer
from benchmarks.timing import machine, round_robin
from benchmarks.train_step import Prepared, prepared
from ditmoe import pipeline
from ditmoe.analysis.findings import layer_row, values_of
from ditmoe.analysis.information import entropy
from ditmoe.analysis.routing import batch_a_class
from ditmoe.analysis.tally import tally
from ditmoe.config.presets import PRESETS
from ditmoe.config.rules import RULES, with_rule
from ditmoe.config.sections import Config
from ditmoe.data.open import open_data
from ditmoe.data.sets import ArrayImages
from ditmoe.generate.draw import balanced_labels, draw
from ditmoe.model import DiTMoETransformer2DModel, count_parameters, tokens_per_image
from ditmoe.training.state import update_ema
from ditmoe.training.step import optimise

NARROW: dict[str, Any] = {
    "hidden_size": 64,
    "ffn_width": 192,
    "refine_width": 0,
    "local_conv": False,
    "long_skips": False,
}
BASES = {name: PRESETS[name] for name in ("fashion", "digits")}
BASES["narrow"] = replace(
    BASES["fashion"],
    model=replace(BASES["fashion"].model, **NARROW),
    moe=replace(BASES["fashion"].moe, blocks="all", expert_width=64, shared_width=64),
    train=replace(BASES["fashion"].train, muon_on="all"),
)
OURS = ("dense", "topk", "place", "label+place", "heads-0", "heads")
MARK = ("<!-- made by benchmarks.rules -->", "<!-- end -->")


def configuration(
    base: str, name: str, steps: int, seed: int, centroids: Path | None, compiled: bool = False
) -> Config:
    """A rule's run of a preset. ValueError for an unknown one."""
    preset = BASES[base]
    train = replace(preset.train, decay_steps=steps, warmup_steps=min(200, steps // 6), compile=compiled)
    if name in ("dense", "mumoe"):
        train = replace(train, muon_on="trunk")  # they have no stacked experts
    start = replace(preset, max_steps=steps, seed=seed, train=train)
    inputs = {"place": "position", "label+place": "label+position"}
    start = replace(start, moe=replace(start.moe, router_input=inputs.get(name, "token")))
    if name == "dense":
        return replace(start, moe=replace(start.moe, blocks="none"))
    if name.startswith("heads"):
        own = replace(start.objective, expert_weight=0.1 * (name == "heads"))
        return replace(start, model=replace(start.model, head_experts=4), objective=own)
    if name in OURS:
        return start
    if name == "switchhead":  # one head for four, of as many activated parameters: 6 D d for 4 D^2
        D = start.model.hidden_size
        start = replace(start, model=replace(start.model, num_heads=1, head_width=2 * D // 24 * 8))
    config = with_rule(start, name)
    return replace(config, moe=replace(config.moe, centroids=centroids)) if name == "centroid" else config


def shifted(data: ArrayImages, most: int, seed: int) -> ArrayImages:
    """Its images, each moved by up to so many pixels in each direction; what comes in is black."""
    if not most:
        return data
    moves = np.random.default_rng(seed).integers(-most, most + 1, (len(data), 2))
    padded = np.pad(data.pixels, ((0, 0), (most, most), (most, most), (0, 0)))
    H, W = data.pixels.shape[1:3]
    pixels = np.stack([
        image[most + dy : most + dy + H, most + dx : most + dx + W]
        for image, (dy, dx) in zip(padded, moves, strict=True)
    ])  # fmt: skip
    return replace(data, pixels=pixels, eval_name=None)


class Benchmark:
    """The phases, each of which finds in the file what it has done before."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rows = args, Rows(args.out / "rows.jsonl")
        self.names = args.only or [n for n in (*OURS, *RULES) if n != "centroid" or args.centroids]
        self.preset = BASES[args.preset]
        size = self.preset.model.sample_size
        self.sets = {s: open_data(self.preset.data, size=size, channels=1, split=s) for s in ("train", "test")}

    def data(self, split: str, shift: int) -> ArrayImages:
        """The training or held-out images, as shifted."""
        found = self.sets[split]
        assert isinstance(found, ArrayImages)
        return shifted(found, shift, 0 if split == "train" else 1)

    def train(self, name: str, shift: int, seed: int) -> Row:
        """One run: errors, distances, what was chosen."""
        torch._dynamo.reset()  # whose limit of compilations is of a process
        config = configuration(self.args.preset, name, self.args.steps, seed, self.args.centroids, self.args.compile)
        made = prepared(config, self.data("train", shift))
        losses, loads = [], []
        for step in range(self.args.steps):
            result = optimise(made.run, step)
            assert result is not None
            update_ema(made.state.ema, made.state.model, min(0.98, (1 + step) / (10 + step)))
            losses.append(result.losses["mse"].detach())
            loads += [] if result.counts is None else [result.counts.sum(dim=1).double().mean()]
        net = made.state.ema.eval()
        errors = held_out_errors(net, config.objective, self.data("test", shift))
        total, active = count_parameters(net)
        found: Row = {
            "mse": errors.mean().item(), "se": (errors.std() / len(errors) ** 0.5).item(), "total": total,
            "active": active, "train_mse": torch.stack(losses[-100:]).mean().item(),
        }  # fmt: skip
        found |= self.choices(net, config, shift) if config.moe.blocks != "none" else {}
        found |= {"heads_by_time": heads_by_time(net)} if config.model.head_experts else {}
        if config.moe.blocks != "none" and config.moe.rule.has_tau:
            load = torch.stack(loads[-100:]).mean().item()
            found["experts_train"] = load / (config.train.batch_size * tokens_per_image(net))
        return found | self.pictures(net, config, shift)

    def choices(self, net: DiTMoETransformer2DModel, config: Config, shift: int) -> Row:
        """Means over layers: experts a token, load, and bits that place, time and class explain."""
        data = self.data("test", shift)
        classes = sorted(data.id2label)
        _, x = batch_a_class(data, classes, 20, 0)
        counted = tally(net, config.objective, x, classes, 10, 0)
        layers = [layer_row("", t, 0) for t in counted]
        tokens = 10 * x.shape[0] * x.shape[1] * tokens_per_image(net)  # each at 10 times
        served = mean(float(t.counts.sum()) / tokens for t in counted)
        numbers = {key: mean(row[key] for row in layers) for key, v in layers[0].items() if isinstance(v, float | int)}
        return {"served": served, "choice": numbers, "findings": values_of(layers)}

    def pictures(self, net: DiTMoETransformer2DModel, config: Config, shift: int) -> Row:
        """Distances and the recognised share of images drawn as the preset draws."""
        if not self.args.num:
            return {}
        pipe = pipeline.assemble(net, config, self.sets["train"].id2label)
        labels = balanced_labels(pipe, self.args.num)
        settings = {"sampler": config.sample.sampler, "steps": config.sample.steps, "cfg": 1.25, "seed": 3}
        images = draw(pipe, labels, self.args.num, batch_size=250, **settings)
        found: Row = {}
        for name in ("efficientnet-lite0", "random-conv-v1"):
            tag = f"{config.data.name}-shift{shift}"
            sets = (tag, self.data("train", shift), self.data("test", shift)) if shift else None
            scorer = Scorer(config, self.args.cache, name, min(10_000, len(self.sets["train"])), sets)
            found |= {f"fd {name}": scorer.distance(images), "recognised": scorer.recognised(images, np.array(labels))}
        return found

    def speed(self) -> Row:
        """Images a second in training and in drawing, of all rules in turns."""
        made: dict[str, Prepared] = {}
        for name in self.names:
            config = configuration(self.args.preset, name, 600, 0, self.args.centroids, self.args.compile)
            made[name] = prepared(config, self.data("train", 0))
        steps = {name: each.step for name, each in made.items()}
        size = self.preset.model.sample_size
        x, t, y = torch.randn(250, 1, size, size), torch.full((250,), 500.0), torch.arange(250) % 10
        drawing = {n: partial(torch.inference_mode()(each.state.ema.forward), x, t, y) for n, each in made.items()}
        batch = self.preset.train.batch_size
        train, pictures = round_robin(steps, self.args.rounds), round_robin(drawing, self.args.rounds)
        return {
            "machine": machine(), "train": {n: batch / s for n, s in train.items()},
            "passes": {n: 250 / s for n, s in pictures.items()},
        }  # fmt: skip


@torch.inference_mode()
def heads_by_time(net: DiTMoETransformer2DModel) -> float:
    """Bits that the noise level (of 10) says of the head with the largest gate, classes and levels being even."""
    t, y = torch.linspace(50, 950, 10).repeat_interleave(10), torch.arange(10).repeat(10)
    size = net.config.sample_size
    best = net(torch.zeros(100, net.config.in_channels, size, size), t, y).heads.gates.argmax(dim=1).view(10, 10)
    counts = torch.stack([torch.bincount(row, minlength=4) for row in best]).numpy()
    return float(entropy(counts.sum(axis=0)) - entropy(counts).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(BASES), default="fashion")
    parser.add_argument("--out", type=Path, default=Path("runs/rules"))
    parser.add_argument("--cache", type=Path, default=Path("runs/scoring"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shifts", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--compile", action="store_true", help="blocks in training: faster, other last digits")
    parser.add_argument("--num", type=int, default=1000, help="images drawn of each run, 0 for none")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=[*OURS, *RULES])
    parser.add_argument("--centroids", type=Path, help="of the dense twin, for the rule centroid")
    parser.add_argument("--phases", nargs="+", choices=["train", "speed"], default=["speed", "train"])
    parser.add_argument("--page", type=Path, help="docs/rules.md: its table is replaced, and pictures/rules.png")
    args = parser.parse_args()
    # before the first product: 24 rules in turns have more kernels than the cache holds, one alone has not
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100000")
    args.out.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(args)
    own = {"preset": args.preset + (", compiled" if args.compile else "")}
    torch._dynamo.config.recompile_limit = 100  # all rules' blocks are of one function
    if "speed" in args.phases:
        benchmark.rows.once({**own, "phase": "speed", "rules": benchmark.names}, benchmark.speed)
    if "train" in args.phases:
        for seed, shift, name in product(args.seeds, args.shifts, benchmark.names):
            key = {**own, "phase": "train", "rule": name, "shift": shift, "seed": seed, "steps": args.steps}
            row = benchmark.rows.once(key, partial(benchmark.train, name, shift, seed))
            print(name, shift, seed, f"{row['mse']:.5f}", flush=True)
    made = [row for row in benchmark.rows if own.items() <= row.items()]
    rows = [row for row in made if row.get("seed", args.seeds[0]) in args.seeds]
    text = table(rows, args.steps)
    for rule in ("topk", "dit-moe"):
        text += f"\n\nDiT-MoE's findings, experts by `{rule}`:\n\n{findings(rows, args.steps, rule)}"
    print(text)
    if args.page is not None:
        before, _, rest = args.page.read_text().partition(MARK[0])
        after = rest.partition(MARK[1])[2]
        args.page.write_text(f"{before}{MARK[0]}\n{text}\n{MARK[1]}{after}")
        if any(row["phase"] == "speed" for row in rows):
            plot(rows, args.steps, args.page.parent / "pictures" / f"{args.page.stem}.png")


if __name__ == "__main__":
    main()
