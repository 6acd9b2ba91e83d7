"""Score against network calls and guidance: `python -m eval.sweep MODEL --ref REF --sampler ... --steps ... --cfg ...`.

Every point is one `ditmoe sample MODEL ... --score REF`, whose report is kept; a sweep that was stopped goes on.
"""

import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import tyro

from eval.compare import cell, differences, field, read_report
from eval.fid import ExtractorName
from eval.processes import together
from eval.progress import progress
from eval.report import Report, check_out, whole_or_absent
from eval.sources.open import open_source

INDEX = "model_index.json"


@dataclass(frozen=True)
class Arguments:
    """Sample MODEL in every combination, score it, and write table.md, sweep.png and a report a point."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run folder or a pipeline folder."""
    ref: str
    """What to compare with, as in eval.fid: folder, .npz, fashion:train, ..."""
    out: Path
    """Folder for the table, the plot and the reports."""
    sampler: tuple[str, ...] = ("ddim",)
    """Samplers, as in ditmoe sample."""
    steps: tuple[int, ...] = (10, 20, 50)
    """Numbers of steps."""
    cfg: tuple[float, ...] = (1.0,)
    """Guidance scales; 1 is none."""
    num: int = 5000
    """Images a point."""
    seed: int = 0
    """Of the images."""
    batch_size: int = 250
    """Images drawn at once."""
    extractor: ExtractorName = "random-conv-v1"
    """Feature network."""
    weights: Path | None = None
    """File of the extractor's weights, where it reads one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the user's mistake (a sentence on stderr)."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m eval.sweep")
    return together(lambda _: run(arguments))


def run(arguments: Arguments) -> None:
    """Make the points that are not there, the table and the plot. Raises ValueError for the user's mistakes."""
    points = list(itertools.product(arguments.sampler, arguments.steps, arguments.cfg))
    if not points or min(arguments.steps) < 1 or arguments.num < 2 or not all(map(math.isfinite, arguments.cfg)):
        raise ValueError("give at least one sampler, steps and finite cfg; steps of 1 or more, num of 2 or more")
    _prepare(arguments)
    reports = []
    with progress(len(points), "sweep", "points") as tell:
        for point in points:
            reports.append(_point(arguments, *point))
            tell(1)
    for warning in dict.fromkeys(warning for report in reports for warning in report["warnings"]):
        print(f"warning: {warning}", file=sys.stderr)
    if found := differences(reports):
        raise ValueError(f"{arguments.out} holds other protocols ({', '.join(found)}); give another folder")
    text = table(reports)
    with whole_or_absent(arguments.out / "table.md") as file:
        file.write(text.encode())
    with whole_or_absent(arguments.out / "sweep.png") as file:
        plot(reports, file)
    print(text)


def _prepare(arguments: Arguments) -> None:
    """Make the folder, which is all that is written before the first point; refuse what can be told until then."""
    folder = arguments.model if (arguments.model / INDEX).is_file() else arguments.model / "model"
    if not (folder / INDEX).is_file():
        raise ValueError(f"{arguments.model} holds no model: neither {INDEX} nor model/{INDEX} is there")
    ref = open_source(arguments.ref).path  # as reports call it: of a table with its split
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        empty = all(entry.name.startswith(".") for entry in arguments.out.iterdir())
    except OSError as error:
        raise ValueError(f"--out {arguments.out} cannot be a folder ({error.strerror}); give another") from error
    check_out(arguments.out / "table.md", ".md")
    made = sorted(arguments.out.glob("*-steps*-cfg*.json"))
    if made:
        _same_sweep(arguments, ref, folder, made)
    elif not empty:
        raise ValueError(f"--out {arguments.out} is not empty; give another folder")


def _same_sweep(arguments: Arguments, ref: str, folder: Path, made: Sequence[Path]) -> None:
    """Refuse points of another sweep. The model is hashed as `ditmoe sample` does it, which has taken it before."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix in (".json", ".safetensors"):
            with file.open("rb") as handle:
                content = hashlib.file_digest(handle, "sha256").digest()
            digest.update(file.relative_to(folder).as_posix().encode() + content)
    common = {  # what all points of a sweep have in common, and where a report says it
        "ref": ("ref.path", ref), "num": ("n_gen", arguments.num),
        "seed": ("generation.seed", arguments.seed), "extractor": ("extractor.name", arguments.extractor),
        "model": ("generation.checkpoint.sha256", digest.hexdigest()),
    }  # fmt: skip
    for report in map(read_report, made):
        other = [name for name, (place, value) in common.items() if field(report, place) != value]
        if other:
            raise ValueError(f"--out {arguments.out} holds a sweep with other {', '.join(other)}; give another folder")


def _point(arguments: Arguments, sampler: str, steps: int, cfg: float) -> Report:
    """The report of one point, made unless it is there."""
    path = arguments.out / f"{sampler}-steps{steps}-cfg{cfg!r}.json"
    if path.exists():
        report = read_report(path)
        found = [field(report, f"generation.sampler.{name}") for name in ("name", "steps", "cfg")]
        if found != [sampler, steps, cfg]:
            raise ValueError(f"{path} is of sampler, steps and cfg {found}; remove it")
        return report
    command = [sys.executable, "-m", "ditmoe", "sample", str(arguments.model)]
    command += ["--score", arguments.ref, "--report", str(path)]
    given = {name: getattr(arguments, name) for name in ("num", "seed", "batch_size", "extractor", "weights")}
    for name, value in {"sampler": sampler, "steps": steps, "cfg": cfg, **given}.items():
        command += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2:
        raise ValueError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return read_report(path)


def _row(report: Report) -> dict[str, Any]:
    found = {name: field(report, f"generation.sampler.{name}") for name in ("name", "steps", "nfe", "cfg")}
    return {**found, "value": report["value"]}


def table(reports: Sequence[Report]) -> str:
    """Markdown: a row a point, by sampler, guidance and network calls."""
    rows = sorted(map(_row, reports), key=lambda row: (row["name"], row["cfg"] or 1, row["nfe"]))
    first = reports[0]
    lines = [f"{first['n_gen']} images a point against {cell(first['ref']['path'])}, lower is better.", ""]
    lines += [f"| sampler | steps | network calls | cfg | {first['metric']} |", "|---|---|---|---|---|"]
    lines += [f"| {r['name']} | {r['steps']} | {r['nfe']} | {r['cfg']} | {r['value']:.5g} |" for r in rows]
    return "\n".join(lines) + "\n"


def load_matplotlib() -> None:
    """Import matplotlib, whatever MPLBACKEND says: that of a notebook need not be installed, and ours draw without."""
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        os.environ.update({} if backend is None else {"MPLBACKEND": backend})
    if backend:
        with suppress(ValueError):  # what its import would do
            matplotlib.rcParams["backend"] = backend


def plot(reports: Sequence[Report], path: Path | IO[bytes]) -> None:
    """Two panels: score against network calls, a line a (sampler, cfg); against cfg, a line a (sampler, steps)."""
    load_matplotlib()
    from matplotlib.figure import Figure

    rows = [_row(report) for report in reports]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, x, other in zip(figure.subplots(1, 2), ("nfe", "cfg"), ("cfg", "steps"), strict=True):
        for key in sorted({(row["name"], row[other]) for row in rows}, key=json.dumps):
            line = sorted((row[x], row["value"]) for row in rows if (row["name"], row[other]) == key)
            axes.plot(*zip(*line, strict=True), marker="o", markersize=4, label=f"{key[0]}, {other} {key[1]}")
        axes.set_xlabel({"nfe": "network calls an image", "cfg": "guidance scale"}[x])
        axes.set_ylabel(reports[0]["metric"])
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    if len({row["nfe"] for row in rows}) > 1:
        figure.axes[0].set_xscale("log")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
