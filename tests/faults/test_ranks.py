"""Two processes: exact resume, another number of processes, one that dies."""

import json
import signal
import time

import numpy as np
import pytest
from PIL import Image

from tests.faults import runs
from tests.faults.test_checkpoints import same


def losses(out):
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in runs.rows(out)]


def test_two_processes_resume_to_the_bit(tmp_path):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    for out, steps in ((straight, 6), (cut, 3), (cut, 6)):
        group = runs.training(out, "--max-steps", steps, world=2)
        assert group.wait() == [0, 0], group.err()
        assert "training on 2 process(es)" in group.out()
    same(straight / "checkpoints/step-000006", cut / "checkpoints/step-000006")
    assert losses(straight) == losses(cut)


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, first, second):
    out, straight = tmp_path / "run", tmp_path / "straight"
    assert runs.training(out, "--max-steps", 3, world=first).wait() == [0] * first
    assert runs.training(out, "--max-steps", 13, world=second).wait() == [0] * second
    assert runs.training(straight, "--max-steps", 13).wait() == [0]
    a, b = losses(out), losses(straight)
    assert [row["step"] for row in a] == list(range(1, 14))
    for one, other in zip(a, b, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_when_one_dies_the_other_does_not_wait_for_ever(tmp_path, number):
    out = tmp_path / "run"
    start = time.monotonic()
    group = runs.training(out, "--max-steps", 50, hook=runs.die_at, args=(4, 1, number), world=2)
    codes = group.wait(60)
    assert codes[1] == -number
    assert codes[0] not in (0, 2, 143)
    assert time.monotonic() - start < 60


def test_all_refuse_what_the_first_one_finds(tmp_path):
    out = tmp_path / "run"
    assert runs.training(out, "--max-steps", 1).wait() == [0]
    group = runs.training(out, "--max-steps", 2, "--train.learning-rate", 0.5, world=2)
    assert group.wait(60) == [2, 2]
    for rank in (0, 1):
        assert "train.learning_rate: 0.004 -> 0.5" in group.err(rank)
        assert "Traceback" not in group.err(rank)
    config = json.loads((out / "config.json").read_text())
    assert config["train"]["learning_rate"] != 0.5


def test_the_readers_of_a_rank_that_dies_go_with_it(tmp_path):
    """Orphans would hold its connections open, and the other ranks would wait for an answer."""
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(24):
        Image.new("L", (8, 8), i).save(folder / f"{i:02}.png")
    flags = ["--data.path", folder, "--model.sample-size", 8, "--model.in-channels", 1, "--data.num-workers", 2]
    out = tmp_path / "run"
    group = runs.training(
        out, *flags, "--max-steps", 50, preset="folder", hook=runs.slow_readers, args=(100, 1), world=2
    )
    group.until(lambda: (out / "metrics.jsonl").exists())
    time.sleep(1.5)
    group.kill(signal.SIGKILL, rank=1)
    codes = group.wait(45)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, 2, 143)


@pytest.mark.parametrize(("differs", "sentence"), [("missing", "photos"), ("pixels", "process 1 was started for")])
def test_a_disk_that_differs_on_one_machine_ends_all(tmp_path, differs, sentence):
    """Without an agent that ends the others, as under SLURM."""
    rng = np.random.default_rng(0)
    for rank in (0, 1):
        folder = tmp_path / str(rank) / "photos"
        folder.mkdir(parents=True)
        for name in range(0 if rank and differs == "missing" else 20):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    data = ["--data.path", "photos", "--model.sample-size", 8, "--max-steps", 1]
    group = runs.training(tmp_path / "run", *data, hook=runs.elsewhere, args=(str(tmp_path),), world=2, preset="folder")
    assert group.wait(60) == [2, 2]
    for rank in (0, 1):
        assert sentence in group.err(rank)
        assert "Traceback" not in group.err(rank)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("own", "code"), [(["--data.num-workers", 1], 0), (["--train.sample-every", 1], 2)])
def test_machines_may_differ_in_readers_and_not_in_what_is_done(tmp_path, own, code):
    group = runs.training(tmp_path / "run", "--max-steps", 1, world=2, of_second=own)
    assert group.wait(60) == [code, code], group.err()
    assert ("process 1 was started for another run" in group.err()) == (code == 2)
