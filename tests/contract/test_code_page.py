"""docs/code.md names files and functions that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "code.md").read_text()
NAMED = re.findall(r"`((?:\w+/)*\w+\.py)` `(\w+)`", PAGE)


def test_the_page_is_short_and_names_what_it_walks_through() -> None:
    assert len(PAGE.splitlines()) <= 80
    assert len(NAMED) >= 20


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_every_function_that_it_names_is_there(file: str, name: str) -> None:
    assert re.search(rf"^ *(def|class) {name}\b", (ROOT / file).read_text(), re.M), f"{file} has no {name}"


def test_every_wing_is_on_it() -> None:
    wings = [p.parent.name for p in (ROOT / "ditmoe").glob("*/__init__.py")]
    assert all(f"{wing}/" in PAGE for wing in wings)
