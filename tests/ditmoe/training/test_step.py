"""One step: its losses add up in the open, its learning rate, its row."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ditmoe.config.sections import Config, TrainConfig
from ditmoe.data.open import open_data
from ditmoe.training.loop import train
from ditmoe.training.row import expert_load
from ditmoe.training.schedule import learning_rate

Tiny = Callable[..., Config]


def first_row(config: Config) -> dict[str, Any]:
    train(config, open_data(config.data, size=8, channels=1))
    row: dict[str, Any] = json.loads((config.out / "metrics.jsonl").read_text().splitlines()[0])
    return row


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_total_is_the_weighted_sum_of_the_parts(tiny: Tiny, accumulation: int) -> None:
    moe = {"blocks": "all", "balance_weight": 0.5, "z_weight": 0.25}
    row = first_row(tiny(max_steps=1, moe=moe, train={"accumulation": accumulation}))
    layers = len(row["dead_experts"])
    assert layers == 2
    assert row["loss"] == pytest.approx(row["mse"] + layers * (0.5 * row["balance"] + 0.25 * row["z"]), rel=1e-6)
    assert "vlb" not in row


PROTOTYPES = {"router": "prototype", "router_input": "plain+position", "contrastive_weight": 0.5}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_prototype_router_has_a_contrastive_loss(tiny: Tiny, accumulation: int) -> None:
    moe = {"blocks": "all", "balance_weight": 0.0, "z_weight": 0.0, **PROTOTYPES}
    row = first_row(tiny(max_steps=1, moe=moe, train={"accumulation": accumulation}))
    assert 0 < row["contrastive"] < 40
    assert row["loss"] == pytest.approx(row["mse"] + 2 * 0.5 * row["contrastive"], rel=1e-6)
    assert "contrastive" not in first_row(tiny(max_steps=1, out=tiny().out.with_name("linear")))


def test_the_temperature_of_the_contrastive_loss_is_the_configurations(tiny: Tiny) -> None:
    losses = []
    for temperature in (0.07, 1e6):
        out = tiny().out.with_name(f"at-{temperature}")
        moe = {**PROTOTYPES, "contrastive_temperature": temperature}
        losses.append(first_row(tiny(max_steps=1, out=out, moe=moe))["contrastive"])
    assert losses[1] == pytest.approx(math.log(4), rel=1e-3)  # of 4 experts that all are alike
    assert abs(losses[0] - losses[1]) > 0.01


def test_a_part_without_a_weight_is_logged_alone(tiny: Tiny) -> None:
    row = first_row(tiny(max_steps=1, moe={"balance_weight": 0.0, "z_weight": 0.0}))
    assert row["loss"] == row["mse"]
    assert row["balance"] > 0.9
    assert row["z"] > 0


def test_the_variance_has_a_loss_of_its_own_and_a_dense_model_no_balance(tiny: Tiny) -> None:
    objective, sample = {"prediction_type": "epsilon", "learn_sigma": True}, {"sampler": "ddpm"}
    row = first_row(tiny(max_steps=1, objective=objective, sample=sample, moe={"blocks": "none", "bias_rate": 0.0}))
    assert row["loss"] == pytest.approx(row["mse"] + row["vlb"], rel=1e-6)
    assert not {"balance", "z", "load_entropy"} & row.keys()


def test_learning_rate_schedule() -> None:
    train_config = TrainConfig(learning_rate=1.0, warmup_steps=10, decay_steps=110)
    assert [learning_rate(train_config, s) for s in (0, 4, 10, 60, 109)] == pytest.approx([0.1, 0.5, 1.0, 0.5, 0.01])
    assert learning_rate(TrainConfig(learning_rate=1.0, warmup_steps=0), 10**6) == 1.0


def test_expert_load() -> None:
    load = expert_load(torch.tensor([[10, 10, 10, 10], [40, 0, 0, 0]]))
    assert load == {"load_max_over_mean": [1.0, 4.0], "dead_experts": [0, 3], "load_entropy": [1.0, 0.0]}
