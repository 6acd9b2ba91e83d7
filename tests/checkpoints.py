"""Checkpoints as a run of one process finds and reads them, whole."""

from pathlib import Path
from typing import Any

from torch import Tensor

from ditmoe.run_folder import checkpoint


def newest(root: Path) -> Path | None:
    """The newest whole checkpoint; None of none, ValueError where none is whole."""
    return checkpoint.first_whole(checkpoint.newest_first(root), checkpoint.find_fault)


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(parts, state) of one checkpoint."""
    parts, state = checkpoint.opened(path)
    return {part: {key: saved.whole() for key, saved in found.items()} for part, found in parts.items()}, state
