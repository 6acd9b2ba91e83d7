"""Images to latents, shard by shard: see `ditmoe.data.latents` for what is written.

Shard k holds the latents of images k * shard_size ... of the set, less those that cannot be used, and notes what it was
made from and its sums. Processes take missing shards in turn; the statistics of the set are those sums added up by
shard, so they do not depend on who made which. A shard is whole or absent.

Shapes: n images, C channels, H W size of the latents.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..config.data import DataConfig
from ..config.encode import LatentArgs
from ..files import digest, locked, whole
from ..launch import agree
from ..launch.progress import progress
from ..launch.start import check_launch
from .below import counted, is_table
from .folders import FolderImages
from .latents import FORMAT, INDEX, KEY, channel_statistics, latent_names, noted_in, read_index
from .pixels import from_pixels
from .sets import BadImage, check_bad, check_classes
from .tables import TableImages
from .tars import TarImages, tar_files
from .vae import identity, latent_shape, open_vae

Entry = dict[str, Any]
Tell = Callable[[int], object]
Read = tuple[int, NDArray[np.uint8] | str]  # a row's image, or what is wrong with it
_WORDS = {"vae": "VAE", "data": "data set"}  # of facts that are hashes, for messages


def encode(args: LatentArgs, state: Any) -> None:
    """Make the shards that are missing in `args.out`, then latents.json. `state` is what `launch.start.joined` gives.

    Raises:
        ValueError: Images or a VAE that cannot be used; the folder holds other latents, is in use or full.
    """
    check_launch(state)
    rank, world = state.process_index, state.num_processes
    job = agree.agreed(state, lambda: _Job(args, state.device))
    with ExitStack() as stack:
        agree.decided_by_first(state, lambda: stack.enter_context(locked(args.out)))
        agree.decided_by_first(state, job.check_shards)
        entries = _together(state, job.existing, job.shards[rank::world])
        check_bad(_bad(entries), args.max_bad, "max_bad")
        missing = [k for k in job.shards if k not in entries]
        if not rank:
            todo = f"{len(missing)} of {len(job.shards)} shards to encode on {world} process(es)"
            print(f"{job.source.source}: {todo}", flush=True)
        mine, began = sum(len(job.rows(k)) for k in missing[rank::world]), time.monotonic()
        threads = ThreadPoolExecutor(args.num_workers, "reader")
        stack.callback(threads.shutdown, cancel_futures=True)  # what has only been asked for is not read any more
        with progress(mine, "encoding", shown=not rank) as tell:
            for start in range(0, len(missing), world):
                turn = missing[start : start + world][rank : rank + 1]
                entries |= _together(state, partial(job.make, threads, tell, _bad(entries)), turn)
                check_bad(_bad(entries), args.max_bad, "max_bad")
        new, seconds = sum(entries[k]["count"] for k in missing), time.monotonic() - began
        index = agree.decided_by_first(state, lambda: job.finish(entries))
    if not rank:
        rate = f", {new} of them encoded now at {new / seconds:.1f} images/s" if new else ""
        print("".join(f"left out: {sentence}\n" for sentence in index["bad"]), end="")
        print(
            f"{args.out} is finished: {counted(index['count'], len(index['classes']), 'latent')}{rate}",
            flush=True,
        )


class _Job:
    """What every process knows: `known` of the VAE; `facts` decide what the shards hold; `shape` is (C, H, W)."""

    def __init__(self, args: LatentArgs, device: torch.device) -> None:
        vae = open_vae(args.vae)
        self.args, self.shape, self.known = args, latent_shape(vae, args.size), identity(vae, args.vae)
        self.source = source = _opened(args, vae.config.in_channels)
        images = hashlib.sha256(json.dumps([source.id2label, source.inventory]).encode() + source.labels.tobytes())
        self.facts = {
            "format": FORMAT,
            "vae": self.known["sha256"],
            "data": images.hexdigest(),
            **{name: getattr(args, name) for name in ("size", "dtype", "flip", "shard_size")},
        }
        self.shards = range(math.ceil(len(source) / args.shard_size))
        self.vae = vae.to(device)

    def rows(self, shard: int) -> range:
        """The images of a shard, those that cannot be used among them."""
        start = shard * self.args.shard_size
        return range(start, min(start + self.args.shard_size, len(self.source)))

    def file(self, shard: int) -> Path:
        return self.args.out / f"{shard:05d}.safetensors"

    def check_shards(self) -> None:
        """ValueError unless all shards that are there are of these latents."""
        out, listed, known = self.args.out, self._listed, {self.file(k) for k in self.shards}
        for file in sorted(out.glob("*.safetensors")):
            noted = noted_in(file)
            if noted is not None:
                self._check_facts(noted["facts"])
            elif file not in known or file.name not in listed:
                what = f"out {out} holds {file.name}, which is none of these latents, or damaged"
                raise ValueError(f"{what}; remove it, or give another --out")

    def existing(self, shard: int) -> Entry | None:
        """What is known of a shard that is there, and is what latents.json says where there is one."""
        file = self.file(shard)
        if not file.exists():
            return None
        noted, sha256 = noted_in(file), digest(file)
        if noted is not None and self._listed.get(file.name, sha256) == sha256:
            return self._entry(shard, noted, sha256)
        return print(f"{file} has other content than {INDEX} says: it is made anew", flush=True)

    def make(self, threads: ThreadPoolExecutor, tell: Tell, bad_before: Sequence[str], shard: int) -> Entry:
        """Encode a shard and write it; `tell` of every image, and count those that are bad with the ones before."""
        parts: dict[str, list[Tensor]] = {kind: [torch.zeros(0, *self.shape)] for kind in latent_names(self.args.flip)}
        rows: list[int] = []
        bad: list[str] = []
        variance = torch.zeros(self.shape[0], dtype=torch.float64)
        for batch in _batches(self.source, self.rows(shard), self.args.batch_size, threads):
            good = {row: image for row, image in batch if not isinstance(image, str)}
            bad += [sentence for _, sentence in batch if isinstance(sentence, str)]
            check_bad([*bad_before, *bad], self.args.max_bad, "max_bad")
            if good:
                rows += good
                x = from_pixels(np.stack(list(good.values())))
                for kind, part in parts.items():
                    mean, spread = self._encode(x.flip(3) if kind == "latents_flipped" else x)
                    part.append(mean)
                    variance += spread
            tell(len(batch))
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

    def finish(self, entries: Mapping[int, Entry]) -> dict[str, Any]:
        """Write latents.json, when all shards are there; what it holds."""
        shards = [entries[k] for k in self.shards]
        count = sum(entry["count"] for entry in shards)
        if not count:
            raise ValueError(f"none of the images can be used: {self.source.source}")
        check_classes(self.source, np.concatenate([_labels(self.file(k)) for k in self.shards]))
        values = count * len(latent_names(self.args.flip)) * math.prod(self.shape[1:])  # of a channel
        index = {
            **self.facts,
            "vae": self.known,
            "shape": self.shape,
            **channel_statistics(shards, values),
            "classes": [self.source.id2label[i] for i in range(len(self.source.id2label))],
            "count": count,
            "bad": _bad(entries),
            "shards": [{name: entry[name] for name in ("file", "count", "bytes", "sha256")} for entry in shards],
        }
        _write(self.args.out / INDEX, (json.dumps(index, indent=1) + "\n").encode())
        return index

    @torch.inference_mode()
    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior's mean (n, C, H, W) float32, and its variance summed by channel (C,) float64; on the CPU."""
        posterior = self.vae.encode(x.to(self.vae.device)).latent_dist
        return posterior.mean.cpu(), posterior.var.double().sum((0, 2, 3)).cpu()

    @cached_property
    def _listed(self) -> dict[str, str]:
        """SHA-256 by file name from latents.json, where there is one. ValueError when it is of other latents."""
        if not (self.args.out / INDEX).is_file() or not (index := read_index(self.args.out)):
            return {}
        self._check_facts({**index, "vae": index["vae"]["sha256"]})
        return {shard["file"]: shard["sha256"] for shard in index["shards"]}

    def _check_facts(self, found: Mapping[str, Any]) -> None:
        if differing := [_WORDS.get(name, name) for name, fact in self.facts.items() if found.get(name) != fact]:
            what = f"out {self.args.out} holds latents with another {', '.join(differing)}"
            raise ValueError(f"{what}; give another --out")

    def _entry(self, shard: int, noted: dict[str, Any], sha256: str) -> Entry:
        file = self.file(shard)
        return {**noted, "shard": shard, "file": file.name, "bytes": file.stat().st_size, "sha256": sha256}


def _opened(args: LatentArgs, channels: int) -> FolderImages:
    """The images: of tar files, a table or a folder. ValueError where it is none, and at an option of another one."""
    data, size, label = args.data, args.size, args.label_column
    tars = tar_files(data)
    table = not tars and is_table(data)
    if not table and (args.image_column or args.split != "train"):
        option = "image-column" if args.image_column else "split"
        raise ValueError(f"--data.{option} is for tables, and {data} is none; leave it out")
    if tars and label is not None:
        raise ValueError(f"--data.label-column is for tables and folders, and {data} holds tar files; leave it out")
    if table:
        columns: dict[str, Any] = {"label_column": label, "image_column": args.image_column, "split": args.split}
        return TableImages(DataConfig(name="hf", path=data, fit="crop", **columns), size, channels)
    if not tars and not data.is_dir():
        raise ValueError(f"data {data} is neither a folder nor a tar file nor a .parquet file")
    return TarImages(data, size, channels) if tars else FolderImages(data, size, channels, "crop", label)


def _batches(source: FolderImages, rows: range, size: int, threads: ThreadPoolExecutor) -> Iterator[list[Read]]:
    """What is read of the rows, `size` at once; a batch is read while the last one is worked on."""
    ahead: list[Future[Read]] = []
    for start in range(0, len(rows) + size, size):
        batch, ahead = ahead, [threads.submit(_read, source, row) for row in rows[start : start + size]]
        if batch:
            yield [future.result() for future in batch]


def _read(source: FolderImages, row: int) -> Read:
    try:
        return row, source.images([row])[0]
    except BadImage as error:
        return row, "".join(c if c.isprintable() else "?" for c in str(error))  # names may hold anything


def _labels(shard: Path) -> NDArray[np.int64]:
    with safe_open(shard, framework="np") as tensors:
        return np.asarray(tensors.get_tensor("labels"))


def _write(file: Path, content: bytes) -> None:
    """A file, whole or absent. Raises ValueError where it cannot be written."""
    try:
        with whole(file) as handle:
            handle.write(content)
    except OSError as error:
        why = f"({error.strerror}); once it can be, the same command goes on"
        raise ValueError(f"{file} could not be written {why}") from error


def _together(state: Any, work: Callable[[int], Entry | None], shards: Sequence[int]) -> dict[int, Entry]:
    """What `work` gives of the shards of all processes; where one raises ValueError, all of them do."""
    found = agree.agreed(state, lambda: [entry for k in shards if (entry := work(k)) is not None])
    return {entry["shard"]: entry for entry in agree.everything(state, found)}


def _bad(entries: Mapping[int, Entry]) -> list[str]:
    """What is wrong with images, in the order of the set."""
    return [sentence for _, entry in sorted(entries.items()) for sentence in entry["bad"]]
