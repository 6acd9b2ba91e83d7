"""Scores over the course of training: every checkpoint of some runs, sampled and scored in the same way.

    python -m benchmarks.curve RUN [RUN ...] --num 5000 --cfg 1.0 1.5 --every 1500 --out curve.jsonl

The runs must have kept their checkpoints (`--train.keep 0`) and share a data set. A line of the JSONL is one
(run, step, guidance); lines that are there are not made again. Ends with a table of them all.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.held_out import held_out_errors
from benchmarks.rows import Rows
from benchmarks.scoring import Scorer, precision
from ditmoe import pipeline
from ditmoe.config.file import read_config
from ditmoe.generate.draw import balanced_labels, draw
from ditmoe.run_folder.network import averaged_network

PROTOCOL = ("num", "sampler", "steps", "seed", "extractor", "num_ref", "precision")


def averaged_pipeline(run: Path, folder: Path, names: dict[int, str]) -> pipeline.DiTMoEPipeline:
    """The pipeline of a checkpoint's moving average."""
    return pipeline.assemble(averaged_network(folder)[0].eval(), read_config(run), names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--num", type=int, default=5000)
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.5])
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="only checkpoints whose step is a multiple of this")
    parser.add_argument("--extractor", default="random-conv-v1")
    parser.add_argument("--num-ref", type=int, help="default: all training images")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--cache", type=Path, default=Path("runs/scoring"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    scorer = Scorer(read_config(args.runs[0]), args.cache, args.extractor, args.num_ref)
    done = Rows(args.out)
    protocol = {name: getattr(args, name) for name in PROTOCOL}
    done.once({"run": "real", "step": 0, "cfg": 0, **protocol}, lambda: scorer.real(args.num))
    for run in args.runs:
        for folder in sorted((run / "checkpoints").glob("step-*")):
            step = int(folder.name.removeprefix("step-"))
            if step % args.every == 0:
                add_rows(run, folder, step, args.cfg, protocol, scorer, done)
    print("| run | step | cfg | Fréchet distance | recognised | held-out mse |\n|---|---|---|---|---|---|")
    for row in sorted(done, key=lambda row: (row["step"], row["cfg"], row["run"])):
        mse = f"{row['mse']:.5f}" if "mse" in row else ""
        print(f"| {row['run']} | {row['step']} | {row['cfg']} | {row['fd']:.4f} | {row['recognised']:.1%} | {mse} |")


def add_rows(
    run: Path, folder: Path, step: int, scales: list[float], protocol: dict[str, Any], scorer: Scorer, done: Rows
) -> None:
    """One row a guidance scale for one checkpoint, unless it is there."""
    keys = [{"run": run.name, "step": step, "cfg": scale, **protocol} for scale in scales]
    keys = [key for key in keys if done.of(key) is None]
    if not keys:
        return
    pipe = averaged_pipeline(run, folder, scorer.train.id2label)
    errors = held_out_errors(pipe.transformer, read_config(run).objective, scorer.test)
    mse = sum(float(some.sum()) for some in errors.split(250)) / len(errors)
    num = protocol["num"]
    labels = balanced_labels(pipe, num)
    for key in keys:
        with precision(protocol["precision"]):
            images = draw(
                pipe, labels, num, sampler=protocol["sampler"], steps=protocol["steps"], cfg=key["cfg"],
                seed=protocol["seed"], batch_size=250,
            )  # fmt: skip
        scores = {"fd": scorer.distance(images), "recognised": scorer.recognised(images, np.asarray(labels))}
        done.add({**key, **scores, "mse": mse})


if __name__ == "__main__":
    main()
