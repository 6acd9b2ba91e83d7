"""Another tau while drawing, at all times or by time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ditmoe import pipeline
from ditmoe.config.sample import SampleArgs
from ditmoe.config.sections import Config, ModelConfig, MoEConfig, ObjectiveConfig, SampleConfig
from ditmoe.generate.request import facts, requested
from ditmoe.model import build
from ditmoe.moe.policy import Steered, Steering

MODEL = ModelConfig(sample_size=8, hidden_size=32, depth=2, num_heads=2, ffn_width=32)


def made(**moe: Any) -> pipeline.DiTMoEPipeline:
    torch.manual_seed(0)
    experts = MoEConfig(num_experts=8, expert_width=16, shared_width=0, **moe)
    config = Config(model=MODEL, moe=experts, objective=ObjectiveConfig(prediction_type="flow_prediction"),
                    sample=SampleConfig(sampler="flow-euler", steps=4))  # fmt: skip
    net = build(config, 3)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return pipeline.assemble(net.eval(), config, {0: "a", 1: "b", 2: "c"})


@pytest.mark.parametrize(("select", "own"), [("relative", 0.25), ("top_p", 0.5), ("threshold", 0.6)])
def test_spans_of_time_have_their_own_tau(select: str, own: float) -> None:
    net = made(select=select, tau=own).transformer
    x, t, y = torch.randn(4, 1, 8, 8), torch.tensor([100.0, 400.0, 600.0, 900.0]), torch.tensor([0, 1, 2, 3])
    found = Steered(net, spans=[(0, 500, 0.1), (350, 450, 0.9)])(x, t, y)
    wanted = net(x, t, y, steering=Steering(tau=torch.tensor([0.1, 0.9, own, own])))
    assert torch.equal(found.sample, wanted.sample)
    assert torch.equal(Steered(net, spans=[])(x, t, y).sample, net(x, t, y).sample)
    assert not torch.equal(found.sample, net(x, t, y).sample)


def test_sample_py_draws_with_it_and_notes_it(tmp_path: Path) -> None:
    pipeline.save(made(select="relative", tau=0.25), tmp_path / "model")
    args = SampleArgs(tmp_path, num=3)
    images = {}
    for words in (None, ("0.25",), ("0.9",), ("0-1000=0.9",), ("0-500=0.9",)):
        images[words] = requested(SampleArgs(tmp_path, num=3, tau=words)).batch(range(3))
    assert np.array_equal(images[None], images[("0.25",)])
    assert np.array_equal(images[("0.9",)], images[("0-1000=0.9",)])
    assert not np.array_equal(images[("0.9",)], images[None])
    assert not np.array_equal(images[("0-500=0.9",)], images[("0.9",)])
    assert "tau" not in facts(args, requested(args))["sampler"]
    some = SampleArgs(tmp_path, num=3, tau=("0-500=0.9",))
    assert facts(some, requested(some))["sampler"]["tau"] == [[0.0, 500.0, 0.9]]


@pytest.mark.parametrize(
    ("moe", "words", "sentence"),
    [
        ({}, ("0.5",), "this one selects topk"),
        ({"select": "relative"}, ("1.5",), "tau 0-1000=1.5 must have times within 0..1000, and a tau that relative"),
        ({"select": "relative"}, ("0-2000=0.5",), "tau 0-2000=0.5 must have times"),
        ({"select": "relative"}, ("late=0.5",), "tau has 'late=0.5'; give a number, or LOW-HIGH=TAU"),
        ({"select": "relative"}, ("much",), "tau has 'much'"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, moe: dict[str, Any], words: tuple[str], sentence: str) -> None:
    pipeline.save(made(**moe), tmp_path / "model")
    with pytest.raises(ValueError, match=sentence):
        requested(SampleArgs(tmp_path, num=3, tau=words))
