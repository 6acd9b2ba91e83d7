"""Where images come from: every set gives uint8 images (or latents) and labels, and says which source was taken.

Shapes: n images asked for, C channels, H W size. Pixels are uint8 (n, H, W, C); the model's x is float32 (n, C, H, W),
x = pixel / 127.5 - 1 in [-1, 1].
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import signal
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .config import Config, DataConfig
from .objective import sample_rng

DIGITS_FILE = Path(__file__).parent / "data_files" / "digits.npz"
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")
_IN_MEMORY_BYTES = 2 * 2**30


class ImageSet(Protocol):
    """A finite, ordered set of labelled images."""

    id2label: dict[int, str]
    """Class names; empty for a set without labels."""
    source: str
    """A sentence for the log: what was read, and from where."""
    is_latent: bool
    """True when the images are latents, not pixels."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(len,) int64; zeros for a set without labels."""
        ...

    def __len__(self) -> int: ...

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """(n, H, W, C) uint8."""
        ...

    def tensors(self, indices: Sequence[int]) -> Tensor:
        """(n, C, H, W) float32, the model's x."""
        ...


@dataclass
class ArrayImages:
    """Images held in memory: pixels (len, H, W, C) uint8, labels (len,) int64."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    id2label: dict[int, str]
    source: str
    is_latent: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """(n, H, W, C) uint8."""
        chosen: NDArray[np.uint8] = self.pixels[np.asarray(indices)]
        return chosen

    def tensors(self, indices: Sequence[int]) -> Tensor:
        """(n, C, H, W) float32 in [-1, 1]."""
        return torch.from_numpy(self.images(indices)).permute(0, 3, 1, 2).float() / 127.5 - 1


class FolderImages:
    """Images read from files each time they are asked for, one sub-folder a class.

    Args:
        root: The folder; without sub-folders its images have no labels.
        size: Height and width of the model's images.
        channels: 1 (grey) or 3 (RGB).
        fit: "exact": other sizes and modes are refused; "crop": resized, centre-cropped and converted.

    Raises:
        ValueError: No images, or (with "exact") an image of another size or mode; it names the file.
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
        self.source = f"{len(self.files)} images of {len(classes)} classes in {root}"
        if fit == "exact":
            for file in self.files:
                with _opened(file) as image:
                    self._check(file, image)

    def __len__(self) -> int:
        return len(self.files)

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """(n, H, W, C) uint8."""
        return np.stack([self._read(self.files[i]) for i in indices])

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

    def _read(self, file: Path) -> NDArray[np.uint8]:
        with _opened(file) as image:
            if self.fit == "exact":
                self._check(file, image)
            try:
                image.load()
            except (OSError, SyntaxError, ValueError, zlib.error) as error:
                raise ValueError(f"{file} cannot be decoded ({error}); remove or replace it") from error
            fitted = image if self.fit == "exact" else _centre_crop(_converted(file, image, self.mode), self.size)
            return np.asarray(fitted, dtype=np.uint8).reshape(self.size, self.size, -1)


@dataclass
class Latents:
    """Latents (len, C, H, W) float32 in memory with labels (len,)."""

    values: Tensor
    labels: NDArray[np.int64]
    id2label: dict[int, str]
    source: str
    is_latent: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Latents have no pixels."""
        raise ValueError(f"{self.source}: latents are not pixels; decode them with their VAE first")

    def tensors(self, indices: Sequence[int]) -> Tensor:
        """(n, C, H, W) float32."""
        return self.values[torch.as_tensor(indices)].float()


def open_data(config: DataConfig, *, size: int, channels: int, split: str = "train") -> ImageSet:
    """The data set of a configuration.

    Args:
        config: Which set, and where.
        size: Height and width that the model takes.
        channels: Channels that the model takes.
        split: "train" or "test"; folders and latents have no test split.

    Raises:
        ValueError: Files that are missing, truncated, or do not fit the model; it names the file and the fix.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; it must be train or test")
    if config.name in ("folder", "latents"):
        if config.path is None:
            raise ValueError(f"the data set {config.name} needs --data.path FOLDER")
        if split == "test":
            raise ValueError(f"the data set {config.name} has no test split")
        folder = (
            _in_memory(FolderImages(config.path, size, channels, config.fit))
            if config.name == "folder"
            else _open_latents(config.path)
        )
        found = tuple(folder.tensors([0]).shape[1:])
    else:
        folder = _open_digits(split) if config.name == "digits" else _open_fashion(config, split)
        found = (folder.pixels.shape[3], *folder.pixels.shape[1:3])
    if found != (channels, size, size):
        raise ValueError(
            f"{config.name} has images of (C, H, W) = {found}, the model takes {(channels, size, size)}; "
            f"set --model.in-channels {found[0]} --model.sample-size {found[1]}"
        )
    classes = max(len(folder.id2label), 1)
    wrong = folder.labels[(folder.labels < 0) | (folder.labels >= classes)]
    if len(wrong):
        raise ValueError(f"{folder.source}: label {wrong[0]} is out of range, the set has classes 0..{classes - 1}")
    return folder


def reference(config: DataConfig, data: ImageSet, seed: int) -> str | NDArray[np.uint8]:
    """What samples are scored against: a name that `eval` knows, or training images (at random, at most 10,000)."""
    if config.name in ("digits", "fashion") and config.path is None:
        return f"{config.name}:train"
    return data.images(sample_rng(seed, 5, 0).permutation(len(data))[:10_000].tolist())


def fingerprint(data: ImageSet) -> str:
    """A hash of what decides which image is which: the classes and the label of every image in order."""
    text = json.dumps([len(data), data.id2label], sort_keys=True).encode()
    return hashlib.sha256(text + data.labels.tobytes()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ the stream


class Batch(NamedTuple):
    """A micro-batch: running numbers of its samples, x (n, C, H, W) float32, y (n,) int64."""

    indices: list[int]
    x: Tensor
    y: Tensor


class _Stream(Dataset[Batch]):
    """Sample number i of a run: image `permutation(epoch)[position]`, perhaps mirrored; a function of (seed, i)."""

    def __init__(self, data: ImageSet, seed: int, flip: bool) -> None:
        self.data, self.seed, self.flip = data, seed, flip
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, indices: list[int]) -> Batch:
        rows = [self._image_of(i) for i in indices]
        x = self.data.tensors(rows)
        if self.flip:
            mirrored = [bool(sample_rng(self.seed, 3, i).integers(2)) for i in indices]
            x = torch.where(torch.tensor(mirrored).view(-1, 1, 1, 1), x.flip(3), x)
        return Batch(indices, x, torch.from_numpy(self.data.labels[rows]))

    def _image_of(self, index: int) -> int:
        epoch, position = divmod(index, len(self.data))
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                sample_rng(self.seed, 4, epoch).permutation(len(self.data)),
            )
        return int(self._order[position])


def _ignore_signals(_: int) -> None:
    """Readers outlive a signal to the whole process group: the training process saves, then ends them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _MicroBatches:
    """The running numbers of this process's samples, one list a micro-batch."""

    def __init__(self, numbers: range, rank: int, num_processes: int, size: int) -> None:
        self.numbers, self.rank, self.num_processes, self.size = numbers, rank, num_processes, size

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.numbers:
            start = (number * self.num_processes + self.rank) * self.size
            yield list(range(start, start + self.size))

    def __len__(self) -> int:
        return len(self.numbers)


def stream(config: Config, data: ImageSet, *, first_step: int, rank: int, num_processes: int) -> Iterator[Batch]:
    """The micro-batches of one process, from `first_step` to the end of the run.

    Global batch s holds samples s * batch_size ... (s + 1) * batch_size - 1 of the run; accumulation and processes
    cut it into equal consecutive parts, so that the samples of a step do not depend on how it is cut.

    Raises:
        ValueError: batch_size does not divide into accumulation * num_processes equal parts.
    """
    train = config.train
    parts = train.accumulation * num_processes
    if train.batch_size % parts:
        raise ValueError(
            f"train.batch_size {train.batch_size} is not a multiple of accumulation {train.accumulation} * "
            f"{num_processes} processes"
        )
    size = train.batch_size // parts
    starts = range(first_step * train.accumulation, config.max_steps * train.accumulation)
    micro_batches = _MicroBatches(starts, rank, num_processes, size)
    workers = config.data.num_workers
    loader = DataLoader(
        _Stream(data, config.seed, config.data.flip),
        sampler=micro_batches,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_signals,
    )
    return iter(loader)


# --------------------------------------------------------------------------------------------- readers


def _in_memory(folder: FolderImages) -> ArrayImages | FolderImages:
    """A folder small enough is decoded once, which also finds every damaged file before training starts."""
    channels = 1 if folder.mode == "L" else 3
    if len(folder) * folder.size**2 * channels > _IN_MEMORY_BYTES:
        return folder
    return ArrayImages(folder.images(range(len(folder))), folder.labels, folder.id2label, folder.source)


def _image_files(root: Path, *, deep: bool = True) -> list[Path]:
    found = root.rglob("*") if deep else root.glob("*")
    return sorted(p for p in found if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def _opened(file: Path) -> Image.Image:
    try:
        return Image.open(file, formats=IMAGE_FORMATS)
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is not a readable image ({error}); remove or replace it") from error


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


def _open_digits(split: str) -> ArrayImages:
    with np.load(DIGITS_FILE, allow_pickle=False) as file:
        pixels, labels = file[f"{split}_images"], file[f"{split}_labels"]
    names = {i: str(i) for i in range(10)}
    source = f"{len(labels)} real 8x8 digits ({split}), bundled"
    return ArrayImages(pixels[..., None], labels.astype(np.int64), names, source)


def _open_fashion(config: DataConfig, split: str) -> ArrayImages:
    stem = "train" if split == "train" else "t10k"
    names = (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")
    cache = Path("data")
    places = [config.path] if config.path else [DEBIAN_FASHION, cache / "FashionMNIST" / "raw"]

    def files_in(place: Path) -> list[Path]:
        found = [next((f for f in (place / n, place / f"{n}.gz") if f.is_file()), None) for n in names]
        return [f for f in found if f]

    if config.download and not any(len(files_in(place)) == 2 for place in places):
        _download_fashion(cache)
    for place in places:
        files = files_in(place)
        if len(files) == 2:
            pixels, labels = read_idx(files[0]), read_idx(files[1])
            if pixels.ndim != 3 or labels.shape != pixels.shape[:1]:
                raise ValueError(f"{files[0]} and {files[1]} do not belong together")
            source = f"{len(labels)} Fashion-MNIST images ({split}) in {place}"
            return ArrayImages(pixels[..., None], labels.astype(np.int64), dict(enumerate(FASHION_CLASSES)), source)
    raise ValueError(
        f"Fashion-MNIST ({names[0]}[.gz]) is not in {' or '.join(map(str, places))}; install the Debian package "
        f"dataset-fashion-mnist, or give --data.path FOLDER, or --data.download"
    )


def _download_fashion(cache: Path) -> None:
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(cache), download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"Fashion-MNIST could not be downloaded ({error}); give --data.path FOLDER") from error


def read_idx(file: Path) -> NDArray[np.uint8]:
    """The uint8 array of an IDX file (MNIST's format), gzipped or not.

    Raises:
        ValueError: The file is truncated or is no IDX file of unsigned bytes.
    """
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{file} is damaged or truncated ({error}); fetch it again") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{file} is not an IDX file of unsigned bytes")
    dims = raw[3]
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims))
    if len(raw) != 4 + 4 * dims + math.prod(shape):
        raise ValueError(f"{file} is truncated: {shape} needs {math.prod(shape)} bytes of data; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _open_latents(root: Path) -> Latents:
    """Shards `*.safetensors`, each with `latents` (n, C, H, W) and, for a set with classes, `labels` (n,)."""
    files = sorted(root.glob("*.safetensors"))
    if not files:
        raise ValueError(f"data.path {root} holds no *.safetensors shards of latents")
    values, labels = [], []
    for file in files:
        try:
            shard = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or truncated ({error})") from error
        if "latents" not in shard:
            raise ValueError(f"{file} has no tensor named latents")
        values.append(shard["latents"])
        labels.append(shard.get("labels", torch.zeros(0, dtype=torch.int64)))
    if len({v.shape[1:] for v in values}) > 1 or values[0].ndim != 4:
        raise ValueError(
            f"the shards in {root} hold latents of different shapes: {[tuple(v.shape) for v in values][:4]}"
        )
    latents, classes = torch.cat(values), torch.cat(labels).long().flatten().numpy()
    if len(latents) == 0 or len(classes) not in (0, len(latents)):
        raise ValueError(f"the shards in {root} hold {len(latents)} latents but {len(classes)} labels")
    if len(classes) and not 0 <= classes.min() <= classes.max() < len(latents):
        raise ValueError(f"the shards in {root} have labels {classes.min()}..{classes.max()}; they must start at 0")
    names = {i: str(i) for i in range(int(classes.max()) + 1)} if len(classes) else {}
    classes = classes if len(classes) else np.zeros(len(latents), dtype=np.int64)
    return Latents(latents, classes, names, f"{len(latents)} latents of {len(names)} classes in {root}")
