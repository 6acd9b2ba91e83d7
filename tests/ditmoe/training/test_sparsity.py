"""Square Hoyer: its values, that training with it makes dense layers sparse, and where it cannot be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ditmoe.config.sections import Config
from ditmoe.data.open import open_data
from ditmoe.training.loop import train
from ditmoe.training.sparsity import square_hoyer

Tiny = Callable[..., Config]


def losses(config: Config) -> list[dict[str, Any]]:
    train(config, open_data(config.data, size=config.model.sample_size, channels=config.model.in_channels))
    return [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]


def test_it_is_the_share_of_units_in_use() -> None:
    a = torch.zeros(3, 5, 8)
    a[..., :2] = torch.tensor([3.0, -3.0])
    assert float(square_hoyer(a)) == pytest.approx(2 / 8)
    assert float(square_hoyer(torch.ones(2, 4, 8))) == 1
    assert float(square_hoyer(torch.zeros(2, 4, 8))) == 0
    a = torch.randn(2, 4, 8, requires_grad=True)
    square_hoyer(a).backward()
    torch.testing.assert_close((a * a.grad).sum(), torch.tensor(0.0), rtol=0, atol=1e-5)  # of no scale


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dense_layers_become_sparse(tiny: Tiny, tmp_path: Path, checkpointing: bool) -> None:
    moe, model = {"blocks": "every-second", "hoyer_weight": 1.0}, {"gradient_checkpointing": checkpointing}
    rows = losses(tiny(max_steps=30, moe=moe, model=model))
    assert rows[-1]["hoyer"] < 0.8 * rows[0]["hoyer"]
    parts = {"mse": 1.0, "hoyer": 1.0, "balance": 0.005, "z": 0.001}
    assert rows[5]["loss"] == pytest.approx(sum(weight * rows[5][name] for name, weight in parts.items()), rel=1e-4)
    assert "hoyer" not in losses(tiny(max_steps=1, out=tmp_path / "without"))[0]


def test_where_it_cannot_be(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="hoyer_weight is for dense layers, and blocks all leaves none"):
        tiny(moe={"blocks": "all", "hoyer_weight": 1.0})
    with pytest.raises(ValueError, match=r"moe.hoyer_weight looks into layers, which train.compile closes"):
        tiny(moe={"hoyer_weight": 1.0}, train={"compile": True})
