"""Statistics of a reference on disk: written once, and found again as long as nothing that made them changed."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.measure import Measured, Wanted, measure, of_statistics
from eval.processes import Processes
from eval.report import whole_or_absent
from eval.sources.images import Images
from eval.sources.npz import open_npz

if TYPE_CHECKING:
    from eval.networks.extractors import Extractor

FORMAT = 3  # of the files; a change makes older cached ones unused


def default_folder() -> Path:
    """Where statistics are kept unless told otherwise: $XDG_CACHE_HOME/ditmoe/stats or ~/.cache/ditmoe/stats."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditmoe" / "stats"


def write_statistics(path: Path, measured: Measured, net: "Extractor") -> None:
    """An .npz with mu, sigma, mu_s and sigma_s and features where there are any, and what made them as `facts`.

    The names are those of ADM's and pytorch-fid's files. Written beside its place first, so it is whole or absent.
    """
    arrays: dict[str, Any] = {"mu": measured.gaussian.mean, "sigma": measured.gaussian.covariance}
    if measured.spatial is not None:
        arrays |= {"mu_s": measured.spatial.mean, "sigma_s": measured.spatial.covariance}
    if measured.features is not None:
        arrays["features"] = measured.features
    made = {"name": net.name, "version": net.version, "sha256": net.sha256, "resize": net.resize}
    facts = {"count": measured.count, "shape": measured.shape, "images": measured.facts, "extractor": made}
    if measured.features is not None:
        facts["rows"] = {"seed": measured.rows_seed, "sha256": measured.rows_sha256}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_absent(path) as file:
        np.savez(file, **arrays, facts=np.array(json.dumps(facts)))


def cached(
    source: Images, net: "Extractor", wanted: Wanted, folder: Path | None, options: dict[str, Any]
) -> tuple[Measured, str | None]:
    """What `measure` gives, or gave for the same images, extractor and wishes before; and a warning or None.

    The key is a hash of the source's fingerprint (checksums inside archives; of other files place, name, inode, size
    and the times of writing and of any change), the extractor's weights, version and resize, and what is wanted. A
    damaged file is computed again, and so is a folder of which images were left out. Where `folder` is None or the
    source has no fingerprint, nothing is kept. The first process reads; the others take its word.
    """
    if folder is None or not source.fingerprint:
        return measure(source, net, wanted, **options), None
    processes: Processes = options["processes"]
    made = [source.kind, source.shape, net.name, net.version, net.sha256, net.resize]
    made += [str(part) for part in (wanted.spatial, wanted.keep, wanted.seed)]
    key = hashlib.sha256(json.dumps([FORMAT, source.fingerprint, *made]).encode()).hexdigest()
    path = folder / f"{key}.npz"
    found, problem = _read(path, source, net) if processes.rank == 0 else (None, None)
    found, problem = processes.gather((found, problem))[0]
    if found is not None:
        return found, None
    measured = measure(source, net, wanted, **options)
    if processes.rank == 0 and not measured.bad:  # what was left out is to be said every time
        try:
            write_statistics(path, measured, net)
        except OSError as error:
            problem = f"the statistics of {source.path} could not be kept in {folder} ({error})"
    return measured, problem


def _read(path: Path, source: Images, net: "Extractor") -> tuple[Measured | None, str | None]:
    try:
        if not path.is_file():
            return None, None
        statistics = open_npz(path, str(path))
        assert not isinstance(statistics, Images)
        images = {**statistics.facts["images"], "path": source.path}
        return replace(of_statistics(statistics, net), shape=source.shape, facts=images), None
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        return None, f"the cached statistics {path} are damaged ({error}) and were computed again"
