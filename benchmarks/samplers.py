"""Fréchet distance against network calls: every sampler, time-shift over its window and cutoff, epsilon scaling.

    python -m benchmarks.samplers MODEL --num 5000 --seeds 0 1 2 --parts nfe shift epsilon --out samplers.jsonl

Appends a line for each (point, seed); lines that are there are not made again, so it can be stopped and continued.
MODEL is an exported model (its training.json names the data) or a run; a guide that it names stays out.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rows import Rows
from benchmarks.scoring import Scorer, precision
from ditmoe import pipeline
from ditmoe.config.file import read_config
from ditmoe.config.sections import Config
from ditmoe.generate.draw import balanced_labels, draw
from samplers import SAMPLERS, network_calls

NFE = (5, 10, 20, 50, 100)
MODES = ("target", "network", "both")
WINDOWS, CUTOFFS = (6, 20, 60, 160), (100, 500)
WINDOWS_BY_STEPS = (
    *(("ts-ddim", 5, w) for w in (40, 80, 160, 320)),
    *(("ts-ddpm", 5, w) for w in (80, 160)),
    *(("ts-ddpm", 10, w) for w in (40, 80)),
    *(("ts-pndm", 11, w) for w in (20, 34)),
    *(("ts-ddpm", 20, w) for w in (6, 20)),
    *((name, 50 - 9 * (name == "ts-pndm"), w) for name in ("ts-ddim", "ts-ddpm", "ts-pndm") for w in (2, 4)),
)
LAMBDAS = (0.98, 0.99, 1.01, 1.02, 1.04)


def points(part: str, scheduler: Any) -> Iterator[dict[str, Any]]:
    """What to draw: sampler, steps, and further arguments of the pipeline."""
    if part == "nfe":
        for calls in NFE:
            for name in SAMPLERS:
                steps = calls - 9 if "pndm" in name else calls // 2 if name == "flow-heun" else calls
                if (steps > 3 or "pndm" not in name) and network_calls(name, scheduler, steps) == calls:
                    yield {"sampler": name, "steps": steps}
        yield {"sampler": "ddpm", "steps": 250}
    elif part == "shift":
        for mode, variance, window, cutoff in itertools.product(MODES, ("published", "calibrated"), WINDOWS, CUTOFFS):
            yield _shifted(10, mode, variance, window, cutoff)
    elif part == "refine":  # the mode and criterion that "shift" finds best
        for steps, window, cutoff in itertools.product((10, 20), (10, 20, 30, 40), (50, 100, 200)):
            yield _shifted(steps, "both", "published", window, cutoff)
    elif part == "window":  # how the best window goes with the steps, for every base
        for name, steps, window in WINDOWS_BY_STEPS:
            yield _shifted(steps, "both", "published", window, 100) | {"sampler": name}
    elif part == "few":  # what epsilon scaling gives where distances are small
        for name, steps, scale in itertools.product(("unipc", "dpm++2m"), (10, 20), (1.003, 1.006, 1.01, 1.02)):
            yield {"sampler": name, "steps": steps, "epsilon_scale": scale}
    else:
        for steps, scale in itertools.product((10, 20), LAMBDAS):
            yield {"sampler": "ddim", "steps": steps, "epsilon_scale": scale}


def _shifted(steps: int, mode: str, variance: str, window: int, cutoff: int) -> dict[str, Any]:
    options = {
        "exposure_mode": mode, "exposure_variance": variance, "exposure_window": window, "exposure_cutoff": cutoff,
    }  # fmt: skip
    return {"sampler": "ts-ddim", "steps": steps, "sampler_options": options}


def training_config(model: Path) -> Config:
    """Of an exported model (training.json) or of a run (config.json)."""
    return read_config(model, "training.json" if (model / "training.json").is_file() else "config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--num", type=int, default=5000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument(
        "--parts", nargs="+", default=["nfe"], choices=["nfe", "shift", "refine", "window", "epsilon", "few"]
    )
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), help="these alone")
    parser.add_argument("--calls", type=int, nargs="+", help="with so many network calls alone")
    parser.add_argument("--cutoff", type=int, help="of the time-shift sweeps, this cutoff alone")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network; --num in whole batches")
    parser.add_argument("--cache", type=Path, default=Path("runs/scoring"))
    parser.add_argument("--extractors", nargs="+", default=["random-conv-v1", "efficientnet-lite0"])
    parser.add_argument("--num-ref", type=int, help="of the distances' reference, the first ones; default: all")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    config = training_config(args.model)
    scorers = {name: Scorer(config, args.cache, name, args.num_ref) for name in args.extractors}
    pipe = pipeline.load(args.model)
    if args.compile:
        pipe.transformer.forward = torch.compile(pipe.transformer.forward, dynamic=False)
    labels = balanced_labels(pipe, args.num)
    done = Rows(args.out)
    for seed in args.seeds:
        for part in args.parts:
            for point in points(part, pipe.scheduler.config):
                key = {"part": part, "seed": seed, "num": args.num, "cfg": args.cfg, "precision": args.precision}
                key |= point
                options = point.get("sampler_options", {})
                nfe = network_calls(point["sampler"], pipe.scheduler.config, point["steps"], options)
                if (args.samplers and point["sampler"] not in args.samplers) or nfe not in (args.calls or [nfe]):
                    continue
                cutoff = options.get("exposure_cutoff")
                if done.of(key) or (args.cutoff and cutoff not in (None, args.cutoff)):
                    continue
                more = {name: value for name, value in point.items() if name not in ("sampler", "steps")}
                start = time.perf_counter()
                with precision(args.precision):
                    images = draw(
                        pipe, labels, args.num, sampler=point["sampler"], steps=point["steps"], cfg=args.cfg, seed=seed,
                        batch_size=args.batch_size, more={"guide": "none", **more},
                    )  # fmt: skip
                done.add({
                    **key,
                    "compiled": args.compile,
                    "nfe": nfe,
                    "seconds": round(time.perf_counter() - start, 1),
                    "fd": {name: scorer.distance(images) for name, scorer in scorers.items()},
                    "recognised": next(iter(scorers.values())).recognised(images, np.asarray(labels)),
                })  # fmt: skip


if __name__ == "__main__":
    main()
