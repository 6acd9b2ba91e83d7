"""What a checkpoint costs a training run: blocks of steps with and without a save at their start, in turn.

    python -m benchmarks.checkpoint_cost [--preset fashion] [--every 200]

A save copies the tensors while training waits, and writes, syncs, reads back and prunes in the background. The extra
time of a block with a save is what one save costs; `--every` steps apart it is the share that is printed.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.timing import machine
from benchmarks.train_step import prepared
from ditmoe.config.presets import PRESETS
from ditmoe.run_folder.writer import Writer
from ditmoe.training.saving import to_parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="fashion")
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    step, state, _ = prepared(PRESETS[args.preset])
    times: dict[str, list[float]] = {"plain": [], "background": [], "waiting": [], "blocked": []}
    with tempfile.TemporaryDirectory() as folder, Writer(Path(folder), 2, tolerant=False) as writer:
        step()
        for number in range(args.rounds):
            for kind in ("plain", "background", "waiting"):
                start = time.perf_counter()
                if kind != "plain":
                    writer.save(10 * number + len(kind), to_parts(state), {}, wait=kind == "waiting")
                    if kind == "background":
                        times["blocked"].append(time.perf_counter() - start)
                for _ in range(args.block):
                    step()
                times[kind].append(time.perf_counter() - start)
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()) / 2e6
    median = {kind: statistics.median(found) for kind, found in times.items()}
    one = median["plain"] / args.block
    print(f"{machine()}; preset {args.preset}, a checkpoint of {size:.0f} MB, medians of {args.rounds} rounds")
    print(f"a step {one:.3f} s; training waits {1000 * median['blocked']:.0f} ms for the copy")
    for kind in ("background", "waiting"):
        extra = median[kind] - median["plain"]
        print(f"{kind}: {extra:.2f} s a save, {extra / (args.every * one):.2%} of a run that saves every {args.every}")


if __name__ == "__main__":
    main()
