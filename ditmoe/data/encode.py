"""Images to latents, shard by shard: see `ditmoe.latent_sets` for what is written.

Shard k holds the latents of images k * shard_size ... of the set, less those that cannot be used, and notes what it was
made from and its sums. Processes take missing shards in turn; the statistics of the set are those sums added up by
shard, so they do not depend on who made which. A shard is whole or absent.

Shapes: n images, C channels, H W size of the latents.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from ..config.encode import LatentArgs
from ..launch import agree
from ..launch.signals import end_with_parent
from ..launch.start import best_device, check_launch
from .folders import FolderImages
from .latents import FORMAT, INDEX, KEY, digest, metadata, names, read_index, statistics
from .sets import BadImage, check_bad
from .tars import TarImages, tar_files
from .vae import identity, latent_shape, open_vae

Entry = dict[str, Any]
Source = FolderImages | TarImages
EVERY = 10.0  # seconds between two lines of a log
LOCK = ".lock"
_WORDS = {"vae": "VAE", "data": "data set"}  # of facts that are hashes, for messages


def join() -> PartialState:
    """This process among those of its launch; one may need a day longer for a shard than another."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun dies of signals that it does not know, and says nothing
        end_with_parent(signal.SIGTERM)
    return PartialState(cpu=best_device().type == "cpu", timeout=timedelta(days=1))


def encode(args: LatentArgs, state: PartialState) -> None:
    """Make the shards that are missing in `args.out`, then latents.json.

    Raises:
        ValueError: Images or a VAE that cannot be used; the folder holds other latents, is in use or full.
    """
    check_launch(state)
    job = agree.agreed(state, lambda: _prepare(args, state.device))
    with ExitStack() as stack:
        agree.decided_by_first(state, lambda: stack.enter_context(job.opened_folder()))
        entries, rate = _all_shards(job, state)
        index = agree.decided_by_first(state, lambda: job.finish([entries[k] for k in job.shards]))
    if state.is_main_process:
        print("".join(f"left out: {sentence}\n" for sentence in index["bad"]), end="")
        print(f"{args.out} is finished: {index['count']} latents of {len(index['classes'])} classes{rate}", flush=True)


def _all_shards(job: _Job, state: PartialState) -> tuple[dict[int, Entry], str]:
    """What is known of every shard by its number, once all are there, and how fast they were made, in words."""
    args, rank, world = job.args, state.process_index, state.num_processes
    whole = _together(state, partial(job.existing, job.shards[rank::world]))
    entries = {entry["shard"]: entry for entry in whole}
    check_bad(_bad(entries), args.max_bad, "max_bad")
    missing = [k for k in job.shards if k not in entries]
    if not rank:
        todo = f"{len(missing)} of {len(job.shards)} shards to encode on {world} process(es)"
        print(f"{job.source.source}: {todo}", flush=True)
    mine, began = sum(len(job.rows(k)) for k in missing[rank::world]), time.monotonic()
    said = began
    with (
        closing(_Readers(job.source, args)) as readers,
        tqdm(desc="encoding", total=mine, unit="img", disable=True if rank else None) as bar,
    ):
        for start in range(0, len(missing), world):
            turn = missing[start : start + world][rank : rank + 1]
            done = _together(state, partial(job.make, turn, readers, bar, _bad(entries)))
            entries |= {entry["shard"]: entry for entry in done}
            check_bad(_bad(entries), args.max_bad, "max_bad")
            if bar.disable and not rank and time.monotonic() - said >= EVERY:
                said = time.monotonic()
                print(f"{len(entries)} of {len(job.shards)} shards are there", flush=True)
    new = sum(entries[k]["count"] for k in missing)
    rate = new / (time.monotonic() - began)
    return entries, f", {new} of them encoded now at {rate:.1f} images/s" if new else ""


def _prepare(args: LatentArgs, device: torch.device) -> _Job:
    vae = open_vae(args.vae)
    shape, channels, known = latent_shape(vae, args.size), vae.config.in_channels, identity(vae, args.vae)
    if not args.data.is_dir() and not tar_files(args.data):
        raise ValueError(f"data {args.data} is neither a folder nor a tar file")
    source: Source = (
        TarImages(args.data, args.size, channels)
        if tar_files(args.data)
        else FolderImages(args.data, args.size, channels, "crop")
    )
    images = hashlib.sha256(json.dumps([source.id2label, source.inventory]).encode() + source.labels.tobytes())
    facts = {
        "format": FORMAT,
        "vae": known["sha256"],
        "data": images.hexdigest(),
        **{name: getattr(args, name) for name in ("size", "dtype", "flip", "shard_size")},
    }
    return _Job(args, source, vae.to(device), known, facts, shape)


@dataclass(frozen=True)
class _Job:
    """What every process knows: `known` of the VAE; `facts` decide what the shards hold; `shape` is (C, H, W)."""

    args: LatentArgs
    source: Source
    vae: Any
    known: dict[str, Any]
    facts: dict[str, Any]
    shape: tuple[int, int, int]

    @property
    def shards(self) -> range:
        """The numbers of all shards."""
        return range(math.ceil(len(self.source) / self.args.shard_size))

    def rows(self, shard: int) -> range:
        """The images of a shard, those that cannot be used among them."""
        start = shard * self.args.shard_size
        return range(start, min(start + self.args.shard_size, len(self.source)))

    def file(self, shard: int) -> Path:
        """Where a shard is."""
        return self.args.out / f"{shard:05d}.safetensors"

    @contextmanager
    def opened_folder(self) -> Iterator[None]:
        """Make the folder, or find it to hold a part of the same latents, and hold it: the lock ends with the process.

        Raises:
            ValueError: It holds something else, is in use, or cannot be written.
        """
        out = self.args.out
        try:
            out.mkdir(parents=True, exist_ok=True)
            file = (out / LOCK).open("w")
        except OSError as error:
            raise ValueError(f"out {out} is no folder that can be written to ({error.strerror})") from error
        with file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise ValueError(f"out {out} is in use; wait for the other launch or give another --out") from None
            except OSError as error:
                print(f"note: {out} is on a disk without locks ({error.strerror}); start only one launch on it")
            self._check_shards()
            yield

    def _check_shards(self) -> None:
        """ValueError unless all shards that are there are of these latents."""
        out, listed, known = self.args.out, self._listed(), {self.file(k) for k in self.shards}
        for file in sorted(out.glob("*.safetensors")):
            noted = metadata(file)
            if noted is not None:
                self._check_facts(noted["facts"])
            elif file not in known or file.name not in listed:
                raise ValueError(
                    f"out {out} holds {file.name}, which is none of these latents, or damaged; remove it, or give "
                    f"another --out"
                )

    def existing(self, shards: Sequence[int]) -> list[Entry]:
        """What is known of those shards that are there, and are what latents.json says where there is one."""
        listed, entries = self._listed(), []
        for file, shard in [(self.file(k), k) for k in shards if self.file(k).exists()]:
            noted = metadata(file)
            sha256 = digest(file)
            if noted is not None and listed.get(file.name, sha256) == sha256:
                entries.append(self._entry(shard, noted, sha256))
            else:
                print(f"{file} has other content than {INDEX} says: it is made anew", flush=True)
        return entries

    def make(self, shards: Sequence[int], readers: _Readers, bar: Any, bad_before: Sequence[str]) -> list[Entry]:
        """Encode these shards (one or none) and write them."""
        return [self._make(shard, readers, bar, bad_before) for shard in shards]

    def _make(self, shard: int, readers: _Readers, bar: Any, bad_before: Sequence[str]) -> Entry:
        kinds = names(self.args.flip)
        parts: dict[str, list[Tensor]] = {kind: [torch.zeros(0, *self.shape)] for kind in kinds}
        rows, bad = [], []
        variance = torch.zeros(self.shape[0], dtype=torch.float64)
        for batch in readers.batches(self.rows(shard)):
            good = [(row, image) for row, image in batch if not isinstance(image, str)]
            bad += [sentence for _, sentence in batch if isinstance(sentence, str)]
            check_bad([*bad_before, *bad], self.args.max_bad, "max_bad")
            if good:
                rows += [row for row, _ in good]
                x = torch.from_numpy(np.stack([image for _, image in good])).permute(0, 3, 1, 2).float() / 127.5 - 1
                for kind in kinds:
                    mean, spread = self._encode(x.flip(3) if kind == "latents_flipped" else x)
                    parts[kind].append(mean)
                    variance += spread
            bar.update(len(batch))
        tensors = {kind: torch.cat(some).to(getattr(torch, self.args.dtype)) for kind, some in parts.items()}
        if not all(bool(z.isfinite().all()) for z in [*tensors.values(), variance]):
            hint = "" if self.args.dtype == "float32" else "; try --dtype float32"
            raise ValueError(f"the latents of shard {shard} are not finite in {self.args.dtype}{hint}")
        wide = torch.cat([z.double() for z in tensors.values()])
        noted = {
            "facts": self.facts,
            "count": len(rows),
            "bad": bad,
            "sum": wide.sum((0, 2, 3)).tolist(),
            "squares": wide.square().sum((0, 2, 3)).tolist(),
            "variance": variance.tolist(),
        }
        tensors["labels"] = torch.from_numpy(self.source.labels[rows])
        content = save(tensors, metadata={KEY: json.dumps(noted, sort_keys=True)})
        _write(self.file(shard), content)
        return self._entry(shard, noted, hashlib.sha256(content).hexdigest())

    def finish(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """Write latents.json, when all shards are there; what it holds."""
        args, count = self.args, sum(entry["count"] for entry in entries)
        if not count:
            raise ValueError(f"none of the images can be used: {self.source.source}")
        values = count * len(names(args.flip)) * self.shape[1] * self.shape[2]  # of a channel
        index = {
            **self.facts,
            "vae": self.known,
            "shape": self.shape,
            **statistics(entries, values),
            "classes": [self.source.id2label[i] for i in range(len(self.source.id2label))],
            "count": count,
            "bad": _bad(dict(enumerate(entries))),
            "shards": [{name: entry[name] for name in ("file", "count", "bytes", "sha256")} for entry in entries],
        }
        _write(args.out / INDEX, (json.dumps(index, indent=1) + "\n").encode())
        return index

    @torch.inference_mode()
    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior's mean (n, C, H, W) float32, and its variance summed by channel (C,) float64; on the CPU."""
        posterior = self.vae.encode(x.to(self.vae.device)).latent_dist
        return posterior.mean.cpu(), posterior.var.double().sum((0, 2, 3)).cpu()

    def _listed(self) -> dict[str, str]:
        """SHA-256 by file name from latents.json, where there is one. ValueError when it is of other latents."""
        index = read_index(self.args.out) if (self.args.out / INDEX).is_file() else None
        if index is None:
            return {}
        self._check_facts({**index, "vae": index["vae"]["sha256"]})
        return {shard["file"]: shard["sha256"] for shard in index["shards"]}

    def _check_facts(self, found: Mapping[str, Any]) -> None:
        differing = [_WORDS.get(name, name) for name in self.facts if found.get(name) != self.facts[name]]
        if differing:
            raise ValueError(
                f"out {self.args.out} holds latents with another {', '.join(differing)}; give another --out"
            )

    def _entry(self, shard: int, noted: dict[str, Any], sha256: str) -> Entry:
        file = self.file(shard)
        return {**noted, "shard": shard, "file": file.name, "bytes": file.stat().st_size, "sha256": sha256}


class _Readers:
    """Threads that read images."""

    def __init__(self, source: Source, args: LatentArgs) -> None:
        self._source, self._size = source, args.batch_size
        self._threads = ThreadPoolExecutor(args.num_workers, "reader")

    def batches(self, rows: range) -> Iterator[list[tuple[int, NDArray[np.uint8] | str]]]:
        """(number, image), or (number, what is wrong with it); a batch is read while the last one is worked on."""
        ahead: list[Future[tuple[int, NDArray[np.uint8] | str]]] = []
        for start in range(0, len(rows) + self._size, self._size):
            batch, ahead = ahead, [self._threads.submit(self._read, row) for row in rows[start : start + self._size]]
            if batch:
                yield [future.result() for future in batch]

    def close(self) -> None:
        """Wait for what is being read; what has only been asked for is not read any more."""
        self._threads.shutdown(cancel_futures=True)

    def _read(self, row: int) -> tuple[int, NDArray[np.uint8] | str]:
        try:
            return row, self._source.images([row])[0]
        except BadImage as error:
            return row, "".join(c if c.isprintable() else "?" for c in str(error))  # names may hold anything


def _write(file: Path, content: bytes) -> None:
    """A file, whole or absent. What a killed process leaves is overwritten when it is made again."""
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(file)
    except OSError as error:
        raise ValueError(
            f"{file} could not be written ({error.strerror}); once it can be, the same command goes on"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _together(state: PartialState, work: Callable[[], list[Entry]]) -> list[Entry]:
    """What `work` gives on all processes, by rank; where one raises ValueError, all of them do."""
    return agree.everything(state, agree.agreed(state, work))


def _bad(entries: Mapping[int, Entry]) -> list[str]:
    """What is wrong with images, in the order of the set."""
    return [sentence for _, entry in sorted(entries.items()) for sentence in entry["bad"]]
