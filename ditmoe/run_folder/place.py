"""A run folder belongs to one configuration, and at any time to one process group."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..config.file import differences, read_file, save, to_dict
from ..config.sections import Config
from . import checkpoint
from .log import read_rows

LOCK = ".lock"

# What may change between the parts of one run: it has no influence on the weights at a given step.
# (data.path has: the data's fingerprint is checked instead.)
_FREE = {"out", "max_steps", "dry_run", "moe.backend", "parallel.experts", "parallel.shard", "parallel.gather"}
_FREE |= {f"data.{name}" for name in ("path", "vae", "download", "num_workers", "max_bad")}
_FREE |= {
    f"train.{name}"
    for name in ("log_every", "checkpoint_every", "keep", "sample_every", "tensorboard", "max_skipped", "on_save_error")
}


@contextmanager
def locked(config: Config) -> Iterator[None]:
    """Hold the run folder, which is made when missing. The lock ends with the process, however it ends.

    Raises:
        ValueError: Another process holds it, or the folder cannot be written.
    """
    check_place(config)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        file = (config.out / LOCK).open("a+")
    except OSError as error:
        raise ValueError(f"out {config.out} cannot be written ({error.strerror})") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process: its readers do not inherit it
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(
                f"{config.out} is in use by {file.read().strip() or 'another process'}; wait for it, stop it, "
                f"or give another --out"
            ) from None
        except OSError as error:
            print(f"note: {config.out} is on a disk without locks ({error.strerror}); start only one run on it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        yield
        file.truncate(0)


def check_place(config: Config) -> None:
    """An existing run folder must hold the same run. Writes nothing.

    Raises:
        ValueError: It holds another run, or things that are no run, or cannot be a folder.
    """
    path = config.out / "config.json"
    parent = next(p for p in (config.out, *config.out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"out {config.out} cannot be written: {parent} is a file, or not writable")
    if path.exists():
        changed = [
            line
            for line in differences(to_dict(read_file(path)), to_dict(config))
            if line.split(":")[0] not in _FREE and not line.startswith(("sample.", "plan."))
        ]
        if changed:
            raise ValueError(
                f"{config.out} holds another run ({'; '.join(changed[:5])}); give another --out, or the same values"
            )
    elif config.out.exists() and any(p.name not in (LOCK, "config.json.tmp") for p in config.out.iterdir()):
        raise ValueError(f"{config.out} is not empty and holds no run; give another --out")


def check_begins(config: Config, exported: int | None) -> None:
    """Refuse to begin again where a run has had checkpoints: they are gone.

    Raises:
        ValueError: The run folder holds a model, or says that something was saved.
    """
    if exported or (config.out / checkpoint.MARK).exists():
        steps = exported or max((row["step"] for row in read_rows(config.out / "metrics.jsonl")), default="some")
        raise ValueError(
            f"{config.out} has been trained for {steps} steps, but {config.out / 'checkpoints'} holds no checkpoint; "
            f"restore it, or move {config.out} away to start again"
        )


def open_folder(config: Config, argv: Sequence[str]) -> None:
    """Note the configuration and the command in a run folder that is ours; its page belongs to an earlier state."""
    for leftover in config.out.glob("model.tmp-*"):  # of an export that was killed
        shutil.rmtree(leftover)
    save(config, config.out / "config.json")
    (config.out / "index.html").unlink(missing_ok=True)
    with (config.out / "command.txt").open("a") as file:
        file.write(shlex.join(argv) + "\n")
