"""What a mixture of data sets costs each of them: the domain loss against balance, and two sizes in one run.

    python -m benchmarks.mixtures domains --out runs/domains [--seeds 0 1 2]
    python -m benchmarks.mixtures sizes --out runs/sizes

`domains`: nine digits to one garment, both 8 x 8, with the domain loss (DAMEX) or the balance loss: the error of the
held-out images of each set, and the share of their tokens' choices that are of experts of their own set. `sizes`: the
digits in 8 x 8 and 4 x 4, step by step in turn (IMP), against a run of each alone with as many steps of it. All have
the preset `digits`; the same noise and times for all. Runs that are there are not made again.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.distill import errors, length, train
from benchmarks.timing import machine
from ditmoe import pipeline
from ditmoe.config.file import trained_by
from ditmoe.data.mixture import Mixture
from ditmoe.data.open import open_held_out
from ditmoe.data.sets import ImageSet
from ditmoe.objective import Objective

LOSSES = {"balance": (), "domain": ("--moe.domain-weight", 0.1, "--moe.balance-weight", 0)}


@torch.inference_mode()
def own_share(model: Path, data: ImageSet, first: int, domain: int, domains: int) -> float:
    """Of images of a set, labels from `first` on: the share of (token, expert) pairs with an expert of the set."""
    net, objective = pipeline.load(model).transformer.eval(), Objective(trained_by(model).objective)
    rows = list(range(min(300, len(data))))
    x = data.tensors(rows)
    draws = objective.draw(1, rows, (x.shape[1], x.shape[2], x.shape[3]))
    noised, _ = objective.corrupt(x, draws.t, draws.noise)
    records = net(noised, draws.t, torch.from_numpy(data.labels[rows]) + first).routing
    experts = torch.cat([record.plan.expert for record in records])
    return float((experts * domains // net.config.num_experts == domain).float().mean())


def domains(args: argparse.Namespace) -> list[str]:
    """A line of the table for each seed and loss."""
    both = ("--data.mixture", "digits=9", "fashion=1", "--data.fit", "crop")
    lines = ["| seed | loss | digits | own experts | garments | own experts |", "|---" * 6 + "|"]
    for seed in args.seeds:
        for loss, words in LOSSES.items():
            model = train(args.out / f"{loss}-{seed}", "digits", *length(args.steps), "--seed", seed, *both, *words)
            test = open_held_out(trained_by(model).data, size=8, channels=1)
            assert isinstance(test, Mixture)
            cells, start = [], 0
            for number, one in enumerate(test.sets):
                cells.append(f"{float(errors(model, one, -start).mean()):.4f}")
                cells.append(f"{own_share(model, one, start, number, len(test.sets)):.1%}")
                start += len(one.id2label)
            lines.append(f"| {seed} | {loss} | {' | '.join(cells)} |")
    return lines


def sizes(args: argparse.Namespace) -> list[str]:
    """A line of the table for each size."""
    crop = ("--data.fit", "crop")
    both = ("--data.mixture", "digits", "digits@4", "--data.alternate", *crop)
    mixed = train(args.out / "both", "digits", *length(2 * args.steps), *both)
    lines = ["| size | alone | in the mixture | of it |", "|---" * 4 + "|"]
    for number, size in enumerate((8, 4)):
        alone = train(args.out / f"{size}", "digits", *length(args.steps), "--model.sample-size", size, *crop)
        test = open_held_out(trained_by(alone).data, size=size, channels=1)
        assert test is not None
        own, other = (float(errors(m, test, f).mean()) for m, f in ((alone, 0), (mixed, -10 * number)))
        lines.append(f"| {size} x {size} | {own:.4f} | {other:.4f} | {other / own:.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["domains", "sizes"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=1100, help="of a run of one size, or of domains")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of domains")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines = {"domains": domains, "sizes": sizes}[args.part](args)
    print(f"{machine()}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
