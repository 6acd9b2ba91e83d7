"""What time-shift costs: a whole sampling step with it against one of its base, in the same run.

python -m benchmarks.time_shift MODEL [--rounds 15]
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.timing import machine, round_robin
from ditmoe import pipeline

STEPS = 10
VARIANTS = {
    "ddim": {},
    "ts-ddim, target": {"exposure_mode": "target"},
    "ts-ddim, network": {"exposure_mode": "network"},
    "ts-ddim, both": {"exposure_mode": "both"},
}


def drawing(pipe: pipeline.DiTMoEPipeline, name: str, images: int) -> Callable[[], object]:
    options = {**VARIANTS[name], "exposure_window": 100, "exposure_cutoff": 0} if VARIANTS[name] else None
    labels = [i % pipe.transformer.config.num_classes for i in range(images)]
    return lambda: pipe(
        labels, sampler=name.split(",")[0], num_inference_steps=STEPS, guidance_scale=1.0, sampler_options=options,
        output_type="pt",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--images", type=int, default=64)
    args = parser.parse_args()
    pipe = pipeline.load(args.model).to(pipeline.best_device())
    pipe.set_progress_bar_config(disable=True)
    times = round_robin({name: drawing(pipe, name, args.images) for name in VARIANTS}, args.rounds)
    print(f"{machine()}; {args.images} images, {STEPS} steps, medians of {args.rounds} rounds\n")
    print("| sampler | ms a step | over ddim |\n|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {seconds / STEPS * 1e3:.1f} | {seconds / times['ddim'] - 1:+.1%} |")


if __name__ == "__main__":
    main()
