"""Latents of images that a VAE has encoded: what training reads of them, and how a pipeline turns them back.

The folder that `python -m ditmoe encode` writes: shards `00000.safetensors`, ..., each with `latents` (n, C, H, W), as
the VAE's posterior mean has them, `labels` (n,) int64 and mostly `latents_flipped`, the latents of the mirrored images;
and `latents.json`, written when all are there. The model's x is (latents - mean) / std with the mean and std of each
channel over the set. In the simple form, shards without a latents.json, the latents are the model's x.

Shapes: n images asked for, C channels, H W size of the latents.
"""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..files import digest
from .below import counted, files_below, left_out
from .sets import MOST_LABELS, ImageSet
from .vae import vae_words

INDEX = "latents.json"
FORMAT = 1
KEY = "ditmoe"  # of a shard's metadata; one entry, for safetensors writes several in any order
_HASHED_BYTES = 2 * 2**30  # a set up to this size is hashed whenever it is opened

Index = dict[str, Any]


class Latents(ImageSet):
    """Latents (len, C, H, W) in memory with labels (len,), as the model takes them; not those of mirrored images."""

    is_latent = in_memory = True

    def __init__(self, values: Tensor, labels: NDArray[np.int64], id2label: dict[int, str], source: str) -> None:
        self.values, self.labels, self.id2label, self.source = values, labels, id2label, source

    def images(self, rows: Sequence[int]) -> NDArray[np.uint8]:
        """Latents have no pixels."""
        raise ValueError(f"{self.source}: latents are not pixels; decode them with their VAE first")

    def readable(self, rows: Sequence[int]) -> list[int]:
        """All of the rows."""
        return list(rows)

    def contents(self) -> bytes | memoryview:
        """The values."""
        return self.values.contiguous().flatten().view(torch.uint8).numpy().data

    def tensors(self, rows: Sequence[int], mirrored: Sequence[bool] | None = None) -> Tensor:
        """(n, C, H, W) float32."""
        assert mirrored is None, "open_latents refuses it"
        return self.values[torch.as_tensor(rows)].float()


class LatentShards(Latents):
    """Latents read from the shards of a folder, mapped into memory, when they are asked for; `index`: its latents.json.

    Raises:
        ValueError: A shard is missing or is not the one that latents.json lists; it names the file and the fix. Hashes
            are compared where the set has at most 2 GiB.
    """

    in_memory = False

    def __init__(self, root: Path, index: Index) -> None:
        self.root, self.index = root, index
        self.id2label, self.normalization = dict(enumerate(index["classes"])), _normalization(index)
        self._ends = list(accumulate(shard["count"] for shard in index["shards"]))
        self._open: dict[int, Any] = {}
        hashed = sum(shard["bytes"] for shard in index["shards"]) <= _HASHED_BYTES
        self.labels = np.concatenate([self._labels(shard, hashed) for shard in index["shards"]])
        self.source = f"{counted(len(self.labels), len(self.id2label), 'latent')} in {root}, VAE {vae_words(index)}"
        self.source += _others(root, [INDEX, *(shard["file"] for shard in index["shards"])])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a process that reads opens the files itself

    def contents(self) -> bytes:
        """The VAE, the statistics, and every shard with its size and hash."""
        return json.dumps([self.index[name] for name in ("vae", "mean", "std", "shards")]).encode()

    def tensors(self, rows: Sequence[int], mirrored: Sequence[bool] | None = None) -> Tensor:
        """(n, C, H, W) float32, mean 0 and variance 1 in each channel over the set; `mirrored`: of which images."""
        kinds = ["latents_flipped" if m else "latents" for m in mirrored or [False] * len(rows)]
        z = torch.stack([self._read(row, kind) for row, kind in zip(rows, kinds, strict=True)])
        return normalize(z, self.index)

    def _read(self, row: int, kind: str) -> Any:
        shard = int(np.searchsorted(self._ends, row, side="right"))
        if shard not in self._open:
            self._open[shard] = safe_open(self.root / self.index["shards"][shard]["file"], framework="pt")
        return self._open[shard].get_slice(kind)[row - self._ends[shard]]  # from the end: a negative number

    def _labels(self, shard: Mapping[str, Any], hashed: bool) -> NDArray[np.int64]:
        """The labels of a shard, once it has been found to be the one that latents.json lists."""
        file = self.root / shard["file"]
        fix = f"restore it, or run python -m ditmoe encode with --out {self.root} again, which makes it anew"
        if not file.is_file():
            raise ValueError(f"{file} is missing, which {INDEX} lists; {fix}")
        if file.stat().st_size != shard["bytes"]:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, not {shard['bytes']} as {INDEX} says; {fix}")
        if hashed and digest(file) != shard["sha256"]:
            raise ValueError(f"{file} has other content than {INDEX} says (SHA-256); {fix}")
        want = {name: [shard["count"], *self.index["shape"]] for name in latent_names(self.index["flip"])}
        try:
            with safe_open(file, framework="pt") as tensors:
                labels = tensors.get_tensor("labels")
                found = {name: tensors.get_slice(name).get_shape() for name in want}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged, truncated or no shard of latents ({error}); {fix}") from error
        if found != want or labels.shape != (shard["count"],) or labels.dtype != torch.int64:
            raise ValueError(f"{file} holds {found}, not {want} and as many labels as {INDEX} says; {fix}")
        return labels.numpy()  # type: ignore[no-any-return]


def open_latents(root: Path, *, flip: bool) -> Latents | LatentShards:
    """The latents in a folder, with or without latents.json.

    Raises ValueError for shards that are missing, damaged or do not belong together, and where mirrored images are
    asked for with `flip`, but not there.
    """
    index = read_index(root)
    if flip and not (index and index["flip"]):
        fix = "encode them with python -m ditmoe encode --flip, or train with --data.no-flip"
        raise ValueError(f"data.flip needs the latents of mirrored images, which {root} does not hold; {fix}")
    return _open_simple(root) if index is None else LatentShards(root, index)


def _open_simple(root: Path) -> Latents:
    """Shards `*.safetensors`, each with `latents` (n, C, H, W) and, for a set with classes, `labels` (n,)."""
    files = sorted(root.glob("*.safetensors"))
    if not files:
        raise ValueError(f"data.path {root} holds no *.safetensors shards of latents")
    values, labels = [], []
    for file in files:
        try:
            shard = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is damaged, truncated or no safetensors file ({error})") from error
        if "latents" not in shard:
            raise ValueError(f"{file} has no tensor named latents")
        values.append(shard["latents"])
        labels.append(shard.get("labels", torch.zeros(0, dtype=torch.int64)))
    if len({v.shape[1:] for v in values}) > 1 or values[0].ndim != 4:
        shapes = [tuple(v.shape) for v in values][:4]
        raise ValueError(f"the shards in {root} hold latents of different shapes: {shapes}")
    latents, classes = torch.cat(values), torch.cat(labels).long().flatten().numpy()
    if len(latents) == 0 or len(classes) not in (0, len(latents)):
        raise ValueError(f"the shards in {root} hold {len(latents)} latents but {len(classes)} labels")
    if len(classes) and not 0 <= classes.min() <= classes.max() < MOST_LABELS:
        found = f"{classes.min()}..{classes.max()}"
        raise ValueError(f"the shards in {root} have labels {found}; they must lie in 0..{MOST_LABELS - 1}")
    id2label = {i: str(i) for i in range(int(classes.max()) + 1)} if len(classes) else {}
    classes = classes if len(classes) else np.zeros(len(latents), dtype=np.int64)
    source = f"{counted(len(latents), len(id2label), 'latent')} in {root}" + _others(root, [f.name for f in files])
    return Latents(latents, classes, id2label, source)


def _others(root: Path, used: Sequence[str]) -> str:
    """What lies beside the shards, in words."""
    below = [file.relative_to(root) for file in files_below(root)]
    return left_out(file for file in below if str(file) not in used)


def latent_names(flip: bool) -> tuple[str, ...]:
    """The tensors of latents in a shard."""
    return ("latents", "latents_flipped") if flip else ("latents",)


def read_index(root: Path) -> Index | None:
    """What latents.json says; None for a folder of the simple form.

    Raises ValueError where it is not whole, or missing because the set has not been encoded to its end.
    """
    file = root / INDEX
    if not file.is_file():
        first = min(root.glob("*.safetensors"), default=None)
        if first is not None and noted_in(first) is not None:
            raise ValueError(f"{root} holds no {INDEX}: run python -m ditmoe encode again until all is encoded")
        return None
    try:
        index: Index = json.loads(file.read_text())
        fault = "it has another format" if index["format"] != FORMAT else _index_fault(index)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fault = f"{type(error).__name__}: {error}"
    if fault:
        raise ValueError(f"{file} is not what python -m ditmoe encode writes ({fault})")
    return index


def _index_fault(index: Any) -> str | None:
    shards, shape = index["shards"], index["shape"]
    files = [shard["file"] for shard in shards]
    numbers = [*shape, index["count"], *(shard[name] for shard in shards for name in ("count", "bytes"))]
    plain = all(Path(file).name == file and file.endswith(".safetensors") for file in files)
    if not plain or not all(isinstance(shard["sha256"], str) for shard in shards):
        return "its shards are not files of the folder"
    if len(shape) != 3 or not all(type(n) is int and 0 <= n < 2**50 for n in numbers):
        return "its counts are not numbers of images"
    if not 0 < index["count"] == sum(shard["count"] for shard in shards):
        return "its shards do not add up to its count"
    if not isinstance(index["flip"], bool) or not all(isinstance(name, str) for name in index["classes"]):
        return "its classes are not names"
    return None if is_normalization(index) and len(index["mean"]) == shape[0] else "mean and std are not usable"


def noted_in(file: Path) -> dict[str, Any] | None:
    """What our encoder noted in a shard; None where it is not one of its shards, or is damaged."""
    try:
        with safe_open(file, framework="pt") as tensors:
            found = json.loads((tensors.metadata() or {}).get(KEY, "null"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("facts"), dict) else None


def channel_statistics(shards: Sequence[Mapping[str, Any]], values: int) -> dict[str, list[float]]:
    """`mean`, `std` and `posterior_std` of each channel, which has so many values in all, from the sums of each shard.

    Raises ValueError where a channel is the same everywhere.
    """
    mean, squares, variance = (
        [math.fsum(sums) / values for sums in zip(*(shard[name] for shard in shards), strict=True)]
        for name in ("sum", "squares", "variance")
    )
    std = [math.sqrt(max(s - m * m, 0)) for m, s in zip(mean, squares, strict=True)]
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        if s <= 1e-6 * abs(m):  # what the rounding of sums leaves of a constant
            raise ValueError(f"channel {channel} of the latents has the same value everywhere: it cannot be normalised")
    return {"mean": mean, "std": std, "posterior_std": [math.sqrt(v) for v in variance]}


def read_normalization(root: Path | None) -> dict[str, Any] | None:
    """`ImageSet.normalization` of the latents in a folder; None for the simple form, and where there is no folder."""
    index = None if root is None else read_index(root)
    return None if index is None else _normalization(index)


def _normalization(index: Index) -> dict[str, Any]:
    return {name: index[name] for name in ("mean", "std", "vae")}


def is_normalization(found: Any) -> bool:
    """Whether a value read from a file has the form of `ImageSet.normalization`."""
    match found:
        case {"mean": list(mean), "std": list(std), "vae": {"name": str(), "sha256": str()}}:
            numbers = all(isinstance(v, float | int) and abs(v) < 1e30 for v in [*mean, *std])
            return numbers and 0 < len(mean) == len(std) and min(std) > 1e-30  # as float32
    return False


def denormalize(x: Tensor, known: Mapping[str, Any]) -> Tensor:
    """The VAE's latents (N, C, H, W) float32 of the model's x: x std + mean, what training does backwards."""
    mean, std = _columns(known)
    return x.float() * std.to(x.device) + mean.to(x.device)


def normalize(latents: Tensor, known: Mapping[str, Any]) -> Tensor:
    """The model's x of a VAE's latents (N, C, H, W): (latents - mean) / std, float32."""
    mean, std = _columns(known)
    return (latents.float() - mean.to(latents.device)) / std.to(latents.device)


def _columns(known: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and std (C, 1, 1) float32."""
    mean, std = (torch.tensor(known[name], dtype=torch.float32).view(-1, 1, 1) for name in ("mean", "std"))
    return mean, std
