"""Checkpoints: whole or not there, verified before they are used. Tensors in safetensors, scalars in JSON.

A checkpoint is a folder `step-000123/` with one `.safetensors` file a part, `state.json`, and `manifest.json` with
the size and SHA-256 of each. It is written under a temporary name, synced to the disk and renamed; older ones are
removed only when enough newer ones have been read back and found whole.

Tensors that are split over processes lie in files of their own, `model.shard-0.safetensors`, ..., which each process
writes into the same temporary folder; they are joined along their first dimension when they are loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
FAILED = "failed"  # a file in the temporary folder
OTHERS_TAKE = 300.0  # seconds, at most, to write their slices
_NAME = re.compile(r"step-(\d{6,})")
_UNFINISHED = "step-*.tmp-*"

Parts = Mapping[str, Mapping[str, Tensor]]


class Writer:
    """Writes checkpoints in a thread of its own while training goes on, one at a time.

    Args:
        root: The folder of checkpoints; made when missing. Leftovers of interrupted saves are removed.
        keep: Newest checkpoints to keep, see `prune`.
        tolerant: Say so and go on where a checkpoint cannot be written, instead of raising OSError.
        token: The same on all processes that write together, another one in every run of the program.
        shard: Which slice of split tensors this process writes; 0 also writes everything else and ends the save.
        shards: How many there are.
    """

    def __init__(
        self, root: Path, keep: int, *, tolerant: bool, token: str = "", shard: int = 0, shards: int = 1
    ) -> None:
        self.root, self.keep, self.tolerant = root, keep, tolerant
        self.token, self.shard, self.shards = token or str(os.getpid()), shard, shards
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._given_up = threading.Event()  # no other process is to be waited for any more
        if shard == 0:
            remove_unfinished(root)

    def save(
        self, step: int, parts: Parts, state: Mapping[str, Any], split: Parts | None = None, *, wait: bool
    ) -> None:
        """Copy the tensors, then write them in the background; with `wait`, return when they are on the disk.

        `parts` and `state` are those of all processes, `split` this one's slices.

        Raises:
            OSError: The one before could not be written, unless tolerant; with `wait` neither could this one.
            FloatingPointError: See `save`.
        """
        try:
            self.finish()
        except OSError as error:
            if not self.tolerant:
                raise
            print(f"warning: a checkpoint could not be written ({error}); trying again now", flush=True)
        copies = {part: {k: _copied(v) for k, v in tensors.items()} for part, tensors in parts.items()}
        slices = {part: {k: _copied(v) for k, v in tensors.items()} for part, tensors in (split or {}).items()}
        self._pending = self._thread.submit(self._write, step, copies, state, slices)
        if wait:
            self.finish()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self._given_up.set()
        self._thread.shutdown(wait=True)
        if self.shard == 0 and self.shards > 1:
            remove_unfinished(self.root)

    def finish(self) -> None:
        """Wait for the last one. Raises what it met."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, parts: Parts, state: Mapping[str, Any], split: Parts) -> None:
        named = {f"{part}.shard-{self.shard}": tensors for part, tensors in split.items()}
        if self.shard == 0 and self.shards > 1:
            remove_unfinished(self.root)  # the last one, if it failed
        if self.shard:
            write_shard(self.root, step, named, self.token, self._given_up)
            return
        others = [f"{part}.shard-{n}" for part in split for n in range(1, self.shards)]
        save(self.root, step, {**parts, **named}, state, token=self.token, others=others, given_up=self._given_up)
        prune(self.root, self.keep)


def save(
    root: Path,
    step: int,
    parts: Parts,
    state: Mapping[str, Any],
    *,
    token: str = "",
    others: Sequence[str] = (),
    given_up: threading.Event | None = None,
) -> Path:
    """Write `root/step-<step>/` and return it. The folder appears complete or not at all.

    Where it is there already, whole, it stays as it is: a step of a run has one state.

    Args:
        root: The folder of checkpoints; made when missing.
        step: Optimiser steps done.
        parts: File name (without suffix) -> tensors by name.
        state: JSON values.
        token: See `Writer`.
        others: Names of parts that other processes write with `write_shard`; they are waited for.
        given_up: Once it is set, no longer.

    Raises:
        OSError: The disk is full, or fails otherwise; nothing is left of this checkpoint.
        FloatingPointError: A value is not finite; nothing was written.
    """
    _check_finite(step, parts)
    final = root / f"step-{step:06d}"
    if not others and final.exists() and find_fault(final) is None:
        return final
    temporary = root / f"{final.name}.tmp-{token or os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        _write_parts(temporary, parts)
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1) + "\n")
        _sync(temporary / "state.json")
        _wait_for([temporary / f"{name}.safetensors" for name in others], temporary / FAILED, given_up)
        files = {p.name: {"size": p.stat().st_size, "sha256": _digest(p)} for p in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT, "step": step, "files": files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        _sync(temporary / "manifest.json")
        _sync(temporary)
        if final.exists():  # damaged: it was not found whole above
            _remove(final)
        temporary.rename(final)
        _sync(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if others:
            with suppress(OSError):  # until the next save, for those who have not begun
                temporary.mkdir()
                (temporary / FAILED).touch()
        raise
    return final


def write_shard(root: Path, step: int, parts: Parts, token: str, given_up: threading.Event | None = None) -> None:
    """This process's slices, into the folder that another one's `save` makes, which learns when it fails.

    Raises as it does.
    """
    temporary = root / f"step-{step:06d}.tmp-{token}"
    _wait_for([temporary], temporary / FAILED, given_up)
    if (temporary / FAILED).exists():
        raise OSError(f"{temporary} was given up by the process that makes it")
    try:
        _check_finite(step, parts)
        _write_parts(temporary, parts)
    except BaseException:
        with suppress(OSError):  # the folder may have gone with the other one's failure
            (temporary / FAILED).touch()
        raise


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
    """(parts, state) of one checkpoint that was found whole, on the CPU; slices are joined.

    Raises:
        ValueError: A file is what its manifest says, and yet none of ours.
    """
    try:
        return _load(path)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} holds a file that cannot be read: {error}; move it away") from error


def _load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    found: dict[str, list[dict[str, Tensor]]] = {}
    for file in sorted(path.glob("*.safetensors"), key=lambda f: [int(n) for n in re.findall(r"shard-(\d+)", f.name)]):
        found.setdefault(file.name.split(".")[0], []).append(load_file(file))
    parts: dict[str, dict[str, Tensor]] = {}
    for part, files in found.items():
        keys = dict.fromkeys(key for tensors in files for key in tensors)
        parts[part] = {key: _joined([tensors[key] for tensors in files if key in tensors]) for key in keys}
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


def _write_parts(folder: Path, parts: Parts) -> None:
    """A file a part, on the disk before it has its name."""
    for name, tensors in parts.items():
        file = folder / f"{name}.safetensors"
        partial = folder / f"{file.name}.part"
        try:
            save_file({key: value.detach().contiguous() for key, value in tensors.items()}, partial)
        except SafetensorError as error:
            raise OSError(f"{file} could not be written: {error}") from error
        _sync(partial)
        partial.rename(file)


def _wait_for(files: Sequence[Path], failed: Path, given_up: threading.Event | None) -> None:
    end = time.monotonic() + OTHERS_TAKE
    while missing := [file for file in files if not file.exists()]:
        if time.monotonic() > end or failed.exists() or (given_up and given_up.is_set()):
            raise OSError(f"{missing[0]} was not written by the process that has to")
        time.sleep(0.05)


def _check_finite(step: int, parts: Parts) -> None:
    wrong = [f"{part} {name}" for part, tensors in parts.items() for name, v in tensors.items() if not _finite(v)]
    if wrong:
        raise FloatingPointError(f"{wrong[0]} is not finite at step {step}: nothing was saved")


def _joined(slices: list[Tensor]) -> Tensor:
    return slices[0] if len(slices) == 1 else torch.cat(slices)


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
