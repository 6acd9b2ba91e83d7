"""Checkpoints: whole or not there, verified before they are used. Tensors in safetensors, scalars in JSON.

A checkpoint is a folder `step-000123/` with one `.safetensors` file a part, `state.json`, and `manifest.json` with
the size and SHA-256 of each. It is written under a temporary name and renamed when everything is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})")


def save(root: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write `root/step-<step>/` and return it. The folder appears complete or not at all.

    Args:
        root: The folder of checkpoints; made when missing.
        step: Optimiser steps done.
        parts: File name (without suffix) -> tensors by name.
        state: JSON values.
    """
    final = root / f"step-{step:06d}"
    temporary = root / f"{final.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with the same number
    temporary.mkdir(parents=True)
    for name, tensors in parts.items():
        contiguous = {key: value.detach().contiguous() for key, value in tensors.items()}
        save_file(contiguous, temporary / f"{name}.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1) + "\n")
    files = {p.name: {"size": p.stat().st_size, "sha256": _digest(p)} for p in sorted(temporary.iterdir())}
    manifest = {"format": FORMAT, "step": step, "files": files}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for path in temporary.iterdir():
        _sync(path)
    _sync(temporary)
    if final.exists():  # the same step saved again
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(root)
    return final


def prune(root: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints (0 keeps all) and leftovers of interrupted saves."""
    for leftover in root.glob("step-*.tmp-*"):
        shutil.rmtree(leftover)
    for path in _newest_first(root)[keep:] if keep else []:
        shutil.rmtree(path)


def newest(root: Path) -> Path | None:
    """The newest checkpoint whose files are what its manifest says; None when there never was one.

    Raises:
        ValueError: Checkpoints are there but none is whole.
    """
    candidates = _newest_first(root)
    for path in candidates:
        fault = find_fault(path)
        if fault is None:
            return path
        print(f"checkpoint {path} is damaged ({fault}); trying the one before it", flush=True)
    if candidates:
        raise ValueError(f"no checkpoint in {root} is whole; move the folder away to start again")
    return None


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; None when every file matches the manifest."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files = manifest["files"]
        strangers = {p.name for p in path.iterdir()} - {"manifest.json", *files}
        if strangers or "state.json" not in files:
            return "manifest.json does not list the files of the folder"
        for name, known in files.items():
            file = path / name
            if file.stat().st_size != known["size"]:
                return f"{name} has {file.stat().st_size} bytes, not {known['size']}"
            if _digest(file) != known["sha256"]:
                return f"{name} has other content than when it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
        return "manifest.json cannot be read"
    return None


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(parts, state) of one checkpoint, on the CPU."""
    parts = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return parts, state


def _newest_first(root: Path) -> list[Path]:
    found = [p for p in root.glob("step-*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
