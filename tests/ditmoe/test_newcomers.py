"""What newcomers type, and what comes back: the rows of docs/newcomers.md that were mended."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ditmoe import cli, pipeline
from ditmoe.config.contrast import ContrastArgs
from ditmoe.config.convert import ConvertArgs, ExportArgs
from ditmoe.config.sample import AnalyzeArgs, CentroidsArgs, ExposureArgs, SampleArgs
from ditmoe.config.sections import Config
from ditmoe.convert.export import export
from ditmoe.convert.tensors import Tensors
from ditmoe.data.folders import FolderImages
from ditmoe.generate.request import run
from tests.ditmoe.generate.test_request import Alone
from tests.ditmoe.test_saved_files import SAVED


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["m", "--out", ""], "error: --out is empty; give a value, or leave it out"),
        (["m", "--out="], "error: --out is empty"),
        (["", "--num", "2"], "error: the first word is empty"),
        (
            ["m", "--device", "cuda"],
            "error: there is no --device: the accelerator that torch finds is used",
        ),
        (["m", "--device=cuda"], "CUDA_VISIBLE_DEVICES=1 before the command chooses another one"),
    ],
)
def test_words_that_no_parser_should_see(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    for read in (lambda: cli.parse(SampleArgs, words), lambda: cli.parse_train(words)):
        with pytest.raises(SystemExit) as end:
            read()
        assert end.value.code == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("word", [*cli.MEANT, "--output_dir"])
def test_options_of_other_programs_are_known(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.parse_train(["fashion", f"{word}=3"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said == f"error: there is no {word}; here it is {cli.MEANT[word.replace('_', '-')]}\n"
    option = re.search(r"here it is (--)([\w.-]+)", said)
    if option is not None:
        value: Any = Config()
        for name in option[2].split("."):
            value = getattr(value, name.replace("-", "_"))


@pytest.mark.parametrize("word", ["--moe.presett", "--moe.pre-set", "--preset", "--moe.presets=topk"])
def test_a_misspelt_rule_option_is_known(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.parse_train(["fashion", word, "topk"])
    assert end.value.code == 2
    option = word.split("=")[0]
    assert capsys.readouterr().err == f"error: there is no {option}; routing rules by name are --moe.preset RULE\n"


def test_a_model_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    shutil.copytree(SAVED / "by-token" / "model", tmp_path / "newer")
    file = tmp_path / "newer" / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attention_window": 7}))
    with pytest.raises(ValueError, match=r"has attention_window 7, which ditmoe [\d.]+ does not know; .* --upgrade"):
        pipeline.load(tmp_path / "newer")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"x.ckpt holds no model: it is a file; python -m ditmoe convert"):
        pipeline.load(tmp_path / "x.ckpt")


def test_a_folder_of_other_pictures_says_which_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds no images \(.*\); 1 other file left out, such as a.heic"):
        FolderImages(tmp_path, 8, 3, "crop")


@pytest.mark.parametrize("word", ["nope.json", "empty"])
def test_a_configuration_that_is_not_there(word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        cli.parse_train([str(tmp_path / word)])
    assert "is not a configuration that can be read: there is no such file\n" in capsys.readouterr().err


def test_a_file_is_no_folder_to_export_to(tmp_path: Path) -> None:
    (tmp_path / "t.txt").touch()
    with pytest.raises(ValueError, match="t.txt is a file; give a folder that is empty, or none yet"):
        export(ExportArgs(SAVED / "by-token", tmp_path / "t.txt"))


def test_a_text_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"no checkpoint \(it is no zip file, as torch.save makes since torch 1.6\)"):
        Tensors([tmp_path / "t.txt"])


@pytest.mark.parametrize(("out", "place"), [("x.png", ""), ("a/b.npz", ""), ("there", "there")])
def test_a_place_that_is_closed_is_told_before_anything_is_drawn(
    out: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / place)
    with pytest.raises(ValueError, match=f"cannot be written: you may not write in {tmp_path / place}; give another"):
        SampleArgs(Path("m"), out=tmp_path / out)


def test_a_model_of_the_hub_is_told_how_it_comes_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="me/gift holds no model: .* hf download me/gift --local-dir gift; neither"):
        pipeline.load(Path("me/gift"))
    (tmp_path / "me").mkdir()
    with pytest.raises(ValueError, match="me/gift holds no model: neither"):
        pipeline.load(Path("me/gift"))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda place: SampleArgs(Path("m")), "out samples.png"),
        (lambda place: ExposureArgs(Path("m"), out=place / "x.png"), "out "),
        (lambda place: AnalyzeArgs((Path("m"),), out=place / "found"), "out "),
        (lambda place: CentroidsArgs(Path("m"), 4, place / "c.safetensors"), "out "),
        (
            lambda place: ContrastArgs(models=(Path("m"),), a=("class=1",), b=("class=2",), policy=place / "p.json"),
            "policy ",
        ),
        (lambda place: ExportArgs(Path("m"), place / "model"), "folder "),
        (lambda place: ConvertArgs(Path("m"), place / "model"), "out "),
    ],
)
def test_no_command_works_for_a_place_that_is_closed(
    make: Callable[[Path], Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    monkeypatch.chdir(tmp_path / "closed" if "samples" in name else tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "closed")
    with pytest.raises(ValueError, match=f"^{name}.*cannot be written: you may not write in .*closed; give another"):
        make(tmp_path / "closed")


def test_a_folder_that_may_not_be_entered_is_told(tmp_path: Path) -> None:
    """As nobody, where the tests are root's, in a process of its own."""
    (tmp_path / "closed").mkdir(mode=0)
    child = os.fork()
    if child == 0:
        said = ""
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            SampleArgs(Path("m"), out=tmp_path / "closed" / "x.png")
        except ValueError as error:
            said = str(error)
        finally:
            os._exit(0 if "you may not look into" in said else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_grid_that_cannot_be_written_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("ditmoe.generate.request.write_grid", closed)
    with pytest.raises(ValueError, match=r"x.png could not be written \(No such file or directory\)"):
        run(SampleArgs(SAVED / "by-token", out=tmp_path / "x.png", num=1, steps=1), Alone())
