"""Saves that are cut short, checkpoints that rot, disks that fill."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from ditmoe.run_folder import checkpoint, writer
from tests import checkpoints
from tests.faults import runs
from tests.processes import start


def newest_step(run):
    path = checkpoints.newest(run / "checkpoints")
    return -1 if path is None else int(path.name.removeprefix("step-"))


def same(a, b):
    (parts_a, state_a), (parts_b, state_b) = checkpoints.load(a), checkpoints.load(b)
    for part in ("model", "ema", "optimizer"):
        assert parts_a[part].keys() == parts_b[part].keys()
        assert all(torch.equal(value, parts_b[part][name]) for name, value in parts_a[part].items())
    assert state_a["data"] == state_b["data"]


def test_a_save_that_is_killed_at_any_point_loses_nothing(tmp_path):
    """Every open, fsync (before, after), rename and removal of a save and of the pruning after it is once the last."""
    root = tmp_path / "checkpoints"
    for step in (1, 2):
        assert start(runs.save_and_die, root, step, 0, folder=tmp_path).wait() == [0]
    before, at, kills = 2, 0, 0
    while True:
        at += 1
        group = start(runs.save_and_die, root, before + 1, at, folder=tmp_path)
        code = group.wait()[0]
        newest = checkpoints.newest(root)
        assert newest is not None
        assert re.fullmatch(r"step-\d{6}", newest.name)
        step = int(newest.name.removeprefix("step-"))
        assert step in (before, before + 1)
        assert checkpoints.load(newest)[1]["step"] == step
        whole = [p for p in root.glob("step-??????") if checkpoint.find_fault(p) is None]
        assert len(whole) >= 2  # never fewer than were asked for
        before = step
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert kills >= 20
    assert int(group.out()) < at
    assert sorted(p.name for p in root.iterdir()) == [f"step-{n:06d}" for n in (before - 1, before)]  # no leftovers


def test_with_one_to_keep_there_is_a_whole_one_at_every_instant(tmp_path, monkeypatch):
    seen = []
    remove = writer._remove

    def watched(path):
        seen.append([p.name for p in tmp_path.glob("step-??????") if checkpoint.find_fault(p) is None])
        remove(path)

    monkeypatch.setattr(writer, "_remove", watched)
    for step in (1, 2, 3):
        writer.save(tmp_path, step, {"model": {"w": torch.zeros(2)}}, {})
        if step == 3:
            (tmp_path / "step-000003" / "model.safetensors").write_bytes(b"rot")  # before it is read back
        writer.prune(tmp_path, 1)
    assert seen == [["step-000001", "step-000002"]]  # at step 3 nothing was removed
    assert checkpoints.newest(tmp_path).name == "step-000002"


@pytest.mark.parametrize("when", ["continue", "stop"])
def test_a_full_disk_leaves_the_older_checkpoints_alone(tmp_path, when):
    out = tmp_path / "run"
    flags = ["--max-steps", 5, "--train.checkpoint-every", 1, "--train.on-save-error", when]
    group = runs.training(out, *flags, hook=runs.full_disk, args=(str(out), (3, 4)))
    [code] = group.wait()
    left = sorted(p.name for p in (out / "checkpoints").iterdir())
    if when == "continue":
        assert code == 0, group.err()
        assert group.out().count("a checkpoint could not be written") == 2
        assert "No space left" in group.out()
        assert left == ["step-000002", "step-000005"]
    else:
        assert code == 1
        assert "No space left" in group.err()
        assert left == ["step-000001", "step-000002"]
        assert checkpoint.find_fault(out / "checkpoints" / "step-000002") is None
        assert runs.training(out, *flags).wait() == [0]  # there is room again
        assert newest_step(out) == 5


def test_a_final_checkpoint_that_cannot_be_written_is_an_error(tmp_path):
    out = tmp_path / "run"
    group = runs.training(out, "--max-steps", 2, hook=runs.full_disk, args=(str(out), (2,)))
    assert group.wait() == [1]
    assert "No space left" in group.err()
    assert not (out / "model").exists()
    assert not list((out / "checkpoints").glob("*"))


def test_no_whole_checkpoint_is_an_error_that_names_the_damage(tmp_path):
    out = tmp_path / "run"
    assert runs.training(out, "--max-steps", 2, "--train.checkpoint-every", 1).wait() == [0]
    for path in (out / "checkpoints").iterdir():
        (path / "ema.safetensors").write_bytes(b"x")
    group = runs.training(out, "--max-steps", 3, "--train.checkpoint-every", 1)
    assert group.wait() == [2]
    for step in (1, 2):
        assert f"step-00000{step} is damaged (ema.safetensors has 1 bytes, not" in group.out()
    assert "no checkpoint in" in group.err()
    assert "Traceback" not in group.err()


def test_a_checkpoint_of_another_network_is_refused_before_anything_is_touched(tmp_path):
    out = tmp_path / "run"
    assert runs.training(out, "--max-steps", 1).wait() == [0]
    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace('"num_experts": 4', '"num_experts": 8'))
    group = runs.training(out, "--max-steps", 2, "--moe.num-experts", 8)
    assert group.wait() == [2]
    assert group.err().count("torch.float32 (4, ") >= 1
    assert "and " in group.err()
    assert "is of another network" in group.err()
    (out / "config.json").write_text(config)
    group = runs.training(out, "--max-steps", 2, "--moe.num-experts", 8)
    assert group.wait() == [2]
    assert "moe.num_experts: 4 -> 8" in group.err()


def test_a_second_run_on_the_same_folder_is_refused(tmp_path):
    out = tmp_path / "run"
    first = runs.training(out, "--max-steps", 900)
    first.until(lambda: (out / "metrics.jsonl").exists())
    second = runs.training(out, "--max-steps", 900, name="second")
    assert second.wait() == [2]
    assert f"is in use by process {first.pids[0]} on " in second.err()
    first.kill(signal.SIGKILL)  # a lock ends with its holder, however that ends
    first.wait()
    assert runs.training(out, "--max-steps", 2).wait() == [0]


def test_a_changed_data_set_is_refused(tmp_path):
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(20):
        Image.new("L", (8, 8), i).save(folder / f"{i:02}.png")
    out = tmp_path / "run"
    flags = ["--data.path", folder, "--model.sample-size", 8, "--model.in-channels", 1]
    assert runs.training(out, *flags, "--max-steps", 1, preset="folder").wait() == [0]
    Image.new("L", (8, 8), 200).save(folder / "07.png")  # as many as before, one is another
    group = runs.training(out, *flags, "--max-steps", 2, preset="folder")
    assert group.wait() == [2]
    assert "the data set is not the one that" in group.err()
    Image.new("L", (8, 8), 7).save(folder / "07.png")
    (folder / "19.png").unlink()
    assert runs.training(out, *flags, "--max-steps", 2, preset="folder").wait() == [2]
    Image.new("L", (8, 8), 19).save(folder / "19.png")
    assert runs.training(out, *flags, "--max-steps", 2, preset="folder").wait() == [0]


@pytest.mark.parametrize("what", ["with its model", "without"])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(tmp_path, what):
    out = tmp_path / "run"
    flags = ["--train.checkpoint-every", 2, "--train.log-every", 1]
    assert runs.training(out, *flags, "--max-steps", 5).wait() == [0]
    shutil.rmtree(out / "checkpoints")
    if what == "without":
        shutil.rmtree(out / "model")
    log = (out / "metrics.jsonl").read_text()
    group = runs.training(out, *flags, "--max-steps", 7, world=2)
    assert group.wait(60) == [2, 2]
    assert "has been trained for 5 steps, but" in group.err()
    assert (out / "metrics.jsonl").read_text() == log
    if what == "with its model":  # nothing is left to do, so nothing is lost
        assert runs.training(out, *flags, "--max-steps", 5).wait() == [0]
        assert (out / "metrics.jsonl").read_text() == log


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path):
    out = tmp_path / "run"
    flags = ["--max-steps", 6, "--train.checkpoint-every", 4, "--train.log-every", 1]
    assert runs.training(out, *flags, hook=runs.die_at, args=(4, 0)).wait() == [-signal.SIGKILL]
    assert len(runs.rows(out)) == 3
    assert runs.training(out, *flags).wait() == [0]


@pytest.mark.parametrize("when", ["continue", "stop"])
def test_a_run_whose_first_checkpoints_failed_begins_again(tmp_path, when):
    out = tmp_path / "run"
    flags = ["--max-steps", 3, "--train.checkpoint-every", 1, "--train.on-save-error", when]
    assert runs.training(out, *flags, hook=runs.full_disk, args=(str(out), (1, 2, 3))).wait() == [1]
    assert len(runs.rows(out)) >= 2
    assert runs.training(out, *flags).wait() == [0]  # there is room again


def test_a_finished_run_without_checkpoints_is_finished_for_fewer_steps_too(tmp_path):
    out = tmp_path / "run"
    assert runs.training(out, "--max-steps", 5).wait() == [0]
    shutil.rmtree(out / "checkpoints")
    assert runs.training(out, "--max-steps", 3).wait() == [0]
    assert len(runs.rows(out)) == 5


@pytest.mark.parametrize("world", [1, 2])
def test_killed_in_a_step_it_ends_as_if_nothing_had_been(tmp_path, world):
    out, straight = tmp_path / "run", tmp_path / "straight"
    flags = ["--max-steps", 6, "--train.checkpoint-every", 2]
    assert runs.training(straight, *flags, world=world).wait() == [0] * world
    codes = runs.training(out, *flags, hook=runs.die_at, args=(6, 0), world=world).wait(60)
    assert codes[0] == -signal.SIGKILL
    assert newest_step(out) in (2, 4)  # the last one may still have been on its way to the disk
    assert runs.training(out, *flags, world=world).wait() == [0] * world
    same(out / "checkpoints/step-000006", straight / "checkpoints/step-000006")


def test_an_old_checkpoint_that_cannot_be_removed_costs_a_warning(tmp_path):
    out = tmp_path / "run"
    flags = ["--max-steps", 4, "--train.checkpoint-every", 1]
    assert runs.training(out, *flags, hook=runs.failing_removal).wait() == [0]
    assert newest_step(out) == 4
    assert (out / "model").is_dir()
    assert runs.training(out, *flags[2:], "--max-steps", 5).wait() == [0]  # where it can be removed
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000004", "step-000005"]


def test_a_file_in_the_way_of_a_checkpoint(tmp_path):
    (tmp_path / "step-000002").write_text("what?")
    (tmp_path / "step-000003.tmp-1").write_text("what?")
    assert checkpoints.newest(tmp_path) is None
    checkpoint.remove_unfinished(tmp_path)
    assert writer.save(tmp_path, 2, {"model": {"w": torch.zeros(2)}}, {}).is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


def test_every_file_is_on_the_disk_before_the_name_that_promises_it(tmp_path, monkeypatch):
    """A killed process cannot show this, a lost power supply would: what is synced when."""
    done, sync, rename, replace = [], os.fsync, os.rename, os.replace

    def fsync(descriptor):
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        sync(descriptor)

    def noted(work):
        return lambda source, target: (done.append(("rename", Path(target))), work(source, target))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", noted(rename))
    monkeypatch.setattr(os, "replace", noted(replace))
    root = tmp_path / "checkpoints"
    final = writer.save(root, 1, {name: {"w": torch.zeros(2)} for name in ("model", "ema")}, {})
    temporary = next(path.parent for what, path in done if path.name == "manifest.json")
    before = done.index(("rename", final))
    folder = done.index(("sync", temporary))
    for name, unfinished in (("model.safetensors", "part"), ("ema.safetensors", "part"), ("state.json", "tmp"),
                             ("manifest.json", "tmp")):  # fmt: skip
        synced = done.index(("sync", temporary / f"{name}.{unfinished}"))
        assert synced < done.index(("rename", temporary / name)) < folder < before
    assert before < done.index(("sync", root))


def test_a_longer_run_that_is_killed_before_its_export_makes_it_later(tmp_path):
    from ditmoe.pipeline import trained_steps

    out = tmp_path / "run"
    assert runs.training(out, "--max-steps", 1).wait() == [0]
    (out / "model").rename(tmp_path / "old")
    assert runs.training(out, "--max-steps", 2).wait() == [0]
    (out / "model").rename(tmp_path / "new")
    (tmp_path / "old").rename(out / "model")  # as if killed between the last checkpoint and the export
    assert trained_steps(out / "model") == 1
    assert runs.training(out, "--max-steps", 2).wait() == [0]
    assert trained_steps(out / "model") == 2
