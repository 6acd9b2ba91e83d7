"""Streaming Inception Score: how sure a classifier is of each image, and how much its answers vary.

Shapes: n images in all, b in a batch, C classes, S splits.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

SPLIT_SIZE = 5000  # images, ADM's


class Score(NamedTuple):
    """Inception Score over splits: between 1 and C, higher is better."""

    mean: float
    std: float  # population standard deviation over splits (divisor S)


class InceptionSums:
    """exp(mean over images of KL(p(y|x) || p(y))) (Salimans et al., 2016, section 4), by splits.

    As in ADM's evaluation suite, image i belongs to split i // split_size, p(y) is a split's own mean and the score is
    the mean over splits. A last split with fewer images is a split like the others: few images score low (at most their
    number), so choose n as a multiple of split_size, or split_size = n for one split.

    Since sum p log(p / q) over a split's images is sum p log p - count * sum q log q for q = mean p, three float64 sums
    a split are all that is kept: `count` (S,), `sum_p` (S, C) and `sum_p_log_p` (S,). To join processes, add those up;
    batches may come in any order.
    """

    def __init__(self, n: int, num_classes: int, *, split_size: int = SPLIT_SIZE) -> None:
        if n < 1 or num_classes < 1 or split_size < 1:
            raise ValueError(f"n {n}, num_classes {num_classes} and split_size {split_size} must be at least 1")
        self.n, self.split_size = n, split_size
        splits = -(-n // split_size)
        self.count = np.zeros(splits)
        self.sum_p = np.zeros((splits, num_classes))
        self.sum_p_log_p = np.zeros(splits)

    def update(self, indices: npt.NDArray[np.integer[Any]], logits: npt.NDArray[Any]) -> None:
        """Add the logits (b, C), any float dtype, of the images `indices` (b,), 0 <= index < n.

        Raises ValueError, and adds nothing, when shapes do not fit, an index is out of range or a logit is not finite.
        """
        classes = self.sum_p.shape[1]
        if logits.ndim != 2 or logits.shape[1] != classes or indices.shape != (len(logits),):
            raise ValueError(
                f"indices {indices.shape} and logits {logits.shape} do not fit; expected (b,) and (b, {classes})"
            )
        if ((indices < 0) | (indices >= self.n)).any():
            raise ValueError(f"the indices {indices} must be at least 0 and below n = {self.n}")
        if not np.isfinite(logits).all():
            raise ValueError("logits hold NaN or infinity; check the images and the classifier's weights")
        shifted = logits.astype(np.float64)
        shifted -= shifted.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        split = indices // self.split_size
        np.add.at(self.count, split, 1)
        np.add.at(self.sum_p, split, p)
        np.add.at(self.sum_p_log_p, split, (p * log_p).sum(axis=1))

    def compute(self) -> Score:
        """Over splits. Raises ValueError when one has not had as many images as belong to it."""
        expected = np.minimum(self.split_size, self.n - np.arange(len(self.count)) * self.split_size)
        wrong = np.flatnonzero(self.count != expected)
        if len(wrong):
            i = wrong[0]
            raise ValueError(f"split {i} had {self.count[i]:.0f} images of {expected[i]}; give every image once")
        q = self.sum_p / self.count[:, None]
        log_q = np.log(q, where=q > 0, out=np.zeros_like(q))  # 0 log 0 = 0
        divergence = self.sum_p_log_p / self.count - (q * log_q).sum(axis=1)
        scores = np.exp(divergence.clip(min=0))  # a KL below 0 is rounding
        return Score(float(scores.mean()), float(scores.std()))
