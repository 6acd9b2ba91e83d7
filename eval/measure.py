"""One pass over a set of images: everything that the metrics need of it, in memory that does not grow with it.

Shapes: n images, b in a batch, D features, C classes.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eval.metrics.frechet import FeatureStatistics, Gaussian
from eval.metrics.inception_score import InceptionSums, Score
from eval.processes import ALONE, Processes, SharedError
from eval.progress import progress as shown_progress
from eval.sources.arrays import Float32Array, IndexArray, UInt8Array
from eval.sources.images import Images, Statistics

if TYPE_CHECKING:
    from eval.networks.extractors import Extractor, Features

Classify = Callable[[UInt8Array], npt.NDArray[np.integer[Any]]]


@dataclass(frozen=True)
class Wanted:
    """What to collect besides the moments of the pooled features."""

    spatial: bool = False  # moments of sFID's features
    logits: bool = False  # the Inception Score
    keep: int = 0  # feature rows to keep for KID, precision and recall; 0 for none
    seed: int = 0  # chooses those rows
    classify: Classify | None = None  # uint8 images (b, H, W, C) -> classes (b,), to count how many have their label


@dataclass(frozen=True)
class Measured:
    """What one side of a score comes to. `count`, `shape` and `rows_seed` are None where a file does not say."""

    gaussian: Gaussian
    count: int | None
    shape: tuple[int, int, int] | None  # (H, W, C)
    facts: dict[str, Any]  # path, kind, sha256, shape, generation: as reported
    spatial: Gaussian | None = None
    features: Float32Array | None = None  # (min(n, keep), D)
    rows_seed: int | None = None  # chose the images that `features` are of
    rows_sha256: str | None = None  # of the pixels of these images; of `features` where a file has no more
    inception: Score | None = None
    accuracy: float | None = None
    bad: list[str] = field(default_factory=list)


def measure(
    source: Images, net: "Extractor", wanted: Wanted, num: int | None = None, *,
    batch_size: int = 64, progress: bool = False, processes: Processes = ALONE,
) -> Measured:  # fmt: skip
    """Read, look, add up: the first `num` images of a source, or all.

    The batches are the same for any number of processes; each takes its share and the sums are added at the end.
    Raises ValueError, in every process, where an image or a feature is bad in one of them.
    """
    count = source.count if num is None else num
    pass_ = _Pass(source, net, wanted, count)
    batches = -(-count // batch_size) - processes.rank
    total = min(batch_size * -(-batches // processes.world), count)

    def look() -> None:
        with shown_progress(total, source.path, shown=progress and not processes.rank) as tell:
            for indices, batch in source.read(count, batch_size, processes.rank, processes.world):
                pass_.add(indices, batch)
                tell(len(batch))

    processes.agree(look)
    return pass_.close(processes)


class _Pass:
    def __init__(self, source: Images, net: "Extractor", wanted: Wanted, count: int) -> None:
        self.source, self.net, self.wanted, self.count = source, net, wanted, count
        self.moments = FeatureStatistics(net.num_features)
        self.spatial = FeatureStatistics() if wanted.spatial else None
        self.inception: InceptionSums | None = None  # the first logits say how many classes there are
        self.chosen = chosen_indices(count, wanted.keep, wanted.seed) if wanted.keep else np.arange(0)
        self.rows: dict[int, Float32Array] = {}  # of the chosen images, each (D,)
        self.right = self.largest = 0
        self.digests: dict[int, bytes] = {}

    def add(self, indices: IndexArray, batch: UInt8Array) -> None:
        found = features_of(self.net, batch)
        self.largest = max(self.largest, int(batch.max()))
        pool = found.pool.numpy()
        self.moments.update(pool)
        self.rows |= {int(indices[k]): pool[k].copy() for k in np.flatnonzero(np.isin(indices, self.chosen))}
        if self.spatial is not None:
            assert found.spatial is not None
            self.spatial.update(found.spatial.numpy())
        if self.wanted.logits:
            assert found.logits is not None
            self.inception = self.inception or InceptionSums(self.count, found.logits.shape[1])
            self.inception.update(indices, found.logits.numpy())
        if self.wanted.classify is not None:
            assert self.source.labels is not None
            classes = np.asarray(self.wanted.classify(batch))
            if classes.shape != (len(batch),):
                raise ValueError(f"classify gave {classes.shape} for {len(batch)} images; expected one class each")
            self.right += int((classes == self.source.labels[indices]).sum())
        for i, image in zip(indices.tolist(), np.broadcast_to(batch, (*batch.shape[:3], 3)), strict=True):
            self.digests[i] = hashlib.sha256(image.tobytes()).digest()

    def close(self, processes: Processes) -> Measured:
        self.moments.merge(processes)
        if self.spatial is not None:
            self.spatial.merge(processes)
        parts = processes.gather((self.digests, self.source.bad, self.right, self.rows, self.largest))
        digests = {i: digest for part in parts for i, digest in part[0].items()}
        bad = sorted({name for part in parts for name in part[1]})
        if len(bad) > self.source.may_skip:
            raise SharedError(f"{self.source.path}: {len(bad)} of its images cannot be read: {', '.join(bad[:5])}")
        rows = {i: row for part in parts for i, row in part[3].items()}
        features = np.array([rows[i] for i in sorted(rows)], np.float32).reshape(-1, self.net.num_features)
        assert bad or len(rows) == len(self.chosen), (len(rows), len(self.chosen))
        assert self.moments.n == len(digests), (self.moments.n, len(digests))

        def sha256(indices: Iterable[int]) -> str:
            joined = repr(self.source.shape[:2]).encode() + b"".join(digests[i] for i in sorted(indices))
            return hashlib.sha256(joined).hexdigest()

        facts = {
            "path": self.source.path, "kind": self.source.kind, "sha256": sha256(digests),
            "shape": list(self.source.shape), "generation": self.source.facts or None,
            "largest": max(part[4] for part in parts),
        }  # fmt: skip
        spatial = self.spatial.gaussian() if self.spatial else None
        keep = self.wanted.keep > 0
        accuracy = sum(part[2] for part in parts) / self.moments.n if self.wanted.classify else None
        return Measured(
            self.moments.gaussian(), self.moments.n, self.source.shape, facts, spatial, features if keep else None,
            self.wanted.seed if keep else None, sha256(rows) if keep else None,
            self._merged_inception(processes), accuracy, bad,
        )  # fmt: skip

    def _merged_inception(self, processes: Processes) -> Score | None:
        if not self.wanted.logits:
            return None
        classes = processes.gather(self.inception and self.inception.sum_p.shape[1])  # the first has the first batch
        sums = self.inception or InceptionSums(self.count, classes[0])
        sums.count, sums.sum_p = processes.total(sums.count), processes.total(sums.sum_p)
        sums.sum_p_log_p = processes.total(sums.sum_p_log_p)
        return sums.compute()


def chosen_indices(n: int, size: int, seed: int) -> IndexArray:
    """min(n, size) different indices of range(n), ascending, each such subset as likely as another.

    The draw is numpy.random.RandomState(seed).choice: NumPy has frozen RandomState's streams (NEP 19) but not those of
    its newer Generator, and a score made today should keep its images after an upgrade.

    Raises ValueError when n < 0 or size < 1.
    """
    if n < 0 or size < 1:
        raise ValueError(f"cannot choose {size} of {n} images; give size >= 1 and n >= 0")
    if size >= n:
        return np.arange(n, dtype=np.int64)
    return np.sort(np.random.RandomState(seed).choice(n, size, replace=False)).astype(np.int64)


def features_of(net: "Extractor", batch: UInt8Array) -> "Features":
    """An extractor's features of uint8 images (b, H, W, C)."""
    import torch

    with torch.inference_mode():
        found = net.features(torch.from_numpy(batch.transpose(0, 3, 1, 2).copy()).to(net.center.device))
    spatial, logits = (None if part is None else part.cpu() for part in (found.spatial, found.logits))
    return found._replace(pool=found.pool.cpu(), spatial=spatial, logits=logits)


def of_statistics(source: Statistics, net: "Extractor") -> Measured:
    """A statistics file as one side of a score. Raises ValueError when it is a `misfit`."""
    if (problem := misfit(source, net)) is not None:
        raise ValueError(f"{source.path}: {problem}; use the extractor that made it, or give images")
    facts = {"path": source.path, "kind": source.kind, "sha256": source.sha256, "made_from": source.facts or None}
    rows: dict[str, Any] = {}
    if source.features is not None:
        rows = source.facts.get("rows") or {"sha256": hashlib.sha256(source.features.tobytes()).hexdigest()}
    kept = source.features, rows.get("seed"), rows.get("sha256")
    return Measured(source.gaussian, source.facts.get("count"), None, facts, source.spatial, *kept)


def misfit(source: Statistics, net: "Extractor") -> str | None:
    """Why these statistics are not those of this extractor; None where nothing speaks against it."""
    size, made = len(source.gaussian.mean), source.facts.get("extractor")
    if size != net.num_features:
        origin = made["name"] if made else f"one with {size} features"
        return f"mu has {size} values of {origin}, but {net.name} gives {net.num_features} features"
    for name in ("sha256", "version", "resize"):
        if made and made[name] != getattr(net, name):
            return f"{name} is {made[name]!r} of {made['name']}, but {net.name} has {getattr(net, name)!r}"
    return None
