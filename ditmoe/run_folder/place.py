"""A run folder: what is in it, whose it is; it belongs to one configuration, and at any time to one process group."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from .. import files
from ..config.checks import writable
from ..config.file import differences, read_file, save, to_dict
from ..config.sections import Config

CONFIG = "config.json"
COMMAND = "command.txt"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
SAVED = ".saved"  # there once a checkpoint has been
MODEL = "model"
PROGRESS = "progress"
SAMPLES, FILM, EXPERTS, LOSS = "samples.png", "film.png", "experts.png", "loss.png"
REPORT = "report.json"
PAGE = "index.html"

# What may change between the parts of one run: it has no influence on the weights at a given step.
# (data.path and data.mixture have: the data's fingerprint is checked instead.)
_FREE = {"out", "max_steps", "dry_run", "moe.backend", "parallel.experts", "parallel.shard", "parallel.gather"}
_FREE |= {f"data.{name}" for name in ("path", "mixture", "vae", "download", "num_workers", "max_bad")}
_FREE |= {f"train.{name}" for name in ("log_every", "checkpoint_every", "keep", "sample_every", "tracker")}
_FREE |= {"distill.teachers"}  # as of data.path
_FREE |= {"train.max_skipped", "train.on_save_error", "train.moved"}
_MOVED = {"train.learning_rate", "train.precision", "train.accumulation"}  # may change too, where train.moved says so


@contextmanager
def locked(config: Config) -> Iterator[None]:
    """Hold the run folder, which is made when missing. ValueError as `check_place` and `ditmoe.files.locked`."""
    check_place(config)
    with files.locked(config.out):
        yield


def check_place(config: Config) -> None:
    """An existing run folder must hold the same run. Writes nothing.

    Raises:
        ValueError: It holds another run, or things that are no run, or cannot be a folder.
    """
    path = config.out / CONFIG
    writable("out", config.out)
    if config.out.is_file():
        raise ValueError(f"out {config.out} is a file; give a folder")
    if path.exists():
        changed = _changed(config)
        if refused := [line for line in changed if not config.train.moved or line.split(":")[0] not in _MOVED]:
            what = f"{config.out} holds another run ({'; '.join(refused[:5])}); give another --out, or the same values"
            movable = {line.split(":")[0] for line in changed} <= _MOVED
            raise ValueError(what + (", or --train.moved if it goes on on other hardware" if movable else ""))
    elif config.train.moved:
        raise ValueError(f"train.moved is for a run that goes on, and {config.out} holds none; leave it out")
    elif config.out.exists() and not files.is_bare(config.out, CONFIG):
        raise ValueError(f"{config.out} is not empty and holds no run; give another --out")


def _changed(config: Config) -> list[str]:
    """What differs from the run that the folder holds, and has an influence on its weights."""
    lines = differences(_told(read_file(config.out / CONFIG)), _told(config))
    grid = ("sample.steps", "sample.flow_shift") if config.distill.few else ()  # what is learnt, then
    shown = [x for x in lines if x.split(":")[0] in grid or not x.startswith(("sample.", "plan."))]
    return [x for x in shown if x.split(":")[0] not in _FREE]


def _told(config: Config) -> dict[str, Any]:
    """The options, with what they come to where a value left it open in one version and said it in another."""
    options = to_dict(config)
    options["moe"]["scale"] = config.moe.routed_scale
    options["data"]["sizes"] = config.data.resolutions()  # of data.mixture, which may name other places
    return options


def open_folder(config: Config, argv: Sequence[str], *, goes_on: bool) -> None:
    """Note in a run folder that is ours the configuration, the command, and whether it `goes_on` from a checkpoint.

    Its page belongs to an earlier state, and goes.
    """
    for leftover in config.out.glob(f"{MODEL}.tmp-*"):  # of an export that was killed
        files.remove(leftover)
    moved = _changed(config) if (config.out / CONFIG).exists() else []
    save(replace(config, train=replace(config.train, moved=False)), config.out / CONFIG)  # it is for one start
    (config.out / PAGE).unlink(missing_ok=True)
    if goes_on:
        (config.out / SAVED).touch()
    with (config.out / COMMAND).open("a") as file:
        file.write("".join([shlex.join(argv) + "\n", *(f"# {line}\n" for line in moved)]))
    for line in moved:
        print(f"note: {line} from here on, as --train.moved allows", flush=True)
