"""What can be scored: images that are read in batches, and statistics of images that are no longer there."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from eval.metrics.frechet import Gaussian
from eval.sources.arrays import Float32Array, IndexArray, ReadBatches, UInt8Array


@dataclass(frozen=True)
class Images:
    """At least two images of one size, read in batches in a fixed order."""

    kind: str  # folder, zip, npz, table, dataset, array or model
    path: str  # as the user wrote it
    count: int  # images whose headers can be read; pixels may still turn out damaged, see `bad`
    shape: tuple[int, int, int]  # (H, W, C)
    read: ReadBatches
    fingerprint: str = ""  # changes when the images do, without reading them all; "" where nothing tells
    labels: IndexArray | None = None  # (count,), the class of each image
    facts: dict[str, Any] = field(default_factory=dict)  # how the images were made, as `sample.py` writes it
    statistics: "Statistics | None" = None  # of a larger set that these stand for, as ADM's reference batches hold them
    may_skip: int = 0  # how many unreadable images may be left out
    bad: list[str] = field(default_factory=list)  # names of those that were left out, filled while reading
    left_out: str = ""  # a sentence on files beside the images that are none

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[UInt8Array]:
        """Batches uint8 (n, H, W, C), n <= batch_size, of the first `limit` images, or of all."""
        return (batch for _, batch in self.read(self.count if limit is None else limit, batch_size, 0, 1))


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance from a file: features of images that are no longer there."""

    kind: str  # stats
    path: str  # as the user wrote it
    gaussian: Gaussian  # of the pooled features
    spatial: Gaussian | None  # of sFID's features (`mu_s`, `sigma_s`), where the file has them
    features: Float32Array | None  # (m, D), some of the images' own features, where the file has them
    sha256: str  # of the file
    facts: dict[str, Any] = field(default_factory=dict)  # what made it, where `eval.ref` did
