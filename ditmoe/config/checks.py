"""Checks that the sections of a configuration share, each a sentence that names the field and the value; its nouns."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

MOST = 1e30  # of a number; one step below what float32 cannot hold


def plural(number: int, noun: str) -> str:
    """A number with its noun: 1 class, 3 classes."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def near(word: str, words: Iterable[str]) -> str:
    """The part of a refusal that asks whether one of `words` was meant, first one of the same letters; or nothing."""
    folded = {known.casefold(): known for known in words}
    found = [folded[key] for key in get_close_matches(word.casefold(), folded, cutoff=0.5)]
    found.sort(key=lambda known: sorted(known.casefold()) != sorted(word.casefold()))
    return f"did you mean {found[0]!r}? " if found else ""


def require(condition: bool, message: str) -> None:
    """ValueError with this sentence unless the condition holds."""
    if not condition:
        raise ValueError(message)


def positive(section: object, *names: str) -> None:
    """ValueError where one of these values of a section is not above 0, or not finite."""
    for name in names:
        value = getattr(section, name)
        require(0 < value <= MOST, f"{name} is {value}; it must be above 0, and finite")


def at_least(section: object, least: int, *names: str) -> None:
    """ValueError where one of these values of a section is below the least; None is no value."""
    for name in names:
        value = getattr(section, name)
        require(value is None or value >= least, f"{name} is {value}; it must be {least} or more")
        require(value is None or value <= MOST, f"{name} is {value}; it must be finite")


def writable(name: str, path: Path) -> None:
    """ValueError, before any work is done, where no file or folder can be written at a path."""
    try:
        place = next(p for p in (path, *path.absolute().parents) if p.is_dir() or (p != path and p.exists()))
    except PermissionError as error:
        what = f"you may not look into {Path(error.filename).parent}"
        raise ValueError(f"{name} {path} cannot be written: {what}; give another place") from error
    except OSError as error:  # its name is too long
        raise ValueError(f"{name} {path} cannot be written: {error.strerror}; give another place") from error
    require(place.is_dir(), f"{name} {path} cannot be written: {place} is a file")
    may = os.access(place, os.W_OK)
    require(may, f"{name} {path} cannot be written: you may not write in {place}; give another place")
