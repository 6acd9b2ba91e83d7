"""Rules of the house: imports point one way, no dead configuration field, nothing happens at import."""

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ditmoe.config.sections import Config

ROOT = Path(__file__).parents[2]
RANK = {  # a wing or a file of the trunk a line: it may import those of a lower rank
    "files": 0,
    "rng": 0,
    "config": 1,
    "moe": 1.5,
    "model": 2,
    "store": 3,
    "objective": 3,
    "launch": 4,
    "data": 5,
    "pipeline": 6,
    "run_folder": 7,
    "generate": 8,
    "training": 8,
    "analysis": 9,
    "convert": 9.5,
    "report": 10,
    "play": 10.5,
    "cli": 11,
    "__main__": 12,
}
OTHERS = {"samplers": {"samplers"}, "eval": {"eval"}, "ditmoe": {"ditmoe"}}
HEAVY = {
    "accelerate": {"launch", "training", "store"},
    "samplers": {"objective", "pipeline", "analysis", "play"},
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, absolute; relative imports are resolved."""
    package = path.relative_to(ROOT).parent.parts
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            inside = {f"{module}.{alias.name}" for alias in node.names if not alias.name.startswith("_")}
            found |= inside if module == "ditmoe" else {module}
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ["samplers", "eval", "ditmoe/moe"])
def test_independent_rooms_know_nobody_of_ours(package: str) -> None:
    own = package.replace("/", ".")
    for path in files(package):
        for module in imports(path):
            top = module.split(".")[0]
            own_module = module == own or module.startswith(own + ".")
            ruled = package == "ditmoe/moe" and module in (
                "ditmoe.config.rule",
                "ditmoe.config.policy",
            )  # without torch
            assert top not in OTHERS or own_module or ruled, f"{path} imports {module}"


def test_imports_of_ditmoe_point_one_way() -> None:
    for path in files("ditmoe"):
        room = path.relative_to(ROOT / "ditmoe").parts[0].removesuffix(".py")
        for module in imports(path):
            parts = module.split(".")
            assert parts[0] != "eval" or room == "__main__", f"{path} imports {module}"
            if parts[0] == "ditmoe" and len(parts) > 1 and parts[1] != room:
                assert RANK[parts[1]] < RANK[room], f"{path} imports {module}"
            if parts[0] in HEAVY:
                assert room in HEAVY[parts[0]], f"{path} imports {module}"


def test_every_room_has_a_rank() -> None:
    rooms = {p.relative_to(ROOT / "ditmoe").parts[0].removesuffix(".py") for p in files("ditmoe")}
    assert rooms - {"__init__"} == RANK.keys()


def leaves(cls: type) -> list[str]:
    names = []
    for field in dataclasses.fields(cls):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        names += leaves(type(default)) if dataclasses.is_dataclass(default) else [field.name]
    return names


def test_every_config_field_is_read_somewhere() -> None:
    paths = [*files("ditmoe"), ROOT / "train.py", ROOT / "sample.py"]
    code = "\n".join(p.read_text() for p in paths if p.parent.name != "config")
    unread = [name for name in leaves(Config) if not re.search(rf"\.{name}\b", code)]
    assert not unread


@pytest.mark.parametrize("door", ["train.py", "sample.py"])
def test_doors_are_small(door: str) -> None:
    assert len((ROOT / door).read_text().splitlines()) <= 30


def test_nothing_happens_at_import() -> None:
    code = (
        "import random, numpy, torch\n"
        "torch.manual_seed(1); numpy.random.seed(1); random.seed(1)\n"
        "before = (torch.random.get_rng_state().sum(), numpy.random.get_state()[1].sum(), torch.get_num_threads(),\n"
        "          torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32)\n"
        "import ditmoe.training.loop, ditmoe.report.write, ditmoe.generate.request, samplers\n"
        "import eval.fid, eval.networks.extractors\n"
        "after = (torch.random.get_rng_state().sum(), numpy.random.get_state()[1].sum(), torch.get_num_threads(),\n"
        "         torch.get_default_dtype(), torch.backends.cuda.matmul.allow_tf32)\n"
        "assert before == after\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_no_unpickling() -> None:
    for path in [*files("ditmoe"), *files("samplers"), *files("eval")]:
        code = path.read_text()
        assert "pickle.load" not in code
        assert "allow_pickle=True" not in code
        for call in re.findall(r"torch\.load\([^)]*\)", code):
            assert "weights_only=True" in call, f"{path}: {call}"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_can_be_imported(path: Path) -> None:
    importlib.import_module(f"benchmarks.{path.stem}")
