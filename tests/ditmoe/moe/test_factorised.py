"""Factorised experts against the explicit sum over experts, and 1.5-entmax against a search for its threshold."""

from dataclasses import replace

import pytest
import torch

from ditmoe.config.presets import PRESETS
from ditmoe.config.rules import with_rule
from ditmoe.config.sections import Config, MoEConfig, ParallelConfig, TrainConfig
from ditmoe.model import build, check_network, count_parameters
from ditmoe.moe import Condition, FactorisedExperts, MoELayer, RoutingRule, entmax
from ditmoe.moe.factorised import FactorisedLayer

D, E, F, C, R, B = 12, 5, 6, 7, 9, 3
DENSE = RoutingRule(1, "entmax", kind="dense")


def weights(seed: int = 0) -> torch.Tensor:
    return entmax(2 * torch.randn(R, E, generator=torch.Generator().manual_seed(seed)))


def explicit(layer: FactorisedLayer, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """sum over e of a_e W_e [x, 1], with every W_e (O, I + 1) made."""
    f_i = torch.cat([layer.input.weight, layer.input.bias[:, None]], dim=1)  # (C, I + 1)
    matrices = [layer.output.weight @ torch.diag(layer.expert.weight[:, e]) @ f_i for e in range(a.shape[1])]
    one = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    return sum(a[:, e, None, None] * (one @ w.T) for e, w in enumerate(matrices))


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_it_is_the_explicit_sum_over_experts(activation: str) -> None:
    torch.manual_seed(0)
    experts, x, a = FactorisedExperts(D, E, F, C, activation), torch.randn(R, B, D), weights()
    h = explicit(experts.first, x, a)
    if activation == "gelu":
        h = torch.nn.functional.gelu(h, approximate="tanh")
    else:
        h = torch.nn.functional.silu(h[..., :F]) * h[..., F:]
    torch.testing.assert_close(experts(x, a), explicit(experts.second, h, a), rtol=1e-4, atol=1e-4)


def test_it_starts_as_the_paper_does() -> None:
    torch.manual_seed(0)
    layer = FactorisedLayer(64, 400, 300, 200)
    expert = layer.expert.weight
    assert float(expert.mean()) == pytest.approx(1, abs=0.05)
    assert float(expert.std()) == pytest.approx(1, abs=0.05)
    for weight, fan_in in ((layer.input.weight, 400), (layer.input.bias, 400), (layer.output.weight, 200)):
        assert float(weight.abs().max()) == pytest.approx(fan_in**-0.5, rel=0.02)
        assert float(weight.std()) == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)
    model = build(with_rule(Config(), "mumoe"), 10)  # DiT's own start of linear maps does not reach them
    (one, *_) = [m for m in model.modules() if isinstance(m, FactorisedLayer)]
    assert float(one.expert.weight.detach().mean()) == pytest.approx(1, abs=0.1)


def brute_force(logits: torch.Tensor) -> torch.Tensor:
    """max(z / 2 - tau, 0)^2, with tau found by halving an interval until it sums to 1."""
    z = logits.double() / 2
    low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
    for _ in range(100):
        tau = (low + high) / 2
        large = (z - tau).clamp_min(0).square().sum(-1, keepdim=True) > 1
        low, high = torch.where(large, tau, low), torch.where(large, high, tau)
    return (z - low).clamp_min(0).square()


@pytest.mark.parametrize("size", [1, 2, 8, 257])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 10.0, 1e4])
def test_entmax_is_what_a_search_finds(size: int, spread: float) -> None:
    logits = spread * torch.randn(50, size, generator=torch.Generator().manual_seed(1)) + 3
    p = entmax(logits)
    torch.testing.assert_close(p, brute_force(logits).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(p.sum(-1), torch.ones(50), rtol=1e-5, atol=1e-5)
    if size == 257 and spread == 1:
        assert (p == 0).any(dim=-1).all()
        assert ((p > 0).sum(dim=-1) > 1).all()


def test_gradients_of_entmax() -> None:
    logits = torch.randn(6, 8, dtype=torch.double, generator=torch.Generator().manual_seed(2)).requires_grad_()
    assert torch.autograd.gradcheck(entmax, (logits,))
    (grad,) = torch.autograd.grad(entmax(logits)[:, 0].sum(), logits)
    assert float(grad.sum(dim=-1).abs().max()) < 1e-12  # a constant changes nothing
    tied = torch.zeros(1, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(entmax(tied)[0, 0], tied)
    assert grad.isfinite().all()


def layer(rank: int | None = C, rule: RoutingRule = DENSE, **more: object) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(D, num_experts=E, expert_width=F, shared_width=0, rule=rule, rank=rank, **more)


def test_the_record_says_who_has_a_weight() -> None:
    made, x = layer(), 3 * torch.randn(2, 8, D)
    y, record = made(x)
    assert y.shape == x.shape
    assert record.plan is None
    assert torch.equal(record.scores, entmax(torch.nn.functional.layer_norm(record.logits, record.logits.shape[-1:])))
    assert torch.equal(record.served(), (record.scores > 0).long().view(2, 8, E))
    assert record.counts.tolist() == record.served().sum(dim=(0, 1)).tolist()
    assert int(record.counts.min()) > 0
    assert int(record.counts.max()) <= 16
    y.square().sum().backward()
    assert made.router is not None
    assert all(float(p.grad.abs().sum()) > 0 for p in made.parameters())


def test_removing_an_expert_changes_the_tokens_that_it_serves_and_no_others() -> None:
    made, x = layer(), 3 * torch.randn(2, 8, D)
    before, record = made(x)
    for e in range(E):
        served = record.served()[..., e] > 0
        kept = [part.expert.weight[:, e].clone() for part in (made.experts.first, made.experts.second)]
        with torch.no_grad():
            for part in (made.experts.first, made.experts.second):
                part.expert.weight[:, e] = 0
            changed = (made(x)[0] - before).abs().amax(dim=-1) > 1e-6
            for part, column in zip((made.experts.first, made.experts.second), kept, strict=True):
                part.expert.weight[:, e] = column
        assert torch.equal(changed, served)
    assert int((record.served() == 0).sum()) > 0


@pytest.mark.parametrize("inputs", [("token",), ("time",), ("position",)])
def test_rows_that_share_weights_go_together(inputs: tuple[str, ...]) -> None:
    places = torch.randn(4, D) if inputs == ("position",) else None
    made, x, t = layer(inputs=inputs, positions=places), torch.randn(3, 4, D), torch.randn(3, D)
    y, record = made(x, Condition(t, t))
    a = record.scores.view(record.images, -1, E).expand(3, 4, E).reshape(12, E)
    torch.testing.assert_close(y.reshape(12, 1, D), made.experts(x.reshape(12, 1, D), a), rtol=1e-4, atol=1e-6)
    empty, none = made(torch.zeros(0, 4, D), Condition(t[:0], t[:0]))
    assert empty.shape == (0, 4, D)
    assert int(none.counts.sum()) == 0


def test_prototypes_have_means_of_those_that_they_serve() -> None:
    made, x = layer(kind="prototype"), torch.randn(2, 8, D)
    record = made(x)[1]
    wanted = torch.einsum("nte,ntd->ed", record.served().float(), x)
    torch.testing.assert_close(record.sums, wanted)


def test_norms_are_of_each_experts_part() -> None:
    experts, x, a = layer().experts, torch.randn(R, B, D), weights()
    h = experts.hidden(x, a)
    for e, found in enumerate(experts.norms(x, a).tolist()):
        alone = torch.zeros_like(a)
        alone[:, e] = a[:, e]
        assert found == pytest.approx(float(experts.second(h, alone).norm(dim=-1).sum()), rel=1e-4)


def test_autocast_runs_it_in_bfloat16() -> None:
    made, x = layer(), torch.randn(2, 8, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, record = made(x)
    assert y.dtype == torch.bfloat16
    assert record.scores.dtype == torch.float32
    torch.testing.assert_close(y.float(), made(x)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("name", ["digits", "fashion", "s", "b"])
def test_the_rank_has_the_parameters_of_the_dense_layer(name: str, activation: str) -> None:
    base = PRESETS[name]
    base = replace(base, model=replace(base.model, activation=activation))
    with torch.device("meta"):
        sizes = [count_parameters(build(config, 10)) for config in (base, with_rule(base, "mumoe"))]
    assert sizes[1][0] == sizes[1][1]  # nothing is idle
    assert sizes[1][1] == pytest.approx(sizes[0][1], rel=0.03)
    asked = replace(with_rule(base, "mumoe").moe, rank=3)
    with torch.device("meta"):
        net = build(replace(base, moe=asked), 10)
    assert {m.input.out_features for m in net.modules() if isinstance(m, FactorisedLayer)} == {3}


def test_what_does_not_go_with_it_is_refused_in_a_sentence() -> None:
    config = with_rule(Config(), "mumoe")
    with pytest.raises(ValueError, match="parallel.experts 2 does not apply to moe.experts factorised"):
        replace(config, parallel=ParallelConfig(experts=2))
    with pytest.raises(ValueError, match="muon_on all is for stacked experts, and moe.experts is factorised"):
        replace(config, train=TrainConfig(optimizer="muon", muon_on="all"))
    for rank, rule in ((None, DENSE), (C, RoutingRule(2))):
        with pytest.raises(ValueError, match="dense has one, as for factorised experts alone"):
            layer(rank, rule)


def test_it_compiles_into_one_graph() -> None:
    config = with_rule(Config(moe=MoEConfig(blocks="all")), "mumoe")
    block, width = build(config, 10).blocks[0], config.model.hidden_size
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch._dynamo.explain(block)(
            torch.randn(4, 16, width, requires_grad=True), Condition(*torch.randn(2, 4, width)), None
        )
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_a_network_with_it_is_known_by_its_settings() -> None:
    with torch.device("meta"):
        values = dict(build(with_rule(Config(), "mumoe"), 10).config)
    known = {name: value for name, value in values.items() if not name.startswith("_")}
    check_network(known)
    with pytest.raises(ValueError, match="rank is 0"):
        check_network({**known, "expert_rank": 0})
    with pytest.raises(ValueError, match="select dense works with experts factorised"):
        check_network({**known, "expert_rank": None})
