"""Checkpoints written: in the background, whole or not at all, older ones pruned once newer ones were read back."""

import json
import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..files import digest, remove, sync, write_json, write_text
from .checkpoint import Parts, find_fault, newest_first, remove_unfinished
from .place import SAVED

FAILED = "failed"  # a file in the temporary folder
OTHERS_TAKE = 1800.0  # seconds, at most, to begin a save or to write their slices


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
        self._whole: list[Path] = []  # those that were read back
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
        self._pending = self._thread.submit(self._write, step, _copied(parts), state, _copied(split or {}))
        if self.shard == 0:
            self._thread.submit(self._prune, self._pending)  # `finish` does not wait for it, leaving does
        if wait:
            self.finish()

    def __enter__(self) -> Self:
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
        if self.shard:
            return write_shard(self.root, step, self.shard, named, self.token, self._given_up)
        if self.shards > 1:
            remove_unfinished(self.root)  # the last one, if it failed
        save(self.root, step, {**parts, **named}, state, self.token, self.shards, self._given_up)
        (self.root.parent / SAVED).touch()

    def _prune(self, written: Future[None]) -> None:
        if written.exception() is not None:
            return
        try:
            whole = prune(self.root, self.keep, self._whole)
            self._whole = whole if self.shards > 1 else []  # what many wrote is too large to be read at every save
        except OSError as error:
            print(f"warning: an older checkpoint could not be removed ({error})", flush=True)


def _copied(parts: Parts) -> Parts:
    return {part: {k: v.detach().to("cpu", copy=True) for k, v in tensors.items()} for part, tensors in parts.items()}


def save(
    root: Path, step: int, parts: Parts, state: Mapping[str, Any], token: str = "", shards: int = 1,
    given_up: threading.Event | None = None,
) -> Path:  # fmt: skip
    """Write `root/step-<step>/` and return it. The folder appears complete or not at all.

    Where it is there already, whole, it stays as it is: a step of a run has one state.

    Args:
        parts: File name (without suffix) -> tensors by name, `step` steps after the start.
        state: JSON values.
        token: See `Writer`.
        shards: Processes that write; the others do so with `write_shard`, and are waited for.
        given_up: Once it is set, no longer.

    Raises:
        OSError: The disk is full, or fails otherwise; nothing is left of this checkpoint.
        FloatingPointError: A value is not finite; nothing was written.
    """
    _check_finite(step, parts)
    final = root / f"step-{step:06d}"
    if shards == 1 and final.exists() and find_fault(final) is None:
        return final
    temporary = root / f"{final.name}.tmp-{token or os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        files = _write_parts(temporary, parts)
        write_text(temporary / "state.json", json.dumps({"step": step, **state}, indent=1) + "\n")
        files["state.json"] = _described(temporary / "state.json")
        notes = [_note(temporary, shard) for shard in range(1, shards)]
        _wait_for(notes, temporary / FAILED, given_up)
        for note in notes:
            files |= json.loads(note.read_text())
            note.unlink()
        manifest = {"step": step, "files": dict(sorted(files.items()))}
        write_text(temporary / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        sync(temporary)
        if final.exists():  # damaged: it was not found whole above
            _remove(final)
        temporary.rename(final)
        sync(root)
    except BaseException:
        remove(temporary)
        if shards > 1:
            with suppress(OSError):  # until the next save, for those who have not begun
                temporary.mkdir()
                (temporary / FAILED).touch()
        raise
    return final


def write_shard(
    root: Path, step: int, shard: int, parts: Parts, token: str, given_up: threading.Event | None = None
) -> None:
    """This process's slices, into the folder that another one's `save` makes, which learns when it fails as it may."""
    temporary = root / f"step-{step:06d}.tmp-{token}"
    try:
        _wait_for([temporary], temporary / FAILED, given_up)
        if (temporary / FAILED).exists():
            raise OSError(f"{temporary} was given up by the process that makes it")
        _check_finite(step, parts)
        write_json(_note(temporary, shard), _write_parts(temporary, parts))
    except BaseException:
        with suppress(OSError):  # the folder may have gone with the other one's failure
            (temporary / FAILED).touch()
        raise


def prune(root: Path, keep: int, known: Collection[Path] = ()) -> list[Path]:
    """Remove what is older than the `keep` newest whole checkpoints, which are read back for it; 0 keeps all.

    Those that are `known` to be whole are not read again. Returns the ones that stay.
    """
    whole: list[Path] = []
    for path in newest_first(root) if keep else []:
        if len(whole) >= keep:
            _remove(path)
        elif path in known or find_fault(path) is None:
            whole.append(path)
    return whole


def _remove(path: Path) -> None:
    """A folder that is going away is none from its first moment on."""
    doomed = path.with_name(f"{path.name}.tmp-{os.getpid()}-old")
    path.rename(doomed)
    remove(doomed)


def _write_parts(folder: Path, parts: Parts) -> dict[str, Any]:
    """A file a part, on the disk before it has its name; what the manifest says of each."""
    files = {}
    for name, tensors in parts.items():
        file = folder / f"{name}.safetensors"
        partial = folder / f"{file.name}.part"
        try:
            save_file({key: value.detach().contiguous() for key, value in tensors.items()}, partial)
        except SafetensorError as error:
            raise OSError(f"{file} could not be written: {error}") from error
        sync(partial)
        files[file.name] = _described(partial)
        partial.rename(file)
    return files


def _described(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": digest(file)}


def _note(folder: Path, shard: int) -> Path:
    """Where another process says what it has written; gone once the manifest has it."""
    return folder / f"shard-{shard}.note"


def _wait_for(files: Sequence[Path], failed: Path, given_up: threading.Event | None) -> None:
    end = time.monotonic() + OTHERS_TAKE
    while missing := [file for file in files if not file.exists()]:
        if time.monotonic() > end or failed.exists() or (given_up and given_up.is_set()):
            raise OSError(f"{missing[0]} was not written by the process that has to")
        time.sleep(0.05)


def _check_finite(step: int, parts: Parts) -> None:
    """FloatingPointError where a value is not finite.

    By NumPy: torch would start a second team of OpenMP threads in the writer's thread, and where there are more threads
    than cores, those of training no longer spin while they wait: the preset digits then trains at half its speed.
    """
    for part, tensors in parts.items():
        for name, value in tensors.items():
            if value.is_floating_point() and not np.isfinite(value.float().numpy()).all():
                raise FloatingPointError(f"{part} {name} is not finite at step {step}: nothing was saved")
