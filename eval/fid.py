"""Fréchet distance between two sets of images: `score(...)`, and `python -m eval.fid` (see --help).

torch is imported only once the arguments and both sources have been found good.
"""

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import PIL
import tyro
from tqdm import tqdm

from eval.arrays import UInt8Array
from eval.frechet import FeatureStatistics, Gaussian, frechet_distance
from eval.sources import Images, Statistics, open_source

if TYPE_CHECKING:
    from eval.extractors import Extractor

SMALL_SAMPLE = 10_000  # images; below this the distance's upward bias is large
Report = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """One side of a score: its Gaussian, and where that came from."""

    gaussian: Gaussian
    count: int | None  # None: a statistics file does not say
    shape: tuple[int, int, int] | None  # (H, W, C)
    facts: Report  # path, kind, sha256 and shape, as reported


def score(
    images: str | Path | UInt8Array,
    ref: str | Path | UInt8Array,
    *,
    extractor: str = "random-conv-v1",
    weights: str | Path | None = None,
    num: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Report:
    """The Fréchet distance of `images` to `ref` with every fact of the protocol, ready for JSON.

    Args:
        images, ref: uint8 array (N, H, W, C), C = 1 or 3, or what `eval.sources.open_source`
            opens: folder, zip, ADM .npz (arr_0), statistics .npz (mu, sigma), NAME:SPLIT.
        extractor: random-conv-v1 or efficientnet-lite0.
        weights: file of the extractor's weights, where it reads one.
        num: score only the first `num` of `images`, in the source's order (default: all).
        batch_size: images per forward pass; changes speed and memory, not the value.
        progress: show a bar on stderr when that is a terminal.

    Returns: the value under its own name (`fd_random_conv_v1`, ...) and under `value`, that name
    under `metric`; counts, extractor, resize, both sources with a hash of their pixels, versions,
    seconds, warnings.

    Raises ValueError for every fault of the arguments and files.
    """
    started = time.perf_counter()
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size} must be at least 1")
    sources = open_source(images), open_source(ref)
    _check_num(num, sources[0])

    from eval.extractors import load_extractor  # imports torch: after the cheap checks

    net = load_extractor(extractor, None if weights is None else Path(weights))
    gen = _measure(sources[0], net, num, batch_size, progress)
    target = _measure(sources[1], net, None, batch_size, progress)
    value = frechet_distance(gen.gaussian, target.gaussian)
    metric = metric_name(net.name)
    return {
        "metric": metric,
        "value": value,
        metric: value,
        "n_gen": gen.count,
        "n_ref": target.count,
        "extractor": {
            "name": net.name,
            "version": net.version,
            "sha256": net.sha256,
            "dim": net.num_features,
        },
        "resize": net.resize,
        "images": gen.facts,
        "ref": target.facts,
        "batch_size": batch_size,
        "dtype": {"features": "float32", "statistics": "float64"},
        "versions": _versions(),
        "seconds": round(time.perf_counter() - started, 3),
        "warnings": _warnings(gen, target, net.num_features),
    }


def metric_name(extractor: str) -> str:
    """The key of a Fréchet distance: fd_<extractor>.

    `fid` means the Inception-2015 network behind TensorFlow 1's resize and nothing else, so no
    other extractor's name can produce that key.
    """
    return "fd_" + extractor.replace("-", "_")


def _check_num(num: int | None, images: Images | Statistics) -> None:
    if num is None:
        return
    if isinstance(images, Statistics):
        raise ValueError(f"{images.path}: num {num} needs images, and these are statistics")
    if not 2 <= num <= images.count:
        raise ValueError(f"num {num} must be between 2 and the {images.count} of {images.path}")


def _measure(
    source: Images | Statistics,
    net: "Extractor",
    num: int | None,
    batch_size: int,
    progress: bool,
) -> Measured:
    facts: Report = {"path": source.path, "kind": source.kind}
    if isinstance(source, Statistics):
        if len(source.gaussian.mean) != net.num_features:
            raise ValueError(
                f"{source.path}: mu has {len(source.gaussian.mean)} values but {net.name} gives "
                f"{net.num_features} features; use the extractor that made it, or give images"
            )
        return Measured(source.gaussian, None, None, {**facts, "sha256": source.sha256})
    count = source.count if num is None else num
    statistics, digest = FeatureStatistics(net.num_features), hashlib.sha256()
    digest.update(repr(source.shape[:2]).encode())
    # disable=None: no bar when stderr is not a terminal
    bar = tqdm(total=count, desc=source.path, unit="img", disable=None if progress else True)
    with bar:
        for batch in source.batches(batch_size, count):
            digest.update(np.broadcast_to(batch, (*batch.shape[:3], 3)).tobytes())
            statistics.update(_features(net, batch))
            bar.update(len(batch))
    assert statistics.n == count, (statistics.n, count)
    facts |= {"sha256": digest.hexdigest(), "shape": list(source.shape)}
    return Measured(statistics.gaussian(), count, source.shape, facts)


def _features(net: "Extractor", batch: UInt8Array) -> np.ndarray[Any, np.dtype[np.float32]]:
    """uint8 (n, H, W, C) -> float32 (n, D)."""
    import torch

    with torch.inference_mode():
        features: np.ndarray[Any, np.dtype[np.float32]] = net(
            torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())
        ).numpy()
    return features


def _warnings(gen: Measured, ref: Measured, num_features: int) -> list[str]:
    warnings: list[str] = []
    for name, side in (("n_gen", gen), ("n_ref", ref)):
        if side.count is None:
            warnings.append(f"{name} unknown: a statistics file names no count and no extractor")
        elif side.count < SMALL_SAMPLE:
            warnings.append(
                f"{name} = {side.count} is below {SMALL_SAMPLE}: the distance is biased upwards, "
                "compare it only with others at the same counts"
            )
        if side.count is not None and side.count <= num_features:
            warnings.append(
                f"{name} = {side.count} is not above {num_features} features: the covariance is rank-deficient"
            )
    if gen.shape and ref.shape and gen.shape[:2] != ref.shape[:2]:
        warnings.append(f"sizes differ: images {gen.shape[:2]}, ref {ref.shape[:2]} (H, W)")
    if gen.facts["sha256"] == ref.facts["sha256"]:
        warnings.append("images and ref are the same data")
    return warnings


def _versions() -> dict[str, str]:
    import torch

    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "torch": str(torch.__version__),
    }


# ------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Arguments:
    """Fréchet distance of IMAGES to a reference; lower is closer.

    IMAGES and REF are a folder of images, a .zip, an .npz (arr_0 uint8 NHWC), a statistics .npz
    (mu, sigma), or digits:train, digits:test, fashion:train, fashion:test.
    Prints the report as JSON, or writes it to --out.
    """

    images: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """What to score."""
    ref: Annotated[str, tyro.conf.arg(metavar="REF")]
    """What to compare with."""
    extractor: Literal["random-conv-v1", "efficientnet-lite0"] = "random-conv-v1"
    """Feature network; only scores of the same one can be compared."""
    weights: Path | None = None
    """File of the extractor's weights, where it reads one."""
    num: int | None = None
    """Score only the first NUM of IMAGES, in order."""
    batch_size: int = 64
    """Images per forward pass; changes speed and memory, not the value."""
    out: Path | None = None
    """JSON file for the report."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 the user's mistake (a sentence on stderr). A bug keeps its traceback."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m eval.fid")
    try:
        if arguments.out is not None:
            _check_out(arguments.out)
        report = score(
            arguments.images,
            arguments.ref,
            extractor=arguments.extractor,
            weights=arguments.weights,
            num=arguments.num,
            batch_size=arguments.batch_size,
            progress=True,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if arguments.out is None:
        print(json.dumps(report, indent=2))
    else:
        write_report(arguments.out, report)
        print(f"{report['metric']} {report['value']:.6g} -> {arguments.out}")
    return 0


def _check_out(out: Path) -> None:
    """Refuse now what would fail after the work is done."""
    if out.suffix != ".json":
        raise ValueError(f"--out {out} must end in .json")
    if not out.parent.is_dir() or out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out} cannot be written; its folder must exist and be writable")


def write_report(path: Path, report: Report) -> None:
    """Write the report as JSON under its name only once it is complete and on disk."""
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
