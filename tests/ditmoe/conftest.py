"""Tiny runs and tiny data for the tests of this folder."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ditmoe.config.sections import Config, DataConfig, ModelConfig, MoEConfig, ObjectiveConfig, TrainConfig

TINY_MODEL = ModelConfig(sample_size=8, patch_size=4, hidden_size=32, depth=2, num_heads=2, ffn_width=48)
TINY_MOE = MoEConfig(num_experts=4, top_k=2, expert_width=16, shared_width=16, bias_rate=0.01, z_weight=0.001)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Config]:
    """tiny(section=dict(...), max_steps=...) -> a run of seconds in a folder of its own."""

    def make(**changes: Any) -> Config:
        base = Config(
            out=tmp_path / "run",
            max_steps=6,
            model=TINY_MODEL,
            moe=TINY_MOE,
            objective=ObjectiveConfig(),
            data=DataConfig(),
            train=TrainConfig(batch_size=16, warmup_steps=2, precision="fp32", checkpoint_every=100),
        )
        sections = {k: replace(getattr(base, k), **v) for k, v in changes.items() if isinstance(v, dict)}
        return replace(base, **{**changes, **sections})

    return make
