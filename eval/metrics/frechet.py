"""Streaming mean and covariance of features, and the Fréchet distance of two Gaussians, in float64.

Shapes: N samples, D features.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from eval.processes import Processes

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = npt.NDArray[np.float64]
# What one pass over features adds up, float64 (D + 3, D), the same in NumPy and in torch. Row 0: how many there were,
# in every place; row 1: a shift; row 2: the sum of (f - shift); below: the sum of (f - shift)(f - shift)^T.
Moments = TypeVar("Moments", FloatArray, "Tensor")


class Gaussian(NamedTuple):
    """The two moments that a Fréchet distance compares."""

    mean: FloatArray  # (D,)
    covariance: FloatArray  # (D, D), symmetric, positive semi-definite


def add(moments: Moments, values: Moments) -> None:
    """Add features `values` (N, D), N >= 1, float64, in place; `values` are overwritten.

    The shift is the first batch's mean: a one-pass covariance of features that lie far from 0 would otherwise lose its
    digits to cancellation (Chan, Golub and LeVeque, 1983, "Algorithms for computing the sample variance").
    """
    if not moments[0, 0]:
        moments[1] = values.mean(0)
    values -= moments[1]
    moments[0] += len(values)
    moments[2] += values.sum(0)
    moments[3:] += values.T @ values


def about(moments: Moments, shift: Moments) -> Moments:
    """The same features' moments about another shift (D,)."""
    count, total, by = moments[0], moments[2], moments[1] - shift
    cross = total[:, None] * by
    moved = moments + 0  # a copy
    moved[1] = shift
    moved[2] += count * by
    moved[3:] += cross + cross.T + count * (by[:, None] * by)
    return moved


def join(parts: Moments) -> Moments:
    """The moments (D + 3, D) of all features of which `parts` (P, D + 3, D) are the moments, exact up to rounding.

    Parts of no features change nothing; the shift is that of the first of the largest parts.
    """
    shift = parts[int(parts[:, 0, 0].argmax()), 1]
    joined: Moments = about(parts[0], shift)
    for part in parts[1:]:
        joined += about(part, shift)
    joined[1] = shift
    return joined


def gaussian(moments: FloatArray) -> Gaussian:
    """Mean (D,) and unbiased covariance (D, D), divisor n - 1. Raises ValueError when n < 2."""
    n = int(moments[0, 0])
    if n < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {n}; give more")
    mean = moments[2] / n
    covariance = (moments[3:] - n * np.outer(mean, mean)) / (n - 1)
    return Gaussian(moments[1] + mean, covariance)


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches; D is `num_features`, or what the first batch says."""

    def __init__(self, num_features: int | None = None) -> None:
        self._moments = np.zeros((num_features + 3, num_features)) if num_features else None

    @property
    def n(self) -> int:
        """Features so far."""
        return 0 if self._moments is None else int(self._moments[0, 0])

    def update(self, features: npt.NDArray[Any]) -> None:
        """Add features (N, D), any float dtype. ValueError when they are not (N, D) for this D, or not finite."""
        check_features("features", features, None if self._moments is None else self._moments.shape[1])
        if self._moments is None:
            self._moments = np.zeros((features.shape[1] + 3, features.shape[1]))
        if len(features):
            add(self._moments, features.astype(np.float64))

    def merge(self, processes: Processes) -> None:
        """Add up what several processes saw; afterwards all of them hold the same sums."""
        mine = self._moments
        shift = processes.gather(None if mine is None else mine[1])[0]  # the first has the first batch
        moved = np.zeros((len(shift) + 3, len(shift))) if mine is None else about(mine, shift)
        self._moments = processes.total(moved)
        self._moments[1] = shift

    def gaussian(self) -> Gaussian:
        """Of all so far, as `gaussian` has it."""
        assert self._moments is not None
        return gaussian(self._moments)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Fréchet (2-Wasserstein) distance of two Gaussians, in feature units squared.

    |m_a - m_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2 (Dowson and Landau, 1982; Heusel et al., 2017, eq. 6). With
    A = F F^T and B = G G^T from two eigendecompositions, the last trace is the sum of the singular values of F^T G. The
    usual way, square roots of the eigenvalues of A^1/2 B A^1/2, turns rounding of 1e-16 into 1e-8 for each dimension
    that N < D leaves empty; singular values do not.

    Raises ValueError when dimensions differ, a value or the distance is not finite, or a matrix is no covariance.
    """
    _check(a, "the first")
    _check(b, "the second")
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"the statistics have {len(a.mean)} and {len(b.mean)} features; use one extractor for both")
    with np.errstate(over="ignore"):
        offset = a.mean - b.mean
        shift = float(offset @ offset)
        size = float(np.trace(a.covariance) + np.trace(b.covariance))
    if not np.isfinite(shift + size):
        apart = f"means {np.abs(offset).max():.3g} apart, traces of {size:.3g} together"
        raise ValueError(f"the statistics are too large for a distance: {apart}; compute them again")
    overlap = np.linalg.svd(_factor(a.covariance).T @ _factor(b.covariance), compute_uv=False).sum()
    distance = float(shift + size - 2 * overlap)
    assert distance >= -1e-6 * size, f"Fréchet distance {distance} of covariances of trace {size}"
    return max(distance, 0.0)


def _check(gaussian: Gaussian, which: str) -> None:
    mean, covariance = gaussian
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"a mean of shape {mean.shape} and a covariance of shape {covariance.shape}"
        raise ValueError(f"{which} statistics have {shapes}; expected (D,) and (D, D)")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{which} statistics hold NaN or infinity; compute them again")
    if np.abs(covariance - covariance.T).max(initial=0) > 1e-5 * np.abs(covariance).max(initial=0):
        raise ValueError(f"{which} covariance is not symmetric; compute the statistics again")


def _factor(covariance: FloatArray) -> FloatArray:
    """F (D, D) with F F^T = covariance; eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(covariance)
    if values[0] < -1e-5 * values[-1]:
        raise ValueError(f"a covariance has the eigenvalue {values[0]:.3g} < 0; compute the statistics again")
    factor: FloatArray = vectors * np.sqrt(values.clip(min=0))
    return factor


def check_features(name: str, features: npt.NDArray[Any], num_features: int | None = None) -> None:
    """Raises ValueError naming `name` unless `features` is (N, D), for this D if one is given, and finite."""
    if features.ndim != 2 or num_features not in (None, features.shape[1]):
        raise ValueError(f"{name} have shape {features.shape}; expected (N, {num_features or 'D'})")
    if not np.isfinite(features).all():
        raise ValueError(f"{name} hold NaN or infinity; check the images and the extractor's weights")


def check_sides(sides: dict[str, npt.NDArray[Any]]) -> None:
    """`check_features` of two sets by name; and ValueError when they differ in D."""
    for name, features in sides.items():
        check_features(name, features)
    first, second = (features.shape[1] for features in sides.values())
    if first != second:
        raise ValueError(f"the sets have {first} and {second} features; use one extractor for both")
