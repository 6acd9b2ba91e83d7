"""Images in folders: one sub-folder a class, or none. Every file that cannot be used is named.

Shapes: n images asked for, C channels, H W size; pixels are uint8 (n, H, W, C).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
_DECODING = (OSError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError)
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")


class BadImage(ValueError):  # noqa: N818 - what is raised is the image
    """An image file that cannot be used.

    Attributes:
        row: Its number in the set.
    """

    def __init__(self, row: int, sentence: str) -> None:
        super().__init__(sentence)
        self.row = row


class FolderImages:
    """Images read from files each time they are asked for, one sub-folder a class.

    Args:
        root: The folder; without sub-folders its images have no labels.
        size: Height and width of the model's images.
        channels: 1 (grey) or 3 (RGB).
        fit: "exact": other sizes and modes cannot be used; "crop": resized, centre-cropped and converted. Either
            way a picture is turned upright first, as its EXIF orientation says.

    Raises:
        ValueError: No images.
    """

    is_latent = False

    def __init__(self, root: Path, size: int, channels: int, fit: str) -> None:
        if not root.is_dir():
            raise ValueError(f"data.path {root} is not a folder; give a folder of images with --data.path")
        if channels not in (1, 3):
            raise ValueError(f"model.in_channels is {channels}; images have 1 (grey) or 3 (RGB)")
        self.size, self.mode, self.fit = size, "L" if channels == 1 else "RGB", fit
        classes = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != "." and _image_files(p))
        if classes and _image_files(root, deep=False):
            raise ValueError(f"data.path {root} holds images beside class folders; move them into one")
        self.files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(classes or ["."]):
            files = _image_files(root / name)
            self.files += files
            labels += [label] * len(files)
        if not self.files:
            raise ValueError(f"data.path {root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        self.labels = np.asarray(labels, dtype=np.int64)
        self.id2label = dict(enumerate(classes))
        self.root = root
        self.source = f"{len(self.files)} images of {len(classes)} classes in {root}"

    def __len__(self) -> int:
        return len(self.files)

    @property
    def inventory(self) -> list[tuple[str, int]]:
        """Every file's place below the root and its size in bytes."""
        return [(file.relative_to(self.root).as_posix(), file.stat().st_size) for file in self.files]

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """(n, H, W, C) uint8. Raises BadImage at the first file that cannot be used."""
        return np.stack([self._image(i) for i in indices])

    def check_headers(self) -> dict[int, str]:
        """With fit "exact", what is wrong with files by their number, as far as their headers tell."""
        wrong = {}
        for row, file in enumerate(self.files if self.fit == "exact" else []):
            try:
                with _opened(file) as image:
                    self._check(file, image)
            except (ValueError, *_DECODING) as error:
                wrong[row] = str(error)
        return wrong

    def tensors(self, indices: Sequence[int]) -> Tensor:
        """(n, C, H, W) float32 in [-1, 1]."""
        return torch.from_numpy(self.images(indices)).permute(0, 3, 1, 2).float() / 127.5 - 1

    def _check(self, file: Path, image: Image.Image) -> None:
        want = (self.size, self.size)
        if image.size != want or image.mode != self.mode:
            raise ValueError(
                f"{file} is {image.size[0]}x{image.size[1]} {image.mode}, the model takes {want[0]}x{want[1]} "
                f"{self.mode}; add --data.fit crop to resize, centre-crop and convert every image"
            )

    def _image(self, row: int) -> NDArray[np.uint8]:
        try:
            return self._read(self.files[row])
        except ValueError as error:
            raise BadImage(row, str(error)) from error

    def _read(self, file: Path) -> NDArray[np.uint8]:
        if self.fit == "crop":
            return read_cropped(file, self.size, self.mode)
        with _opened(file) as image:
            self._check(file, image)
            return np.asarray(_upright(file, image), dtype=np.uint8).reshape(self.size, self.size, -1)


def read_cropped(file: Path, size: int, mode: str, content: BinaryIO | None = None) -> NDArray[np.uint8]:
    """The image of a file, upright, resized, centre-cropped and converted: (size, size, C) uint8.

    Args:
        file: The file, or with `content` what messages call it.
        size: Height and width.
        mode: "L" or "RGB".
        content: What is read instead of the file.

    Raises:
        ValueError: It cannot be used; the file is named.
    """
    with _opened(file, content) as image:
        fitted = _centre_crop(_converted(file, _upright(file, image), mode), size)
        return np.asarray(fitted, dtype=np.uint8).reshape(size, size, -1)


def _image_files(root: Path, *, deep: bool = True) -> list[Path]:
    found = root.rglob("*") if deep else root.glob("*")
    return sorted(p for p in found if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def _opened(file: Path, content: BinaryIO | None = None) -> Image.Image:
    try:
        return Image.open(file if content is None else content, formats=IMAGE_FORMATS)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is not a readable image ({error}); remove or replace it") from error


def _upright(file: Path, image: Image.Image) -> Image.Image:
    """Decoded, and turned as its EXIF orientation says."""
    try:
        upright = ImageOps.exif_transpose(image)
        upright.load()
    except _DECODING as error:
        raise ValueError(f"{file} cannot be decoded ({error}); remove or replace it") from error
    return upright


def _converted(file: Path, image: Image.Image, mode: str) -> Image.Image:
    """The image in the model's mode; transparency becomes white."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{file} has more than 8 bits a channel ({image.mode}); convert it to 8 bits first")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(mode)


def _centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square at size x size: halved with a box filter while large, then bicubic, as in ADM."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = size / min(image.size)
    width, height = (max(size, round(v * factor)) for v in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
