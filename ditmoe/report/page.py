"""A run's page: one HTML text from the facts of `report.json` and the pictures, with nothing to fetch.

Its words stand in page.html, beside the values that they are about; here is how values are written.
"""

import base64
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..run_folder.place import EXPERTS, FILM, LOSS, SAMPLES

CAPTIONS = {  # of the pictures, by their names in the run folder
    SAMPLES: ("Samples", "A row is a class; these are the first samples of the seed, none was picked. Every row should"
              " show its class, and its images should differ."),
    FILM: ("Denoising", "Left to right, from noise (t near 1000) to image; below each noisy state is the clean image"
           " that the model predicts from it. Where that stops changing, the rest of the steps only refine."),
    LOSS: ("Training", "Faint: logged values; strong: their moving average. The load is that of the worst layer and"
           " near 1 when experts share the work evenly."),
    EXPERTS: ("Experts", "Which expert serves what, on noised training images: white is the even load, red more, blue"
              " less. A column of one colour is an expert in general favour; a column that changes colour is one that"
              " specialises."),
}  # fmt: skip


def render(
    report: Mapping[str, Any], pictures: Mapping[str, bytes], config: Mapping[str, Any],
    live: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """The page of a run as one HTML text.

    Args:
        report: what `report.write` returns.
        pictures: PNG files by the keys of `CAPTIONS`; one that is missing is left out.
        config: the run's config.json, shown folded.
        live: what can be looked at closely: the `film` (`pictures.film_strip`), the `loads` (`maps.expert_loads`).
    """
    figures = {name: base64.b64encode(pictures[name]).decode() for name in CAPTIONS if name in pictures}
    room = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    room.filters |= {
        "share": "{:.1%}".format, "whole": "{:,}".format, "number": _number, "millions": _millions,
        "duration": duration, "text": _text, "quote": shlex.quote, "repr": repr,
    }  # fmt: skip
    given = {"report": report, "figures": figures, "config": json.dumps(config, indent=2)}
    return room.get_template("page.html").render(
        **given, captions=CAPTIONS, live={"film": None, "loads": None, **(live or {})}
    )


def _text(value: Any, name: str = "") -> str:
    """A JSON value on one line; long hashes are cut."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item, key)}" for key, item in value.items() if item not in (None, ""))
    if isinstance(value, list | tuple):
        return ("×" if name == "shape" else "; ").join(_text(item) for item in value)
    return f"{str(value)[:12]}…" if name == "sha256" else str(value)


def _number(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count < 1e8 else f"{count / 1e6:,.0f} M"


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s, or 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
