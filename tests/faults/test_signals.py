"""A signal in every phase of a run: saved, left with 143, and the run goes on as if nothing had been."""

import os
import signal
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.faults import runs
from tests.faults.test_checkpoints import newest_step, same
from tests.processes import door, start

STEPS = ["--max-steps", 6, "--train.accumulation", 4]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    assert runs.training(out, *STEPS).wait() == [0]
    return out


@pytest.mark.parametrize(
    ("place", "step", "number"),
    [
        ("first step", 0, signal.SIGTERM), ("save", None, signal.SIGTERM), ("micro-step", 1, signal.SIGTERM),
        ("micro-step", 1, signal.SIGINT), ("micro-step", 1, signal.SIGUSR1),
    ],
)  # fmt: skip
def test_in_a_step_and_in_a_save(tmp_path, straight, place, step, number):
    out = tmp_path / "run"
    every = ["--train.checkpoint-every", 2 if place == "save" else 100]
    group = runs.training(out, *STEPS, *every, hook=runs.signal_in, args=(place, number))
    assert group.wait() == [143], group.err()
    assert "and saved; the same command goes on" in group.err()
    assert newest_step(out) == step or (step is None and newest_step(out) in (2, 3))  # a part of a step is thrown away
    assert runs.training(out, *STEPS, *every).wait() == [0]
    same(out / "checkpoints/step-000006", straight / "checkpoints/step-000006")


@pytest.mark.parametrize("world", [1, 2])
def test_while_waiting_for_data(tmp_path, world):
    out = tmp_path / "run"
    group = runs.training(out, "--max-steps", 6, hook=runs.slow_images, args=(30,), world=world)
    group.until(lambda: (out / "metrics.jsonl").exists())
    time.sleep(1.0)
    start = time.monotonic()
    group.kill(signal.SIGTERM)
    assert group.wait() == [143] * world, group.err()
    assert time.monotonic() - start < 10
    assert newest_step(out) == 0


def test_to_the_whole_group_with_readers_alive(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(40):
        Image.new("L", (8, 8), i).save(folder / f"{i}.png")
    flags = ["--data.path", folder, "--data.num-workers", 2, "--model.sample-size", 8, "--model.in-channels", 1]
    flags += ["--train.log-every", 1, "--max-steps", 900]
    out = tmp_path / "run"
    group = runs.training(out, *flags, preset="folder")
    group.until(lambda: (out / "metrics.jsonl").exists() and len(runs.rows(out)) > 2)
    group.kill(signal.SIGTERM)
    assert group.wait(30) == [143], group.err()
    stopped = newest_step(out)
    assert stopped > 1
    straight = tmp_path / "straight"
    flags = [*flags[:-1], stopped + 3]
    assert runs.training(out, *flags, preset="folder").wait() == [0]
    assert runs.training(straight, *flags, preset="folder").wait() == [0]
    same(*(run / f"checkpoints/step-{stopped + 3:06d}" for run in (out, straight)))


@pytest.mark.parametrize("to", ["the one that samples", "another", "all"])
def test_while_the_first_process_samples(tmp_path, to):
    out = tmp_path / "run"
    flags = ["--max-steps", 6, "--train.sample-every", 2]
    group = runs.training(out, *flags, hook=runs.lingering_samples, world=2)
    group.until(lambda: "sampling 2" in group.out())
    time.sleep(0.3)
    group.kill(signal.SIGTERM, {"the one that samples": 0, "another": 1, "all": None}[to])
    assert group.wait(30) == [143, 143], group.err()
    assert newest_step(out) == 2


def test_to_one_process_of_two_in_the_middle_of_training(tmp_path):
    out = tmp_path / "run"
    group = runs.training(out, "--max-steps", 900, "--train.log-every", 1, world=2)
    group.until(lambda: (out / "metrics.jsonl").exists() and len(runs.rows(out)) > 2)
    group.kill(signal.SIGTERM, rank=1)
    assert group.wait(30) == [143, 143], group.err() + group.err(1)
    assert newest_step(out) > 1


def test_a_second_signal_leaves_at_once_and_a_repeated_one_does_not(tmp_path):
    out = tmp_path / "run"
    group = runs.training(out, "--max-steps", 6, hook=runs.slow_steps, args=(60,), world=2)
    group.until(lambda: "training on 2" in group.out() and (out / "metrics.jsonl").exists())
    time.sleep(0.5)
    group.kill(signal.SIGTERM)
    group.kill(signal.SIGTERM)  # as a launcher hands it on
    time.sleep(2.5)
    assert all(os.path.exists(f"/proc/{pid}") for pid in group.pids)
    start = time.monotonic()
    group.kill(signal.SIGINT)
    assert group.wait() == [143, 143]
    assert time.monotonic() - start < 5
    assert "by a second signal" in group.err()


def test_a_second_signal_ends_a_process_that_waits_for_another(tmp_path):
    """It runs no handlers then: the other one is stopped, and the exchange of gradients hangs."""
    out = tmp_path / "run"
    group = runs.training(out, "--max-steps", 6, hook=runs.stop_peer, args=(3,), world=2)
    group.until(lambda: len(runs.rows(out)) == 2 if (out / "metrics.jsonl").exists() else False)
    time.sleep(1.0)
    group.kill(signal.SIGTERM, rank=0)
    time.sleep(2.5)
    assert os.path.exists(f"/proc/{group.pids[0]}/fd/0")
    group.kill(signal.SIGINT, rank=0)
    group.members[0].join(5)
    assert group.members[0].exitcode == 143
    assert "stopped at once by a second signal" in group.err()
    group.kill(signal.SIGKILL, rank=1)
    group.wait()


def test_after_training_while_the_page_is_made(tmp_path):
    out, latents = tmp_path / "run", tmp_path / "latents"
    latents.mkdir()
    save_file({"latents": torch.randn(32, 1, 8, 8), "labels": torch.arange(32) % 2}, latents / "0.safetensors")
    argv = ["digits", "--data.name", "latents", "--data.path", latents, "--out", out, *runs.TINY, "--max-steps", 2]
    argv += ["--sample.num", 20_000, "--sample.steps", 100]
    group = start(door, "train", argv, folder=tmp_path / "log")
    group.until(lambda: (out / "model" / "model_index.json").exists())
    time.sleep(0.5)
    second = start(door, "train", argv, folder=tmp_path / "second")
    assert second.wait() == [2]
    assert f"is in use by process {group.pids[0]} on " in second.err()
    group.kill(signal.SIGTERM)
    assert group.wait(30) == [143], group.err()
    assert not (out / "index.html").exists()  # the same command makes it: tests/faults/test_torn.py


def test_before_training(tmp_path):
    """While data are read, a signal ends the program the same way."""
    out = tmp_path / "run"
    group = runs.training(out, "--max-steps", 6, hook=time.sleep, args=(60,))
    group.until(lambda: os.path.exists(f"/proc/{group.pids[0]}"))
    time.sleep(1.0)
    group.kill(signal.SIGTERM)
    assert group.wait() == [143], group.err()
    assert not out.exists()
