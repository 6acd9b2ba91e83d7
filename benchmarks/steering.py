"""What suppressing experts does to whom: the held-out error of every group, with its own experts off and with others.

    python -m benchmarks.steering --out runs/steering                      # trains one first
    python -m benchmarks.steering --model models/digits --top 4 --out runs/steering-digits
    python -m benchmarks.steering --model models/fashion --top 4 --by error --out runs/steering-fashion

Groups are the data sets of a mixture, or the classes of one set. A group's experts are the `--top` ones by `analyze
contrast` of it over all others; or with `--by error`, for routers that see no image, those whose suppression alone
raises its error most over the others', on the first half of the images, of which the second half then tells. Random
ones are as many, drawn anew where a layer would be left with fewer than a token has. All errors are of the same images,
noise and times, with labels; a rise is the error over that with no policy, minus 1.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import machine
from ditmoe.analysis.routing import Array
from ditmoe.config.contrast import ContrastArgs
from ditmoe.config.file import trained_by
from ditmoe.config.policy import Policy, Rule
from ditmoe.data.mixture import Mixture
from ditmoe.data.open import open_held_out
from ditmoe.model import DiTMoETransformer2DModel
from ditmoe.moe.policy import Steered
from ditmoe.objective import Objective
from ditmoe.pipeline import load
from ditmoe.report import contrast

Cell = tuple[int, int]
TRAIN = (
    "train.py digits --data.mixture digits fashion --data.fit crop --moe.domain-weight 0.1 --moe.balance-weight 0 "
    "--sample.num 200"
)


def suppressed(cells: list[Cell]) -> Policy:
    """The policy that leaves these (layer, expert) out."""
    return Policy(tuple(Rule(layer, expert, "suppress") for layer, expert in cells))


class Bench:
    """A model, its groups of held-out images, noised once, and what policies do to their errors."""

    def __init__(self, model: Path, num: int) -> None:
        self.model, self.config = model, trained_by(model)
        self.net: DiTMoETransformer2DModel = load(model).transformer.eval()
        c = self.net.config
        data = open_held_out(self.config.data, size=c.sample_size, channels=c.in_channels)
        assert data is not None, "the data set has no held-out images"
        if isinstance(data, Mixture):
            ends = np.cumsum([0, *data.sizes])
            rows = {f"domain={name}": np.arange(*ends[i : i + 2]) for i, name in enumerate(data.names)}
        else:
            rows = {f"class={label}": np.flatnonzero(data.labels == label) for label in sorted(data.id2label)}
        self.groups, self.batches, objective = list(rows), [], Objective(self.config.objective)
        for i, some in enumerate(rows.values()):
            some = np.random.default_rng(i).permutation(some)[:num]
            draws = objective.draw(12345 + i, range(len(some)), (c.in_channels, c.sample_size, c.sample_size))
            x_t, target = objective.corrupt(data.tensors(some.tolist()), draws.t, draws.noise)
            self.batches.append((x_t, draws.t, torch.as_tensor(data.labels[some]), target))
        self.layers = [i for i, block in enumerate(self.net.blocks) if hasattr(block, "moe")]
        self.cells = [(layer, expert) for layer in self.layers for expert in range(c.num_experts)]
        self.base = self.errors(None)

    @torch.inference_mode()
    def errors(self, policy: Policy | None) -> list[Array]:
        """Mean squared error of every image, a group an array."""
        net = Steered(self.net, policy)
        return [
            (net(x, t, y).sample[:, : z.shape[1]] - z).square().mean(dim=(1, 2, 3)).numpy()
            for x, t, y, z in self.batches
        ]

    def rises(self, policy: Policy, half: slice = slice(None)) -> Array:
        """Of every group what its error rises by; of each group's images `half`."""
        pairs = zip(self.errors(policy), self.base, strict=True)
        return np.array([on[half].mean() / off[half].mean() - 1 for on, off in pairs])

    def by_contrast(self, group: str, top: int, out: Path) -> list[Cell]:
        """The experts that serve it more than all other groups."""
        others = tuple(other for other in self.groups if other != group)
        contrast.run(ContrastArgs(models=(self.model,), a=(group,), b=others, top=top, out=out))
        rules = json.loads((out / "contrast.json").read_text())["top"]["rules"]
        return [(rule["layer"], rule["expert"]) for rule in rules]

    def by_error(self, top: int) -> dict[str, list[Cell]]:
        """Of every group the experts whose suppression alone raises its error most over the others' mean."""
        alone = np.stack([self.rises(suppressed([cell]), slice(0, None, 2)) for cell in self.cells])  # (cells, groups)
        found = {}
        for g, group in enumerate(self.groups):
            own = alone[:, g] - np.delete(alone, g, axis=1).mean(axis=1)
            found[group] = [self.cells[i] for i in np.argsort(-own)[:top]]
        return found

    def by_chance(self, top: int, seed: int) -> list[Cell]:
        """As many experts at random, of which a token still has enough."""
        rng = np.random.default_rng(seed)
        while True:
            cells = [self.cells[i] for i in rng.permutation(len(self.cells))[:top]]
            most = max(sum(layer == of for of, _ in cells) for layer in self.layers)
            if most <= self.net.config.num_experts - self.net.config.top_k:
                return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of what is made")
    parser.add_argument("--model", type=Path, help="instead of one that is trained")
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.add_argument("--top", type=int, default=8, help="experts that are suppressed")
    parser.add_argument("--by", choices=("contrast", "error"), default="contrast")
    parser.add_argument("--num", type=int, default=1000, help="held-out images of a group, at most")
    parser.add_argument("--draws", type=int, default=10, help="of random experts")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.model is None:
        args.model = args.out / "run"
        own = ["--max-steps", args.steps, "--train.decay-steps", args.steps, "--seed", args.seed, "--out", args.model]
        subprocess.run([sys.executable, *TRAIN.split(), *map(str, own)], check=True)
    bench = Bench(args.model, args.num)
    half = slice(1, None, 2) if args.by == "error" else slice(None)
    chance = [bench.rises(suppressed(bench.by_chance(args.top, seed)), half) for seed in range(args.draws)]
    found = bench.by_error(args.top) if args.by == "error" else {}
    rows, lines = [], []
    for g, group in enumerate(bench.groups):
        cells = found.get(group) or bench.by_contrast(group, args.top, args.out / group)
        rise, random = bench.rises(suppressed(cells), half), [draw[g] for draw in chance]
        others = np.delete(rise, g)
        rows.append({
            "group": group, "experts": cells, "error": float(bench.base[g][half].mean()), "rise": float(rise[g]),
            "others": others.tolist(), "random": [float(value) for value in random],
        })  # fmt: skip
        lines.append(
            f"| {group} | {bench.base[g][half].mean():.4f} | {rise[g]:+.2%} | {others.mean():+.2%}, at most "
            f"{others.max():+.2%} | {np.mean(random):+.2%} ({min(random):+.2%} to {max(random):+.2%}) |"
        )
    print(f"\n{machine()}; {args.model}, {args.top} of {len(bench.cells)} experts by {args.by}\n")
    print("| group | error | its experts off | others' errors then | as many random ones off |\n|---|---|---|---|---|")
    print("\n".join(lines))
    (args.out / "steering.json").write_text(json.dumps({"model": str(args.model), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
