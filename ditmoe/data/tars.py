"""Images in tar files as WebDataset lays them out: members KEY.jpg (or .png, ...) and KEY.cls, the label's number.

The files are read in place with `tarfile`; nothing is unpacked.
"""

import io
import tarfile
from pathlib import Path, PurePath, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np

from ..config.checks import plural
from .below import IMAGE_SUFFIXES, counted, files_below, is_hidden, is_image, left_out
from .folders import FolderImages, mode_of
from .sets import MOST_LABELS


class _Member(NamedTuple):
    tar: Path
    key: str
    offset: int
    size: int


class TarImages(FolderImages):
    """Images read from uncompressed tar files each time they are asked for; without .cls members, without labels.

    `root` is a tar file, or a folder of them (*.tar), taken in the order of their names; images are made of the `size`
    and number of `channels` as those of `FolderImages` with fit "crop".

    Raises:
        ValueError: A file is truncated, damaged or compressed, holds no images, links instead of images, a key twice
            or a label without an image, or labels that are not numbers; or there are images beside the tar files.
    """

    def __init__(self, root: Path, size: int, channels: int) -> None:
        self.size, self.mode, self.fit = size, mode_of(channels), "crop"
        tars = tar_files(root)
        beside = [file for file in files_below(root) if file not in tars] if root.is_dir() else []
        if stray := next(filter(is_image, beside), None):
            raise ValueError(f"{root} holds tar files, and images beside them ({stray}); move the one or the other")
        others: list[PurePath] = [file.relative_to(root) for file in beside]
        found = [entry for tar in tars for entry in _scan(tar, others)]
        if not found:
            raise ValueError(f"the tar files in {root} hold no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        self._members, labels = [member for member, _ in found], [label for _, label in found]
        bare = [member for member, label in found if label is None]
        if bare and len(bare) < len(labels):
            raise ValueError(f"{bare[0].tar} has {bare[0].key} without {bare[0].key}.cls, but others have labels")
        self.labels = np.asarray([label or 0 for label in labels], dtype=np.int64)
        self.id2label = {} if bare else {i: str(i) for i in range(int(self.labels.max()) + 1)}
        empty = len(self.id2label) - len(np.unique(self.labels)) if self.id2label else 0
        classes = counted(len(labels), len(self.id2label)) + (f" ({empty} of them without an image)" if empty else "")
        self.source = f"{classes} in {plural(len(tars), 'tar file')} of {root}{left_out(others)}"

    @property
    def inventory(self) -> list[tuple[str, int]]:
        """Every image's file and key, and its size in bytes."""
        return [(f"{m.tar.name}/{m.key}", m.size) for m in self._members]

    def name(self, row: int) -> str:
        """The tar file and the key in it."""
        return f"{self._members[row].tar}/{self._members[row].key}"

    def _content(self, row: int) -> BinaryIO:
        member = self._members[row]
        with member.tar.open("rb") as file:
            file.seek(member.offset)
            return io.BytesIO(file.read(member.size))


def tar_files(root: Path) -> list[Path]:
    """The tar files that a path means; none for a folder of images."""
    if root.is_file() and root.suffix.lower() == ".tar":
        return [root]
    return sorted(p for p in root.glob("*.tar") if not is_hidden(Path(p.name)))


def _scan(tar: Path, others: list[PurePath]) -> list[tuple[_Member, int | None]]:
    """The images of a tar file in its order, each with its label; what is neither goes to `others`."""
    images: dict[str, _Member] = {}
    labels: dict[str, int] = {}
    with tar.open("rb") as file:
        for entry in _entries(tar):
            place = PurePosixPath(entry.name)
            stem, _, extension = place.name.partition(".")
            is_label, is_picture = extension.lower() == "cls", f".{extension.lower()}" in IMAGE_SUFFIXES
            if entry.isdir() or is_hidden(place):
                continue
            if not (is_label or is_picture):
                others.append(tar.name / place)
                continue
            key = str(place.with_name(stem))
            if not entry.isreg() or entry.issparse():
                raise ValueError(f"{tar} has {entry.name} as a link or another special file; store the file itself")
            if key in (labels if is_label else images):
                raise ValueError(f"{tar} has two {'labels' if is_label else 'images'} of the key {key}")
            if is_label:
                file.seek(entry.offset_data)
                text = file.read(entry.size if entry.size <= 32 else 0).decode("ascii", errors="replace").strip()
                if not text.isdecimal() or int(text) >= MOST_LABELS:
                    raise ValueError(f"{tar} has {key}.cls with {text!r:.40}; a label is a number from 0 on")
                labels[key] = int(text)
            else:
                images[key] = _Member(tar, key, entry.offset_data, entry.size)
    if alone := next((key for key in labels if key not in images), None):
        raise ValueError(f"{tar} has {alone}.cls without an image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [(member, labels.get(key)) for key, member in images.items()]


def _entries(tar: Path) -> list[tarfile.TarInfo]:
    """All that a tar file holds. `tarfile` alone takes a damaged header for the end, and follows sizes below 0."""
    entries: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(tar, "r:") as archive, tar.open("rb") as file:
            for entry in archive:
                if entry.size < 0 or (entries and entry.offset_data <= entries[-1].offset_data):
                    raise tarfile.ReadError(f"the size or the place of {entry.name} makes no sense")
                entries.append(entry)
            file.seek(archive.offset)
            rest = file.read(tarfile.BLOCKSIZE)
            if rest != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"neither a member nor the end is at byte {archive.offset}")
            while rest:
                if rest.strip(tarfile.NUL):
                    raise tarfile.ReadError(f"it goes on after its end at byte {archive.offset}")
                rest = file.read(2**20)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(f"{tar} is truncated, damaged, compressed or no tar file ({error})") from error
    return entries
