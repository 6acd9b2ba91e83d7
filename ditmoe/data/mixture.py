"""Several sets of images as one, and which of them a training sample is of.

Shapes: n images asked for, C channels, H W size; pixels are uint8 (n, H, W, C).
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .sets import BadImage, ImageSet


class Mixture(ImageSet):
    """Sets of pixels as one: the images and the classes of a set come after those of the sets before it.

    Sets may have images of their own sizes, which training sees; whoever else asks gets all in one.

    Names that classes of two sets share become "set/class". Where some sets have labels, one without is a class of its
    own, which has the set's name.

    Args:
        sets: The sets; the number of one, from 0, is its domain.
        names: Theirs; equal ones are told apart by their numbers.
        weights: Whole numbers above 0: training samples are of a set in proportion to its weight.
        resized: Pixels (n, h, w, C) to (n, H, W, C), where sets have other sizes than the model.
    """

    def __init__(
        self, sets: Sequence[ImageSet], names: Sequence[str], weights: Sequence[int],
        resized: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None,
    ) -> None:  # fmt: skip
        self._resized = resized
        self.sets, self.weights = tuple(sets), tuple(weight // math.gcd(*weights) for weight in weights)
        self._ends = np.cumsum(self.sizes)
        labelled = any(one.id2label for one in sets)
        names = [f"{name} {number}" if names.count(name) > 1 else name for number, name in enumerate(names)]
        self.names = tuple(names)
        classes = [one.id2label or ({0: name} if labelled else {}) for one, name in zip(sets, names, strict=True)]
        self.id2label = _side_by_side(names, [[known[c] for c in sorted(known)] for known in classes])
        starts = np.cumsum([0, *map(len, classes)])
        self.labels = np.concatenate([one.labels + start for one, start in zip(sets, starts, strict=False)])
        self.in_memory = all(one.in_memory for one in sets)
        shares = [weight / sum(weights) for weight in weights]
        parts = [f"{share:.3g} of samples: {one.source}" for one, share in zip(sets, shares, strict=True)]
        self.source = f"a mixture of {len(sets)} sets ({'; '.join(parts)})"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Images of each set."""
        return tuple(map(len, self.sets))

    def images(self, rows: Sequence[int]) -> NDArray[np.uint8]:
        """(n, H, W, C) uint8. Raises BadImage at one that cannot be used."""
        parts = []
        for one, start, own in self._own(rows):
            try:
                pixels = one.images(own)
            except BadImage as error:
                raise BadImage(error.row + start, str(error)) from error
            parts.append(pixels if self._resized is None else self._resized(pixels))
        back = np.argsort(np.argsort(self._domains(rows), kind="stable"))
        return np.concatenate(parts)[back]

    def taught(self, rows: Sequence[int], mirrored: Sequence[bool] | None = None) -> Tensor:
        """(n, C, h, w) float32, of one set in its own size. Raises as `images`."""
        if self._resized is None:
            return self.tensors(rows, mirrored)
        (one, start, own), *others = self._own(rows)
        assert not others, "a batch has images of one size"
        try:
            return one.tensors(own, mirrored)
        except BadImage as error:
            raise BadImage(error.row + start, str(error)) from error

    def contents(self) -> bytes:
        """The fingerprints of the sets, with their weights."""
        return json.dumps([[one.fingerprint(), w] for one, w in zip(self.sets, self.weights, strict=True)]).encode()

    def in_proportion(self, order: Sequence[int], most: int) -> list[int]:
        """The first rows of an order, at most so many, as many of each set as its share and the smallest set allow.

        One of each, though they be more, where that would be none of any.
        """
        total = sum(self.weights)
        whole = min([most, *(size * total // weight for size, weight in zip(self.sizes, self.weights, strict=True))])
        left = [whole * weight // total for weight in self.weights]
        left = left if any(left) else [1] * len(left)
        chosen = []
        for row, domain in zip(order, self._domains(order), strict=True):
            if left[domain]:
                left[domain] -= 1
                chosen.append(int(row))
        return chosen

    def readable(self, rows: Sequence[int]) -> list[int]:
        """Those of the rows whose images can be used."""
        good = {row + start for one, start, own in self._own(rows) for row in one.readable(own)}
        return [row for row in rows if row in good]

    def name(self, row: int) -> str:
        """The file of an image, or its number in its set."""
        one, _, (own,) = next(self._own([row]))
        return one.name(own)

    def _own(self, rows: Sequence[int]) -> Iterator[tuple[ImageSet, int, list[int]]]:
        """The sets that some of the rows are of, in order: one, its first row, and those of its own, from there on."""
        domains = self._domains(rows)
        for number in np.unique(domains).tolist():
            start = sum(self.sizes[:number])
            own = [int(row) - start for row, domain in zip(rows, domains, strict=True) if domain == number]
            yield self.sets[number], start, own

    def _domains(self, rows: Sequence[int]) -> NDArray[np.int64]:
        """(n,) the sets that rows are of."""
        return np.searchsorted(self._ends, np.asarray(rows, np.int64), side="right").astype(np.int64)


def _side_by_side(names: Sequence[str], classes: Sequence[Sequence[str]]) -> dict[int, str]:
    """The names of all classes, set after set."""
    shared = Counter(word for known in classes for word in set(known))
    words = [
        f"{name}/{word}" if shared[word] > 1 else word
        for name, known in zip(names, classes, strict=True)
        for word in known
    ]
    return dict(enumerate(words))


def turn(number: int, weights: Sequence[int]) -> tuple[int, int]:
    """Which of several sets sample `number` is of, and how many of the samples before it were.

    Set 0 has ceil(n p) of the first n samples, p its share; the others share what is left by the same rule. So each has
    its share of any stretch of samples to within a few of them, exactly; equal weights take turns.
    """
    left = sum(weights)
    for domain, weight in enumerate(weights):
        before, after = (-(-n * weight // left) for n in (number, number + 1))
        if after > before:
            return domain, before
        number, left = number - before, left - weight
    raise AssertionError("the last set takes all that is left")
