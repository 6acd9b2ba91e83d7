"""One score: two sources, an extractor, the Fréchet distance and its companions, and the report."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import report as reporting
from eval import statistics
from eval.measure import Classify, Measured, Wanted, measure, misfit, of_statistics
from eval.metrics import kid
from eval.metrics.frechet import frechet_distance
from eval.metrics.inception_score import SPLIT_SIZE
from eval.processes import ALONE, Processes
from eval.report import Report, check_report
from eval.sources.arrays import UInt8Array
from eval.sources.images import Images, Statistics
from eval.sources.open import open_source

if TYPE_CHECKING:
    from eval.networks.extractors import Extractor

INCEPTION = "inception-2015"
PR_K, DC_K = 3, 5  # of Kynkäänniemi et al. and of Naeem et al.


def score(
    images: str | Path | UInt8Array | Images, ref: str | Path | UInt8Array | Images, *,
    extractor: str = "random-conv-v1", weights: str | Path | None = None, metrics: Sequence[str] = (),
    num: int | None = None, keep: int = 10_000, seed: int = 0, classify: Classify | None = None,
    batch_size: int = 64, skip_bad: int = 0, cache: Path | None = None, progress: bool = False,
    processes: Processes = ALONE,
) -> Report:  # fmt: skip
    """The Fréchet distance of `images` to `ref` with every fact of the protocol, ready for JSON.

    Args:
        images, ref: uint8 array (N, H, W, C), C = 1 or 3, or what `eval.sources.open.open_source` opens: folder, zip,
            table, ADM .npz (arr_0), statistics .npz (mu, sigma), NAME:SPLIT. A reference .npz with both statistics and
            images, as ADM's are, gives the statistics to FID and sFID and the images to KID, precision and recall.
        extractor, weights, num, keep, seed, batch_size, skip_bad: As in `eval.fid.Arguments`.
        metrics: besides the Fréchet distance: "sfid" and "is" (Inception Score), of inception-2015 alone; "kid"; "prdc"
            (precision, recall, density, coverage).
        classify: uint8 (b, H, W, C) -> classes (b,): adds `accuracy`, the share of images that are taken for their
            label (arr_1 of an .npz).
        cache: folder for the statistics of the reference; None keeps none.
        progress: tell on stderr how far it is.
        processes: those that share the work; only the first one's report is written.

    Returns: the value under its own name (`fd_random_conv_v1`, ..., `fid` for inception-2015 alone) and under `value`,
    that name under `metric`, all metrics under `scores`; what else there is says `report.SCHEMA`.

    Raises ValueError for every fault of the arguments and files.
    """
    started = time.perf_counter()

    def prepare() -> tuple[tuple[Images | Statistics, Images | Statistics], "Extractor"]:
        check_options(batch_size, keep, seed, skip_bad, metrics)
        sources = open_source(images, skip_bad), open_source(ref, skip_bad)
        check_sources(sources, metrics, extractor, num, classify)
        if skip_bad and not any(isinstance(side, Images) and side.may_skip for side in sources):
            raise ValueError(f"skip_bad {skip_bad} is for folders, zips and tables of images; leave it out")

        from eval.networks.extractors import best_device, load_extractor  # imports torch: after the cheap checks

        net = load_extractor(extractor, None if weights is None else Path(weights)).to(best_device())
        for side in sources:
            if isinstance(side, Statistics):
                of_statistics(side, net)  # a misfit is found before the work
        return sources, net

    (side, reference), net = processes.agree(prepare)
    wanted = Wanted("sfid" in metrics, "is" in metrics, keep if {"kid", "prdc"} & set(metrics) else 0, seed, classify)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "processes": processes}
    gen = of_statistics(side, net) if isinstance(side, Statistics) else measure(side, net, wanted, num, **options)
    target, problems = _reference(reference, net, replace(wanted, logits=False, classify=None), cache, options)
    problems += [one.left_out for one in (side, reference) if isinstance(one, Images) and one.left_out]
    scores = processes.agree(lambda: _scores(gen, target, net, metrics))
    metric = metric_name(net.name, fid_named=net.fid_named)
    return check_report({
        **reporting.assemble(gen, target, net, metric, scores, _parameters(gen, target, wanted, metrics)),
        "world_size": processes.world, "batch_size": batch_size, "seconds": round(time.perf_counter() - started, 3),
        "warnings": reporting.warnings_of(gen, target, net) + problems,
    })  # fmt: skip


def metric_name(extractor: str, metric: str = "fid", *, fid_named: bool = False) -> str:
    """The key of a metric: fd_<extractor>, kid_<extractor>, ..., but fid, kid, ... where `Extractor.fid_named`.

    No name can produce the key `fid`: it means the pinned Inception-2015 behind TensorFlow 1's resize and nothing else.
    """
    if fid_named:
        return metric
    return ("fd" if metric == "fid" else metric) + "_" + extractor.replace("-", "_")


def check_options(batch_size: int, keep: int, seed: int, skip_bad: int, metrics: Sequence[str]) -> None:
    """Refuse numbers out of range: ValueError naming the option and its value."""
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size} must be at least 1")
    if keep < 2:
        raise ValueError(f"keep {keep} must be at least 2")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} must be between 0 and {2**32 - 1}")
    if skip_bad < 0:
        raise ValueError(f"skip_bad {skip_bad} must be at least 0")
    if skip_bad and "is" in metrics:
        raise ValueError(f"skip_bad {skip_bad}: the Inception Score needs every image of its splits; leave it out")


def check_sources(
    sources: tuple[Images | Statistics | None, Images | Statistics], metrics: Sequence[str], extractor: str,
    num: int | None = None, classify: Classify | None = None,
) -> None:  # fmt: skip
    """Refuse what these sources cannot give: ValueError naming the metric, the file and what it needs.

    The first one, what is scored, is None while it is still to come: images then, of which nothing is asked.
    """
    images = sources[0]
    for metric in metrics:
        if metric not in ("sfid", "is", "kid", "prdc"):
            raise ValueError(f"unknown metric {metric!r}; choose from sfid, is, kid, prdc")
        if metric in ("sfid", "is") and extractor != INCEPTION:
            raise ValueError(f"metric {metric} is defined on inception-2015 alone, not on {extractor}")
    if isinstance(images, Statistics):
        if num is not None:
            raise ValueError(f"{images.path}: num {num} needs images, and these are statistics")
        if "is" in metrics:
            raise ValueError(f"{images.path}: the Inception Score needs images, and these are statistics")
    elif images and num is not None and not 2 <= num <= images.count:
        raise ValueError(f"num {num} must be between 2 and the {images.count} of {images.path}")
    for side in sources:
        if isinstance(side, Statistics) and {"kid", "prdc"} & set(metrics) and side.features is None:
            raise ValueError(f"{side.path}: KID and prdc need images, and these are statistics without features")
        stored = side.statistics if isinstance(side, Images) and side is not images else side
        if isinstance(stored, Statistics) and "sfid" in metrics and stored.spatial is None:
            raise ValueError(f"{stored.path}: sFID needs mu_s and sigma_s, which this file does not have")
    if images and classify is not None and (isinstance(images, Statistics) or images.labels is None):
        raise ValueError(f"{images.path}: class accuracy needs labels, the arr_1 of an .npz")


def _reference(
    source: Images | Statistics, net: "Extractor", wanted: Wanted, cache: Path | None, options: dict[str, Any]
) -> tuple[Measured, list[str]]:
    """The reference's side, and warnings."""
    if isinstance(source, Statistics):
        return of_statistics(source, net), []
    problem = None if source.statistics is None else misfit(source.statistics, net)
    if source.statistics is None or problem:
        found, warning = statistics.cached(source, net, wanted, cache, options)
        passed_over = [f"the statistics in {source.path} were not used ({problem}), but its images"] if problem else []
        return found, passed_over + ([warning] if warning else [])
    whole = of_statistics(source.statistics, net)
    if not wanted.keep:
        return whole, []
    kept = measure(source, net, replace(wanted, spatial=False), **options)
    return replace(kept, gaussian=whole.gaussian, spatial=whole.spatial, count=whole.count, facts=whole.facts), []


def _parameters(gen: Measured, ref: Measured, wanted: Wanted, metrics: Sequence[str]) -> dict[str, Any]:
    """What the metrics besides the Fréchet distance depend on; None where one was not asked for."""
    rows = [None if side.features is None else len(side.features) for side in (gen, ref)]
    size = min(kid.SUBSET_SIZE, *(row for row in rows if row is not None)) if rows != [None, None] else None
    return {
        "rows": rows if wanted.keep else None,
        "rows_seed": gen.rows_seed if wanted.keep else None,
        "rows_sha256": {"images": gen.rows_sha256, "ref": ref.rows_sha256} if wanted.keep else None,
        "kid": {"subsets": kid.SUBSETS, "subset_size": size, "seed": kid.SEED} if "kid" in metrics else None,
        "prdc": {"pr_k": PR_K, "dc_k": DC_K} if "prdc" in metrics else None,
        "inception_score": {"split_size": SPLIT_SIZE} if "is" in metrics else None,
        "classify": getattr(wanted.classify, "__qualname__", repr(wanted.classify)) if wanted.classify else None,
    }


def _scores(gen: Measured, ref: Measured, net: "Extractor", metrics: Sequence[str]) -> dict[str, Any]:
    """Every metric under its key."""

    def name(metric: str) -> str:
        return metric_name(net.name, metric, fid_named=net.fid_named)

    scores: dict[str, Any] = {name("fid"): frechet_distance(gen.gaussian, ref.gaussian)}
    if "sfid" in metrics:
        assert gen.spatial is not None
        assert ref.spatial is not None
        scores[name("sfid")] = frechet_distance(gen.spatial, ref.spatial)
    if "is" in metrics:
        assert gen.inception is not None
        scores["inception_score"], scores["inception_score_std"] = gen.inception
    if gen.features is not None and ref.features is not None:
        if "kid" in metrics:
            scores[name("kid")], scores[name("kid") + "_std"] = kid.kernel_distance(gen.features, ref.features)
        if "prdc" in metrics:
            from eval.metrics.manifold import prdc

            found = prdc(ref.features, gen.features, pr_k=PR_K, dc_k=DC_K)._asdict()
            scores |= {name(key): value for key, value in found.items()}
    if gen.accuracy is not None:
        scores["accuracy"] = gen.accuracy
    return scores
