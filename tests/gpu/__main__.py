"""All checks on the accelerator, as one table: `make test-gpu`, or python -m tests.gpu [FOLDER]."""

import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.timing import machine
from tests.gpu.checks import CHECKS, REAL, ROOT, Row, Size


def run(device: torch.device, size: Size, folder: Path) -> int:
    """How many rows are not good, of all checks: printed as they come, written to gpu-checks.md; an error is a row."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    begin, rows = time.perf_counter(), []
    lines = [f"# Checks on {device.type}\n\n{machine()}, commit {commit.strip() or 'unknown'}, {time.strftime('%F')}\n"]
    lines += ["| check | what | found | wanted | good |", "|---|---|---|---|---|"]
    print("\n".join(lines))
    for name, check in CHECKS.items():
        try:
            found = check(device, size)
        except Exception as error:  # the other checks are worth their table
            found = [Row("it ends", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "no error", False)]
        for row in found:
            cells = (name, row.what, row.found.replace("|", "/"), row.wanted, "yes" if row.good else "**no**")
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
        rows += found
    wrong = sum(not row.good for row in rows)
    lines.append(f"\n{len(rows)} rows, {wrong} not good, {time.perf_counter() - begin:.0f} s")
    print(lines[-1])
    (folder / "gpu-checks.md").write_text("\n".join(lines) + "\n")
    return wrong


def main() -> int:
    """Exit code: 0 when all is good, or there is no accelerator; else 1."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        print("there is no GPU here, so nothing was checked; make test runs the same checks, tiny, on the CPU")
        return 0
    return min(1, run(device, REAL, Path(*sys.argv[1:2])))


if __name__ == "__main__":
    sys.exit(main())
