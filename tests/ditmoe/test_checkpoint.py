"""Checkpoint folders: complete or absent, verified, pruned."""

import json
from pathlib import Path

import pytest
import torch

from ditmoe import checkpoint


def write(root: Path, step: int) -> Path:
    return checkpoint.save(root, step, {"model": {"w": torch.full((3,), float(step))}}, {"note": step})


def test_round_trip(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    assert path.name == "step-000007"
    parts, state = checkpoint.load(path)
    assert parts["model"]["w"].tolist() == [7, 7, 7]
    assert state == {"step": 7, "note": 7}
    assert checkpoint.newest(tmp_path) == path
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
    assert checkpoint.newest(tmp_path) == older


def test_prune_keeps_the_newest_and_clears_leftovers(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        write(tmp_path, step)
    (tmp_path / "step-000101.tmp-1").mkdir()
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000010", "step-000100"]
    checkpoint.prune(tmp_path, 0)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_save_is_never_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = write(tmp_path, 1)

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, 2)
    assert checkpoint.newest(tmp_path) == older


def test_a_manifest_that_names_nothing_is_no_checkpoint(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    (path / "manifest.json").write_text(json.dumps({"format": 1, "step": 3, "files": {}}))
    with pytest.raises(ValueError, match="is whole"):
        checkpoint.newest(tmp_path)
