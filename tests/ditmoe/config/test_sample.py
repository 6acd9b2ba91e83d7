"""Sets that `sample.py` draws to be scored: what it refuses first."""

import pytest

from ditmoe.config.sample import SampleArgs


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num": 1, "score": "digits:test"}, "num asks for 1 image; a score needs 2 or more"),
        ({"classes": (3,), "score": "digits:test"}, "classes asks for 1 image; a score needs 2 or more"),
        ({"score": ""}, "score is empty"),
    ],
)
def test_a_set_that_cannot_be_scored_is_refused_before_it_is_drawn(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SampleArgs(tmp_path, **options)
    SampleArgs(tmp_path, **{**options, "score": None})
