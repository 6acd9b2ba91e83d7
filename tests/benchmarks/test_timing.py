"""The interval of a median holds it as often as it says."""

import random

from benchmarks.timing import interval


def test_an_interval_holds_the_median_19_times_in_20() -> None:
    draw = random.Random(0)
    for n in (7, 30):
        ends = [interval([draw.gauss(3, 1) for _ in range(n)]) for _ in range(2000)]
        assert 0.94 < sum(low <= 3 <= high for low, high in ends) / len(ends) < 0.995
    assert interval([2.0, 1.0, 3.0]) == (1.0, 3.0)
