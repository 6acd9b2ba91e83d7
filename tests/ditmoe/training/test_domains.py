"""Runs of a mixture: loss by set, the domain loss, steps in turn, exact resume, and routers that learn their sets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ditmoe.config.sections import Config, DataConfig
from ditmoe.data.open import open_data
from ditmoe.objective import Objective
from ditmoe.pipeline import load
from ditmoe.training.loop import train
from tests.ditmoe.training.test_loop import rows, same_checkpoint
from tests.faults import runs

Tiny = Callable[..., Config]
DAMEX = {"domain_weight": 0.1, "balance_weight": 0.0, "z_weight": 0.0, "bias_rate": 0.0, "blocks": "all"}


def stripes(root: Path, count: int = 60, seed: int = 0) -> Path:
    """Grey waves of any direction, which no digit looks like."""
    root.mkdir(parents=True)
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:8, :8]
    for i in range(count):
        angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
        wave = np.sin(1.6 * (np.cos(angle) * x + np.sin(angle) * y) + phase)
        Image.fromarray((127.5 + 127.5 * wave).astype(np.uint8)).save(root / f"{i:03}.png")
    return root


@pytest.fixture
def waves(tmp_path: Path) -> Path:
    return stripes(tmp_path / "waves")


def go(config: Config) -> list[dict[str, Any]]:
    assert train(config, open_data(config.data, size=8, channels=1))
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(config.out)]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_domain_loss_is_added_and_each_set_has_its_own_loss(tiny: Tiny, waves: Path, accumulation: int) -> None:
    data = {"mixture": ("digits=3", str(waves))}
    (row,) = go(tiny(max_steps=1, data=data, moe=DAMEX, train={"accumulation": accumulation}))
    assert 0.3 < row["domain"] < 1.2  # log 2 of an even router
    assert row["loss"] == pytest.approx(row["mse"] + 0.1 * row["domain"], rel=1e-6)
    assert row["mse"] == pytest.approx(0.75 * row["loss_domain_0"] + 0.25 * row["loss_domain_1"], rel=1e-5)
    (plain,) = go(tiny(max_steps=1, out=tiny().out.with_name("plain")))
    assert not {"domain", "loss_domain_0"} & plain.keys()


@pytest.mark.parametrize(("size", "alternate"), [("", False), ("", True), ("@4", True)])
def test_a_mixture_resumes_to_the_bit(tiny: Tiny, tmp_path: Path, waves: Path, size: str, alternate: bool) -> None:
    data = {"mixture": ("digits", f"{waves}{size}"), "alternate": alternate}  # an epoch ends within step 4 or 8
    straight = go(tiny(out=tmp_path / "straight", max_steps=9, data=data, moe=DAMEX))
    for stop in (5, 9):
        cut = go(tiny(out=tmp_path / "cut", max_steps=stop, data=data, moe=DAMEX))
    last = Path("checkpoints/step-000009")
    same_checkpoint(tmp_path / "straight" / last, tmp_path / "cut" / last)
    assert straight == cut
    for row in straight:
        sets = [(row["step"] - 1) % 2] if alternate else [0, 1]
        assert [d for d in (0, 1) if f"loss_domain_{d}" in row] == sets


def test_steps_in_turn_are_logged_in_turn(tiny: Tiny, waves: Path) -> None:
    data = {"mixture": ("digits", str(waves)), "alternate": True}
    from ditmoe.run_folder.log import Log

    config = tiny(max_steps=300, data=data, train={"log_every": 20})
    config.out.mkdir()
    with Log(config, 0, shown=False) as log:
        due = [step for step in range(1, 301) if log.count(step)]
    assert due[:6] == [20, 21, 40, 41, 60, 61]
    assert {(step - 1) % 2 for step in due} == {0, 1}


def test_other_weights_are_another_run(tiny: Tiny, waves: Path, tmp_path: Path) -> None:
    go(tiny(max_steps=2, data={"mixture": ("digits", str(waves))}))
    with pytest.raises(ValueError, match="the data set is not the one that .* was trained on .other images, order, we"):
        go(tiny(max_steps=3, data={"mixture": ("digits", f"{waves}=2")}))
    with pytest.raises(ValueError, match="data.alternate: False -> True"):
        go(tiny(max_steps=3, data={"mixture": ("digits", str(waves)), "alternate": True}))
    (tmp_path / "moved").mkdir()
    moved = waves.rename(tmp_path / "moved" / "waves")
    assert len(go(tiny(max_steps=3, data={"mixture": ("digits=2", f"{moved}=2")}))) == 3


def test_two_processes_equal_one(waves: Path, tmp_path: Path) -> None:
    flags = ["--max-steps", 5, "--data.mixture", "digits=3", waves, "--moe.domain-weight", 0.1]
    for name, world in (("one", 1), ("two", 2)):
        group = runs.training(tmp_path / name, *flags, world=world, name=f"log-{name}")
        assert group.wait() == [0] * world, group.err()
    one, two = (runs.rows(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 5
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "mse", "domain", "loss_domain_0", "loss_domain_1"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


def accuracy(config: Config, held_out: Path, labelled: bool, below: float) -> float:
    """Share of held-out tokens' assignments, at times below `below`, that are to experts of the image's own set."""
    net, n = load(config.out).transformer, 150
    digits = open_data(DataConfig(), size=8, channels=1, split="test")
    others = open_data(DataConfig(name="folder", path=held_out), size=8, channels=1)
    x, domain = torch.cat([digits.tensors(range(n)), others.tensors(range(n))]), torch.arange(2 * n) // n
    y = torch.cat([torch.from_numpy(digits.labels[:n]), torch.full((n,), 10)])
    t = ((torch.arange(2 * n) % n + 0.5) * below / n).floor()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    x_t, _ = Objective(config.objective).corrupt(x, t, noise)
    with torch.no_grad():
        routing = net(x_t, t, y if labelled else None).routing
    own = (torch.arange(4) // 2)[None] == domain[:, None]  # 2 sets of 2 experts
    served = torch.stack([record.served().double() for record in routing])  # (L, N, T, E)
    return float((served * own[:, None]).sum() / served.sum())


@pytest.mark.parametrize(("labelled", "below"), [(True, 1000), (False, 100)])
def test_routers_learn_which_set_an_image_is_of(tiny: Tiny, tmp_path: Path, labelled: bool, below: float) -> None:
    """By the label at every noise level; without labels by what is seen, which noise hides."""
    moe = {**DAMEX, "domain_weight": 0.1 if labelled else 1.0}
    model = {"num_classes": None if labelled else 0}
    optimiser = {"batch_size": 32, "learning_rate": 1e-2, "ema_decay": 0.9}
    data = {"mixture": ("digits", str(stripes(tmp_path / "seen", 150)))}
    config = tiny(max_steps=80, data=data, moe=moe, model=model, train=optimiser)
    go(config)
    unseen = stripes(tmp_path / "unseen", 150, seed=1)
    assert accuracy(config, unseen, labelled, below) >= 0.9


@pytest.mark.parametrize(
    ("moe", "data", "sentence"),
    [
        ({"domain_weight": -1.0}, {}, "domain_weight is -1.0; it must be 0 or more"),
        ({}, {"mixture": ()}, "moe.domain_weight 0.1 needs several data sets; give them as --data.mixture SET SET"),
        ({"router_input": "position"}, {}, "domain_weight needs a router that sees images or their labels, and router"),
        ({"router_input": "time"}, {}, "router_input time sees neither; try token"),
        ({"blocks": "none", "bias_rate": 0.0}, {}, "moe.domain_weight does not apply to a model without experts"),
        ({"num_experts": 2}, {"mixture": ("digits", "a", "b")}, "moe.num_experts 2 cannot be shared among 3 data sets"),
    ],
)
def test_a_domain_loss_that_cannot_be_is_refused(tiny: Tiny, moe: dict, data: dict, sentence: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        tiny(moe={"domain_weight": 0.1, **moe}, data={"mixture": ("digits", "a"), **data})
    assert sentence in str(refused.value)


def test_a_mixture_has_a_report(tiny: Tiny, waves: Path) -> None:
    from ditmoe.report import write

    config = tiny(max_steps=2, data={"mixture": ("digits", str(waves))}, sample={"num": 11, "steps": 2})
    go(config)
    seen: list[int] = []

    def score(images: np.ndarray) -> dict[str, Any]:
        seen.append(len(images))
        return {"metric": "count", "value": float(len(images)), "n_gen": len(images)}

    report = write.write(config.out, score=score)
    assert (report["data"]["name"], report["data"]["num_classes"]) == (f"digits + {waves}", 11)
    assert (report["data"]["num_train"], report["data"]["num_held_out"], seen) == (1557, 0, [11])
    assert load(config.out).id2label[10] == "waves"
    assert json.loads((config.out / "report.json").read_text())["data"]["source"].startswith("a mixture of 2 sets")
