"""Image arrays read from .npz and IDX files as a stream, so that memory does not grow with N.

A file's fault is a ValueError of one sentence that names the file. Nothing is ever unpickled.
"""

import gzip
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

UInt8Array = npt.NDArray[np.uint8]
IndexArray = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
# Every world-th of the batches of the first `limit` images, from the rank-th on: their indices (n,) and pixels
# (n, H, W, C), n <= batch_size. Called as read(limit, batch_size, rank, world).
ReadBatches = Callable[[int, int, int, int], Iterator[tuple[IndexArray, UInt8Array]]]
Stream = AbstractContextManager[IO[bytes] | gzip.GzipFile]
# What zipfile, gzip, NumPy and Pillow raise on truncated, corrupt or foreign bytes
# (RuntimeError: zipfile's, of an encrypted member; MemoryError: of a header that claims more than there is).
DAMAGE = (
    OSError, EOFError, zipfile.BadZipFile, zlib.error, struct.error, lzma.LZMAError, tokenize.TokenError, SyntaxError,
    NotImplementedError, RuntimeError, MemoryError, OverflowError,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
IDX_IMAGES = 0x00000803  # unsigned bytes, three dimensions
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Header(NamedTuple):
    """What an array in an .npz says of itself."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int  # bytes before the values
    length: int  # bytes in all


def read_npz_header(file: Path, name: str) -> Header:
    """The header of one array: nothing is read of its values. ValueError for damage, or where it needs unpickling."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            if version not in HEADERS:
                raise ValueError(f"array format {version} is not supported")
            header = Header(*HEADERS[version](stream), stream.tell(), archive.getinfo(f"{name}.npy").file_size)
    except (*DAMAGE, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file}: cannot read {name} ({error}); write it again") from error
    if header.dtype.hasobject:
        raise ValueError(f"{file}: cannot read {name}: it holds Python objects, and allow_pickle=False")
    return header


def read_npz_arrays(file: Path, *names: str) -> list[npt.NDArray[Any]]:
    """The named arrays, whole. ValueError for a damaged file or one that needs unpickling."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = [arrays[name] for name in names]
    except (*DAMAGE, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file}: cannot read {' and '.join(names)} ({error})") from error
    for name, array in zip(names, found, strict=True):
        if not isinstance(array, np.ndarray):  # NumPy hands out the bytes of what is no array
            raise ValueError(f"{file}: {name} is no array; write it again")
    return found


def open_npz_images(file: Path, name: str) -> tuple[int, tuple[int, int, int], ReadBatches]:
    """Count, (H, W, C) and reader of the uint8 array (N, H, W, C) `name`, compressed or not.

    Raises ValueError (the reader too) for another dtype or shape and for damaged bytes.
    """
    shape, fortran, dtype, offset, length = read_npz_header(file, name)
    if dtype != np.uint8 or len(shape) != 4 or fortran:
        order = ", Fortran order" if fortran else ""
        raise ValueError(f"{file}: {name} is {dtype} {shape}{order}; expected uint8 (N, H, W, C) in C order")
    if length != offset + math.prod(shape):
        raise ValueError(f"{file}: {name} does not hold the {shape[0]} images its header says")

    @contextmanager
    def opened() -> Iterator[IO[bytes]]:
        with zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as stream:
            yield stream

    count, height, width, channels = shape
    size = (height, width, channels)
    return count, size, _reader(opened, offset, count, size, f"{file}: {name}", "write it again")


def open_idx(file: Path) -> tuple[int, tuple[int, int, int], ReadBatches]:
    """Count, (H, W, 1) and reader of an IDX image file (MNIST's format), gzipped or not.

    Raises ValueError (the reader too) for another format and for damaged bytes.
    """

    def opened() -> Stream:
        return gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb")

    try:
        with opened() as stream:
            magic, count, height, width = struct.unpack(">4I", stream.read(16))
    except DAMAGE as error:
        raise ValueError(f"{file}: not an IDX file ({error}); download it again") from error
    if magic != IDX_IMAGES:
        raise ValueError(f"{file}: starts with {magic:#010x}, not IDX images' {IDX_IMAGES:#010x}")
    size = (height, width, 1)
    return count, size, _reader(opened, 16, count, size, f"{file}:", "download it again")


def _reader(
    opened: Callable[[], Stream], offset: int, count: int, shape: tuple[int, int, int], what: str, remedy: str
) -> ReadBatches:
    """Of `count` images that follow `offset` bytes; one more read at the end lets zip and gzip check their CRC."""
    size = math.prod(shape)

    def read(limit: int, batch_size: int, rank: int, world: int) -> Iterator[tuple[IndexArray, UInt8Array]]:
        try:
            with opened() as stream:
                stream.read(offset)
                for number, start in enumerate(range(0, limit, batch_size)):
                    n = min(batch_size, limit - start)
                    data = stream.read(n * size)
                    if len(data) != n * size:
                        raise EOFError(f"it ends after {start + len(data) // size} images")
                    if start + n == count and stream.read(1):
                        raise EOFError("bytes follow the last image")
                    if number % world == rank:
                        yield np.arange(start, start + n), np.frombuffer(data, np.uint8).reshape(n, *shape)
        except DAMAGE as error:
            raise ValueError(f"{what} is damaged ({error}); {remedy}") from error

    return read
