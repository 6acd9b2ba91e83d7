"""Kernel distance of two sets of features; on Inception's features it is the KID.

Shapes: n and m samples, D features, s samples in a subset.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eval.metrics.frechet import FloatArray, check_sides

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020  # torch-fidelity's


class KernelDistance(NamedTuple):
    """Squared MMD over random subsets; the mean is unbiased, so it may be slightly below 0."""

    mean: float
    std: float  # population standard deviation over subsets (divisor `subsets`)


def kernel_distance(
    x: npt.NDArray[Any], y: npt.NDArray[Any], *, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE,
    seed: int = SEED,
) -> KernelDistance:  # fmt: skip
    """Mean and standard deviation over subsets of the unbiased squared MMD of x (n, D) and y (m, D).

    Kernel (x.y / D + 1)^3 (Bińkowski et al., 2018, "Demystifying MMD GANs", section 4). Arithmetic is float64. Subset
    after subset, numpy.random.RandomState(seed) draws s rows of x, then s rows of y, each without replacement:
    torch-fidelity's order, so equal features give its figure when x is its first input.

    s = min(subset_size, n, m). Where that is n or m the subsets share all of a side and the deviation says little: it
    is 0 up to rounding when s = n = m. Report s with the value.

    Raises ValueError when n or m < 2, D differs, a value is not finite, subsets < 1 or subset_size < 2.
    """
    check_sides({"the first features": x, "the second features": y})
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a kernel distance needs at least 2 images a side, got {len(x)} and {len(y)}")
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"subsets {subsets} must be at least 1 and subset_size {subset_size} at least 2")
    size = min(subset_size, len(x), len(y))
    rng = np.random.RandomState(seed)
    values = np.empty(subsets)
    for i in range(subsets):
        a, b = (side[rng.choice(len(side), size, replace=False)].astype(np.float64) for side in (x, y))
        values[i] = _mmd2(a, b)
    return KernelDistance(float(values.mean()), float(values.std()))


def _mmd2(x: FloatArray, y: FloatArray) -> float:
    """Unbiased squared MMD of x (s, D) and y (s, D): Gretton et al., 2012, eq. 3."""
    s = len(x)
    xx, yy, xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)  # no sample is paired with itself
    return float(within / (s * (s - 1)) - 2 * xy.mean())


def _kernel(x: FloatArray, y: FloatArray) -> FloatArray:
    """Polynomial kernel of every pair, (s, s)."""
    base: FloatArray = x @ y.T / x.shape[1] + 1
    return base * base * base
