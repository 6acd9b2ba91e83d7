"""The command analyze, on tiny models: tables, files, refusals in a sentence."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ditmoe import pipeline
from ditmoe.config.file import save
from ditmoe.config.sections import Config
from ditmoe.model import build
from tests.ditmoe.data.test_tables import unlabelled_test
from tests.doors import command
from tests.faults.halts import save_run

analyze = partial(command, "analyze")
Make = Callable[..., Path]


@pytest.fixture
def run(tiny: Callable[..., Config], tmp_path: Path) -> Make:
    """run(name, seed=0, classes=10, section={...}) makes the folder of a run on digits."""

    def make(name: str, seed: int = 0, classes: int = 10, **sections: Any) -> Path:
        config = replace(tiny(**sections), out=tmp_path / name)
        torch.manual_seed(seed)
        net = build(config, classes)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
        names = {i: str(i) for i in range(classes)}
        pipeline.save(pipeline.assemble(net, config, names), config.out / "model")
        save(config, config.out / "config.json")
        return config.out

    return make


def test_one_run(run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = run("a", model={"depth": 4}), tmp_path / "new" / "folder"
    assert analyze(model, "--num", 60, "--bins", 4, "--out", out) == 0
    text = capsys.readouterr().out
    assert "a: 60 images, 6 of each of 10 classes, held out: 300 real 8x8 digits (test), bundled" in text
    assert "2 of 4 experts a token in blocks 1, 3; 4 time bins, seed 0" in text
    assert sum(line.startswith("| block 3 | ") for line in text.splitlines()) == 3
    assert sum(line.startswith("| mean | ") for line in text.splitlines()) == 3
    assert "One run says nothing of another" in text
    assert sorted(p.name for p in out.iterdir()) == ["analysis.json", "analysis.png"]
    assert Image.open(out / "analysis.png").size == (1040, 820)
    found = json.loads((out / "analysis.json").read_text())
    (one,) = found["runs"]
    assert [row["layer"] for row in one["layers"]] == ["block 1", "block 3"]
    assert np.shape(one["layers"][0]["lift"]) == (4, 4)
    assert one["layers"][0]["lift"][0][0] is None
    assert found["findings"][0]["interval"] == [None, None]
    assert analyze(model / "model", "--num", 60, "--bins", 4, "--out", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again/analysis.json").read_text())
    assert again["runs"][0]["layers"] == one["layers"]


def test_several_runs_have_intervals(run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run(f"s{seed}", seed, model={"depth": 4}) for seed in range(3)]
    assert analyze(*runs, "--num", 40, "--bins", 2, "--out", tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert "| finding of DiT-MoE | value | 95 % interval | verdict |" in text
    found = json.loads((tmp_path / "out/analysis.json").read_text())
    assert [len(row["values"]) for row in found["findings"]] == [3, 3, 3]
    for row in found["findings"]:
        low, high = row["interval"]
        assert low < row["mean"] < high
        assert row["verdict"] == ("holds" if low > 0 else "does not hold" if high <= 0 else "undecided")
    assert found["mean"]["place"] == pytest.approx(
        np.mean([row["place"] for one in found["runs"] for row in one["layers"]])
    )


@pytest.mark.parametrize(
    ("moe", "classes", "what"),
    [
        ({"router_input": "position"}, 10, "place"),
        ({"router_input": "label"}, 10, "class"),
        ({"router_input": "time", "top_k": 1, "renormalize": False}, 10, "time"),
        ({"router_input": "token", "top_k": 4, "blocks": "all"}, 0, None),
    ],
)
def test_every_kind_of_router(run: Make, tmp_path: Path, moe: dict[str, Any], classes: int, what: str | None) -> None:
    assert analyze(run("a", classes=classes, moe=moe), "--num", 60, "--bins", 4, "--out", tmp_path / "out") == 0
    row = json.loads((tmp_path / "out/analysis.json").read_text())["runs"][0]["layers"][0]
    explained = {key: row[key] for key in ("place", "time", "class")}
    if what == "time":  # two times in one bin may have different experts
        assert 0 < explained.pop("time") <= row["choice"]
    elif what is not None:
        assert explained.pop(what) == pytest.approx(row["choice"], abs=1e-6)
    assert list(explained.values()) == pytest.approx([0] * len(explained), abs=1e-9)
    assert (tmp_path / "out/analysis.png").exists()


def test_a_folder_of_images_has_none_that_were_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_run(tmp_path / "run", ("cat", "dog"), "python train.py")
    assert analyze(model, "--num", 100, "--bins", 2, "--out", tmp_path / "out") == 0
    assert "8 images, 4 of each of 2 classes, training: " in capsys.readouterr().out
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert analyze(model, "--out", tmp_path / "out") == 2
    moved = ("--data.path", tmp_path / "moved", "--out", tmp_path / "out")
    assert analyze(model, "--num", 8, "--bins", 2, *moved) == 0
    assert analyze(model, "--num", 3, *moved) == 2
    assert "num is 3; for 2 classes it must be 4 or more" in capsys.readouterr().err
    for i in range(1, 4):
        (tmp_path / "moved/cat" / f"{i}.png").unlink()
    assert analyze(model, *moved) == 2
    assert "class 0 has one image, and two are needed" in capsys.readouterr().err
    (tmp_path / "moved/cow").mkdir()
    (tmp_path / "moved/dog/0.png").rename(tmp_path / "moved/cow/0.png")
    assert analyze(model, *moved) == 2
    assert "3 classes, but the model knows 2" in capsys.readouterr().err


def test_a_held_out_split_without_labels_is_not_taken(
    tiny: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(tiny(data={"name": "hf", "path": unlabelled_test(tmp_path / "set")}), out=tmp_path / "run")
    net = build(config, 3)
    pipeline.save(pipeline.assemble(net, config, dict(enumerate(["ant", "bee", "cat"]))), config.out / "model")
    save(config, config.out / "config.json")
    assert analyze(config.out, "--num", 6, "--bins", 2, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "training (those held out cannot be used: " in said
    assert "row 0 has label -1" in said


def test_mistakes_are_one_sentence(run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, dense, other = run("a"), run("dense", moe={"blocks": "none"}), run("b", moe={"num_experts": 8})
    foreign, nameless = tmp_path / "foreign", tmp_path / "deep" / "nameless"
    foreign.mkdir()
    (foreign / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    nameless.parent.mkdir()
    (good / "model").rename(nameless)
    good = run("a")
    for argv, sentence in (
        ([tmp_path / "gone"], "gone holds no model"),
        ([foreign], "model_index.json"),
        ([nameless], "nameless has neither config.json nor training.json"),
        ([dense], "dense has no experts (a dense model)"),
        ([good, other], "b has 2 of 8 experts a token in blocks 1, "),
        ([good, "--num", 19], "num is 19; for 10 classes it must be 20 or more"),
        ([good, "--data.path", tmp_path], "path does not apply to digits"),
    ):
        assert analyze(*argv, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.startswith("error: ")
        assert len(error.splitlines()) == 1, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "models is empty"),
        (["m", "./m"], "models has m twice"),
        (["m", "--num", "1"], "num is 1; it must be 2 or more"),
        (["m", "--bins", "1"], "bins is 1; it must be 2 or more"),
        (["m", "--bins", "1001"], "bins is 1001; the time axis has 1000 steps"),
        (["m", "--seed", "-1"], "seed is -1"),
        (["m", "--out", "file"], "out file is a file; give a folder"),
    ],
)
def test_mistakes_are_found_before_anything_is_read(
    argv: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert analyze(*argv) == 2
    assert sentence in " ".join(capsys.readouterr().err.replace("│", " ").split())
