"""Checkpoints: whole or not there, verified before they are used. Tensors in safetensors, scalars in JSON.

A checkpoint is a folder `step-000123/` with one `.safetensors` file a part, `state.json`, and `manifest.json` with
the size and SHA-256 of each. It is written under a temporary name, synced to the disk and renamed. Tensors that are
split over processes lie in files of their own, `model.shard-0.safetensors`, ..., which each process writes into the
same temporary folder; of what is read back a process reads the rows that it needs.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..config.sections import Config
from ..files import digest, remove
from .log import read_rows
from .place import CHECKPOINTS, METRICS, SAVED

Parts = Mapping[str, Mapping[str, Tensor]]


class Saved:
    """A tensor of a checkpoint, with its shape and dtype, whose rows are read from the disk when they are asked for.

    `pieces` are its rows in order, memory-mapped. Raises ValueError where they do not fit together.
    """

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        first = pieces[0]
        alike = all(p.ndim and (p.shape[1:], p.dtype) == (first.shape[1:], first.dtype) for p in pieces)
        if len(pieces) > 1 and not alike:
            raise ValueError("the slices of a tensor do not fit together")
        rows = [sum(len(p) for p in pieces)] if first.ndim else []
        self._pieces, self.dtype, self.shape = pieces, first.dtype, torch.Size([*rows, *first.shape[1:]])

    def rows(self, start: int, stop: int) -> Tensor:
        """A copy of rows start..stop - 1, as far as they exist."""
        found, before = [], 0
        for piece in self._pieces:
            found.append(piece[max(start - before, 0) : max(stop - before, 0)])
            before += len(piece)
        return torch.cat(found)

    def whole(self) -> Tensor:
        """A copy of all of it."""
        return torch.cat(list(self._pieces)) if self.shape else self._pieces[0].clone()


def remove_unfinished(root: Path) -> None:
    """Remove what interrupted saves and removals have left."""
    for leftover in root.glob("step-*.tmp-*"):
        remove(leftover)


def newest_first(root: Path) -> list[Path]:
    """The checkpoints of a folder, whole or not."""
    found = [p for p in root.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def first_whole(
    candidates: Sequence[Path], fault_of: Callable[[Path], str | None], say: Callable[[str], None] = print
) -> Path | None:
    """The first one without a fault, after a line on those before it. None of none; ValueError where all have one."""
    for path in candidates:
        if (fault := fault_of(path)) is None:
            return path
        say(f"checkpoint {path} is damaged ({fault}); trying the one before it")
    if candidates:
        raise ValueError(f"no checkpoint in {candidates[0].parent} is whole; move the folder away to start again")
    return None


def find_fault(path: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint folder, in words; None when every file matches the manifest.

    With a `share` (n, of) the contents of every of-th file alone are read, from the n-th on; all sizes are looked at.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files = manifest["files"]
        strangers = {p.name for p in path.iterdir()} - {"manifest.json", *files}
        if strangers or "state.json" not in files:
            return "manifest.json does not list the files of the folder"
        for i, (name, known) in enumerate(sorted(files.items())):
            file = path / name
            if file.stat().st_size != known["size"]:
                return f"{name} has {file.stat().st_size} bytes, not {known['size']}"
            if i % share[1] == share[0] and digest(file) != known["sha256"]:
                return f"{name} has other content than when it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "manifest.json cannot be read"
    return None


def opened(path: Path) -> tuple[dict[str, dict[str, Saved]], dict[str, Any]]:
    """(parts, state) of one checkpoint that was found whole; tensors are read when they are asked for.

    Raises:
        ValueError: A file is what its manifest says, and yet none of ours.
    """
    try:
        pieces: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        for file in sorted(path.glob("*.safetensors"), key=lambda f: [int(n) for n in re.findall(r"-(\d+)", f.name)]):
            part = pieces[file.name.split(".")[0]]
            for key, value in load_file(file).items():
                part[key].append(value)
        parts = {part: {key: Saved(values) for key, values in found.items()} for part, found in pieces.items()}
        state = dict(json.loads((path / "state.json").read_text()))
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:  # RecursionError is a RuntimeError
        raise ValueError(f"{path} holds a file that cannot be read: {error}; move it away") from error
    return parts, state


def check_begins(config: Config, exported: int | None) -> None:
    """Raise ValueError where a run without checkpoints has `exported` a model of so many steps, or had saved them."""
    if exported or (config.out / SAVED).exists():
        steps = exported or max((row["step"] for row in read_rows(config.out / METRICS)), default="some")
        raise ValueError(
            f"{config.out} has been trained for {steps} steps, but {config.out / CHECKPOINTS} holds no checkpoint; "
            f"restore it, or move {config.out} away to start again"
        )
