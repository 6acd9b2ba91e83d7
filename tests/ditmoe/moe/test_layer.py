"""The MoE layer: against the obvious version, backend against backend, and what must not depend on what."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ditmoe.config.sections import Config, ModelConfig, MoEConfig
from ditmoe.model import build
from ditmoe.moe import Experts, MoELayer, RoutingRule, select
from tests.reference.moe_layer import moe as reference_moe

D, E, F = 16, 6, 8


def layer(rule: RoutingRule, **options: object) -> MoELayer:
    torch.manual_seed(0)
    values = {"num_experts": E, "expert_width": F, "shared_width": 12, **options}
    made = MoELayer(D, rule=rule, **values)  # type: ignore[arg-type]
    with torch.no_grad():
        made.router.weight.mul_(2)  # spread the logits
    return made


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("shared_width", [0, 12])
def test_equals_the_obvious_version(score: str, renormalize: bool, activation: str, shared_width: int) -> None:
    rule = RoutingRule(2, score, renormalize, 2.5)  # type: ignore[arg-type]
    made = layer(rule, activation=activation, shared_width=shared_width, with_bias=True, backend="loop").double()
    made.router.expert_bias.copy_(torch.linspace(-0.3, 0.3, E))
    x = torch.randn(2, 5, D, dtype=torch.float64)
    torch.testing.assert_close(made(x)[0], reference_moe(made, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["loop", "auto"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_routing_by_place_equals_the_obvious_version(backend: str, activation: str) -> None:
    rule = RoutingRule(2, "sigmoid", True, 2.0)
    made = layer(rule, positions=torch.randn(5, D), backend=backend, activation=activation).double()
    x = torch.randn(3, 5, D, dtype=torch.float64)
    y, routing = made(x)
    torch.testing.assert_close(y, reference_moe(made, x), rtol=1e-10, atol=1e-10)
    assert routing.expert_ids.shape == (5, 2)  # one decision a place
    assert len(torch.unique(routing.expert_ids, dim=0)) > 1
    assert routing.counts.tolist() == (3 * torch.bincount(routing.expert_ids.flatten(), minlength=E)).tolist()
    y.square().mean().backward()
    assert made.router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("by_place", "backend"), [(False, "loop"), (True, "loop"), (True, "auto")])
def test_gradients_are_right(by_place: bool, backend: str) -> None:
    positions = torch.randn(4, D) if by_place else None
    made = layer(RoutingRule(3, "sigmoid", True), positions=positions, backend=backend).double()
    x = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*made.named_parameters(), strict=True)

    def forward(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.func.functional_call(made, dict(zip(names, values, strict=True)), (x,))[0]
        return y

    assert torch.autograd.gradcheck(forward, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("by_place", [False, True])
def test_backends_agree_to_the_bit(dtype: torch.dtype, activation: str, by_place: bool) -> None:
    results = []
    options = {"activation": activation, "expert_width": 64, "positions": torch.randn(7, D) if by_place else None}
    for backend in ("grouped", "loop"):
        made = layer(RoutingRule(2), backend=backend, **options).to(dtype)
        x = torch.randn(3, 7, D, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y, _ = made(x)
        y.float().square().mean().backward()
        results.append([y, x.grad, *(p.grad for p in made.parameters())])
    for grouped, loop in zip(*results, strict=True):
        assert torch.equal(grouped, loop)


def test_joined_experts_are_used_where_they_are_small_and_agree_with_the_plan() -> None:
    made = layer(RoutingRule(2), positions=torch.randn(7, D), expert_width=64)
    x = torch.randn(3, 7, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        joined = made(x)[0]
        made.experts.backend = "grouped"
        planned = made(x)[0]
    assert joined.dtype == planned.dtype == torch.bfloat16
    assert not torch.equal(joined, planned)  # the sum over experts is rounded once instead of after each of them
    torch.testing.assert_close(joined, planned, rtol=2e-2, atol=2e-2)
    made.experts.backend = "auto"
    assert made.experts.joins(7, 2)
    assert not made.experts.joins(7 * 100, 2)
    made.experts.backend = "loop"
    assert not made.experts.joins(7, 2)


def test_an_expert_without_tokens_has_zero_gradient() -> None:
    made = layer(RoutingRule(1), with_bias=True)
    made.router.expert_bias.copy_(torch.tensor([10.0, 0, 0, 0, 0, 0]))
    y, routing = made(torch.randn(2, 4, D))
    y.sum().backward()  # a gradient of stride 0 on its way to grouped_mm
    assert routing.counts.tolist() == [8, 0, 0, 0, 0, 0]
    assert made.experts.w_in.grad[0].abs().sum() > 0
    assert made.experts.w_in.grad[1:].abs().sum() == 0


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    made = layer(RoutingRule(2, "sigmoid", True)).eval()
    x = torch.randn(5, 9, D)
    together = made(x)[0]
    for i in range(5):
        torch.testing.assert_close(made(x[i : i + 1])[0][0], together[i], rtol=1e-5, atol=1e-6)


def test_forward_changes_no_state() -> None:
    made = layer(RoutingRule(2), with_bias=True)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    for training in (True, False):
        made.train(training)(torch.randn(2, 4, D))
    assert all(torch.equal(before[k], v) for k, v in made.state_dict().items())


def test_evaluation_mode_is_differentiable() -> None:
    made = layer(RoutingRule(2)).eval()
    made(torch.randn(2, 4, D))[0].sum().backward()
    assert made.experts.w_in.grad is not None


def test_autocast_runs_the_experts_in_bfloat16_and_the_router_in_float32() -> None:
    made = layer(RoutingRule(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = made(torch.randn(2, 4, D))
    assert y.dtype == torch.bfloat16
    assert routing.logits.dtype == routing.scores.dtype == routing.weights.dtype == torch.float32


def test_plan_lists_every_pair_once_sorted_by_expert() -> None:
    logits = torch.randn(40, E)
    chosen = select(logits, RoutingRule(2))
    plan = chosen.plan
    pairs = {(int(t), int(e)) for t, e in zip(plan.token, plan.expert, strict=True)}
    wanted = {(s, int(e)) for s, e in itertools.product(range(40), range(E)) if e in chosen.expert_ids[s]}
    assert pairs == wanted
    assert (plan.expert.diff() >= 0).all()
    assert plan.counts.tolist() == torch.bincount(chosen.expert_ids.flatten(), minlength=E).tolist()
    assert torch.equal(plan.token[plan.slot], torch.arange(40)[:, None].expand(40, 2))
    assert torch.equal(plan.weight[plan.slot], chosen.weights)


def test_the_bias_moves_the_choice_and_not_the_weights() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -1.0, -1.0]])
    bias = torch.tensor([0.0, 0, 0, 0, 0, 5.0])
    chosen = select(logits, RoutingRule(2, "sigmoid"), bias)
    assert set(chosen.expert_ids[0].tolist()) == {0, 5}
    torch.testing.assert_close(chosen.weights, logits.sigmoid().gather(1, chosen.expert_ids))


def test_paper_weights_are_not_renormalised() -> None:
    weights = select(torch.zeros(3, 8), RoutingRule(2)).weights
    torch.testing.assert_close(weights, torch.full((3, 2), 1 / 8))


@pytest.mark.parametrize("top_k", [-1, 0, 5])
def test_a_token_goes_to_at_least_one_expert_and_at_most_to_all(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k is {top_k}; it must be between 1 and num_experts 4"):
        MoELayer(8, num_experts=4, expert_width=8, shared_width=0, rule=RoutingRule(top_k))


def test_grouped_refuses_odd_widths_and_auto_takes_the_loop() -> None:
    with pytest.raises(ValueError, match="backend loop"):
        Experts(16, 4, 7, backend="grouped")
    odd = MoELayer(6, num_experts=3, expert_width=7, shared_width=0, rule=RoutingRule(1))
    assert odd(torch.randn(1, 4, 6))[0].shape == (1, 4, 6)


@pytest.mark.parametrize(("width", "loops"), [(128, False), (1024, True)])
def test_auto_takes_the_loop_for_large_experts_on_a_cpu(
    width: int, loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MoELayer(64, num_experts=2, expert_width=width, shared_width=0, rule=RoutingRule(1))
    x = torch.randn(1, 4, 64)
    expected = made(x)[0]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("grouped_mm was called")

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", refuse)
    if loops:
        assert torch.equal(made(x)[0], expected)
    else:
        with pytest.raises(AssertionError, match="grouped_mm"):
            made(x)


def block_of(**moe: object) -> torch.nn.Module:
    config = Config(moe=MoEConfig(blocks="all", **moe))  # type: ignore[arg-type]
    return build(config, 10).blocks[0]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_a_block_compiles_into_one_graph_in_bfloat16(activation: str) -> None:
    config = Config(model=ModelConfig(activation=activation), moe=MoEConfig(blocks="all"))  # type: ignore[arg-type]
    block, D = build(config, 10).blocks[0], config.model.hidden_size
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch._dynamo.explain(block)(torch.randn(4, 16, D, requires_grad=True), torch.randn(4, D), None)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.parametrize("how", ["float32", "loop", "exchange"])
def test_what_changes_from_step_to_step_is_not_compiled_anew(how: str) -> None:
    torch._dynamo.reset()  # what other tests compiled counts against the limit of recompilations
    block = block_of(backend="loop") if how == "loop" else block_of()
    if how == "exchange":
        block.moe.experts.exchange = lambda rows, counts, products: products(
            torch.cat(rows.split(counts.tolist())), counts
        )
    counter = CompileCounter()
    compiled, D = torch.compile(block, backend=counter, dynamic=False), block.attn.proj.in_features
    graphs = []
    for seed in range(12):
        torch.manual_seed(seed)
        x = torch.randn(4, 16, D, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=how != "float32"):
            wanted, got = block(x, x[:, 0], None)[0], compiled(x, x[:, 0], None)[0]
        torch.testing.assert_close(got, wanted)
        got.sum().backward()
        graphs.append(counter.frame_count)
    assert graphs == [graphs[0]] * 12
    assert graphs[0] > 0
