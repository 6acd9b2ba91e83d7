"""A large checkpoint is converted in little memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditmoe.convert.tensors import Tensors
from tests.ditmoe.convert import checkpoints
from tests.ditmoe.convert.checkpoints import FLAGS, checkpoint


@pytest.mark.slow
def test_peak_memory_is_that_of_the_largest_tensor_and_the_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "D", 512)
    monkeypatch.setattr(checkpoints, "DEPTH", 4)
    monkeypatch.setattr(checkpoints, "EXPERTS", 30)
    weights = checkpoint("dit-moe")
    size = sum(value.nbytes for value in weights.values())
    assert size > 1.5e9
    torch.save(weights, tmp_path / "them.pt")
    del weights
    program = "import sys; from ditmoe.__main__ import main; sys.argv[0] = 'ditmoe'; sys.exit(main())"
    words = ["convert", str(tmp_path / "them.pt"), str(tmp_path / "out"), *FLAGS["dit-moe"][2:], "--num-heads", "8"]
    # started by a process without memory of its own: what a parent has at a fork counts as the child's
    command = [sys.executable, "-c", PEAK, sys.executable, "-c", program, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    peak = 1024 * int(done.stdout.split()[-1])
    largest = max(torch.Size(s).numel() * 4 for s in Tensors(_files(tmp_path / "out")).shapes.values())
    assert peak < 1.3 * largest + 2e9
    assert peak < size  # nowhere near the whole


PEAK = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def _files(folder: Path) -> list[Path]:
    return sorted((folder / "transformer").glob("*.safetensors"))
