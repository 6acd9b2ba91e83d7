"""The command analyze contrast, on tiny models: who serves a more than b, and the policy for them."""

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
from ditmoe.config.policy import Policy, Rule
from ditmoe.config.sections import Config
from ditmoe.model import build
from tests.doors import command

contrast = partial(command, "analyze", "contrast")


@pytest.fixture
def run(tiny: Callable[..., Config], tmp_path: Path) -> Callable[..., Path]:
    """run(section={...}) makes the folder of a run on digits, whose routers know labels: class c has expert c % 4."""

    def make(classes: int = 10, **sections: Any) -> Path:
        sections = {"moe": {"router_input": "label", "top_k": 1, "renormalize": False}, **sections}
        config = replace(tiny(**sections), out=tmp_path / "run")
        torch.manual_seed(0)
        net = build(config, classes)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
        if config.moe.router_input == "label" and config.moe.blocks != "none":
            with torch.no_grad():
                one_hot = torch.eye(32)[torch.arange(classes + 1) % 4]
                net.y_embedder.embedding_table.weight.copy_(one_hot)
                net.blocks[1].moe.router.weight.copy_(torch.eye(32)[:4])
        names = {i: f"{i}, number {i}" for i in range(10)} | {i: f"piece {i}" for i in range(10, classes)}
        pipeline.save(pipeline.assemble(net, config, names), config.out / "model")
        save(config, config.out / "config.json")
        return config.out

    return make


def test_who_serves_one_class_more_than_another(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--a", "class=3", "--b", "class=4", "class=1", "--num", 40, "--bins", 4, "--out", tmp_path / "new")
    assert contrast(run(), *words, "--policy", tmp_path / "p.json") == 0
    text = capsys.readouterr().out
    assert "| 1 | 3 | 100.0% | 0.0% | +100.0% ± 0.0% |" in text
    assert "| 1 | 0 | 0.0% | 50.0% | -50.0% ± " in text
    assert "suppress 1 expert; python -m ditmoe sample" in text
    assert "may be chance" not in text
    assert Policy.read(tmp_path / "p.json") == Policy((Rule(1, 3, "suppress"),))
    found = json.loads((tmp_path / "new/contrast.json").read_text())
    assert found["difference"] == [[-0.5, -0.5, 0.0, 1.0]]
    assert found["layers"] == [1]
    assert np.shape(found["by_time"]) == (1, 4, 4)
    assert found["top"] == Policy.read(tmp_path / "p.json").to_dict()
    assert Image.open(tmp_path / "new/contrast.png").size[0] == 1040
    assert command("sample", tmp_path / "run", "--num", 2, "--steps", 2, "--policy", tmp_path / "p.json",
                   "--out", tmp_path / "x.png") == 0  # fmt: skip


def test_a_policy_may_favour_and_has_the_top_alone(run: Callable[..., Path], tmp_path: Path) -> None:
    words = ("--a", "class=3", "class=2", "--b", "class=0", "--num", 8, "--bins", 2, "--out", tmp_path / "new")
    how = ("--action", "favour", "--bias", 2.5, "--top", 1, "--policy", tmp_path / "p.json")
    assert contrast(run(), *words, *how) == 0
    (rule,) = Policy.read(tmp_path / "p.json").rules
    assert (rule.layer, rule.action, rule.bias) == (1, "favour", 2.5)
    assert rule.expert in (2, 3)


def test_data_sets_of_a_mixture(run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, colour in (("light", 250), ("dark", 5)):
        (tmp_path / "pieces" / kind).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (8, 8), colour + i).save(tmp_path / "pieces" / kind / f"{i}.png")
    model = run(classes=12, data={"mixture": ("digits", str(tmp_path / "pieces"))})
    words = (model, "--num", 40, "--bins", 2, "--out", tmp_path / "new")
    assert contrast(*words, "--a", "domain=pieces", "--b", "domain=digits") == 0
    found = json.loads((tmp_path / "new/contrast.json").read_text())
    assert found["rate_a"] == [[0.0, 0.0, 0.5, 0.5]]  # classes 10 and 11
    assert found["rate_b"][0] == pytest.approx([0.3, 0.3, 0.2, 0.2])
    assert "a: 8 images of 2 classes, training: a mixture" in capsys.readouterr().out
    assert contrast(*words, "--a", "domain=piece", "--b", "domain=digits") == 2
    assert "there is no domain 'piece' with labels: those of this model are digits, pieces" in capsys.readouterr().err
    assert contrast(*words, "--a", "domain=digits", "--b", "class=3") == 2
    assert "class 3 is in a and in b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("moe", "words", "sentence"),
    [
        ({"router_input": "position"}, ("--a", "class=3", "--b", "class=4"), "chooses experts by position alone"),
        ({"router_input": "time"}, ("--a", "class=3", "--b", "class=4"), "chooses experts by time alone"),
        ({"blocks": "none"}, ("--a", "class=3", "--b", "class=4"), "has no experts"),
        ({}, ("--a", "class=three", "--b", "class=4"), "there is no class 'three'"),
        ({}, ("--a", "class=3", "--b", "class=10"), "label 10 is out of range"),
        ({}, ("--a", "domain=digits", "--b", "class=4"), "this model has one data set"),
        ({}, ("--a", "3", "--b", "class=4"), "a has '3'; give class=LABEL"),
        ({}, ("--a", "class=3"), "Missing from"),
        ({}, ("--a", "class=3", "--b", "class=4", "--action", "force"), "action and bias are of a policy"),
        ({}, ("--a", "class=3", "--b", "class=4", "--policy", "no/p.json"), "must be a .json file in a folder"),
    ],
)
def test_what_cannot_be_is_refused(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], moe: dict[str, Any], words: tuple[str, ...],
    sentence: str,
) -> None:  # fmt: skip
    own = {"router_input": "label", "top_k": 2, **moe}
    assert contrast(run(moe=own), *words, "--num", 4, "--bins", 2) == 2
    assert sentence in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_policy_that_cannot_be_followed_is_refused_before_anything_is_written(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ("--num", 8, "--bins", 2, "--out", tmp_path / "new", "--policy", tmp_path / "p.json")
    words = ("--a", "class=0", "class=1", "class=2", "--b", "class=3", *how)
    assert contrast(run(), *words, "--action", "force") == 2
    assert "policy: it forces 3 experts of layer 1, and a token has 1; force fewer" in capsys.readouterr().err
    model = run(moe={"router_input": "label", "top_k": 4, "renormalize": False})
    assert contrast(model, *words) == 2
    assert "no expert serves a more than b" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "p.json").exists()


def test_what_may_be_chance_is_said(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(moe={"router_input": "token"})
    assert (
        contrast(folder, "--a", "class=1", "--b", "class=2", "--num", 2, "--bins", 2, "--top", 9, "--out", tmp_path)
        == 0
    )
    assert "may be chance, within two standard errors" in capsys.readouterr().out
