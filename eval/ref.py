"""Statistics of a reference in one file for `eval.fid --ref`: `python -m eval.ref IMAGES --out stats.npz`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from eval.fid import ExtractorName
from eval.measure import Wanted, measure
from eval.processes import Processes, together
from eval.report import check_out
from eval.score import check_options
from eval.sources.images import Images, Statistics
from eval.sources.npz import MAX_ROWS
from eval.sources.open import open_source
from eval.statistics import write_statistics

if TYPE_CHECKING:
    from eval.networks.extractors import Extractor


@dataclass(frozen=True)
class Arguments:
    """Write the statistics of IMAGES as an .npz: mu, sigma, the count, the extractor, and features if asked for."""

    images: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """A folder of images, a .zip, an .npz (arr_0), or NAME:SPLIT."""
    out: Path
    """The .npz to write."""
    extractor: ExtractorName = "random-conv-v1"
    """Feature network."""
    weights: Path | None = None
    """File of the extractor's weights, where it reads one."""
    keep: int = 0
    """Feature rows to keep for kid and prdc (eval.fid's default looks at 10,000)."""
    seed: int = 0
    """Chooses those rows."""
    batch_size: int = 64
    """Images per forward pass."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the user's mistake (a sentence on stderr)."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m eval.ref")
    return together(lambda processes: write(arguments, processes))


def write(arguments: Arguments, processes: Processes) -> None:
    """Measure and write the file. Raises ValueError for the user's mistakes."""
    source, net = processes.agree(lambda: _prepared(arguments, processes))
    wanted = Wanted(spatial=net.fid_named, keep=arguments.keep, seed=arguments.seed)
    found = measure(source, net, wanted, batch_size=arguments.batch_size, progress=True, processes=processes)
    if not processes.rank:
        write_statistics(arguments.out, found, net)
        print(f"{found.count} images, {net.num_features} features -> {arguments.out}")


def _prepared(arguments: Arguments, processes: Processes) -> tuple[Images, "Extractor"]:
    """The images and the network, once everything is found good that can be told before the work."""
    check_out(arguments.out, ".npz", processes)
    check_options(arguments.batch_size, arguments.keep or 2, arguments.seed, 0, ())
    if arguments.keep > MAX_ROWS:
        raise ValueError(f"keep {arguments.keep} must be at most {MAX_ROWS}")
    source = open_source(arguments.images)
    if isinstance(source, Statistics):
        raise ValueError(f"{arguments.images}: these are statistics already; give images")
    if source.statistics is not None:
        found = "holds statistics already, which its images may be a small part of; give it to --ref as it is"
        raise ValueError(f"{arguments.images}: {found}")
    from eval.networks.extractors import best_device, load_extractor

    return source, load_extractor(arguments.extractor, arguments.weights).to(best_device())


if __name__ == "__main__":
    sys.exit(main())
