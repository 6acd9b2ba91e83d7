"""Which images' features are kept for the metrics that need features, not only their moments.

The choice depends on (n, size, seed) alone, so it is the same for any batch size, order of the
images and number of processes, and at most `size` rows are in memory. Shapes: n images in all,
m = min(n, size) of them chosen, b in a batch, D features.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eval.metrics.frechet import check_features

IndexArray = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


def chosen_indices(n: int, size: int, seed: int) -> IndexArray:
    """min(n, size) different indices of range(n), ascending; all of range(n) when size >= n.

    Every subset of that size is equally likely. The draw is numpy.random.RandomState(seed).choice
    without replacement: NumPy has frozen RandomState's streams (NEP 19) but not those of its newer
    Generator, and a score made today should keep its images after an upgrade.

    Raises ValueError when n < 0 or size < 1.
    """
    if n < 0 or size < 1:
        raise ValueError(f"cannot choose {size} of {n} images; give size >= 1 and n >= 0")
    if size >= n:
        return np.arange(n, dtype=np.int64)
    return np.sort(np.random.RandomState(seed).choice(n, size, replace=False)).astype(np.int64)


class Rows(NamedTuple):
    """Features and the images that they belong to."""

    indices: IndexArray  # (p,), ascending
    features: Float32Array  # (p, D)


class Reservoir:
    """Keeps the features of chosen images; the others pass by.

    `indices` (m,), ascending and different, comes from `chosen_indices`. With several processes
    each makes the same reservoir, feeds it the images it has, and what all of them hold is joined by
    `update(*rows)` for the `rows()` of each, in any order.
    """

    def __init__(self, indices: IndexArray, num_features: int) -> None:
        if indices.ndim != 1 or (np.diff(indices) <= 0).any() or (indices < 0).any():
            raise ValueError(f"the chosen indices {indices} must be >= 0, ascending and different")
        self.indices = indices.astype(np.int64)
        self._features = np.empty((len(indices), num_features), np.float32)
        self._held = np.zeros(len(indices), bool)

    def update(self, indices: npt.NDArray[Any], features: npt.NDArray[Any]) -> None:
        """Keep the rows of `features` (b, D), any float dtype, whose image in `indices` (b,) is chosen.

        Raises ValueError, and keeps nothing of the batch, when shapes do not fit, a value is not
        finite, or a chosen image comes a second time (a loader that pads its last batch does that).
        """
        check_features("features", features)
        if indices.shape != (len(features),) or features.shape[1] != self._features.shape[1]:
            raise ValueError(
                f"indices {indices.shape} and features {features.shape} do not fit; "
                f"expected (b,) and (b, {self._features.shape[1]})"
            )
        chosen = np.isin(indices, self.indices)
        places = np.searchsorted(self.indices, indices[chosen])
        again = self._held[places] | (np.bincount(places, minlength=len(self.indices))[places] > 1)
        if again.any():
            raise ValueError(f"image {self.indices[places[again][0]]} came twice; give every image once")
        self._features[places] = features[chosen]
        self._held[places] = True

    def rows(self) -> Rows:
        """What is held so far, p <= m rows in index order: a process's part."""
        return Rows(self.indices[self._held], self._features[self._held])

    def features(self) -> Float32Array:
        """All chosen rows (m, D) in index order. Raises ValueError while one is missing."""
        if not self._held.all():
            missing = self.indices[~self._held]
            raise ValueError(f"{len(missing)} of {len(self.indices)} chosen images are missing, first {missing[0]}")
        return self._features.copy()
