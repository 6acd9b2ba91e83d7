"""Numbers and their nouns."""

import pytest

from ditmoe.config.checks import plural


@pytest.mark.parametrize(("number", "words"), [(0, "0 classes"), (1, "1 class"), (2, "2 classes")])
def test_a_noun_goes_by_its_number(number: int, words: str) -> None:
    assert plural(number, "class") == words
    assert plural(number, "image") == words.replace("classes", "images").replace("class", "image")
