"""Checkpoint folders: complete or absent, verified, pruned."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditmoe.run_folder import checkpoint
from ditmoe.run_folder import writer as writer_module
from ditmoe.run_folder.writer import Writer
from tests import checkpoints


def write(root: Path, step: int) -> Path:
    return writer_module.save(root, step, {"model": {"w": torch.full((3,), float(step))}}, {"note": step})


def test_round_trip(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    assert path.name == "step-000007"
    parts, state = checkpoints.load(path)
    assert parts["model"]["w"].tolist() == [7, 7, 7]
    assert state == {"step": 7, "note": 7}
    assert checkpoints.newest(tmp_path) == path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000007"]


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("fault", ["flip", "truncate", "delete"])
def test_every_damage_is_found_and_the_one_before_is_used(tmp_path: Path, name: str, fault: str) -> None:
    older = write(tmp_path, 1)
    file = write(tmp_path, 2) / name
    raw = file.read_bytes()
    if fault == "delete":
        file.unlink()
    else:
        middle = len(raw) // 2
        rest = b"" if fault == "truncate" else bytes([raw[middle] ^ 8]) + raw[middle + 1 :]
        file.write_bytes(raw[:middle] + rest)
    assert checkpoints.newest(tmp_path) == older


@pytest.mark.parametrize("sizes", [(5,), (2, 3), (4, 0, 1), (1, 1, 1, 2)])
def test_rows_of_a_tensor_in_pieces(sizes: tuple[int, ...]) -> None:
    whole = torch.arange(15.0).view(5, 3)
    saved = checkpoint.Saved(whole.split(sizes))
    assert (saved.shape, saved.dtype) == (whole.shape, whole.dtype)
    assert torch.equal(saved.whole(), whole)
    for start in range(6):
        for stop in range(start, 7):
            assert torch.equal(saved.rows(start, stop), whole[start:stop])


def test_a_number_is_whole_and_pieces_that_do_not_fit_are_refused() -> None:
    assert checkpoint.Saved([torch.tensor(7.0)]).whole() == 7
    for other in (torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.float64), torch.tensor(0.0)):
        with pytest.raises(ValueError, match="do not fit together"):
            checkpoint.Saved([torch.zeros(2, 3), other])


def test_a_hostile_file_with_a_fitting_manifest_is_a_sentence(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    raw = (2**60).to_bytes(8, "little") + b"{}"
    (path / "model.safetensors").write_bytes(raw)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoints.newest(tmp_path) == path
    with pytest.raises(ValueError, match="step-000001 holds a file that cannot be read"):
        checkpoints.load(path)


def test_prune_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        write(tmp_path, step)
    (tmp_path / "step-000101.tmp-1").mkdir()
    checkpoint.remove_unfinished(tmp_path)
    writer_module.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000010", "step-000100"]
    writer_module.prune(tmp_path, 0)
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "step-000100" / "state.json").write_text("{}")
    write(tmp_path, 101)
    writer_module.prune(tmp_path, 2)
    assert (tmp_path / "step-000010").exists()  # one of the newer two is damaged
    write(tmp_path, 102)
    writer_module.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000101", "step-000102"]


def test_a_step_that_is_saved_whole_is_left_alone_and_a_damaged_one_is_written_again(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    before = path.stat().st_ino
    assert write(tmp_path, 1).stat().st_ino == before
    (path / "model.safetensors").write_bytes(b"")
    assert checkpoint.find_fault(write(tmp_path, 1)) is None
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="model w is not finite at step 3"):
        writer_module.save(tmp_path, 3, {"model": {"w": torch.tensor([1.0, float("nan")])}}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_the_writer_starts_no_team_of_threads_of_its_own(tmp_path: Path) -> None:
    script = """
import os, sys, torch
from pathlib import Path
from ditmoe.run_folder.writer import Writer

torch.set_num_threads(4)
weights = torch.randn(1 << 20).exp()
before = len(os.listdir("/proc/self/task"))
writer = Writer(Path(sys.argv[1]), 2, tolerant=False)
writer.save(3, {"model": {"w": weights}}, {"step": 3}, wait=True)
print(before, len(os.listdir("/proc/self/task")))
"""
    ran = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    before, after = map(int, ran.stdout.split())
    assert before >= 4
    assert after <= before + 1


def test_the_writer_saves_a_state_as_it_was_and_says_what_failed(tmp_path: Path, monkeypatch, capsys) -> None:
    weight = torch.zeros(3)
    with Writer(tmp_path, 2, tolerant=False) as writer:
        writer.save(1, {"model": {"w": weight}}, {}, wait=False)
        weight += 1  # training goes on
    parts, _ = checkpoints.load(tmp_path / "step-000001")
    assert parts["model"]["w"].tolist() == [0, 0, 0]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer_module, "sync", full)
    with Writer(tmp_path, 2, tolerant=True) as writer:
        writer.save(2, {"model": {"w": weight}}, {}, wait=False)
        with pytest.raises(OSError, match="No space left"):  # the last one must be written
            writer.save(3, {"model": {"w": weight}}, {}, wait=True)
    assert "warning: a checkpoint could not be written" in capsys.readouterr().out
    with Writer(tmp_path, 2, tolerant=False) as writer:
        writer.save(2, {"model": {"w": weight}}, {}, wait=False)
        with pytest.raises(OSError, match="No space left"):
            writer.save(3, {"model": {"w": weight}}, {}, wait=False)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_an_interrupted_save_is_never_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = write(tmp_path, 1)

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, 2)
    assert checkpoints.newest(tmp_path) == older


def test_a_manifest_that_names_nothing_is_no_checkpoint(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    (path / "manifest.json").write_text(json.dumps({"format": 1, "step": 3, "files": {}}))
    with pytest.raises(ValueError, match="is whole"):
        checkpoints.newest(tmp_path)
