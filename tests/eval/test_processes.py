"""One score on one, two and three processes: the same number, and really that many processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval.fid import score
from tests.doors import typed

REPO = Path(__file__).resolve().parents[2]


def test_torchrun_starts_them(tmp_path, digits):
    """The one real launch: the others are forks that find what torchrun sets."""
    np.savez(tmp_path / "a.npz", arr_0=digits[0][:8])
    out = tmp_path / "r.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "eval.fid", str(tmp_path / "a.npz"), "--ref", str(tmp_path / "a.npz"), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--no-cache", "--batch-size", "4"],
        cwd=REPO, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["world_size"] == 2  # several processes, not one that was started quietly
    assert report["n_gen"] == 8
    assert done.stdout.count("fd_random_conv_v1") == 1


@pytest.mark.parametrize("world", [3, 2])
def test_processes_share_the_work_and_change_nothing(tmp_path, digits, world):
    count = 403 if world == 2 else 330  # more than features: a rank-deficient distance magnifies the last bits
    labels = digits[1][:count]
    np.savez(tmp_path / "a.npz", arr_0=digits[0][:count], arr_1=labels)
    out = tmp_path / "r.json"
    options = ["--metrics", "kid", "prdc", "--keep", "100", "--no-cache", "--out", out]
    done = typed("eval.fid", tmp_path / "a.npz", "--ref", "digits:test", *options, world=world)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["world_size"] == world
    alone = score(tmp_path / "a.npz", "digits:test", metrics=["kid", "prdc"], keep=100)
    assert alone["world_size"] == 1
    assert report["n_gen"] == alone["n_gen"] == count
    assert report["images"]["sha256"] == alone["images"]["sha256"]
    for name, value in alone["scores"].items():
        assert report["scores"][name] == pytest.approx(value, rel=1e-9), name
    assert done.stdout.count("fd_random_conv_v1") == 1


def test_more_processes_than_batches(tmp_path, digits):
    np.savez(tmp_path / "a.npz", arr_0=digits[0][:390])
    out = tmp_path / "r.json"
    options = ["--no-cache", "--batch-size", 512, "--out", out]
    done = typed("eval.fid", tmp_path / "a.npz", "--ref", "digits:test", *options, world=3)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["world_size"] == 3
    assert report["value"] == pytest.approx(score(tmp_path / "a.npz", "digits:test", batch_size=512)["value"], rel=1e-9)


def test_one_process_that_meets_a_bad_image_stops_them_all(tmp_path, digits):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(digits[0][:130]):
        Image.fromarray(image[..., 0]).save(folder / f"{i:03d}.png")
    whole = (folder / "100.png").read_bytes()
    (folder / "100.png").write_bytes(whole[: len(whole) - 30])  # the second process's batch; its header is intact
    out = tmp_path / "r.json"
    done = typed("eval.fid", folder, "--ref", "digits:test", "--no-cache", "--out", out, world=2)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "100.png" in done.stderr
    assert not out.exists()
