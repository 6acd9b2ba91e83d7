"""benchmarks.rules can train what it offers."""

from pathlib import Path

import pytest

from benchmarks.rules import BASES, OURS, configuration
from ditmoe.analysis.budget import flops
from ditmoe.config.rules import RULES
from ditmoe.model import build, count_parameters


@pytest.mark.parametrize("base", BASES)
def test_every_rule_has_a_run_of_every_preset(base: str) -> None:
    for name in (*OURS, *RULES):
        config = configuration(base, name, 60, 1, Path("centres.safetensors"))
        assert (config.max_steps, config.train.decay_steps, config.seed) == (60, 60, 1)
        assert (config.moe.blocks == "none") == (name == "dense")
        assert config.train.muon_on == ("all" if base == "narrow" and name not in ("dense", "mumoe") else "trunk")


def test_every_rule_activates_about_as_much_as_the_twin() -> None:
    """Parameters within 3 %; the two with the largest routers have 3.4 % more products."""
    twin = configuration("narrow", "dense", 60, 0, None)
    active, products = count_parameters(build(twin, 10))[1], flops(twin).forward
    for name in {*OURS, *RULES} - {"centroid"}:
        config = configuration("narrow", name, 60, 0, None)
        assert abs(count_parameters(build(config, 10))[1] / active - 1) < 0.03, name
        assert abs(flops(config).forward / products - 1) < (0.034 if name in ("null", "promoe") else 0.031), name
