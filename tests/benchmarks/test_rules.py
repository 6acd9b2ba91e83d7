"""benchmarks.rules can train what it offers."""

from pathlib import Path

import pytest

from benchmarks.rules import BASES, OURS, configuration
from ditmoe.config.rules import RULES


@pytest.mark.parametrize("base", BASES)
def test_every_rule_has_a_run_of_every_preset(base: str) -> None:
    for name in (*OURS, *RULES):
        config = configuration(base, name, 60, 1, Path("centres.safetensors"))
        assert (config.max_steps, config.train.decay_steps, config.seed) == (60, 60, 1)
        assert (config.moe.blocks == "none") == (name == "dense")
        assert config.train.muon_on == ("all" if base == "narrow" and name not in ("dense", "mumoe") else "trunk")
