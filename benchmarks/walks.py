"""Which files and rooms two walks enter: an image to its loss, a sample to its PNG. A room is a wing or a trunk file.

    python -m benchmarks.walks

Counted are the files whose functions are called, in the order of the first call: for a micro-batch of the preset digits
from its reader to its loss, and for `sample.py models/fashion --num 4 --out FILE.png` from the door to the file.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

from benchmarks.train_step import prepared
from ditmoe import __main__
from ditmoe.config import PRESETS
from ditmoe.training.step import _forward, _given

ROOT = Path(__file__).parents[1]
OPTIMIZED = 1  # of a code's flags: a function's, and not the body of a class or module


def entered(work: Callable[[], object]) -> list[str]:
    """The files of ours that are entered meanwhile."""
    seen: dict[str, None] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_flags & OPTIMIZED and code.co_filename.startswith(str(ROOT)):
            file = Path(code.co_filename).relative_to(ROOT)
            if file.parts[0] in ("ditmoe", "samplers", "eval"):
                seen[file.as_posix()] = None

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return list(seen)


def room(file: str) -> str:
    parts = file.removesuffix(".py").split("/")
    return parts[1] if parts[0] == "ditmoe" else parts[0]


def walks() -> dict[str, list[str]]:
    """The files of each walk."""
    config = PRESETS["digits"]
    _, _, run = prepared(replace(config, train=replace(config.train, precision="fp32")))

    def to_the_loss() -> None:
        batch = run.watch.take(run.batches)
        assert batch is not None
        _forward(run, _given(run, batch), None)

    def to_the_png() -> None:
        with tempfile.TemporaryDirectory() as folder:
            words = [str(ROOT / "models/fashion"), "--num", "4", "--steps", "2", "--out", f"{folder}/grid.png"]
            __main__.sample(words, "sample.py")

    return {"an image to its loss": entered(to_the_loss), "a sample to its PNG": entered(to_the_png)}


def main() -> None:
    for name, files in walks().items():
        rooms = list(dict.fromkeys(map(room, files)))
        print(f"{name}: {len(files)} files, {len(rooms)} rooms\n  {', '.join(files)}\n  {', '.join(rooms)}")


if __name__ == "__main__":
    main()
