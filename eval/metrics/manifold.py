"""Precision, recall, density and coverage of generated features against real ones.

Every sample of a set carries a ball that reaches to its k-th nearest other sample of that set;
the balls together stand for the set's manifold. Shapes: n real, m generated, D features.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eval.metrics.frechet import check_sides

# Rounding of a squared distance, relative to the sum of the two squared norms, reaches 1e-14 at
# D = 2048. What differs by less than TIE is a tie, so that no result depends on the block size.
TIE = 1e-13


class PRDC(NamedTuple):
    """Fractions in [0, 1], except density, which is >= 0 and 1 on average for equal distributions."""

    precision: float  # generated samples inside the real manifold: fidelity
    recall: float  # real samples inside the generated manifold: diversity
    density: float  # real balls that hold a generated sample, over k
    coverage: float  # real balls that hold some generated sample


def prdc(
    real: npt.NDArray[Any], generated: npt.NDArray[Any], *, pr_k: int = 3, dc_k: int = 5, block_size: int = 1024
) -> PRDC:
    """All four measures of generated (m, D) against real (n, D), any float dtype.

    Precision and recall (Kynkäänniemi et al., 2019, eq. 1 and 2) have k = pr_k, 3 in the paper and in ADM's evaluation
    suite, and closed balls, distance <= radius, as there. Density and coverage (Naeem et al., 2020, eq. 3 and 4) have
    k = dc_k, 5 in the paper, and open balls, distance < radius, as in its authors' code: with those, equal sets have a
    density of exactly 1. In either case a sample is not its own neighbour, and a duplicate of it is a neighbour at
    distance 0.

    Distances come from float64 matrix products of features relative to the real mean, in tiles of block_size x
    block_size: memory beyond the features does not grow with n and m.

    Raises ValueError when n <= max(pr_k, dc_k) or m <= pr_k, when D differs, a value is not finite, or an option is
    below 1.
    """
    check_sides({"the real features": real, "the generated features": generated})
    if min(pr_k, dc_k, block_size) < 1:
        raise ValueError(f"pr_k {pr_k}, dc_k {dc_k} and block_size {block_size} must be at least 1")
    for side, count, k in (("real", len(real), max(pr_k, dc_k)), ("generated", len(generated), pr_k)):
        if count <= k:
            raise ValueError(f"{count} {side} images have no {k} neighbours each; give at least {k + 1}")
    center = real.mean(axis=0, dtype=np.float64)
    near = _nearest(real, center, max(pr_k, dc_k), block_size)
    radius_pr, radius_dc = near[:, pr_k - 1], near[:, dc_k - 1]  # (n,)
    radius_gen = _nearest(generated, center, pr_k, block_size)[:, pr_k - 1]  # (m,)
    precise = torch.zeros(len(generated), dtype=torch.bool)
    recalled, covered = torch.zeros(2, len(real), dtype=torch.bool)
    inside = 0
    for i, x in _blocks(real, center, block_size):
        for j, y in _blocks(generated, center, block_size):
            d, tie = _squared_distances(x, y)
            closed, opened = d - tie, d + tie
            precise[j] |= (closed <= radius_pr[i, None]).any(dim=0)
            recalled[i] |= (closed <= radius_gen[j]).any(dim=1)
            within = opened < radius_dc[i, None]
            covered[i] |= within.any(dim=1)
            inside += int(within.sum())
    precision, recall, coverage = (float(hit.double().mean()) for hit in (precise, recalled, covered))
    return PRDC(precision, recall, inside / (dc_k * len(generated)), coverage)


def _blocks(
    features: npt.NDArray[Any], center: npt.NDArray[np.float64], size: int, start: int = 0
) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive rows relative to the center, float64 (<= size, D), and where they lie."""
    for begin in range(start, len(features), size):
        yield slice(begin, begin + size), torch.from_numpy(features[begin : begin + size] - center)


def _squared_distances(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of every row of x (a, D) to every row of y (b, D), and what counts as a tie: float64 (a, b) each.

    Rounding may leave a distance below 0, by less than a tie.
    """
    norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    return torch.addmm(norms, x, y.T, alpha=-2), norms.mul_(TIE)


def _nearest(features: npt.NDArray[Any], center: npt.NDArray[np.float64], k: int, size: int) -> Tensor:
    """Squared distances of each sample to its k nearest others, ascending, float64 (N, k)."""
    nearest = torch.full((len(features), k), torch.inf, dtype=torch.float64)

    def merge(rows: slice, d: Tensor) -> None:
        nearest[rows] = torch.cat([nearest[rows], d], dim=1).topk(k, dim=1, largest=False).values

    for i, x in _blocks(features, center, size):
        for j, y in _blocks(features, center, size, start=i.start):  # a tile serves both of its sides
            d, _ = _squared_distances(x, y)
            if i == j:
                merge(i, d.fill_diagonal_(torch.inf))  # itself, by place: a duplicate stays
            else:
                merge(i, d)
                merge(j, d.T)
    return nearest
