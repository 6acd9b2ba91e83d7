"""What newcomers type, and what comes back: the rows of docs/newcomers.md that were mended."""

import json
import shutil
from pathlib import Path

import pytest

from ditmoe import cli, pipeline
from ditmoe.config.sample import SampleArgs
from ditmoe.data.folders import FolderImages
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
