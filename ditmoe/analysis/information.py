"""Statistics of counts: entropies and information in bits without what few images feign, intervals.

Shapes: X conditions (places, time bins or classes), E experts.
"""

import math

import numpy as np

from .routing import Array, mutual_information

SHUFFLES = 20  # of which the information that chance gives is the mean


def entropy(counts: Array) -> Array:
    """Of counts (..., E), in bits (...); nan where nothing was counted."""
    with np.errstate(invalid="ignore"):
        p = counts / counts.sum(axis=-1, keepdims=True)
    bits: Array = -(p * np.log2(np.where(p > 0, p, 1.0))).sum(axis=-1)
    return bits


def entropy_given(counts: Array, n: int) -> Array:
    """The mean entropy of cells (..., X, E), weighted by what they count, in bits (...), corrected for few images.

    Every cell counts n independent images, A assignments in all: its entropy comes out too small by about
    (m - A / n) / (2 A ln 2), m being the experts that were seen. That is Miller-Madow's correction where an image
    chooses A / n experts that are distinct; for one it is theirs (Miller, 1955).
    """
    total = counts.sum(axis=-1)
    seen = (counts > 0).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cells = np.nan_to_num(entropy(counts) + np.maximum(seen - total / n, 0) / (2 * total * math.log(2)))
        mean: Array = (cells * total).sum(axis=-1) / total.sum(axis=-1)
    return mean


def chance(counts: Array, rng: np.random.Generator) -> float:
    """Information between expert and condition, in bits, that remains when the conditions of every unit are shuffled.

    A unit is what would show no difference between its conditions if these did not matter: an image at its T places or
    B noise levels; or images, one of each class. Tokens of an image are alike, so that many tokens of few images feign
    more than Miller-Madow's correction of single assignments would take off.

    Args:
        counts: (units, X, E).
        rng: of the shuffles.
    """
    units, X, _ = counts.shape
    order = np.tile(np.arange(X), (units, 1))
    tables = (np.take_along_axis(counts, rng.permuted(order, axis=1)[..., None], axis=1) for _ in range(SHUFFLES))
    return float(np.mean([mutual_information(table.sum(axis=0)) for table in tables]))


def lift(pairs: Array) -> Array:
    """How often two experts serve a token together, over what their loads alone would give: (E, E), 1 by chance.

    pairs (E, E): tokens that both serve. Chance is a_e a_f, with a for which every row adds up to its count: an expert
    never stands beside itself. nan on the diagonal and where no chance is; all of it where no token has two experts.
    """
    together = pairs * (1 - np.eye(len(pairs)))
    wanted = together.sum(axis=1)
    if not wanted.any():
        return np.full(pairs.shape, np.nan)
    a = np.sqrt(wanted / wanted.sum() * wanted)
    for _ in range(500):
        others = a.sum() - a
        a = np.sqrt(a * np.divide(wanted, others, out=np.zeros_like(a), where=others > 0))
    expected = np.outer(a, a) * (1 - np.eye(len(pairs)))
    lifts: Array = np.divide(together, expected, out=np.full(pairs.shape, np.nan), where=expected > 0)
    return lifts


def interval(values: Array) -> tuple[float, float, float]:
    """Mean and ends of its 95 % interval by Student's t of independent values; of fewer than two not finite ones."""
    mean, R = float(np.mean(values)), len(values)
    if R < 2:
        return mean, -math.inf, math.inf
    half = student(R - 1) * float(np.std(values, ddof=1)) / math.sqrt(R)
    return mean, mean - half, mean + half


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with so many degrees of freedom, to 0.004.

    Source: closed for 1 and 2; else the expansion around the normal quantile (Abramowitz and Stegun, 26.7.5).
    """
    if freedom <= 2:
        return math.tan(0.475 * math.pi) if freedom == 1 else 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z, v = 1.959963985, freedom
    return (
        z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )  # fmt: skip
