"""Sets of images on the disk: drawn by several processes, continued after an interruption.

Image i is a function of (seed, i, its label) alone, so a set does not depend on the batch size, on the number of
processes, or on how often it was interrupted. Shapes: N images, C channels, H W size; pictures are uint8 (N, H, W, C).
"""

from __future__ import annotations

import json
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from ..pipeline import DiTMoEPipeline
from .draw import draw_some

Pixels = NDArray[np.uint8]


NOTE = "sampling.json"  # what made the images of a folder


NEW_NOTE = "note.tmp"  # on its way to be that


EVERY = 10.0  # seconds between two lines of a log


class Processes(Protocol):
    """Those that draw one set together."""

    rank: int
    world: int

    def gather(self, value: Any) -> list[Any]:
        """Every process's value; all wait for the last."""


@dataclass(frozen=True)
class ImageSet:
    """Images that a pipeline can draw.

    Attributes:
        pipe: The pipeline.
        labels: One a image, None of a model without labels.
        num: N.
        options: Arguments of the pipeline's call.
        facts: What makes the images, as JSON values; it goes into the report of a score.
    """

    pipe: DiTMoEPipeline
    labels: list[int] | None
    num: int
    options: dict[str, Any]
    facts: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the pictures."""
        config = self.pipe.transformer.config
        if self.pipe.vae is None:
            return config.sample_size, config.sample_size, config.in_channels
        side = config.sample_size * 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)
        return side, side, self.pipe.vae.config.out_channels

    @property
    def are_latents(self) -> bool:
        """Whether the model makes latents and has no VAE to decode them, so that they are no pictures."""
        return self.pipe.vae is None and (self.pipe.config.latents is not None or self.shape[2] not in (1, 3))

    def source(self, path: Path) -> dict[str, Any]:
        """The fields of an `eval` source that draws the images when they are asked for."""
        labels = None if self.labels is None else np.asarray(self.labels, np.int64)
        return {
            "kind": "model", "path": str(path), "count": self.num, "shape": self.shape, "read": self.read,
            "labels": labels, "facts": self.facts,
        }  # fmt: skip

    def read(self, limit: int, batch_size: int, rank: int, world: int) -> Iterator[tuple[NDArray[np.int64], Pixels]]:
        """A process's share of the first `limit` images: indices (n,) and pictures (n, H, W, C)."""
        for start in range(rank * batch_size, limit, world * batch_size):
            indices = range(start, min(start + batch_size, limit))
            yield np.array(indices), draw_some(self.pipe, self.labels, indices, self.options)


def write_folder(images: ImageSet, folder: Path, batch_size: int, processes: Processes) -> None:
    """One PNG an image, 000000.png, or 000000-class7.png, and what made them in sampling.json.

    A folder that holds a part of the same set is completed; each file is whole or absent.

    Raises:
        ValueError: The folder holds something else.
    """
    _same_set(folder, images, "--out")
    labels = images.labels
    names = [f"{i:06d}" + (f"-class{labels[i]}" if labels else "") + ".png" for i in range(images.num)]
    _agree(folder, images, processes)
    for indices in _share(images, batch_size, processes):
        missing = [i for i in indices if not (folder / names[i]).exists()]
        if missing:  # drawn as the batch that it was, for the last bits may depend on its size
            batch = _drawn(images, indices, folder)
            for i in missing:
                pixels = batch[i - indices[0]]
                partial = folder / f".{names[i]}.tmp"
                picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
                picture.save(partial, format="PNG")
                partial.replace(folder / names[i])
    processes.gather(None)


def write_npz(images: ImageSet, path: Path, batch_size: int, processes: Processes) -> None:
    """ADM's layout: arr_0 uint8 (N, H, W, C) and, for a model with classes, arr_1 labels (N,) int64; and `facts`.

    Batches are kept in `path`.parts until all are there, so an interrupted set is continued; memory does not grow
    with N. The file is whole or absent.

    Raises:
        ValueError: The parts are those of another set.
    """
    parts = path.with_name(path.name + ".parts")
    _same_set(parts, images, f"the unfinished set of {path}, ")
    _agree(parts, images, processes)
    for indices in _share(images, batch_size, processes):
        part = parts / f"{indices[0]:09d}-{indices[-1]:09d}.npy"
        if not part.exists():
            pixels, partial = _drawn(images, indices, parts), part.with_suffix(".tmp")
            with partial.open("wb") as file:
                np.save(file, pixels)
            partial.replace(part)
    processes.gather(None)
    if processes.rank == 0:
        _join(parts, images, path, batch_size)
        finished = parts.with_name(parts.name + ".done")
        shutil.rmtree(finished, ignore_errors=True)  # of a process that was killed below
        parts.rename(finished)  # at once: no half-removed parts to go on from
        shutil.rmtree(finished)
    processes.gather(None)


def _share(images: ImageSet, batch_size: int, processes: Processes) -> Iterator[range]:
    """The indices of this process's batches; the first process shows a progress bar, or plain lines in a log."""
    starts = range(processes.rank * batch_size, images.num, processes.world * batch_size)
    total = sum(min(batch_size, images.num - start) for start in starts)
    done, began = 0, time.monotonic()
    said = began
    with tqdm(desc="sampling", total=total, unit="img", disable=True if processes.rank else None) as bar:
        for start in starts:
            batch = range(start, min(start + batch_size, images.num))
            yield batch
            bar.update(len(batch))
            done, now = done + len(batch), time.monotonic()
            if bar.disable and not processes.rank and now - said >= EVERY:
                said = now
                print(f"sampling: {done} of {total} images, {done / (now - began):.3g} a second", file=sys.stderr)


def _join(parts: Path, images: ImageSet, path: Path, batch_size: int) -> None:
    """The parts, in order, as one .npz."""
    temporary = parts / "whole.tmp"  # leaves with the parts if this is interrupted
    header = {"descr": "|u1", "fortran_order": False, "shape": (images.num, *images.shape)}
    with zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for start in range(0, images.num, batch_size):
                stop = min(start + batch_size, images.num)
                member.write(np.load(parts / f"{start:09d}-{stop - 1:09d}.npy", allow_pickle=False).tobytes())
        if images.labels is not None:
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(images.labels, np.int64), allow_pickle=False)
        with archive.open("facts.npy", "w") as member:
            np.lib.format.write_array(member, np.array(json.dumps(images.facts)), allow_pickle=False)
    temporary.replace(path)


def _same_set(folder: Path, images: ImageSet, what: str) -> None:
    """Refuse a folder that holds anything but a part of the same set."""
    if not folder.is_dir() or all(entry.name == NEW_NOTE for entry in folder.iterdir()):
        return
    note = folder / NOTE
    try:
        facts = json.loads(note.read_text()) if note.is_file() else None
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise ValueError(f"{what} {folder} is not empty; give another folder")
    differing = sorted(key for key in {*facts, *images.facts} if _what(facts, key) != _what(images.facts, key))
    if differing:
        raise ValueError(
            f"{what} {folder} holds a part of another set (other {', '.join(differing)}); "
            "repeat that command to complete it, or give another place"
        )


def _what(facts: dict[str, Any], key: str) -> Any:
    """A fact, of the checkpoint its weights: the same model may be reached by another path."""
    found = facts.get(key)
    return found.get("sha256") if key == "checkpoint" and isinstance(found, dict) else found


def _agree(folder: Path, images: ImageSet, processes: Processes) -> None:
    """Every process has looked at the folder; then the first one makes it."""
    processes.gather(None)
    if processes.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.tmp"):
            left.unlink()
        if not (folder / NOTE).exists():
            (folder / NEW_NOTE).write_text(json.dumps(images.facts, indent=2) + "\n")
            (folder / NEW_NOTE).replace(folder / NOTE)
    processes.gather(None)


def _drawn(images: ImageSet, indices: range, folder: Path) -> NDArray[np.uint8]:
    """The images of a batch. A command that is refused takes a folder with it that has nothing but its note."""
    try:
        return draw_some(images.pipe, images.labels, indices, images.options)
    except ValueError:
        with suppress(OSError):  # another process has been faster
            if {entry.name for entry in folder.iterdir()} == {NOTE}:
                (folder / NOTE).unlink()
                folder.rmdir()
        raise
