"""Balance losses as values: what they are worth, and that their gradient survives scaling and accumulation."""

import pytest
import torch

from ditmoe.moe import MoELayer, Routing, RoutingRule, balance_loss, balanced_bias, select, z_loss


def record(logits: torch.Tensor, top_k: int, score: str = "softmax") -> Routing:
    scores, plan = select(logits, RoutingRule(top_k, score))  # type: ignore[arg-type]
    return Routing(logits, scores, plan, plan.counts, 1)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
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
