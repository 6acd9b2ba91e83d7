"""What can be scored: images that are read in batches, and statistics of images that are no longer there."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from eval.metrics.frechet import Gaussian
from eval.sources.arrays import Float32Array, IndexArray, ReadBatches, UInt8Array


@dataclass(frozen=True)
class Images:
    """At least two images of one size, read in batches in a fixed order.

    Attributes:
        kind: folder, zip, npz, dataset, array or model.
        path: As the user wrote it.
        count: Images whose headers can be read; pixels may still turn out damaged, see `bad`.
        shape: (H, W, C).
        read: See `eval.arrays.ReadBatches`.
        fingerprint: Changes when the images do, without reading them all; "" where nothing tells.
        labels: (count,) int64, the class of each image, or None.
        facts: How the images were made, as `sample.py` writes it beside them; {} where unknown.
        statistics: Of a larger set that these images stand for, as ADM's reference batches hold them, or None.
        may_skip: How many unreadable images may be left out.
        bad: Names of images that turned out unreadable and were left out, filled while reading.
    """

    kind: str
    path: str
    count: int
    shape: tuple[int, int, int]
    read: ReadBatches
    fingerprint: str = ""
    labels: IndexArray | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    statistics: "Statistics | None" = None
    may_skip: int = 0
    bad: list[str] = field(default_factory=list)

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[UInt8Array]:
        """Batches uint8 (n, H, W, C), n <= batch_size, of the first `limit` images, or of all."""
        return (batch for _, batch in self.read(self.count if limit is None else limit, batch_size, 0, 1))


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance from a file: features of images that are no longer there.

    Attributes:
        kind: stats.
        path: As the user wrote it.
        gaussian: Of the pooled features.
        spatial: Of sFID's features (`mu_s`, `sigma_s`), where the file has them.
        features: (m, D) float32, some of the images' own features, where the file has them.
        sha256: Of the file.
        facts: What made it, where `eval.ref` did: count, extractor, source.
    """

    kind: str
    path: str
    gaussian: Gaussian
    spatial: Gaussian | None
    features: Float32Array | None
    sha256: str
    facts: dict[str, Any] = field(default_factory=dict)
