"""Images in tar files as WebDataset lays them out: members KEY.jpg (or .png, ...) and KEY.cls, the label's number.

The files are read in place with `tarfile`; nothing is unpacked.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .folders import IMAGE_SUFFIXES, BadImage, read_cropped

_MOST_LABELS = 1_000_000


class _Member(NamedTuple):
    tar: Path
    key: str
    offset: int
    size: int


class TarImages:
    """Images read from uncompressed tar files each time they are asked for; without .cls members, without labels.

    Args:
        root: A tar file, or a folder of them (*.tar), taken in the order of their names.
        size: Height and width; images are resized and centre-cropped.
        channels: 1 (grey) or 3 (RGB).

    Raises:
        ValueError: A file is truncated or compressed, holds no images, or its labels are not numbers.
    """

    def __init__(self, root: Path, size: int, channels: int) -> None:
        self.size, self.mode = size, "L" if channels == 1 else "RGB"
        self._members: list[_Member] = []
        labels: list[int | None] = []
        tars = tar_files(root)
        for tar in tars:
            for member, label in _scan(tar):
                self._members.append(member)
                labels.append(label)
        if not self._members:
            raise ValueError(f"the tar files in {root} hold no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        bare = [member for member, label in zip(self._members, labels, strict=True) if label is None]
        if bare and len(bare) < len(labels):
            raise ValueError(f"{bare[0].tar} has {bare[0].key} without {bare[0].key}.cls, but others have labels")
        self.labels = np.asarray([label or 0 for label in labels], dtype=np.int64)
        self.id2label = {} if bare else {i: str(i) for i in range(int(self.labels.max()) + 1)}
        self.source = f"{len(labels)} images of {len(self.id2label)} classes in {len(tars)} tar files of {root}"

    def __len__(self) -> int:
        return len(self._members)

    @property
    def inventory(self) -> list[tuple[str, int]]:
        """Every image's file and key, and its size in bytes."""
        return [(f"{m.tar.name}/{m.key}", m.size) for m in self._members]

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """(n, H, W, C) uint8. Raises BadImage at the first one that cannot be used."""
        return np.stack([self._image(i) for i in indices])

    def _image(self, row: int) -> NDArray[np.uint8]:
        member = self._members[row]
        try:
            with member.tar.open("rb") as file:
                file.seek(member.offset)
                content = io.BytesIO(file.read(member.size))
            return read_cropped(member.tar / member.key, self.size, self.mode, content)
        except (OSError, ValueError) as error:
            raise BadImage(row, str(error)) from error


def tar_files(root: Path) -> list[Path]:
    """The tar files that a path means; none for a folder of images."""
    return [root] if root.is_file() and root.suffix == ".tar" else sorted(root.glob("*.tar"))


def _scan(tar: Path) -> list[tuple[_Member, int | None]]:
    """The images of a tar file in its order, each with its label."""
    images: dict[str, _Member] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for entry in archive:
                place = PurePosixPath(entry.name)
                stem, _, extension = place.name.partition(".")
                key = str(place.with_name(stem)) if stem else ""
                if not key or not entry.isreg() or entry.issparse():
                    continue
                if f".{extension.lower()}" in IMAGE_SUFFIXES:
                    if key in images:
                        raise ValueError(f"{tar} has two images of the key {key}")
                    images[key] = _Member(tar, key, entry.offset_data, entry.size)
                elif extension.lower() == "cls":
                    content = archive.extractfile(entry)
                    labels[key] = _label(tar, key, b"" if content is None else content.read(32))
            end = max((m.offset + m.size for m in images.values()), default=0)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{tar} is truncated, compressed or no tar file ({error})") from error
    if end > tar.stat().st_size:
        raise ValueError(f"{tar} is truncated: fetch it again")
    return [(member, labels.get(key)) for key, member in images.items()]


def _label(tar: Path, key: str, content: bytes) -> int:
    text = content.decode("ascii", errors="replace").strip()
    if not text.isdecimal() or int(text) >= _MOST_LABELS:
        raise ValueError(f"{tar} has {key}.cls with {text!r:.40}; a label is a number from 0 on")
    return int(text)
