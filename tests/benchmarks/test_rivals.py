"""The contest of our preset with diffusers' networks: they are asked rightly, and nothing is made twice."""

import json
import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.rival_models import OPTIONS, Rival, run_as, sized
from benchmarks.rival_options import parsed
from benchmarks.rival_training import NAMES, WARM_UP, Training, contestants
from benchmarks.rivals import Contest, main
from ditmoe.config.file import save
from ditmoe.config.presets import PRESETS
from ditmoe.config.sections import ModelConfig
from ditmoe.data.open import open_data
from ditmoe.training.loop import train

SMALL = ModelConfig(sample_size=8, patch_size=2, hidden_size=32, depth=2, num_heads=2)


@pytest.fixture
def small_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = PRESETS["digits"]
    model = replace(digits.model, hidden_size=32, depth=2, num_heads=2, ffn_width=96)
    moe = replace(digits.moe, expert_width=32, shared_width=32)
    monkeypatch.setitem(PRESETS, "digits", replace(digits, model=model, moe=moe))


def rival(kind: str, target: int = 60_000) -> Rival:
    torch.manual_seed(0)
    net = sized(kind, target, SMALL, 10, "flow_prediction").make()
    with torch.no_grad():
        for p in net.parameters():  # the last layer is zero, and so are the gates
            p.add_(0.05 * torch.randn_like(p))
    return net.train()


@pytest.mark.parametrize("kind", OPTIONS)
def test_labels_and_fractions_of_the_time_are_heard_and_nothing_is_dropped_in_training(kind: str) -> None:
    net, x = rival(kind).double(), torch.randn(64, 1, 8, 8, dtype=torch.float64)
    t, labels = torch.full((64,), 500.0), torch.full((64,), 3)
    answer = net(x, t, labels).sample
    assert answer.shape == x.shape
    assert torch.equal(answer, net(x, t, labels, return_dict=False)[0])
    for other in (net(x, t, torch.full((64,), net.null_label)), net(x, t, labels + 1), net(x, t + 0.5, labels)):
        assert bool(((other.sample - answer).abs().amax(dim=(1, 2, 3)) > 1e-8).all())


@pytest.mark.parametrize(("kind", "option"), [(kind, option) for kind in OPTIONS for option in OPTIONS[kind]])
def test_a_faster_way_gives_the_same(kind: str, option: str) -> None:
    x, t, labels = torch.randn(4, 1, 8, 8), torch.rand(4) * 1000, torch.arange(4)
    expected = rival(kind)(x, t, labels).sample
    torch.testing.assert_close(run_as(rival(kind), option)(x, t, labels).sample, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_size_is_near_the_one_asked_for(kind: str) -> None:
    found = sized(kind, 1_544_208, PRESETS["fashion"].model, 10, "flow_prediction")
    assert found.parameters == sum(p.numel() for p in found.make().parameters())
    assert abs(found.parameters / 1_544_208 - 1) < 0.04


@pytest.mark.parametrize("name", ["unet-active", "dit-active"])
def test_a_short_training_lowers_the_loss(name: str, small_digits: None) -> None:
    preset = PRESETS["digits"]
    args = Namespace(preset="digits", rival_objective="flow-logit-normal", beta2=None, batch_size=16)
    who = contestants(args, 10)[name]
    data = open_data(preset.data, size=preset.model.sample_size, channels=preset.model.in_channels)
    training = Training(who, data, {"precision": "fp32", "option": OPTIONS[who.kind][0], "compile": False}, 2e-3, 1000)
    training.steps = round(WARM_UP * training.total)
    for _ in range(25):
        training.step()
    losses = torch.stack([*training.losses])
    assert losses[-8:].mean() < 0.8 * losses[:4].mean()


def test_all_are_trained_and_scored_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, small_digits: None
) -> None:
    monkeypatch.setattr("eval.judge.PASSES", 1_500)  # a classifier that need not be good
    out, four = tmp_path / "out", ("ours", "dense", "unet", "dit")
    command = ["--preset", "digits", "--minutes", "0.006", "--tune-minutes", "0.002", "--rates", "0.001", "0.002"]
    command += ["--num", "40", "--tune-num", "20", "--seeds", "0", "1", "--calls", "2", "--cfg", "1", "1.5"]
    command += ["--batch-size", "16", "--rounds", "1", "--no-compile", "--extractors", "random-conv-v1"]
    command += ["--cache", str(tmp_path / "cache"), "--out", str(out)]
    main([*command, "--only", "ours", "unet"])
    main([*command, "--only", *four])
    table = capsys.readouterr().out.split("\n| |")[-1]
    text = (out / "rows.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    for name in four:
        mine = [row for row in rows if row["contestant"] == name]
        phases = {p: sum(row["phase"] == p for row in mine) for p in ("way", "tune", "train", "guidance", "score")}
        assert phases == {"way": 1, "tune": 2, "train": 1, "guidance": 2, "score": 2}
        trained = next(row for row in mine if row["phase"] == "train")
        assert trained["images"] > 0
        assert not trained["diverged"]
        assert all(math.isfinite(row["fd_random-conv-v1"]) for row in mine if row["phase"] == "score")
        assert f"| {name} |" in table
    assert "| real |" in table
    for again in ([*command, "--only", *four], [*command, "--only", *NAMES, "--score-only"]):
        main(again)
        assert (out / "rows.jsonl").read_text() == text
        assert capsys.readouterr().out.split("\n| |")[-1] == table


def test_a_finished_run_of_the_preset_takes_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits, run = PRESETS["digits"], tmp_path / "run"
    preset = replace(digits, max_steps=2, train=replace(digits.train, batch_size=8, warmup_steps=0, decay_steps=9))
    monkeypatch.setitem(PRESETS, "digits", preset)
    monkeypatch.setattr("benchmarks.rivals.Judge", lambda *_: None)
    config = replace(preset, out=run, seed=5, train=replace(preset.train, precision="fp32", keep=1))
    train(config, open_data(config.data, size=8, channels=1))
    contest = Contest(parsed(argv=["--preset", "digits", "--ours", str(run), "--out", str(tmp_path / "out")]))
    contest.speeds = {"ours": 3.0}
    row = contest.once(*contest.finished())
    assert contest.once(*contest.finished()) is row
    known = {"phase": "run", "steps": 2, "images": 16, "rate": preset.train.learning_rate, "images_per_second": 24.0}
    assert known.items() <= row.items()
    wanted = load_file(run / "model/transformer/diffusion_pytorch_model.safetensors")
    net = contest.averaged(contest.all["ours"], row, {"precision": "fp32", "option": "", "compile": False})
    found = net.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    save(replace(config, max_steps=3), run / "config.json")  # of a run that goes on
    contest.preset = replace(preset, max_steps=3)
    with pytest.raises(ValueError, match=f"--ours is {run}, which is not finished"):
        contest.finished()
    contest.preset = digits
    with pytest.raises(ValueError, match=f"--ours is {run}, which is no run of the preset digits"):
        contest.finished()
