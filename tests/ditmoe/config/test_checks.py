"""Numbers and their nouns; words that were meant."""

import pytest

from ditmoe.config.checks import near, plural


@pytest.mark.parametrize(("number", "words"), [(0, "0 classes"), (1, "1 class"), (2, "2 classes")])
def test_a_noun_goes_by_its_number(number: int, words: str) -> None:
    assert plural(number, "class") == words
    assert plural(number, "image") == words.replace("classes", "images").replace("class", "image")


def test_a_word_of_the_same_letters_was_meant_before_one_that_looks_more_alike() -> None:
    assert near("ddmi", ["ddpm", "ddim", "pndm"]) == "did you mean 'ddim'? "
    assert near("stepz", ["seed", "steps"]) == "did you mean 'steps'? "
    assert near("SNEAKR", ["Coat", "Sneaker"]) == "did you mean 'Sneaker'? "
    assert near("xyz", ["seed", "steps"]) == ""
