"""One score on one, two and three processes: the same number, and really that many processes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from eval.fid import main, score
from eval.processes import together
from eval.sources.open import open_source
from tests.doors import typed
from tests.processes import start

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


def score_with_another_reference(argv, others):
    """The first process finds its reference, the others have a path that leads nowhere."""
    sys.exit(main([*argv, "--ref", others if int(os.environ["RANK"]) else "digits:test"]))


def test_a_reference_that_one_process_lacks_stops_them_all(tmp_path, digits):
    np.savez(tmp_path / "a.npz", arr_0=digits[0][:20])
    group = start(score_with_another_reference, [str(tmp_path / "a.npz")], "nowhere.npz", folder=tmp_path, world=2)
    assert group.wait() == [2, 2]
    assert "error: 'nowhere.npz' does not exist" in group.err(0)
    assert group.err(0).count("\n") == 1
    assert group.err(1) == ""


def fail_alone(with_others):
    """The second process has a mistake of the user's, which the first one never hears of, or a bug."""

    def work(processes):
        if with_others:
            processes.agree(lambda: np.linalg.inv(np.zeros((2, 2))) if processes.rank else None)
        elif processes.rank:
            open_source("nowhere.npz")

    sys.exit(together(work))


def test_a_mistake_that_one_process_has_to_itself_is_told_by_it(tmp_path):
    group = start(fail_alone, False, folder=tmp_path, world=2)
    assert group.wait() == [0, 2]
    assert "error: 'nowhere.npz' does not exist" in group.err(1)


def test_a_launch_by_hand_that_cannot_work_is_a_sentence(monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert together(lambda _: pytest.fail("worked")) == 2
    assert "error: WORLD_SIZE is 2, but " in capfd.readouterr().err


def test_a_bug_in_one_process_ends_them_all_and_keeps_its_traceback(tmp_path):
    group = start(fail_alone, True, folder=tmp_path, world=2)
    assert group.wait() == [1, 1]
    assert "numpy.linalg.LinAlgError: Singular matrix" in group.err(1)
    assert "RuntimeError: process 1 failed: Singular matrix" in group.err(0)


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


def stand_still(flag):
    """A score that stands still; after a signal, on its way out. The first of two processes waits for the other."""

    def work(processes):
        Path(f"{flag}.{processes.rank}").touch()
        try:
            if processes.world > 1 and not processes.rank:
                processes.gather(None)
            time.sleep(60)
        finally:
            time.sleep(60)

    sys.exit(together(work))


@pytest.mark.parametrize("world", [1, 2])  # a process that waits for another one runs no handlers
def test_a_second_signal_leaves_at_once_and_a_repeated_one_does_not(tmp_path, world):
    group = start(stand_still, tmp_path / "flag", folder=tmp_path, world=world)
    group.until(lambda: all((tmp_path / f"flag.{rank}").exists() for rank in range(world)))
    time.sleep(0.5)
    group.kill(signal.SIGTERM)
    group.kill(signal.SIGTERM)  # as a launcher hands it on
    time.sleep(2.5)
    assert all(member.is_alive() for member in group.members)
    before = time.monotonic()
    group.kill(signal.SIGINT)
    assert group.wait(20) == [143] * world
    assert time.monotonic() - before < 5
    for rank in range(world):
        assert group.err(rank) == "stopped at once by a second signal; nothing more was saved\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_first_signal_is_told_and_ends_with_143(capfd, number):
    handler = signal.getsignal(number)
    assert together(lambda _: signal.raise_signal(number)) == 143
    assert capfd.readouterr().err == f"stopped by {number.name}\n"
    assert signal.getsignal(number) == handler
    threads = [thread for thread in threading.enumerate() if "(watch)" in thread.name]
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
