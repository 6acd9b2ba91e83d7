"""Sets of images on the disk: drawn by several processes, continued after an interruption.

Shapes: N images, C channels, H W size; pictures are uint8 (N, H, W, C).
"""

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..data.pixels import to_pil
from ..files import LOCK, is_bare, locked, read_object, whole, write_json
from .draw import Pixels, RequestedSet, batches

NOTE = "sampling.json"  # what made the images of a folder
WRITERS = 4  # threads, at most
_NETWORKS = ("checkpoint", "guide")  # facts with a path and a hash

Facts = Mapping[str, Any]  # what makes a set, as JSON values


class Processes(Protocol):
    """Those that draw one set together."""

    rank: int
    world: int

    def gather(self, value: Any) -> list[Any]:
        """Every process's value; all wait for the last."""


def write_folder(images: RequestedSet, facts: Facts, folder: Path, processes: Processes) -> None:
    """One PNG an image, 000000.png, or 000000-class7.png, and what made them in sampling.json.

    A folder that holds a part of the same set is completed; each file is whole or absent. ValueError where it holds
    something else, or another command draws into it.
    """

    def files(indices: range) -> list[Path]:
        ends = [f"-class{images.labels[i]}" if images.labels else "" for i in indices]
        return [folder / f"{i:06d}{end}.png" for i, end in zip(indices, ends, strict=True)]

    def write(path: Path, picture: Pixels) -> None:
        if not is_png(path):
            with whole(path, durable=False) as file:
                to_pil(picture).save(file, format="PNG")

    with _held(folder, facts, "--out", processes):
        _complete(images, facts, folder, files, list, write, is_png, processes)


def is_png(path: Path) -> bool:
    """Whether a PNG is there, all of it: of a machine that went down it may be the name alone."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()  # the sums of its parts
    except (OSError, SyntaxError):  # which Pillow raises of a broken part
        return False
    return True


def write_npz(images: RequestedSet, facts: Facts, path: Path, processes: Processes) -> None:
    """ADM's layout: arr_0 uint8 (N, H, W, C) and, for a model with classes, arr_1 labels (N,) int64; and `facts`.

    Batches are kept in `path`.parts until all are there, so an interrupted set is continued; memory does not grow
    with N. The file is whole or absent. ValueError where the parts are those of another set, or of another command.
    """
    parts = path.with_name(path.name + ".parts")

    def files(indices: range) -> list[Path]:
        return [parts / f"{indices[0]:09d}-{indices[-1]:09d}.npy"]

    def write(part: Path, pixels: Pixels) -> None:
        with whole(part) as file:  # on the disk before it has its name
            np.save(file, pixels)

    with _held(parts, facts, f"the unfinished set of {path}, ", processes):
        _complete(images, facts, parts, files, lambda pixels: [pixels], write, Path.exists, processes)
        if processes.rank == 0:
            written = (files(indices)[0] for indices in batches(images.num, images.batch_size, shown=False))
            _join(written, images, facts, path)
            finished = parts.with_name(parts.name + ".done")
            shutil.rmtree(finished, ignore_errors=True)  # of a process that was killed below
            parts.rename(finished)  # at once: no half-removed parts to go on from
            shutil.rmtree(finished)
        processes.gather(None)


@contextmanager
def _held(folder: Path, facts: Facts, what: str, processes: Processes) -> Iterator[None]:
    """A folder that is for this set alone, and that the first process holds for all; ValueError in each if not."""
    _same_set(folder, facts, what)  # before anything is written
    processes.gather(None)
    with ExitStack() as stack:
        refused = None
        try:
            if processes.rank == 0:
                stack.enter_context(locked(folder, kept=False))
        except ValueError as error:
            refused = str(error)
        for sentence in processes.gather(refused):
            if sentence is not None:
                raise ValueError(sentence)
        try:
            if (folder / NOTE).exists():
                _same_set(folder, facts, what)  # another command may have come and gone
            yield
        finally:
            stack.close()
            if processes.rank == 0:
                with suppress(OSError):
                    folder.rmdir()  # which is empty where the command was refused


def _complete(
    images: RequestedSet, facts: Facts, folder: Path, files: Callable[[range], list[Path]],
    shares: Callable[[Pixels], Sequence[Pixels]], write: Callable[[Path, Pixels], None],
    is_whole: Callable[[Path], bool], processes: Processes,
) -> None:  # fmt: skip
    """Draw this process's batches of which a file is missing, whole: the last bits may depend on a batch's size.

    Other threads write each file's share while the next batch is drawn, which waits for all of the one before.
    A command that is refused takes a folder with it that has nothing but its note.
    """
    if processes.rank == 0 and not (folder / NOTE).exists():
        write_json(folder / NOTE, facts)
    processes.gather(None)
    written: list[Future[None]] = []
    with ThreadPoolExecutor(WRITERS) as pool:
        for indices in batches(images.num, images.batch_size, processes.rank, processes.world):
            if all(map(is_whole, files(indices))):
                continue
            try:
                pixels = images.batch(indices)
            except ValueError:
                with suppress(OSError):
                    if processes.rank == 0 and {entry.name for entry in folder.iterdir()} <= {NOTE, LOCK}:
                        (folder / NOTE).unlink()
                raise
            for done in written:
                done.result()  # what went wrong there is raised here
            written = [pool.submit(write, *each) for each in zip(files(indices), shares(pixels), strict=True)]
        for done in written:
            done.result()
    processes.gather(None)  # all is there


def _join(parts: Iterator[Path], images: RequestedSet, facts: Facts, path: Path) -> None:
    """The parts, in order, as one .npz."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (images.num, *images.shape)}
    with whole(path) as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for part in parts:
                member.write(np.load(part, allow_pickle=False).tobytes())
        labels = {} if images.labels is None else {"arr_1": np.asarray(images.labels, np.int64)}
        for name, array in {**labels, "facts": np.array(json.dumps(facts))}.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _same_set(folder: Path, facts: Facts, what: str) -> None:
    """Refuse a folder that holds anything but a part of the same set."""
    if not folder.is_dir() or is_bare(folder, NOTE):
        return
    try:
        there = read_object(folder / NOTE)
    except ValueError:
        raise ValueError(f"{what} {folder} is not empty; give another folder") from None
    there, wanted = ({**known, **{name: _weights(known.get(name)) for name in _NETWORKS}} for known in (there, facts))
    if differing := sorted(key for key in {*there, *wanted} if there.get(key) != wanted.get(key)):
        fix = "repeat that command to complete it, or give another place"
        raise ValueError(f"{what} {folder} holds a part of another set (other {', '.join(differing)}); {fix}")


def _weights(network: Any) -> Any:
    """The same model or guide may be reached by another path."""
    return network.get("sha256") if isinstance(network, dict) else network
