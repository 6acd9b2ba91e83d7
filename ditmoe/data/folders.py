"""Images in folders: one sub-folder a class, or none. Every file that cannot be used is named.

Shapes: n images asked for, C channels, H W size; pixels are uint8 (n, H, W, C).
"""

import json
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from ..config.checks import plural
from .below import IMAGE_SUFFIXES, counted, files_below, is_hidden, is_image, is_table, left_out
from .columns import METADATA, column_of, labelled, metadata_of, misnumbered
from .pixels import to_pil, upright
from .sets import BadImage, ImageSet

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
MOST_PIXELS = 2**30 // 12  # beyond it Pillow warns of a decompression bomb
# Parts of a set as people call their folders, in small letters with the words apart: train_images, testset, val2017.
_PART = re.compile(
    r"(?<![a-z])(?:(train(?:ing)?)|(?:val(?:id(?:ation)?)?|test(?:ing)?|dev|eval(?:uation)?)s?)"
    r"(?:data|sets?|images?|imgs?)?(?![a-z])"
)
_BESIDE = {"set", "sets", "split", "data", "images", "imgs", "image", "img", "pictures", "photos"}
_LONGEST = 16  # times the short side: of a longer image only the centre square is enlarged
# What Pillow raises on truncated, corrupt or foreign bytes.
_DAMAGE = (
    OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, NotImplementedError, OverflowError, MemoryError,
    struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


class FolderImages(ImageSet):
    """Images read from files each time they are asked for, one sub-folder a class.

    Args:
        root: The folder; without sub-folders its images have no labels.
        size, channels: Of the model's images; 1 channel is grey, 3 are RGB.
        fit: "exact": other sizes and modes cannot be used; "crop": resized, centre-cropped and converted. Either
            way a picture is turned upright first, as its EXIF orientation says.
        label_column: The classes are of this column of metadata.jsonl, whatever the sub-folders.

    Raises:
        ValueError: No images, some beside class folders or a class folder without any, or as `files_below`.
    """

    def __init__(self, root: Path, size: int, channels: int, fit: str, label_column: str | None = None) -> None:
        if not root.is_dir():
            fix = _as_table(root) or "give a folder of images with --data.path"
            raise ValueError(f"data.path {root} is not a folder; {fix}")
        self.size, self.mode, self.fit, self.root = size, mode_of(channels), fit, root
        found = files_below(root)
        images, metadata = [file for file in found if is_image(file)], metadata_of(root)
        if not images:
            kinds = f"({', '.join(sorted(IMAGE_SUFFIXES))}){left_out(file.relative_to(root) for file in found)}"
            raise ValueError(f"data.path {root} holds no images {kinds}{'; ' * is_table(root)}{_as_table(root)}")
        if label_column is not None:
            if metadata is None:
                raise ValueError(
                    f"data.label_column {label_column} is one of {' or '.join(METADATA)}, and {root} has none"
                )
            values = column_of(metadata, label_column, [file.relative_to(root).as_posix() for file in images])
            self.labels, self.id2label, said = labelled(metadata, label_column, values)
            self.files, found = images, [file for file in found if file != metadata]
        else:
            classes = _classes(root, images)
            self.files = [file for files in classes.values() for file in files] if classes else images
            labels = [label for label, files in enumerate(classes.values()) for _ in files] or [0] * len(images)
            self.labels, self.id2label = np.asarray(labels, dtype=np.int64), dict(enumerate(classes))
            said = misnumbered("names", classes)
            said += f"; a class may be in {metadata.name}: --data.label-column" if metadata else ""
        said += left_out(file.relative_to(root) for file in found if not is_image(file))
        self.source = f"{counted(len(self.files), len(self.id2label))} in {root}{said}"

    @property
    def inventory(self) -> list[tuple[str, int]]:
        """Every file's place below the root and its size in bytes, -1 of one that cannot be reached."""
        sizes = (os.path.getsize(file) if os.path.exists(file) else -1 for file in self.files)
        return [(file.relative_to(self.root).as_posix(), size) for file, size in zip(self.files, sizes, strict=True)]

    def images(self, rows: Sequence[int]) -> NDArray[np.uint8]:
        """(n, H, W, C) uint8. Raises BadImage at the first one that cannot be used."""
        return np.stack([self._image(row) for row in rows])

    def contents(self) -> bytes:
        """Names and sizes of the images."""
        return json.dumps(self.inventory).encode()

    def name(self, row: int) -> str:
        """The file."""
        return str(self.files[row])

    def check_headers(self) -> dict[int, str]:
        """With fit "exact", what is wrong with files by their number, as far as their headers tell."""
        wrong = {}
        for row, file in enumerate(self.files if self.fit == "exact" else []):
            try:
                with _opened(file) as image:
                    self._check(file, image)
            except ValueError as error:
                wrong[row] = str(error)
        return wrong

    def _check(self, file: Path, image: Image.Image) -> None:
        size, want = f"{image.width}x{image.height} {image.mode}", f"{self.size}x{self.size} {self.mode}"
        if size != want:
            fix = "add --data.fit crop to resize, centre-crop and convert every image"
            raise ValueError(f"{file} is {size}, the model takes {want}; {fix}")

    def _image(self, row: int) -> NDArray[np.uint8]:
        file = Path(self.name(row))
        try:
            return self._read(file, self._content(row))
        except (OSError, ValueError) as error:
            raise BadImage(row, re.sub(" <_io.BytesIO object at 0x[0-9a-f]+>", "", str(error))) from error
        except Exception as error:  # no damage that is known: it ends the run, which says at which file
            raise RuntimeError(f"{file} could not be read: {error!r}") from error

    def _content(self, row: int) -> BinaryIO | None:
        """What is read instead of a file of its own."""

    def _read(self, file: Path, content: BinaryIO | None) -> NDArray[np.uint8]:
        if self.fit == "crop":
            return read_cropped(file, self.size, self.mode, content)
        with _opened(file, content) as image:
            self._check(file, image)
            decoded = _decoded(file, image).convert(self.mode)
            return np.asarray(decoded, dtype=np.uint8).reshape(self.size, self.size, -1)


def _as_table(root: Path) -> str:
    """How a table is read that was taken for a folder of images; nothing of another place."""
    return f"it is a table: give --data.name hf, or in a mixture hf:{root}" if is_table(root) else ""


def mode_of(channels: int) -> str:
    """Pillow's name of images of so many channels. ValueError where there are none."""
    if channels not in (1, 3):
        raise ValueError(f"model.in_channels is {channels}; images have 1 (grey) or 3 (RGB)")
    return "L" if channels == 1 else "RGB"


def read_cropped(file: Path, size: int, mode: str, content: BinaryIO | None = None) -> NDArray[np.uint8]:
    """The image of a file, upright, resized, centre-cropped and made "L" or "RGB": (size, size, C) uint8.

    `content` is read instead of the file where it is given. Raises ValueError, which names the file.
    """
    with _opened(file, content) as image:
        decoded = _decoded(file, image)
        with _naming(file, f"cannot be made {mode} of {size}x{size}"):
            fitted = _centre_crop(decoded.convert(mode), size)
            return np.asarray(fitted, dtype=np.uint8).reshape(size, size, -1)


def cropped(pixels: NDArray[np.uint8], size: int, channels: int) -> NDArray[np.uint8]:
    """Images (n, H, W, C) as `read_cropped` makes those of files: uint8 (n, size, size, channels)."""
    mode = mode_of(channels)
    made = [np.asarray(_centre_crop(to_pil(image).convert(mode), size), dtype=np.uint8) for image in pixels]
    return np.stack(made).reshape(len(pixels), size, size, channels)


def _classes(root: Path, images: Iterable[Path]) -> dict[str, list[Path]]:
    """The images of each folder of a root, in the order of their names; none of a root that holds its images itself.

    Raises ValueError for a folder without images, without which the labels of those after it would be others.
    """
    insides = [file.relative_to(root).parts for file in images]
    if all(len(inside) == 1 for inside in insides):
        return {}
    if any(len(inside) == 1 for inside in insides):
        raise ValueError(f"data.path {root} holds images beside class folders; move them into one")
    folders = [place.name for place in sorted(root.iterdir()) if place.is_dir() and not is_hidden(Path(place.name))]
    found: dict[str, list[Path]] = {name: [] for name in folders}
    for file, inside in zip(images, insides, strict=True):
        found[inside[0]].append(file)
    if empty := [name for name, files in found.items() if not files]:
        what = f"has {plural(len(empty), 'class folder')} without an image that can be read, such as {empty[0]}"
        others = left_out(file.relative_to(root) for file in files_below(root / empty[0]))
        kinds = f"give each some ({', '.join(sorted(IMAGE_SUFFIXES))}), remove it or begin its name with a dot"
        raise ValueError(f"data.path {root} {what}{others}; {kinds}")
    _check_parts(root, insides)
    return found


def _check_parts(root: Path, insides: Iterable[tuple[str, ...]]) -> None:
    """ValueError where folders beside each other are called as parts of one set are, or all of a root's are."""
    beside: dict[Path, set[str]] = {}
    for inside in insides:
        for depth, name in enumerate(inside[:-1]):
            beside.setdefault(Path(*inside[:depth]), set()).add(name)
    for parent, names in sorted(beside.items(), key=lambda item: len(item[0].parts)):
        kinds: dict[frozenset[str], dict[str, str]] = {}  # of what else the names say, the parts by name
        for name in sorted(names):
            if part := _part(name):
                kinds.setdefault(part[1], {})[name] = part[0]
        plain = kinds.get(frozenset(), {})
        alike = next((found for found in kinds.values() if {*found.values()} >= {"train", "other"}), None)
        parts = plain if parent == Path() and len(plain) == len(names) else alike
        if parts:
            said = ", ".join(str(parent / name) for name in [*parts][:4])
            one = root / parent / max(parts, key=lambda name: parts[name] == "train")
            fix = f"give one of them, as in --data.path {one}"
            if len(beside[Path()]) > 1 and parent != Path():
                fix = f"bring the parts to the top, as in {root / one.name / parent}"
            raise ValueError(f"data.path {root} holds {said}, which are parts of a set, not classes; {fix}")


def _part(name: str) -> tuple[str, frozenset[str]] | None:
    """Which part of a set a folder of this name is, "train" or "other", and its other words; None where it is none."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    if len(found := [*_PART.finditer(text)]) != 1:
        return None
    rest = text[: found[0].start()] + " " + text[found[0].end() :]
    words = frozenset(word for word in re.split(r"[\W_]+", rest) if word) - _BESIDE
    return "train" if found[0][1] else "other", words


@contextmanager
def _naming(file: Path, fault: str) -> Iterator[None]:
    """Whatever damage is met inside becomes a ValueError that names the file."""
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(f"{file} {fault} ({str(error) or type(error).__name__}); remove or replace it") from error


@contextmanager
def _opened(file: Path, content: BinaryIO | None = None) -> Iterator[ImageFile.ImageFile]:
    """An image of which only the header has been read."""
    with _naming(file, "is not a readable image"):
        if content is None and not file.is_file():  # to open a pipe would be to wait
            raise OSError("it is no file, or a link that leads nowhere")
        opened = Image.open(file if content is None else content, formats=IMAGE_FORMATS)
    with opened as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{file} has {image.width} x {image.height} pixels, more than {MOST_PIXELS}; shrink it")
        if _is_deep(image):
            raise ValueError(f"{file} has more than 8 bits a channel ({image.mode}); convert it to 8 bits first")
        with _naming(file, "is not a readable image"):
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # a camera's preview is no frame
        if frames > 1:
            raise ValueError(f"{file} has {frames} frames; save the one that counts")
        yield image


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether the file has more than 8 bits a value, which Pillow cuts off without a word where the mode is RGB."""
    stored = [tile[3] for tile in image.tile]  # as they lie in the file: "RGB;16B", ("RGB", largest value)
    if image.mode.startswith(("I", "F")):
        return True
    if image.format == "PPM":
        return any(isinstance(args, tuple) and isinstance(args[-1], int) and args[-1] > 255 for args in stored)
    return image.format in ("PNG", "TIFF") and any(";16" in str(args) for args in stored)


def _decoded(file: Path, image: Image.Image) -> Image.Image:
    with _naming(file, "cannot be decoded"):
        return upright(image)


def _centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square at size x size: halved with a box filter while large, then bicubic, as in ADM."""
    short = min(image.size)
    if max(image.size) > _LONGEST * short:  # the short side enlarged to size, the long one would fill the memory
        image = _centre(image, short)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = size / min(image.size)
    width, height = (max(size, round(v * factor)) for v in image.size)
    return _centre(image.resize((width, height), Image.Resampling.BICUBIC), size)


def _centre(image: Image.Image, size: int) -> Image.Image:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
