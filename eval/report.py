"""The report of a score: every fact of the protocol, checked against a schema and written whole or not at all."""

import errno
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import PIL

from eval import strict_json
from eval.measure import Measured
from eval.metrics.inception_score import SPLIT_SIZE
from eval.processes import ALONE, Processes

if TYPE_CHECKING:
    from eval.networks.extractors import Extractor

Report = dict[str, Any]
SMALL_SAMPLE = 10_000  # images; below this the distance's upward bias is large
ADM_BATCH = 10_000  # images of ADM's reference batches, beside the statistics of the whole training set
NUMBER, NONE = (int, float), type(None)

# What every report holds, beside the metric's own key, which repeats `value`.
SCHEMA: dict[str, Any] = {
    "metric": str, "value": NUMBER, "scores": dict,
    "n_gen": (int, NONE), "n_ref": (int, NONE),
    "extractor": {"name": str, "version": str, "sha256": str, "dim": int, "layer": str},
    "resize": str, "crop": str,
    "images": {"path": str, "kind": str, "sha256": str},
    "ref": {"path": str, "kind": str, "sha256": str},
    "generation": (dict, NONE),
    "world_size": int, "batch_size": int,
    "dtype": {"features": str, "statistics": str}, "device": str, "tf32": bool,
    "repeats": int, "aggregate": str,
    "versions": {"python": str, "numpy": str, "pillow": str, "torch": str, "ditmoe": (str, NONE)},
    "git": (str, NONE), "seconds": NUMBER,
    "bad_images": list, "parameters": dict, "warnings": list,
}  # fmt: skip


def assemble(
    gen: Measured, ref: Measured, net: "Extractor", metric: str, scores: dict[str, Any], parameters: dict[str, Any]
) -> Report:
    """The facts that two measured sides, the extractor and the scores come to; the caller adds how it ran."""
    made = {"name": net.name, "version": net.version, "sha256": net.sha256, "dim": net.num_features, "layer": net.layer}
    return {
        "metric": metric, "value": scores[metric], metric: scores[metric], "scores": scores,
        "n_gen": gen.count, "n_ref": ref.count,
        "extractor": made, "resize": net.resize, "crop": "none",
        "images": gen.facts, "ref": ref.facts, "generation": gen.facts.get("generation"),
        "dtype": {"features": "float32", "statistics": "float64"},
        "device": net.center.device.type,
        "tf32": False,  # `Extractor.features` sees to it
        "repeats": 1, "aggregate": "single",
        "versions": versions(), "git": commit(),
        "bad_images": gen.bad + ref.bad,
        "parameters": parameters,
    }  # fmt: skip


def check_report(report: Report) -> Report:
    """The report. ValueError naming the first field that is missing, not finite, or of a type not in SCHEMA."""
    strict_json.check(report, SCHEMA, "the report")
    metric, value = report["metric"], report["value"]
    for where, found in ((metric, report.get(metric)), (f"scores.{metric}", report["scores"].get(metric))):
        if found != value:
            raise ValueError(f"the report's {where} is {found!r} and its value {value!r}")
    for name, score in report["scores"].items():
        strict_json.check(score, NUMBER, "the report", f"scores.{name}")
    return report


def write_report(path: Path, report: Report) -> None:
    """Write the report as JSON under its name only once it is complete and on disk."""
    with whole_or_absent(path) as file:
        file.write((json.dumps(report, indent=2, allow_nan=False) + "\n").encode())


def check_out(path: Path | None, suffix: str, processes: Processes = ALONE, option: str = "--out") -> None:
    """Refuse now what would fail after the work is done: ValueError, by its option, for a file that cannot be written.

    The first process looks and will write: its disk alone may have the folder.
    """
    if path is None or processes.rank:
        return
    if path.suffix.lower() != suffix:
        raise ValueError(f"{option} {path} must end in {suffix}")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        partial = _partial(path)
        partial.touch()
        partial.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"{option} {path} cannot be written ({reason}); its folder must exist and be writable"
        ) from error


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def whole_or_absent(path: Path) -> Iterator[IO[bytes]]:
    """A file that stands at `path` once the block is done and its bytes are on disk, and not at all if it fails."""
    partial = _partial(path)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def warnings_of(gen: Measured, ref: Measured, net: "Extractor") -> list[str]:
    """What a reader of the number should know."""
    warnings: list[str] = []
    for name, side in (("n_gen", gen), ("n_ref", ref)):
        if side.count is None:
            warnings.append(f"{name} unknown: a statistics file names no count and no extractor")
        elif side.count < SMALL_SAMPLE:
            biased = "the distance is biased upwards, compare it only with others at the same counts"
            warnings.append(f"{name} = {side.count} is below {SMALL_SAMPLE}: {biased}")
        if side.count is not None and side.count <= net.num_features:
            rank = f"{net.num_features} features: the covariance is rank-deficient"
            warnings.append(f"{name} = {side.count} is not above {rank}")
        if side.bad:
            many, were = (f"{len(side.bad)} images", "were") if len(side.bad) > 1 else ("1 image", "was")
            warnings.append(f"{many} of {side.facts['path']} could not be read and {were} left out")
        if side.facts.get("largest", 255) <= 1:
            path = side.facts["path"]
            warnings.append(f"no value of {path} is above 1 of 255: were they floats in [0, 1]? multiply by 255 first")
    if gen.shape and ref.shape and gen.shape[:2] != ref.shape[:2]:
        warnings.append(f"sizes differ: images {gen.shape[:2]}, ref {ref.shape[:2]} (H, W)")
    source = (ref.facts.get("made_from") or {}).get("images") or ref.facts
    if gen.facts["sha256"] == source["sha256"]:
        warnings.append("images and ref are the same data")
    if ref.count == ADM_BATCH:
        warnings.append("ref is 10,000 images; published FIDs use the statistics of a whole training set")
    made = (gen.facts.get("generation") or {}).get("num")
    if made not in (None, gen.count):
        warnings.append(f"images were made as a set of {made}, and {gen.count} were scored")
    if gen.inception is not None and gen.count is not None and gen.count % SPLIT_SIZE:
        warnings.append(f"the Inception Score has in its last split {gen.count % SPLIT_SIZE}, not {SPLIT_SIZE}")
    origin = source["path"]
    if origin.endswith((":test", ":val")) or Path(origin).stem.lower() in ("test", "val", "validation"):
        warnings.append(f"ref comes from {origin}: published scores compare with the training split")
    return warnings


def versions() -> dict[str, str | None]:
    """Of what can change a number."""
    import torch

    own = next((found.version for found in distributions(name="ditmoe")), None)
    numeric = {"numpy": np.__version__, "pillow": PIL.__version__, "torch": str(torch.__version__)}
    return {"python": platform.python_version(), **numeric, "ditmoe": own}


def commit() -> str | None:
    """The git commit of this code, with a + where files have changed; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    ours = [*git, "ls-files", "--error-unmatch", "report.py"]  # not a checkout that merely surrounds us
    describe = [*git, "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        tracked, done = (
            subprocess.run(words, capture_output=True, text=True, timeout=10) for words in (ours, describe)
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip() or None) if tracked.returncode == 0 else None
