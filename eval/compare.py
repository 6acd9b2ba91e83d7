"""Scores side by side: `python -m eval.compare A.json B.json ...`. Numbers of different protocols are not ranked."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from eval import strict_json
from eval.report import Report, check_report

# Two numbers may be ranked when these agree; what made the images (steps, guidance, model) is what is compared.
PROTOCOL = (
    "metric", "n_gen", "n_ref", "extractor.name", "extractor.version", "extractor.sha256", "resize", "crop",
    "ref.sha256", "dtype.features", "tf32", "repeats", "aggregate",
    "generation.label_sampling", "generation.labels_sha256", "generation.quantize",
    "parameters.rows", "parameters.rows_seed", "parameters.rows_sha256.ref", "parameters.kid", "parameters.prdc",
    "parameters.inception_score", "parameters.classify",
)  # fmt: skip
MAY_BE_UNKNOWN = ("generation.", "parameters.")  # of images of unknown origin, of metrics that were not asked for
LOWER_IS_BETTER = ("fid", "fd_", "sfid", "kid")


def field(report: Report, name: str) -> Any:
    """A field by its dotted name; None where a part of the path is missing.

    `ref.sha256` is that of the images, also where only their statistics were at hand and say it.
    """
    if name == "ref.sha256" and (images := field(report, "ref.made_from.images.sha256")):
        return images
    found: Any = report
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def differences(reports: Sequence[Report]) -> dict[str, list[Any]]:
    """The protocol fields in which the reports differ, with the value of each.

    What is unknown of some of them (how images were made that another program wrote) does not count as different.
    """
    differing = {}
    for name in PROTOCOL:
        found = [field(report, name) for report in reports]
        known = [value for value in found if value is not None] if name.startswith(MAY_BE_UNKNOWN) else found
        if any(value != known[0] for value in known):
            differing[name] = found
    return differing


def unknowns(reports: Sequence[Report]) -> list[str]:
    """Protocol fields of the images that some reports have and others do not."""
    mixed = (name for name in PROTOCOL if len({field(report, name) is None for report in reports}) == 2)
    return [name for name in mixed if name.startswith("generation.")]


def read_report(path: Path) -> Report:
    """Raises ValueError for a file that is missing, no JSON, or no complete report."""
    report = strict_json.read(path)
    if not isinstance(report, dict):
        raise ValueError(f"{path}: holds no report")
    try:
        return check_report(report)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; write it again with python -m eval.fid") from error


def table(paths: Sequence[Path], reports: Sequence[Report]) -> str:
    """Markdown: a row a report, a column a score that all have, best first where the protocols agree."""
    rows = list(zip(paths, reports, strict=True))
    names = [name for name in reports[0]["scores"] if all(name in report["scores"] for report in reports)]
    if not differences(reports) and reports[0]["metric"].startswith(LOWER_IS_BETTER):
        rows.sort(key=lambda row: row[1]["value"])
    heads = names or ["metric", "value"]
    lines = ["| report | images | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for path, report in rows:
        values = [f"{report['scores'][name]:.6g}" for name in names] or [report["metric"], f"{report['value']:.6g}"]
        lines.append(f"| {cell(path)} | {cell(report['images']['path'])} | {' | '.join(values)} |")
    return "\n".join(lines)


def cell(text: object) -> str:
    """A text as one cell of a Markdown table: on one line, its bars escaped."""
    return " ".join(str(text).split()).replace("|", "\\|")


@dataclass(frozen=True)
class Arguments:
    """Compare reports of python -m eval.fid. Exits with 1 where their protocols differ: then nothing is ranked."""

    reports: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="REPORT.json")]
    """Two or more report files."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 ranked, 1 the protocols differ, 2 the user's mistake."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m eval.compare")
    try:
        if len(arguments.reports) < 2:
            raise ValueError(f"give at least 2 reports, got {len(arguments.reports)}")
        reports = [read_report(path) for path in arguments.reports]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(arguments.reports, reports))
    if unknown := unknowns(reports):
        print(f"\nUnknown of some images: {', '.join(unknown)}.")
    found = differences(reports)
    if not found:
        return 0
    print("\nNot ranked: these numbers come from different protocols.")
    for name, values in found.items():
        print(f"  {name}: " + ", ".join(_short(value) for value in values))
    return 1


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else text[:16] + "..."


if __name__ == "__main__":
    sys.exit(main())
