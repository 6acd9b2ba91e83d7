"""A folder that is on the disk whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its place once all that was written is on the disk.

    The older one stays until then. Where the block or the disk fails, nothing is left of the new one; what a kill
    leaves is named `folder`.tmp-*, and is removed when the next one is in place.
    """
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    old = folder.with_name(f"{temporary.name}-old")
    remove(temporary)
    try:
        yield temporary
        os.umask(mask := os.umask(0o077))
        for path in (*temporary.rglob("*"), temporary):
            if path.is_file():
                path.chmod(0o666 & ~mask)  # safetensors makes files that their owner alone may read
            sync(path)
        remove(old)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        remove(temporary)
        raise
    sync(folder.parent)
    for leftover in folder.parent.glob(f"{escape(folder.name)}.tmp-*"):
        remove(leftover)


def remove(path: Path) -> None:
    """A folder, file or link; what cannot be removed now is a leftover for the next time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
