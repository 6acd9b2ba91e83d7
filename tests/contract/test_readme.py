"""Every command of the README is one that the programs take."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from ditmoe import cli
from ditmoe.config.convert import ConvertArgs, ExportArgs
from ditmoe.config.file import save
from ditmoe.config.presets import PRESETS
from ditmoe.config.sample import AnalyzeArgs, CentroidsArgs, ExposureArgs, SampleArgs
from eval import compare, sweep
from eval.fid import Arguments
from samplers import SAMPLERS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip() for block in re.findall(r"```\n(.*?)```", README, re.S) for line in block.splitlines()
]


def test_there_are_commands() -> None:
    assert sum(c.startswith("python train.py") for c in COMMANDS) >= 5
    assert sum(c.startswith("python sample.py") for c in COMMANDS) >= 2


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c])
def test_train_commands(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(PRESETS["digits"], tmp_path / "config.json")
    argv = shlex.split(command.split("train.py", 1)[1])
    argv = [str(tmp_path / "config.json") if a.endswith("config.json") else a for a in argv]
    if argv == ["--help"]:
        with pytest.raises(SystemExit) as stopped:
            cli.parse_train(argv)
        assert stopped.value.code == 0
    else:
        cli.parse_train(argv)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python sample.py")])
def test_sample_commands(command: str) -> None:
    cli.parse(SampleArgs, shlex.split(command)[2:])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m eval.fid")])
def test_score_commands(command: str) -> None:
    tyro.cli(Arguments, args=shlex.split(command)[3:])


def test_other_commands() -> None:
    (ranked,) = (c for c in COMMANDS if c.startswith("python -m eval.compare"))
    tyro.cli(compare.Arguments, args=shlex.split(ranked)[3:])
    (swept,) = (c for c in COMMANDS if c.startswith("python -m eval.sweep"))
    tyro.cli(sweep.Arguments, args=shlex.split(swept)[3:])
    (meter,) = (c for c in COMMANDS if c.startswith("python -m ditmoe exposure"))
    assert set(cli.parse(ExposureArgs, shlex.split(meter)[4:]).samplers) <= SAMPLERS.keys()
    for looked in (c for c in COMMANDS if c.startswith("python -m ditmoe analyze")):
        cli.parse(AnalyzeArgs, shlex.split(looked)[4:])
    (fit,) = (c for c in COMMANDS if c.startswith("python -m ditmoe centroids"))
    cli.parse(CentroidsArgs, shlex.split(fit)[4:])
    (brought,) = (c for c in COMMANDS if c.startswith("python -m ditmoe convert"))
    cli.parse(ConvertArgs, shlex.split(brought)[4:])
    (gift,) = (c for c in COMMANDS if c.startswith("python -m ditmoe export"))
    cli.parse(ExportArgs, shlex.split(gift)[4:])


def test_make_targets_and_links_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([\w-]+)", README):
        assert f"\n{target}:" in makefile
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_presets_named_in_the_readme_exist() -> None:
    for name in re.findall(r"`(dit-moe-[^`]+)`", README):
        assert name in PRESETS


def test_no_figure_was_left_open() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        assert not re.search(r"@[A-Za-z0-9]+@", page.read_text()), page


def test_commands_of_distillation_are_taken() -> None:
    text = (ROOT / "docs" / "distill.md").read_text().replace("\\\n", " ")
    commands = [c for c in re.findall(r"^python train.py ((?:fashion|digits) .*)$", text, re.M) if "--distill" in c]
    assert len(commands) == 4
    for command in commands:
        assert cli.parse_train(shlex.split(command)).distill.teachers
