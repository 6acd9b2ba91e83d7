"""Streaming mean and covariance of features, and the Fréchet distance of two Gaussians.

Everything is float64 NumPy. Shapes: N samples, D features.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eval.processes import Processes

FloatArray = npt.NDArray[np.float64]


class Gaussian(NamedTuple):
    """The two moments that a Fréchet distance compares."""

    mean: FloatArray  # (D,)
    covariance: FloatArray  # (D, D), symmetric, positive semi-definite


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches, in D*D*8 bytes whatever N is.

    Sums are kept relative to the first batch's mean: a one-pass covariance of features that lie
    far from 0 would otherwise lose its digits to cancellation (Chan, Golub and LeVeque, 1983,
    "Algorithms for computing the sample variance", shifted data).
    """

    def __init__(self, num_features: int) -> None:
        self.n = 0
        self.num_features = num_features
        self._shift = np.zeros(num_features)  # (D,)
        self._sum = np.zeros(num_features)  # (D,)  sum of (f - shift)
        # (D, D)  sum of (f - shift)(f - shift)^T
        self._outer = np.zeros((num_features, num_features))

    def update(self, features: npt.NDArray[Any]) -> None:
        """Add a batch of features (N, D), any float dtype.

        Raises ValueError when the batch is not (N, D) for this D, or is not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(f"features have shape {features.shape}; expected (N, {self.num_features})")
        if not np.isfinite(features).all():
            raise ValueError("features hold NaN or infinity; check the images and the extractor's weights")
        if len(features) == 0:
            return
        values = features.astype(np.float64)
        if self.n == 0:
            self._shift = values.mean(axis=0)
        values -= self._shift
        self.n += len(values)
        self._sum += values.sum(axis=0)
        self._outer += values.T @ values

    def merge(self, processes: Processes) -> None:
        """Add up what several processes saw; afterwards all of them hold the same sums."""
        shift = processes.gather(self._shift)[0]  # the first process has the first batch
        moved = self._shift - shift
        self._outer += np.outer(self._sum, moved) + np.outer(moved, self._sum) + self.n * np.outer(moved, moved)
        self._sum += self.n * moved
        self._shift = shift
        self.n = round(processes.total(np.array([self.n], dtype=np.float64))[0])
        self._sum, self._outer = processes.total(self._sum), processes.total(self._outer)

    def gaussian(self) -> Gaussian:
        """Mean (D,) and unbiased covariance (D, D), divisor n - 1. Raises ValueError when n < 2."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.n}; give more")
        mean = self._sum / self.n
        covariance = (self._outer - self.n * np.outer(mean, mean)) / (self.n - 1)
        return Gaussian(self._shift + mean, covariance)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Fréchet (2-Wasserstein) distance of two Gaussians, in feature units squared.

    |m_a - m_b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2
    (Dowson and Landau, 1982; Heusel et al., 2017, eq. 6). With A = F F^T and B = G G^T from two
    eigendecompositions, the last trace is the sum of the singular values of F^T G. The usual way,
    square roots of the eigenvalues of A^1/2 B A^1/2, turns rounding of 1e-16 into 1e-8 for each
    dimension that N < D leaves empty; singular values do not.

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
        raise ValueError(
            f"the statistics are too large for a distance: means {np.abs(offset).max():.3g} apart, traces of "
            f"{size:.3g} together; compute them again"
        )
    overlap = np.linalg.svd(_factor(a.covariance).T @ _factor(b.covariance), compute_uv=False).sum()
    distance = float(shift + size - 2 * overlap)
    assert distance >= -1e-6 * size, f"Fréchet distance {distance} of covariances of trace {size}"
    return max(distance, 0.0)


def _check(gaussian: Gaussian, which: str) -> None:
    mean, covariance = gaussian
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{which} statistics have a mean of shape {mean.shape} and a covariance of shape "
            f"{covariance.shape}; expected (D,) and (D, D)"
        )
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


def check_features(name: str, features: npt.NDArray[Any]) -> None:
    """Raises ValueError naming `name` unless `features` is (N, D) and finite."""
    if features.ndim != 2:
        raise ValueError(f"{name} have shape {features.shape}; expected (N, D)")
    if not np.isfinite(features).all():
        raise ValueError(f"{name} hold NaN or infinity; check the images and the extractor's weights")
