"""ADM's own samples against ADM's own reference batch, for whoever has the files."""

import os
from pathlib import Path

import pytest

from eval.fid import score
from eval.networks.extractors import INCEPTION_FILES

PLACE = os.environ.get("DITMOE_ADM")
REFERENCE, SAMPLES = "VIRTUAL_imagenet256_labeled.npz", "admnet_guided_upsampled_imagenet256.npz"
# ADM-G + ADM-U at 256 pixels in guided-diffusion's README
PUBLISHED = {"fid": 3.9426, "sfid": 6.1404, "inception_score": 215.84, "precision": 0.8265, "recall": 0.5309}


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.skipif(PLACE is None, reason=f"DITMOE_ADM is no folder with {REFERENCE}, {SAMPLES}, {INCEPTION_FILES[0]}")
def test_the_published_scores_come_out():
    folder = Path(PLACE)
    weights = next(folder / name for name in INCEPTION_FILES if (folder / name).is_file())
    options = {"extractor": "inception-2015", "weights": weights, "metrics": ["sfid", "is", "prdc"], "keep": 50_000}
    found = score(folder / SAMPLES, folder / REFERENCE, **options)["scores"]
    assert {name: found[name] for name in PUBLISHED} == pytest.approx(PUBLISHED, rel=1e-3, abs=0.01)
