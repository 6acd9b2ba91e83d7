"""Balance losses as values: what they are worth, and that their gradient survives scaling and accumulation."""

import math

import pytest
import torch

from ditmoe.config.rule import SelectKind
from ditmoe.moe import (
    Condition,
    MoELayer,
    Routing,
    RoutingRule,
    balance_loss,
    balanced_bias,
    contrastive_loss,
    domain_loss,
    select,
    z_loss,
)
from tests.reference import moe_layer as reference


def record(logits: torch.Tensor, top_k: int, score: str = "softmax") -> Routing:
    scores, plan, _ = select(logits, RoutingRule(top_k, score))  # type: ignore[arg-type]
    return Routing(logits, scores, plan, plan.counts, 1)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "identity"])
def test_balance_loss_is_exactly_one_at_even_load(score: str) -> None:
    logits = 4.0 * torch.eye(8)  # token e prefers expert e
    assert balance_loss(record(logits, 1, score)).item() == pytest.approx(1.0, abs=1e-6)


def test_balance_loss_is_e_when_one_expert_takes_all() -> None:
    logits = torch.zeros(50, 8)
    logits[:, 3] = 50.0
    assert balance_loss(record(logits, 1)).item() == pytest.approx(8.0, abs=1e-4)


def test_balance_loss_of_global_counts_averages_to_the_whole_batch() -> None:
    logits = torch.randn(64, 8)
    whole = record(logits, 2)
    halves = [record(part, 2) for part in logits.chunk(2)]
    mean = torch.stack([balance_loss(half, whole.counts) for half in halves]).mean()
    torch.testing.assert_close(mean, balance_loss(whole))
    apart = torch.stack([balance_loss(half) for half in halves]).mean()
    assert abs(apart - mean) > 1e-5  # averaging local losses is another number


def test_cosines_below_zero_count_as_none() -> None:
    logits = torch.tensor([[0.5, -0.9, 0.0], [-0.1, -0.2, -0.3]], requires_grad=True)
    loss = balance_loss(record(logits, 1, "identity"))
    assert loss.item() == pytest.approx(3 * 1.0 * 0.5)  # expert 0 serves both, and is all of one's score
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def prototypes(inputs: str, top_k: int = 2, num_experts: int = 6) -> tuple[MoELayer, torch.Tensor, Condition]:
    torch.manual_seed(0)
    kinds = tuple(inputs.split("+"))
    layer = MoELayer(
        8, num_experts=num_experts, expert_width=8, shared_width=0, rule=RoutingRule(top_k, "sigmoid"), backend="loop",
        kind="prototype", inputs=kinds, positions=torch.randn(5, 8) if "position" in kinds else None,  # type: ignore[arg-type]
    ).double()  # fmt: skip
    x, plain = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    t, y = torch.randn(2, 4, 8, dtype=torch.float64)
    return layer, x.requires_grad_(), Condition(t + y, t, y, plain.requires_grad_())


@pytest.mark.parametrize("inputs", ["token", "plain+position", "token+time", "time+label"])
@pytest.mark.parametrize(("top_k", "num_experts"), [(1, 6), (2, 6), (1, 40)])  # of 40 some have no token
def test_contrastive_loss_and_its_gradient_are_those_of_the_obvious_version(
    inputs: str, top_k: int, num_experts: int
) -> None:
    layer, x, condition = prototypes(inputs, top_k, num_experts)
    routing = layer(x, condition)[1]
    assert bool((routing.counts == 0).any()) == (num_experts == 40 or inputs == "time+label")
    loss, wanted = contrastive_loss(routing, 0.2), reference.contrastive(layer, x, condition, 0.2)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-7)  # times are normalised in float32
    leaves = [layer.router.weight, x, *([condition.plain] if "plain" in inputs else [])]
    got, slow = (torch.autograd.grad(value, leaves, allow_unused=True) for value in (loss, wanted))
    assert got[0].abs().max() > 1e-4
    for a, b in zip(got, slow, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_contrastive_loss_pulls_prototypes_to_the_means_of_their_tokens() -> None:
    layer, x, _ = prototypes("token")
    optimizer = torch.optim.SGD([layer.router.weight], 0.05)
    first = contrastive_loss(layer(x)[1], 0.1)
    for _ in range(50):
        optimizer.zero_grad()
        loss = contrastive_loss(layer(x)[1], 0.1)
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * first


def test_one_expert_that_serves_all_has_nothing_to_be_told_from() -> None:
    layer, x, _ = prototypes("token", top_k=1, num_experts=1)
    assert contrastive_loss(layer(x)[1], 0.1) == 0


def test_contrastive_loss_of_global_sums_is_the_whole_batchs() -> None:
    layer, x, condition = prototypes("plain+position")
    halves = [
        layer(part, Condition(*parts))[1]
        for part, *parts in zip(x.chunk(2), *(part.chunk(2) for part in condition[:4]), strict=True)  # type: ignore[union-attr]
    ]
    whole = layer(x, condition)[1]
    sums = torch.stack([half.sums for half in halves]).sum(0)  # type: ignore[misc]
    for half in halves:
        torch.testing.assert_close(
            contrastive_loss(half, 0.1, sums, whole.counts), contrastive_loss(whole, 0.1), rtol=1e-9, atol=1e-12
        )
        assert abs(contrastive_loss(half, 0.1) - contrastive_loss(whole, 0.1)) > 1e-3


def test_domain_loss_and_its_gradient_have_known_values() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0], [0.5, -0.5, 0.0, 2.0], [0.0, 0.0, 9.0, 9.0]])
    logits.requires_grad_()
    routing = record(logits, 2, "sigmoid")._replace(images=2)  # 2 images of 2 rows
    domain = torch.tensor([0, 1])
    loss = domain_loss(routing, domain, 2)
    p = logits.detach().softmax(dim=1)
    mine = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
    own = (p * mine).sum(1, keepdim=True)
    assert loss.item() == pytest.approx(-own.log().mean().item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, (p - p * mine / own) / 4)
    assert domain_loss(routing, 1 - domain, 2) > loss


@pytest.mark.parametrize(
    ("experts", "domains", "owner"), [(4, 4, [0, 1, 2, 3]), (5, 2, [0, 0, 0, 1, 1]), (3, 1, [0] * 3)]
)
def test_domain_loss_is_zero_for_routers_that_are_sure_of_their_own(experts, domains, owner) -> None:
    logits = 60.0 * torch.eye(experts)
    routing = record(logits, 1)._replace(images=experts)  # a row an image, as of a router by label
    assert domain_loss(routing, torch.tensor(owner), domains) == pytest.approx(0, abs=1e-6)
    even = record(torch.zeros(6, 4), 1)._replace(images=3)
    assert domain_loss(even, torch.tensor([0, 1, 1]), 2).item() == pytest.approx(math.log(2))
    with pytest.raises(AssertionError, match="images share decisions"):
        domain_loss(even, torch.tensor([0, 1]), 2)


def test_z_loss() -> None:
    assert z_loss(record(torch.zeros(5, 8), 1)).item() == pytest.approx(torch.log(torch.tensor(8.0)).item() ** 2)


def router_gradient(scale: float, parts: int, weight: float) -> torch.Tensor:
    torch.manual_seed(0)
    layer = MoELayer(16, num_experts=8, expert_width=8, shared_width=0, rule=RoutingRule(2))
    x = torch.randn(8, 4, 16)
    _, whole = layer(x)
    for part in x.chunk(parts):
        y, routing = layer(part)
        loss = 0.0 * y.sum() + weight * balance_loss(routing, whole.counts)
        (loss * scale / parts).backward()
    grad = layer.router.weight.grad
    assert grad is not None
    return grad / scale


@pytest.mark.parametrize(("scale", "parts"), [(65536.0, 1), (1.0, 8), (1024.0, 4)])
def test_gradient_is_right_under_loss_scaling_and_accumulation(scale: float, parts: int) -> None:
    plain = router_gradient(1.0, 1, 0.01)
    assert plain.abs().max() > 1e-6
    torch.testing.assert_close(router_gradient(scale, parts, 0.01), plain, rtol=1e-4, atol=1e-9)


def test_weight_zero_gives_zero_gradient() -> None:
    assert router_gradient(1.0, 1, 0.0).abs().max() == 0


def test_bias_moves_towards_the_idle_experts_and_keeps_mean_zero() -> None:
    bias = balanced_bias(torch.zeros(4), torch.tensor([100, 50, 50, 0]), 0.001)
    torch.testing.assert_close(bias, torch.tensor([-0.001, 0, 0, 0.001]))
    uneven = balanced_bias(torch.zeros(4), torch.tensor([90, 10, 0, 0]), 0.001)
    assert uneven.mean().abs() < 1e-9
    assert uneven[0] < uneven[1:].min()


def test_bias_evens_a_lopsided_router() -> None:
    torch.manual_seed(0)
    logits = torch.randn(512, 8) + torch.linspace(0, 2, 8)
    bias = torch.zeros(8)
    rule = RoutingRule(2, "sigmoid", True)

    def spread() -> float:
        counts = select(logits, rule, bias)[1].counts.float()
        return float(counts.max() / counts.mean())

    before = spread()
    for _ in range(400):
        bias = balanced_bias(bias, select(logits, rule, bias)[1].counts, 0.005)
    assert before > 2.0
    assert spread() < 1.15


@pytest.mark.parametrize(
    ("kind", "share"),
    [("relative", 0.05), ("relative", 0.9), ("top_p", 0.2), ("top_p", 0.9), ("threshold", 0.05), ("threshold", 0.95)],
)
def test_bias_holds_the_experts_of_a_token_where_tokens_differ(kind: SelectKind, share: float) -> None:
    """Whatever tau is: K on average, other tokens other numbers, and no load far from the others."""
    logits = torch.randn(512, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(0, 2, 8)
    rule = RoutingRule(2, "softmax" if kind == "top_p" else "sigmoid", True, kind=kind, tau=share)
    bias = torch.zeros(8)
    before = len(select(logits, rule, bias)[1].row) / 512
    for _ in range(1500):
        bias = balanced_bias(bias, select(logits, rule, bias)[1].counts, 0.001, 2 * 512 / 8)
    plan = select(logits, rule, bias)[1]
    assert abs(before - 2) > 0.3
    assert abs(len(plan.row) / 512 - 2) < 0.06
    assert plan.counts.max() / plan.counts.float().mean() < 1.15
    assert len({*plan.row.bincount(minlength=512).tolist()}) > 1
