"""JSON that somebody else may have written: every number finite, every fault a ValueError."""

import json
import math
from pathlib import Path
from typing import Any


def parse(text: str) -> Any:
    """What the text says. Raises ValueError for anything but JSON of finite numbers, and for one nested too deep."""
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON of finite numbers: {error}") from error


def read(path: Path) -> Any:
    """What a file says. Raises ValueError that names it where it cannot be read."""
    try:
        return parse(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{path}: there is no such file") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path}: is a folder, not a JSON file") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def check(found: Any, schema: Any, what: str, name: str = "") -> None:
    """Raises ValueError naming the first field of `what` that is missing, not finite, or of another type.

    `schema` is what `isinstance` takes, or, for an object, a dict of the fields that it has at least.
    """
    if isinstance(schema, dict):
        if not isinstance(found, dict):
            raise ValueError(f"{what}'s {name} is {found!r}; expected an object")
        for key, part in schema.items():
            where = f"{name}.{key}" if name else key
            if key not in found:
                raise ValueError(f"{what} has no field {where}")
            check(found[key], part, what, where)
    elif not isinstance(found, schema) or (isinstance(found, bool) and schema is not bool):
        raise ValueError(f"{what}'s {name} is {found!r}, a {type(found).__name__}")
    elif isinstance(found, float) and not math.isfinite(found):
        raise ValueError(f"{what}'s {name} is {found!r}; check the statistics of both sides")
