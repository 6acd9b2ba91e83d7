"""What a layer's experts did, against slow sums over single tokens."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ditmoe.analysis.routing import count_experts
from ditmoe.analysis.tally import norms_of, parts_of, tally
from ditmoe.config.rules import with_rule
from ditmoe.config.sections import Config, ObjectiveConfig
from ditmoe.model import DiTMoETransformer2DModel, build
from ditmoe.moe import Condition, MoELayer, RoutingRule

Tiny = Callable[..., Config]


def network(config: Config, classes: int = 3) -> DiTMoETransformer2DModel:
    torch.manual_seed(0)
    net = build(config, classes)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.eval()


@pytest.mark.parametrize("router_input", ["token", "position", "label+position", "time", "label", "time+label"])
def test_a_tally_agrees_with_the_counts(tiny: Tiny, router_input: str) -> None:
    net = network(tiny(moe={"blocks": "all", "router_input": router_input}))
    x = torch.randn(3, 5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    objective = ObjectiveConfig()
    counts, found = count_experts(net, objective, x, [0, 1, 2], 4, 7), tally(net, objective, x, [0, 1, 2], 4, 7)
    assert len(found) == len(counts) == 2
    for layer, one in zip(counts, found, strict=True):
        assert (one.counts == layer).all()
        assert (one.by_place.reshape(3, 5, 4, 4).sum(axis=1) == layer.sum(axis=0)).all()
        assert (one.by_time.reshape(3, 5, 4, 4).sum(axis=1) == layer.sum(axis=2).swapaxes(0, 1)).all()
        assert one.pairs.diagonal() == pytest.approx(layer.sum(axis=(0, 1, 2)))
        assert one.pairs.sum() == pytest.approx(2 * layer.sum())  # a token has two experts, and so four pairs
        assert one.undecided == pytest.approx(1)
        assert (one.norms > 0).tolist() == (layer.sum(axis=(0, 1, 2)) > 0).tolist()


def test_a_tally_of_experts_that_all_serve_counts_weights_above_0(tiny: Tiny) -> None:
    config = with_rule(tiny(moe={"blocks": "all", "z_weight": 0.0}), "mumoe")
    net, objective, x = network(config), ObjectiveConfig(), torch.randn(3, 5, 1, 8, 8)
    counts, found = count_experts(net, objective, x, [0, 1, 2], 4, 7), tally(net, objective, x, [0, 1, 2], 4, 7)
    for layer, one in zip(counts, found, strict=True):
        assert (one.counts == layer).all()
        assert 60 * 4 <= layer.sum() < 60 * 4 * 4
        assert one.pairs.diagonal() == pytest.approx(layer.sum(axis=(0, 1, 2)))
        assert (one.norms > 0).tolist() == (layer.sum(axis=(0, 1, 2)) > 0).tolist()


@pytest.mark.parametrize("place", [False, True])
def test_norms_are_those_of_every_token_and_expert(place: bool) -> None:
    torch.manual_seed(0)
    layer = MoELayer(
        16, num_experts=4, expert_width=8, shared_width=8, rule=RoutingRule(2, "sigmoid"),
        inputs=("position",) if place else ("token",), positions=torch.randn(6, 16) if place else None,
    )  # fmt: skip
    x = torch.randn(5, 6, 16)
    condition = Condition(torch.zeros(5, 16), torch.zeros(5, 16))
    with torch.no_grad(), norms_of([layer]) as (norms,):
        y, record = layer(x, condition)
    assert not layer.experts._forward_pre_hooks
    assert torch.equal(y, layer(x, condition)[0])
    expected = np.zeros(4)
    weights = torch.zeros(len(record.logits), 4)
    weights[record.plan.row, record.plan.expert] = record.plan.weight
    w_in, w_out = layer.experts.w_in, layer.experts.w_out
    weights = weights.view(record.images, 6, 4).expand(5, 6, 4)
    for n, t in np.ndindex(5, 6):
        for e in range(4):
            gate, up = (w_in[e] @ x[n, t]).chunk(2)
            out = w_out[e] @ (torch.nn.functional.silu(gate) * up)
            expected[e] += float((weights[n, t, e] * out).detach().norm())
    assert norms == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("place", [False, True])
def test_the_routed_part_of_the_output_beside_the_shared_one(gated: bool, place: bool) -> None:
    layer = MoELayer(
        16, num_experts=4, expert_width=8, shared_width=8, rule=RoutingRule(2, "sigmoid"), shared_gate=gated,
        inputs=("position",) if place else ("token",), positions=torch.randn(6, 16) if place else None,
    )  # fmt: skip
    if layer.shared_gate is not None:
        torch.nn.init.normal_(layer.shared_gate.weight)
    x = torch.randn(5, 6, 16)
    with torch.no_grad(), parts_of([layer]) as (parts,):
        y, _ = layer(x, Condition(torch.zeros(5, 16), torch.zeros(5, 16)))
    assert not layer.experts._forward_hooks
    assert layer.shared is not None
    shared = layer.shared(x)
    if layer.shared_gate is not None:
        shared = shared * torch.sigmoid(x @ layer.shared_gate.weight[0])[..., None]
    expected = [float(part.detach().norm(dim=-1).sum()) for part in (y - shared, shared)]
    assert parts == pytest.approx(expected, rel=1e-4)


def test_without_a_shared_expert_all_is_routed(tiny: Tiny) -> None:
    x = torch.randn(3, 2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for width, low, high in [(0, 1.0, 1.0), (16, 0.01, 0.99)]:
        (one,) = tally(network(tiny(moe={"shared_width": width})), ObjectiveConfig(), x, [0, 1, 2], 2, 0)
        assert low <= one.routed <= high


def test_what_experts_are_chosen_among_k_is_not_a_choice(tiny: Tiny) -> None:
    options: dict[str, Any] = {"top_k": 4, "router_input": "position"}
    x = torch.randn(3, 2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    (one,) = tally(network(tiny(moe=options)), ObjectiveConfig(), x, [0, 1, 2], 2, 0)
    assert one.undecided == pytest.approx(math.log2(4))
