"""Images per second of the feature networks, and the peak memory of a score of 2,000 and of 20,000 images.

    python -m benchmarks.extractors [--rounds 5] [--extractor random-conv-v1 efficientnet-lite0]

The peak is that of a fresh process that scores an .npz against itself (`--peak FILE.npz` measures one).
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import machine, round_robin
from benchmarks.train_step import peak_resident
from eval.fid import score
from eval.networks.extractors import load_extractor

SIDE, BATCH = 28, 64


def looks(name: str) -> Callable[[], object]:
    """A function that puts a batch through an extractor."""
    net = load_extractor(name)
    images = torch.randint(0, 256, (BATCH, 1, SIDE, SIDE), dtype=torch.uint8)

    def run() -> None:
        with torch.inference_mode():
            net(images)

    return run


def peak(name: str, count: int, folder: Path) -> float:
    """Megabytes of a process that scores `count` images, its own imports and network included."""
    path = folder / f"{count}.npz"
    if not path.exists():
        images = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 1), dtype=np.uint8)
        np.savez(path, arr_0=images)
    command = [sys.executable, "-m", "benchmarks.extractors", "--extractor", name, "--peak", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--extractor", nargs="+", default=["random-conv-v1", "efficientnet-lite0"])
    parser.add_argument("--peak", type=Path)
    args = parser.parse_args()
    if args.peak:
        score(args.peak, args.peak, extractor=args.extractor[0])
        print(peak_resident())
        return
    times = round_robin({name: looks(name) for name in args.extractor}, args.rounds)
    print(f"{machine()}; images of {SIDE}x{SIDE}, batches of {BATCH}, medians of {args.rounds} rounds\n")
    print("| extractor | images/s | peak MB, 2,000 images a side | 20,000 images a side |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.extractor:
            few, many = (peak(name, count, Path(folder)) for count in (2_000, 20_000))
            print(f"| {name} | {BATCH / times[name]:.0f} | {few:.0f} | {many:.0f} |", flush=True)


if __name__ == "__main__":
    main()
