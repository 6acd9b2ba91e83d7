"""Checkpoints: whole or not there, verified before they are used. Tensors in safetensors, scalars in JSON.

A checkpoint is a folder `step-000123/` with one `.safetensors` file a part, `state.json`, and `manifest.json` with
the size and SHA-256 of each. It is written under a temporary name, synced to the disk and renamed; older ones are
removed only when enough newer ones have been read back and found whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})")
_UNFINISHED = "step-*.tmp-*"

Parts = Mapping[str, Mapping[str, Tensor]]


class Writer:
    """Writes checkpoints in a thread of its own while training goes on, one at a time.

    Args:
        root: The folder of checkpoints; made when missing. Leftovers of interrupted saves are removed.
        keep: Newest checkpoints to keep, see `prune`.
        tolerant: Say so and go on where a checkpoint cannot be written, instead of raising OSError.
    """

    def __init__(self, root: Path, keep: int, *, tolerant: bool) -> None:
        self.root, self.keep, self.tolerant = root, keep, tolerant
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        remove_unfinished(root)

    def save(self, step: int, parts: Parts, state: Mapping[str, Any], *, wait: bool) -> None:
        """Copy the tensors, then write them in the background; with `wait`, return when they are on the disk.

        Raises:
            OSError: The one before could not be written, unless tolerant; with `wait` neither could this one.
            FloatingPointError: See `save`.
        """
        try:
            self._finish()
        except OSError as error:
            if not self.tolerant:
                raise
            print(f"warning: a checkpoint could not be written ({error}); trying again now", flush=True)
        copies = {part: {k: _copied(v) for k, v in tensors.items()} for part, tensors in parts.items()}
        self._pending = self._thread.submit(self._write, step, copies, state)
        if wait:
            self._finish()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.shutdown(wait=True)

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, parts: Parts, state: Mapping[str, Any]) -> None:
        save(self.root, step, parts, state)
        prune(self.root, self.keep)


def save(root: Path, step: int, parts: Parts, state: Mapping[str, Any]) -> Path:
    """Write `root/step-<step>/` and return it. The folder appears complete or not at all.

    Where it is there already, whole, it stays as it is: a step of a run has one state.

    Args:
        root: The folder of checkpoints; made when missing.
        step: Optimiser steps done.
        parts: File name (without suffix) -> tensors by name.
        state: JSON values.

    Raises:
        OSError: The disk is full, or fails otherwise; nothing is left of this checkpoint.
        FloatingPointError: A value is not finite; nothing was written.
    """
    wrong = [f"{part} {name}" for part, tensors in parts.items() for name, v in tensors.items() if not _finite(v)]
    if wrong:
        raise FloatingPointError(f"{wrong[0]} is not finite at step {step}: nothing was saved")
    final = root / f"step-{step:06d}"
    if final.exists() and find_fault(final) is None:
        return final
    temporary = root / f"{final.name}.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with the same number
    temporary.mkdir(parents=True)
    try:
        for name, tensors in parts.items():
            contiguous = {key: value.detach().contiguous() for key, value in tensors.items()}
            save_file(contiguous, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1) + "\n")
        files = {p.name: {"size": p.stat().st_size, "sha256": _digest(p)} for p in sorted(temporary.iterdir())}
        for name in files:
            _sync(temporary / name)
        manifest = {"format": FORMAT, "step": step, "files": files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        _sync(temporary / "manifest.json")
        _sync(temporary)
        if final.exists():  # damaged: it was not found whole above
            _remove(final)
        temporary.rename(final)
        _sync(root)
    except SafetensorError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{temporary} could not be written: {error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def prune(root: Path, keep: int) -> None:
    """Remove what is older than the `keep` newest whole checkpoints, which are read back for it; 0 keeps all."""
    whole = 0
    for path in _newest_first(root) if keep else []:
        if whole >= keep:
            _remove(path)
        elif find_fault(path) is None:
            whole += 1


def remove_unfinished(root: Path) -> None:
    """Remove what interrupted saves and removals have left."""
    for leftover in root.glob(_UNFINISHED):
        shutil.rmtree(leftover)


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
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json cannot be read"
    return None


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(parts, state) of one checkpoint that was found whole, on the CPU."""
    parts = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    return parts, state


def _newest_first(root: Path) -> list[Path]:
    found = [p for p in root.glob("step-*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def _remove(path: Path) -> None:
    """A folder that is going away is none from its first moment on."""
    doomed = path.with_name(f"{path.name}.tmp-{os.getpid()}-old")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _copied(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
