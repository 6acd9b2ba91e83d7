"""Programs that are ended while they write: no file is half there, and the same command goes on as if nothing were."""

import json
import os
import signal
import time

import numpy as np
import pytest

from ditmoe.report import write as report
from eval.sources.open import DIGITS_FILE
from tests.faults import runs
from tests.faults.halts import halted, save_model, save_run
from tests.processes import door, start

SIZES = ["--num", 120, "--batch-size", 8, "--steps", 2]


def finished(name, argv, folder, **more):
    group = start(door, name, argv, folder=folder, **more)
    assert group.wait() == [0], group.err()
    return group


def stopped(name, argv, place, number, folder, *, seen=lambda: None, rank=None, **more):
    """Ended by a signal at a certain place, where `seen()` looks around first."""
    flag = folder / "there"
    folder.mkdir(exist_ok=True)
    group = start(halted, name, argv, place, str(flag), rank, folder=folder, **more)
    group.until(flag.exists)
    seen()
    group.kill(number)
    (folder / "killed").touch()
    codes = group.wait()
    assert set(codes) == {-9 if number == signal.SIGKILL else 143}, group.err()
    assert "Traceback" not in "".join(group.err(i) for i in range(len(codes)))
    flag.unlink()
    (folder / "killed").unlink()
    return group


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A model, and what it draws when nobody disturbs it."""
    root = tmp_path_factory.mktemp("straight")
    save_model(root / "model")
    for out in ("set", "set.npz"):
        finished("sample", [root / "model", *SIZES, "--out", root / "out" / out], root / "printed")
    return root


@pytest.mark.parametrize(
    ("out", "place", "number"),
    [
        ("set", "picture", signal.SIGKILL),
        ("set", "picture", signal.SIGTERM),
        ("set", "note", signal.SIGKILL),
        ("set.npz", "part", signal.SIGKILL),
        ("set.npz", "part", signal.SIGTERM),
        ("set.npz", "join", signal.SIGKILL),
        ("set.npz", "clearing", signal.SIGKILL),
    ],
)
def test_a_set_goes_on_after_a_kill_and_is_the_same(tmp_path, straight, out, place, number):
    whole = {k: v for k, v in contents(straight / "out").items() if k == out or k.startswith(out + "/")}
    assert len(whole) == (121 if out == "set" else 1)

    def seen():
        """Under its own name a file is what it will be."""
        now = contents(tmp_path / "out")
        assert {name: data for name, data in now.items() if name in whole}.items() <= whole.items()
        assert len(now) > len(now.keys() & whole.keys())  # it is in the middle of one

    argv = [straight / "model", *SIZES, "--out", tmp_path / "out" / out]
    stopped("sample", argv, place, number, tmp_path / "first", seen=seen)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.png")}
    assert 40 <= len(before) < 64 if place == "picture" else not before  # a batch's are written beside each other
    finished("sample", argv, tmp_path / "second")
    assert contents(tmp_path / "out") == whole
    assert {p: p.stat().st_mtime_ns for p in before} == before  # what was there was not drawn again


@pytest.fixture
def images(tmp_path, digits_file):
    """Images to score, the command, and an environment with a cache of its own."""
    argv = [digits_file, "--ref", "digits:test", "--batch-size", 8, "--out", tmp_path / "score.json"]
    return argv, {"XDG_CACHE_HOME": str(tmp_path / "cache")}


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("digits") / "digits.npz"
    with np.load(DIGITS_FILE) as arrays:
        np.savez(file, arr_0=arrays["train_images"][:40, ..., None])
    return file


def test_a_torn_cache_is_computed_again(tmp_path, images):
    argv, env = images
    stopped("eval.fid", argv, "sync", signal.SIGKILL, tmp_path / "a", env=env)
    assert list((tmp_path / "cache").rglob("*.npz")) == []
    finished("eval.fid", argv, tmp_path / "b", env=env)
    value = json.loads((tmp_path / "score.json").read_text())["value"]
    (kept,) = (tmp_path / "cache").rglob("*.npz")
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    warned = finished("eval.fid", argv, tmp_path / "c", env=env)
    assert "are damaged" in warned.err()
    assert "computed again" in warned.err()
    assert json.loads((tmp_path / "score.json").read_text())["value"] == value
    assert "damaged" not in finished("eval.fid", argv, tmp_path / "d", env=env).err()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_report_of_a_score_is_whole_or_absent(tmp_path, images, number):
    argv, env = [*images[0], "--no-cache"], images[1]
    score = tmp_path / "score.json"
    if number != signal.SIGTERM:
        score.write_text('{"old": 1}')
    old = contents(tmp_path)
    group = stopped("eval.fid", argv, "sync", number, tmp_path / "a", env=env)
    assert (score.read_text() if score.exists() else None) == (None if number == signal.SIGTERM else '{"old": 1}')
    if number != signal.SIGKILL:
        assert f"stopped by {number.name}" in group.err()
        assert {name for name in contents(tmp_path) if not name.startswith("a/")} == old.keys()  # nothing temporary
    finished("eval.fid", argv, tmp_path / "b", env=env)
    assert json.loads(score.read_text())["metric"] == "fd_random_conv_v1"


@pytest.mark.parametrize("waiting", [None, 0])
def test_processes_that_score_together_leave_together(tmp_path, images, waiting):
    """Both at work, or one of them where it waits for the other."""
    argv, env = [*images[0], "--no-cache"], images[1]
    stopped(
        "eval.fid", argv, "features", signal.SIGTERM, tmp_path / "a", world=2, rank=waiting, env=env,
        seen=lambda: time.sleep(0.3),
    )  # fmt: skip
    assert not (tmp_path / "score.json").exists()


def test_the_page_of_a_run_is_whole_or_absent(tmp_path):
    run = save_run(tmp_path / "run", ["a", "b"], "python train.py")
    for name in ("report.json", "index.html"):
        (run / name).write_text("{}")
    for place, facts in (("page facts", None), ("page", "run")):
        stopped("page", [str(run)], place, signal.SIGKILL, tmp_path / place)
        assert json.loads((run / "report.json").read_text()).get("title") == facts
        assert not (run / "index.html").exists()  # so train.py writes it when it comes by again
    report.write(run)
    assert (run / "index.html").read_text().rstrip().endswith("</html>")
    assert not list(run.glob("*.tmp"))


def test_a_torn_model_is_exported_again(tmp_path):
    out = tmp_path / "run"
    assert runs.training(out, "--max-steps", 1).wait() == [0]
    (weights,) = (out / "model/transformer").glob("*.safetensors")
    whole = weights.read_bytes()
    os.truncate(weights, 100)
    assert runs.training(out, "--max-steps", 1).wait() == [0]
    assert weights.read_bytes() == whole
