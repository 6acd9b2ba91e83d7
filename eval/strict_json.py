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
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value
