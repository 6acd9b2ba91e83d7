"""Every check of the accelerator, tiny, on the CPU; at its real size where there is one (-m gpu)."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from ditmoe.analysis import budget
from ditmoe.moe import MoELayer
from tests.gpu import __main__ as table
from tests.gpu import checks
from tests.gpu.checks import CHECKS, REAL, TINY, Row

CPU = torch.device("cpu")


def wrong(rows: list[Row]) -> list[Row]:
    assert rows
    return [row for row in rows if not row.good]


@pytest.mark.parametrize("name", CHECKS)
def test_on_the_cpu(name: str) -> None:
    assert not wrong(CHECKS[name](CPU, TINY))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator")
@pytest.mark.parametrize("name", CHECKS)
def test_on_the_accelerator(name: str) -> None:
    assert not wrong(CHECKS[name](torch.accelerator.current_accelerator(), REAL))


def test_a_layer_that_waits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = MoELayer.forward

    def waiting(self: MoELayer, *args: Any) -> Any:
        assert args[0].sum().isfinite()
        return forward(self, *args)

    monkeypatch.setattr(MoELayer, "forward", waiting)
    (row,) = wrong(checks.check_waits(CPU, TINY))
    assert "blocks.py 1" in row.found  # one block of two has experts


def test_waits_on_a_gpu_are_counted_by_file(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with checks.waits(torch.device("cuda")) as found:
        for text in ("called a synchronizing CUDA operation (Triggered internally)", "a prototype"):
            warnings.warn(text, stacklevel=1)
    assert (found, modes) == ({"test_checks.py": 1}, ["warn", "default"])


def test_a_layer_that_is_wrong_and_memory_that_was_not_planned_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, saved = MoELayer.forward, budget.activations
    monkeypatch.setattr(MoELayer, "forward", lambda self, *args: (1.1 * forward(self, *args)[0], None))
    assert len(wrong(checks.check_layer(CPU, TINY))) == 4
    monkeypatch.setattr(budget, "activations", lambda *args: [1.1 * x for x in saved(*args)])
    assert len(wrong(checks.check_memory(CPU, TINY))) == 1


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    two = {"a": lambda device, size: 1 / 0, "b": lambda device, size: [Row("x", "1", "at most 2", True)]}
    monkeypatch.setattr(table, "CHECKS", two)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: CPU)
    monkeypatch.setattr("sys.argv", ["gpu", str(tmp_path)])
    assert table.main() == 1
    text = (tmp_path / "gpu-checks.md").read_text()
    assert text == capsys.readouterr().out
    assert f"torch {torch.__version__}, commit " in text
    assert "| a | it ends | ZeroDivisionError: division by zero | no error | **no** |" in text
    assert "| b | x | 1 | at most 2 | yes |" in text
    assert "2 rows, 1 not good" in text
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert table.main() == 0
    assert "there is no GPU here" in capsys.readouterr().out
