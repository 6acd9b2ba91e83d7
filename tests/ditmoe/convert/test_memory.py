"""A large checkpoint is converted in little memory."""

import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ditmoe.convert import tensors
from ditmoe.convert.tensors import Tensors, save
from ditmoe.files import whole
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


class Watched(BytesIO):
    """Notes how much of a folder's mapped files is in memory whenever it is written to."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.seen = str(folder), list[int]()

    def write(self, content: bytes | memoryview) -> int:  # type: ignore[override]
        lines = Path("/proc/self/smaps").read_text().splitlines()
        resident = [lines[i + 4] for i, line in enumerate(lines) if self.folder in line]
        assert all(line.startswith("Rss:") for line in resident)
        self.seen.append(1024 * sum(int(line.split()[1]) for line in resident))
        return super().write(content)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_pt_file_is_written_with_about_one_tensor_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_LET_GO", 2**20)
    weights = {f"{i}": torch.randn(1024, 512, generator=torch.Generator().manual_seed(i)) for i in range(16)}  # 2 MiB
    weights["odd"] = torch.randn(3).bfloat16()
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file({name: weights[name] for name in list(weights)[:9]}, files[0])
    save_file({name: weights[name] for name in list(weights)[9:]}, files[1])
    table, names = torch.ones(4), {f"their {name}": name for name in weights}
    save(out := Watched(tmp_path), names, files, {"table": table})
    torch.save({"table": table, **{new: weights[old] for new, old in names.items()}}, expected := BytesIO())
    assert out.getvalue() == expected.getvalue()
    assert 2 * 2**20 <= max(out.seen) < 3 * 2**20  # of 32


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, OSError])
def test_a_pt_file_that_is_stopped_leaves_nothing(tmp_path: Path, stopped: type[BaseException]) -> None:
    class Stopped(BytesIO):
        def write(self, content: bytes | memoryview) -> int:  # type: ignore[override]
            if self.tell() > 5000:
                raise stopped
            return super().write(content)

    save_file({"a": torch.ones(1000), "b": torch.ones(1000)}, file := tmp_path / "a.safetensors")
    with pytest.raises(stopped), whole(tmp_path / "out.pt"):
        save(Stopped(), {"a": "a", "b": "b"}, [file], {})
    assert [*tmp_path.iterdir()] == [file]
