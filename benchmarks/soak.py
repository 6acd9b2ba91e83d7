"""Kill and resume a digits run at random moments, and compare it with one that was left alone.

    python -m benchmarks.soak --kills 50 --out runs/soak

Half of the kills are SIGKILL, half SIGTERM; one in five strikes while the program starts, the others while it trains,
samples for its log, or saves. The final weights, averages and optimiser moments, and every logged loss, must be equal
to the bit. Exit code 0 if they are.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine
from ditmoe.run_folder import checkpoint

ROOT = Path(__file__).parents[1]
FLAGS = ["--train.checkpoint-every", "5", "--train.log-every", "1", "--train.sample-every", "100"]
FLAGS += ["--sample.num", "20", "--sample.steps", "5"]


def launched(out: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "train.py", "digits", "--out", str(out), *FLAGS],
            cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip


def newest_of(out: Path) -> Path | None:
    return checkpoint.first_whole(checkpoint.newest_first(out / "checkpoints"), checkpoint.find_fault)


def newest(out: Path) -> int:
    path = newest_of(out)
    return 0 if path is None else int(path.name.removeprefix("step-"))


def rows(out: Path) -> list[dict[str, Any]]:
    """Whole rows only, without what depends on the clock."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in found]


def disturb(process: subprocess.Popen[bytes], out: Path, rng: random.Random) -> tuple[str, float] | None:
    """Kill it once; (signal, seconds until it was gone), or None when it had ended by itself."""
    number = rng.choice([signal.SIGKILL, signal.SIGTERM])
    before, log = newest(out), out / "metrics.jsonl"
    old = log.stat().st_ino if log.exists() else 0
    if rng.random() < 0.8:  # while it trains
        while process.poll() is None and not (
            log.exists() and log.stat().st_ino != old and rows(out) and rows(out)[-1]["step"] > before
        ):  # the log is written anew when the run goes on
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 2))
    else:
        time.sleep(rng.uniform(0, 8))
    if process.poll() is not None:
        return None
    start = time.monotonic()
    os.killpg(process.pid, number)
    code = process.wait(timeout=120)
    # before the program has its handlers, while Python starts, SIGTERM ends it as it ends any other
    assert code in ({143, -signal.SIGTERM} if number == signal.SIGTERM else {-signal.SIGKILL}), code
    return number.name, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    rng = random.Random(args.seed)
    straight, killed = args.out / "straight", args.out / "killed"
    assert launched(straight, args.out / "straight.log").wait() == 0
    kills: list[tuple[str, float]] = []
    lost = []
    while len(kills) < args.kills:
        process = launched(killed, args.out / "killed.log")
        done = disturb(process, killed, rng)
        if done is None:
            print(f"the run ended after {len(kills)} kills; the rest strikes a finished run")
            break
        kills.append(done)
        logged = rows(killed)
        step = newest(killed)
        lost.append(max(0, (logged[-1]["step"] if logged else 0) - step))
        print(f"{len(kills)}: {done[0]}, gone after {done[1]:.2f} s, goes on from step {step}", flush=True)
    assert launched(killed, args.out / "killed.log").wait() == 0
    one, other = (checkpoint.opened(path)[0] for run in (straight, killed) if (path := newest_of(run)))
    equal = all(torch.equal(v.whole(), other[part][name].whole()) for part in one for name, v in one[part].items())
    logs = rows(straight) == rows(killed)
    count = {name: sum(kind == name for kind, _ in kills) for name in ("SIGKILL", "SIGTERM")}
    print(f"{machine()}; {len(kills)} kills {count}, {len(rows(straight))} steps")
    print(f"slowest exit after SIGTERM {max((s for kind, s in kills if kind == 'SIGTERM'), default=0):.2f} s")
    print(f"steps lost at a kill: at most {max(lost, default=0)} (checkpoints every 5)")
    print(f"weights, averages, moments equal to the bit: {equal}; every logged loss equal: {logs}")
    sys.exit(0 if equal and logs and len(kills) == args.kills else 1)


if __name__ == "__main__":
    main()
