"""`pip install .` outside of the clone: the package is whole, and its command trains alone and under a launcher."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("ditmoe", "samplers", "eval")
TINY = ["digits", "--max-steps", "3", "--model.hidden-size", "32", "--model.depth", "2", "--model.num-heads", "2",
        "--model.patch-size", "4", "--train.batch-size", "16", "--sample.num", "20", "--sample.steps", "2"]  # fmt: skip


def done(*command: object, cwd: Path, **more: str) -> str:
    """The output of a command that knows nothing of the clone."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **more}
    ended = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a folder of its own, for builds write beside what they read."""
    folder = tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / "source" / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    done(*pip, "--wheel-dir", folder, folder / "source", cwd=folder)
    (built,) = folder.glob("ditmoe-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an empty environment with the wheel in it, which borrows the packages that ours depends on."""
    environment = tmp_path_factory.mktemp("environment")
    done(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    interpreter = environment / "bin/python"
    install = (sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", "--no-deps", "--no-index")
    done(*install, wheel, cwd=environment)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(done(interpreter, "-c", where, cwd=environment).strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith(tuple(f"{p}/" for p in PACKAGES))}
    there = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert packed == there


def test_the_installed_command_trains_alone_and_launched(python: Path, tmp_path: Path) -> None:
    ditmoe = python.with_name("ditmoe")
    assert done(ditmoe, "--help", cwd=tmp_path).count("\n  ") == 10
    assert "1497 real 8x8 digits" in done(ditmoe, "train", *TINY, "--out", "alone", cwd=tmp_path)
    launch = (python, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", 0)
    words = ("-m", "ditmoe", "train", *TINY, "--out", "launched")
    assert "training on 2 process(es)" in done(*launch, *words, cwd=tmp_path, ACCELERATE_USE_CPU="true")
    for run, command in (("alone", ["ditmoe"]), ("launched", ["python", "-m", "ditmoe"])):
        report = json.loads((tmp_path / run / "report.json").read_text())
        assert report["training"]["steps"] == 3
        assert (report["score"]["n_ref"], report["score"]["n_gen"]) == (1497, 20)
        assert "</html>" in (tmp_path / run / "index.html").read_text()
        typed = (tmp_path / run / "command.txt").read_text().splitlines()
        assert typed == [" ".join([*command, "train", *TINY, "--out", run])]
