"""Images in memory: they depend on (seed, number, label) alone."""

import numpy as np
import pytest

from ditmoe.data import pixels
from ditmoe.generate.draw import balanced_labels, draw
from tests.ditmoe.pipeline.test_pipeline import make


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_batch_size_changes_nothing(sampler: str) -> None:
    pipe = make()
    labels = balanced_labels(pipe, 50)
    whole = draw(pipe, labels, 50, sampler=sampler, batch_size=50)
    for size in (1, 7):
        other = draw(pipe, labels, 50, sampler=sampler, batch_size=size)
        assert (whole.astype(int) - other).__abs__().max() <= 1  # one grey level: float32 sums in another order
        assert (whole == other).mean() > 0.999
    assert len({image.tobytes() for image in whole}) == 50


def test_image_i_depends_on_its_number_seed_and_label() -> None:
    pipe = make()
    base = draw(pipe, [0, 1, 2], 3)
    assert np.array_equal(draw(pipe, [0, 1, 3], 3)[:2], base[:2])
    assert not np.array_equal(draw(pipe, [0, 1, 3], 3)[2], base[2])
    assert not np.array_equal(draw(pipe, [0, 1, 2], 3, seed=1)[0], base[0])
    later = pipe(class_labels=[2], indices=[2], output_type="pt").images
    assert np.abs(pixels.to_pixels(later)[0].astype(int) - base[2]).max() <= 1
