"""What time-shift costs: a sampling step with it against one of its base, whole and without the network, in one run.

python -m benchmarks.time_shift MODEL [--rounds 15]

Whole steps scatter by more than it costs; the scheduler's part of a step says what that is.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine, round_robin
from ditmoe import pipeline
from ditmoe.launch.start import best_device

STEPS = 10
VARIANTS = {
    "ddim": {},
    "ts-ddim, target": {"exposure_mode": "target"},
    "ts-ddim, network": {"exposure_mode": "network"},
    "ts-ddim, both": {"exposure_mode": "both"},
}


def options_of(name: str) -> dict[str, Any] | None:
    return {**VARIANTS[name], "exposure_window": 100, "exposure_cutoff": 0} if VARIANTS[name] else None


def stepping(pipe: pipeline.DiTMoEPipeline, name: str, images: int) -> Callable[[], object]:
    """All steps of a set, but without the network: it answers at once."""
    scheduler = pipe.scheduler_for(name.split(",")[0], STEPS, options_of(name))
    c = pipe.transformer.config
    noise, answer = torch.randn(2, images, c.in_channels, c.sample_size, c.sample_size, device=pipe.transformer.device)

    def run() -> None:
        scheduler.set_timesteps(STEPS)
        x = noise
        for t in scheduler.timesteps:
            if hasattr(scheduler, "model_timestep"):
                scheduler.model_timestep(t)
            x = scheduler.step(answer, t, x).prev_sample

    return run


def drawing(pipe: pipeline.DiTMoEPipeline, name: str, images: int) -> Callable[[], object]:
    options = options_of(name)
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
    pipe = pipeline.load(args.model).to(best_device())
    pipe.set_progress_bar_config(disable=True)
    whole, alone = (
        round_robin({name: make(pipe, name, args.images) for name in VARIANTS}, rounds)
        for make, rounds in ((drawing, args.rounds), (stepping, 10 * args.rounds))
    )
    print(f"{machine()}; {args.images} images, {STEPS} steps, medians of {args.rounds} rounds\n")
    print("| sampler | ms a step | over ddim | the scheduler alone, ms | added, of a step |\n" + "|---" * 5 + "|")
    for name in VARIANTS:
        more, own = (alone[name] - alone["ddim"]) / whole["ddim"], alone[name] / STEPS * 1e3
        over = whole[name] / whole["ddim"] - 1
        print(f"| {name} | {whole[name] / STEPS * 1e3:.1f} | {over:+.1%} | {own:.2f} | {more:+.1%} |")


if __name__ == "__main__":
    main()
