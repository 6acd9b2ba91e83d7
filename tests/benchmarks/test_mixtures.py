"""What the benchmark of mixtures counts."""

from pathlib import Path

import pytest
import torch

from benchmarks.mixtures import own_share
from ditmoe import pipeline
from ditmoe.config.file import save
from ditmoe.config.sections import Config, DataConfig, MoEConfig
from ditmoe.data.open import open_held_out
from tests.ditmoe.convert.toys import MODEL, network


@pytest.mark.parametrize(("favoured", "shares"), [([0, 1], (1.0, 0.0)), ([2, 3], (0.0, 1.0)), ([0, 3], (0.5, 0.5))])
def test_choices_of_a_sets_own_experts_are_counted(
    favoured: list[int], shares: tuple[float, float], tmp_path: Path
) -> None:
    moe = MoEConfig(num_experts=4, bias_rate=0.01)
    config = Config(model=MODEL, moe=moe)
    net = network(num_experts=4, bias_rate=0.01)
    for block in net.blocks:
        if hasattr(block, "moe"):
            block.moe.router.expert_bias[favoured] = 10.0
    pipeline.save(pipeline.assemble(net, config, {i: str(i) for i in range(10)}), tmp_path)
    save(config, tmp_path / "training.json")
    data = open_held_out(DataConfig(), size=8, channels=1)
    assert data is not None
    with torch.inference_mode():
        assert tuple(own_share(tmp_path, data, 0, domain, 2) for domain in (0, 1)) == shares
