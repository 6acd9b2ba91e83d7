"""Fréchet distance between two sets of images, and its companions: `score(...)`, `python -m eval.fid` (see --help)."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from eval import statistics
from eval.processes import Processes, together
from eval.report import check_out, write_report
from eval.score import check_sources, metric_name, score
from eval.sources.images import Images
from eval.sources.open import open_source

__all__ = ["main", "metric_name", "score", "score_and_show", "scorer"]

Extra = Literal["sfid", "is", "kid", "prdc"]
ExtractorName = Literal["random-conv-v1", "efficientnet-lite0", "inception-2015", "dinov2-vitl14"]


@dataclass(frozen=True)
class Arguments:
    """Fréchet distance of IMAGES to a reference; lower is closer.

    IMAGES and REF are a folder of images, a .zip, an .npz (arr_0 uint8 NHWC), a statistics .npz
    (mu, sigma), a table of Hugging Face (a .parquet, a folder of them or what save_to_disk made;
    PATH or PATH:SPLIT), or digits:train, digits:test, fashion:train, fashion:test.
    Prints the report as JSON, or writes it to --out. Under torchrun or accelerate launch the
    processes share the work.
    """

    images: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """What to score."""
    ref: Annotated[str, tyro.conf.arg(metavar="REF")]
    """What to compare with."""
    extractor: ExtractorName = "random-conv-v1"
    """Feature network; only scores of the same one can be compared."""
    weights: Path | None = None
    """File of the extractor's weights, where it reads one."""
    metrics: tuple[Extra, ...] = ()
    """More than the Fréchet distance; sfid and is (Inception Score) belong to inception-2015."""
    num: int | None = None
    """Score only the first NUM of IMAGES, in order."""
    keep: int = 10_000
    """Images a side that kid and prdc look at; ADM's precision and recall have 10,000 real and 50,000 generated."""
    seed: int = 0
    """Chooses those images."""
    batch_size: int = 64
    """Images per forward pass; changes speed and memory, not the value."""
    skip_bad: int = 0
    """Unreadable images of a folder, zip or table to leave out, and name in the report, before giving up."""
    cache: bool = True
    """Keep the statistics of the reference in ~/.cache/ditmoe/stats ($XDG_CACHE_HOME)."""
    out: Path | None = None
    """JSON file for the report."""


def main(argv: Sequence[str] | None = None, prog: str = "python -m eval.fid") -> int:
    """Exit code: 0 done, 2 the user's mistake (a sentence on stderr). A bug keeps its traceback."""
    options = vars(tyro.cli(Arguments, args=argv, prog=prog))
    return together(lambda processes: score_and_show(processes=processes, **options))


def score_and_show(
    images: str | Path | Images, ref: str, out: Path | None, processes: Processes, *, cache: bool = True, **options: Any
) -> None:
    """`score` with the user's cache; warnings on stderr; the report on stdout or, with a line that says so, in a file.

    Raises ValueError as `score` does, and for a file that cannot be written.
    """
    processes.agree(lambda: check_out(out, ".json", processes))
    folder = statistics.default_folder() if cache else None
    report = score(images, ref, **options, cache=folder, progress=True, processes=processes)
    if processes.rank:
        return
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if out is None:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        write_report(out, report)
        print(f"{report['metric']} {report['value']:.6g} -> {out}")


def scorer(
    ref: str, out: Path | None, processes: Processes, **options: Any
) -> Callable[[str | Path | dict[str, Any]], None]:
    """`score_and_show` of images that are not there yet: a path, or the fields of `Images`.

    Raises ValueError now for what would fail once they are: the reference, the extractor, its weights, the file.
    """

    def prepare() -> None:
        check_out(out, ".json", processes, "--report")  # which is what sample.py calls it
        check_sources((None, open_source(ref)), options["metrics"], options["extractor"])

        from eval.networks.extractors import load_extractor

        load_extractor(options["extractor"], options["weights"])

    processes.agree(prepare)
    return lambda drawn: score_and_show(
        Images(**drawn) if isinstance(drawn, dict) else drawn, ref, out, processes, **options
    )


if __name__ == "__main__":
    sys.exit(main())
