"""Tensors of checkpoints: read one by one from mapped files, and streamed into .safetensors files."""

import json
import math
import mmap
import pickle
import re
import struct
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import safe_globals

from ..files import WEIGHTS

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
SHARD = 5 * 10**9  # bytes of a file that is written, about
_LET_GO = 2**27  # bytes of mapped files that are read before the pages read so far are let go
_BROKEN = (ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError)


class Tensors:
    """The floating point tensors of `.safetensors` files, or of others that `torch.save` wrote, by name.

    Nothing but tensors and an argparse.Namespace is unpickled. Of a training checkpoint the averaged weights are taken.

    `notes` is what the training script was asked (`args`), where the file says so. ValueError where a file is damaged,
    or holds anything else.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self.notes: Mapping[str, Any] = {}
        self._map()
        self.shapes = {name: tuple(value.shape) for name, value in self._mapped.items()}
        self.dtypes = {name: value.dtype for name, value in self._mapped.items()}

    def __getitem__(self, name: str) -> Tensor:
        if self._read > _LET_GO:
            self._mapped.clear()
            self._map()
        self._read += self._mapped[name].nbytes
        return self._mapped[name]

    def _map(self) -> None:
        self._read = 0
        self._mapped: dict[str, Tensor] = {}
        for file in self._files:
            found = _safetensors(file) if file.suffix == ".safetensors" else self._unpickled(file)
            for name, value in found.items():
                if not isinstance(name, str) or not isinstance(value, Tensor) or not _is_plain(value):
                    raise ValueError(f"{file} has {name!r:.100}, which is no dense floating point tensor")
            self._mapped |= found

    def _unpickled(self, file: Path) -> dict[str, Tensor]:
        try:
            with safe_globals([Namespace]):
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            asked = re.search(r"GLOBAL (\S+)", str(error))
            what = f"asks for {asked[1]}" if asked else "is no list of tensors"
            raise ValueError(f"{file} {what}, and only tensors are read of a checkpoint") from error
        except (*_BROKEN, struct.error) as error:
            old = "it is no zip file, as torch.save makes since torch 1.6"
            why = " ".join(str(error).split())[:200] if is_zipfile(file) else old
            raise ValueError(f"{file} is damaged or no checkpoint ({why})") from error
        if not isinstance(found, dict):
            raise ValueError(f"{file} holds no dict of tensors")
        if isinstance(found.get("args"), Namespace):
            self.notes = vars(found["args"])
        for name in ("ema", "model"):
            if isinstance(found.get(name), dict):
                return dict(found[name])
        if "module" in found:
            raise ValueError(f"{file} is a part of a DeepSpeed checkpoint; its zero_to_fp32.py makes one file of it")
        return found


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, *_BROKEN) as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error})") from error


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor has all the memory that its shape says, which a crafted file need not."""
    return value.layout == torch.strided and value.dtype in DTYPES and value.nbytes <= value.untyped_storage().nbytes()


class Entry(NamedTuple):
    """A tensor that is to be written: its pieces follow one another along the first axis, and are made when needed."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        """Its bytes in a file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write(folder: Path, entries: Sequence[Entry]) -> None:
    """The weights of a component of diffusers: one file, or several and their index where they are large.

    One piece is in memory at a time. Raises OSError.
    """
    lots: list[list[Entry]] = [[]]
    for entry in sorted(entries, key=lambda entry: -entry.dtype.itemsize):  # so that each begins at a multiple of it
        if lots[-1] and sum(e.nbytes for e in lots[-1]) + entry.nbytes > SHARD:
            lots.append([])
        lots[-1].append(entry)
    if len(lots) == 1:
        return _write_file(folder / f"{WEIGHTS}.safetensors", lots[0])
    where: dict[str, str] = {}
    for number, lot in enumerate(lots, start=1):
        name = f"{WEIGHTS}-{number:05d}-of-{len(lots):05d}.safetensors"
        _write_file(folder / name, lot)
        where |= {entry.name: name for entry in lot}
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": where}
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _write_file(file: Path, entries: Sequence[Entry]) -> None:
    """The format: the header's length (8 bytes), a JSON header with each tensor's place, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            for piece in entry.pieces():
                out.write(piece.contiguous().flatten().view(torch.uint8).numpy().data)
        assert out.tell() == 8 + len(text) + end


def save(out: IO[bytes], names: Mapping[str, str], files: Sequence[Path], more: Mapping[str, Tensor]) -> None:
    """What `torch.save` makes of tensors of `.safetensors` files that `Tensors` has read, with one in memory at a time.

    Args:
        out: The file that it is written into. Raises what its `write` does.
        names: New names of the tensors, and theirs.
        files: All that hold them.
        more: Others by name, which come first.
    """
    found: dict[str, Tensor] = {}
    pages = [_lay_out(file, found) for file in files]
    try:
        sink = cast("IO[bytes]", _Sink(out, pages))
        torch.save({**more, **{new: found[old] for new, old in names.items()}}, sink)
    except RuntimeError as error:  # torch's own, in the course of what stopped the file, such as Ctrl-C
        raise (error.__context__ or error) from None


def _lay_out(file: Path, found: dict[str, Tensor]) -> mmap.mmap:
    """Add the tensors of a file, which are its mapped pages: a tensor of safetensors does not say which."""
    with file.open("rb") as opened:
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        start = 8 + int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(start - 8))
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    for name in header.keys() - {"__metadata__"}:
        dtype, shape, (begin, _) = (header[name][key] for key in ("dtype", "shape", "data_offsets"))
        flat = torch.frombuffer(pages, dtype=dtypes[dtype], count=math.prod(shape), offset=start + begin)
        found[name] = flat.view(shape)
    return pages


class _Sink:
    """A file that lets go of mapped pages once they are written."""

    def __init__(self, file: IO[bytes], pages: Sequence[mmap.mmap]) -> None:
        self._file, self._pages, self._written = file, pages, 0
        self.flush = file.flush

    def write(self, content: bytes | memoryview) -> int:
        count = self._file.write(content)
        self._written += count
        if self._written > _LET_GO and hasattr(mmap, "MADV_DONTNEED"):  # which Windows has not
            self._written = 0
            for pages in self._pages:
                pages.madvise(mmap.MADV_DONTNEED)
        return count
