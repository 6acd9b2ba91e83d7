"""Who serves whom: every kind of choice against its obvious version, one row or one expert at a time."""

import math

import pytest
import torch

from ditmoe.config.rule import RoutingRule
from ditmoe.moe import select
from ditmoe.moe.noise import keys_of, uniform

n, t, E = 3, 12, 6


def logits_of(experts: int = E, seed: int = 0) -> torch.Tensor:
    return torch.randn(n * t, experts, generator=torch.Generator().manual_seed(seed))


def pairs(plan) -> set[tuple[int, int]]:
    return set(zip(plan.row.tolist(), plan.expert.tolist(), strict=True))


def check_bags(plan, rows: int = n * t) -> None:
    """The way back leads every row to its own pairs."""
    ends = [*plan.starts.tolist()[1:], len(plan.row)]
    assert len(plan.starts) == rows
    for row, (start, end) in enumerate(zip(plan.starts.tolist(), ends, strict=True)):
        assert all(int(plan.row[slot]) == row for slot in plan.slot[start:end])
    assert plan.expert.tolist() == sorted(plan.expert.tolist())
    assert plan.counts.tolist() == [int((plan.expert == e).sum()) for e in range(len(plan.counts))]


@pytest.mark.parametrize(("capacity", "wanted"), [(None, 4), (1.0, 2), (3.0, 6), (0.01, 1), (6.0, 12)])
def test_every_expert_takes_its_best_rows_of_each_image(capacity: float | None, wanted: int) -> None:
    rule = RoutingRule(2, "softmax", kind="expert_choice", capacity=capacity)
    logits = logits_of()
    scores, plan, counts = select(logits, rule, images=n)
    expected = set()
    for image in range(n):
        for e in range(E):
            rows = sorted(range(image * t, image * t + t), key=lambda r: -float(logits.softmax(1)[r, e]))
            expected |= {(row, e) for row in rows[:wanted]}
    assert pairs(plan) == expected
    assert plan.counts.tolist() == counts.tolist() == [n * wanted] * E  # even by construction
    check_bags(plan)
    torch.testing.assert_close(plan.weight, scores[plan.row, plan.expert])
    missed = sum(all((row, e) not in expected for e in range(E)) for row in range(n * t))
    assert float(plan.unserved) == pytest.approx(missed / (n * t))


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5, 1.0])
def test_relative_runs_who_comes_near_the_best(tau: float) -> None:
    rule = RoutingRule(2, "sigmoid", True, 2.0, "relative", tau)
    logits = logits_of()
    _, plan, _ = select(logits, rule, images=n)
    scores = logits.sigmoid()
    near = {(r, e) for r in range(n * t) for e in range(E) if scores[r, e] >= (1 - tau) * scores[r].max()}
    assert pairs(plan) == near
    check_bags(plan)
    sums = torch.zeros(n * t).index_add_(0, plan.row, plan.weight)
    torch.testing.assert_close(sums, torch.full((n * t,), 2.0))
    if tau == 0:
        assert len(plan.row) == n * t  # the best one alone
    if tau == 1:
        assert len(plan.row) == n * t * E


@pytest.mark.parametrize("tau", [0.0, 0.4, 0.8, 1.0])
def test_top_p_runs_the_fewest_with_the_share(tau: float) -> None:
    logits = logits_of().double()
    _, plan, _ = select(logits, RoutingRule(2, "softmax", kind="top_p", tau=tau), images=n)
    chosen = pairs(plan)
    check_bags(plan)
    for r in range(n * t):
        ranked = sorted(range(E), key=lambda e: -float(logits[r, e]))
        shares, took = logits[r].softmax(0), []
        while not took or sum(float(shares[e]) for e in took) < tau - 1e-9:
            took.append(ranked[len(took)])
        assert {e for row, e in chosen if row == r} == set(took)


def test_a_threshold_lets_any_number_pass_and_by_default_top_k_on_average() -> None:
    logits = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(1))
    _, plan, _ = select(logits, RoutingRule(2, "sigmoid", kind="threshold"))
    assert len(plan.row) / len(logits) == pytest.approx(2, rel=0.02)
    per_row = torch.bincount(plan.row, minlength=len(logits))
    assert int(per_row.min()) == 0
    assert int(per_row.max()) > 4
    _, plan, _ = select(logits_of(), RoutingRule(2, "sigmoid", kind="threshold", tau=0.7))
    assert len(plan.row) == int((logits_of().sigmoid() >= 0.7).sum())
    check_bags(plan)


def test_tau_may_be_each_rows_own() -> None:
    logits, tau = logits_of(), torch.linspace(0, 1, n * t).unsqueeze(1)
    _, plan, _ = select(logits, RoutingRule(2, "sigmoid", kind="relative", tau=0.3), tau=tau)
    scores = logits.sigmoid()
    assert len(plan.row) == int((scores >= (1 - tau) * scores.amax(1, keepdim=True)).sum())


def test_order_drops_the_last_rows_and_random_others_at_every_key() -> None:
    """Rows that all want the same experts: what is left is C rows an expert and image."""
    side, experts, K = 16, 4, 2
    logits = torch.randn(1, experts).expand(64 * side * side, experts) + 1e-3 * torch.randn(64 * side * side, experts)
    keys = keys_of(torch.rand(64, generator=torch.Generator().manual_seed(0)) * 1000)
    dropped = {}
    for overflow in ("order", "random"):
        rule = RoutingRule(K, "softmax", overflow=overflow, capacity=1.0)
        _, plan, counts = select(logits, rule, images=64, keys=keys)
        check_bags(plan, 64 * side * side)
        assert int(plan.counts.max()) == 64 * K * side * side / experts
        assert int(counts.sum()) == K * 64 * side * side  # what was asked for, for the balance loss
        kept = torch.bincount(plan.row, minlength=64 * side * side).view(64, side, side).double()
        dropped[overflow] = 1 - kept.mean(dim=(0, 2)) / K  # by row of the image
    assert float(dropped["order"][-1]) == 1.0
    assert float(dropped["order"][0]) == 0.0
    assert float(dropped["random"].max() / dropped["random"].min()) <= 1.2
    rule = RoutingRule(K, "softmax", overflow="random")
    one, other = (pairs(select(logits[:256], rule, images=1, keys=keys[i : i + 1])[1]) for i in (0, 1))
    assert one != other


def test_a_capacity_that_suffices_drops_nothing() -> None:
    logits = logits_of()
    plain = select(logits, RoutingRule(2, "sigmoid", True))[1]
    roomy = select(logits, RoutingRule(2, "sigmoid", True, overflow="order", capacity=6.0), images=n)[1]
    assert pairs(plain) == pairs(roomy)
    torch.testing.assert_close(roomy.weight, plain.weight)


def test_a_row_sees_its_best_groups_alone() -> None:
    logits = logits_of(8)
    _, plan, _ = select(logits, RoutingRule(2, "sigmoid", groups=4, top_groups=1))
    values = logits.sigmoid().view(-1, 4, 2).sum(2)
    assert (plan.expert // 2).tolist() == values.argmax(1)[plan.row].tolist()
    assert plan.per_row == 2
    free = select(logits, RoutingRule(2, "sigmoid", groups=4, top_groups=4))[1]
    assert pairs(free) == pairs(select(logits, RoutingRule(2, "sigmoid"))[1])


def test_null_experts_do_nothing_and_count() -> None:
    logits = logits_of(E + 6)
    _, plan, counts = select(logits, RoutingRule(4, "sigmoid", True, 2.0, null_experts=6))
    best = logits.topk(4, dim=1).indices
    assert pairs(plan) == {(r, int(e)) for r in range(n * t) for e in best[r] if e < E}
    assert counts.tolist() == torch.bincount(best.flatten(), minlength=E + 6).tolist()
    assert len(plan.counts) == E
    served = torch.zeros(n * t).index_add_(0, plan.row, plan.weight)
    assert set(served.round(decimals=4).tolist()) <= {0.0, 2.0}
    check_bags(plan)


@pytest.mark.parametrize("kind", ["expert_choice", "relative", "top_p", "threshold"])
def test_the_bias_moves_the_choice_and_never_a_weight(kind: str) -> None:
    logits, bias = logits_of(), torch.tensor([0.9, 0, 0, 0, 0, -0.9])
    rule = RoutingRule(2, "sigmoid", kind=kind)  # type: ignore[arg-type]
    plain, biased = select(logits, rule, images=n)[1], select(logits, rule, bias, images=n)[1]
    assert int(biased.counts[0]) >= int(plain.counts[0])
    assert int(biased.counts[-1]) <= int(plain.counts[-1])
    torch.testing.assert_close(biased.weight, logits.sigmoid()[biased.row, biased.expert])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"tau": 0.5}, "tau does not apply to select topk"),
        ({"kind": "relative", "tau": 1.5}, r"tau is 1.5; with select relative it lies in \[0, 1\]"),
        ({"kind": "threshold"}, "select threshold needs a tau with score softmax"),
        ({"kind": "relative", "score": "identity"}, "score identity has others"),
        ({"kind": "top_p", "overflow": "order"}, "overflow works with select topk, not top_p"),
        ({"capacity": 2.0}, "capacity works with select expert_choice, or with overflow"),
        ({"kind": "expert_choice", "capacity": 0.0}, "capacity is 0.0; it must be above 0"),
        ({"kind": "relative", "groups": 2}, "groups work with select topk, not relative"),
        ({"groups": 2, "top_groups": 3}, "top_groups is 3; it must be between 1 and groups 2"),
        ({"groups": 2, "null_experts": 1}, "leave out one of groups and null_experts"),
        ({"kind": "expert_choice", "null_experts": 1}, "do not apply to select expert_choice"),
        ({"null_experts": -1}, "null_experts is -1; it must be 0 or more"),
        ({"kind": "threshold", "tau": math.nan}, "tau is nan; it must be finite"),
    ],
)
def test_what_cannot_go_together_is_refused(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RoutingRule(2, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "experts", "sentence"),
    [
        ({}, 1, "top_k 2 is more than num_experts 1"),
        ({"kind": "expert_choice", "capacity": 7.0}, 6, "capacity is 7; a token has at most num_experts 6"),
        ({"groups": 4}, 6, "groups is 4; it must divide num_experts 6"),
        ({"groups": 8, "top_groups": 1}, 8, "top_k is 2, but top_groups 1 hold 1 experts"),
    ],
)
def test_what_so_many_experts_cannot_do_is_refused(values: dict[str, int], experts: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RoutingRule(2, **values).check(experts)  # type: ignore[arg-type]


def test_noise_is_uniform_and_a_function_of_key_place_and_salt() -> None:
    keys = keys_of(torch.rand(200, generator=torch.Generator().manual_seed(3)) * 1000)
    u = uniform(keys, (49, 16))
    assert torch.equal(u, uniform(keys, (49, 16)))
    assert not torch.equal(u, uniform(keys, (49, 16), salt=1))
    assert torch.equal(u[7:8], uniform(keys[7:8], (49, 16)))
    assert 0 <= float(u.min()) < 1e-3
    assert 1 - 1e-3 < float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=3e-3)
    assert float(u.var()) == pytest.approx(1 / 12, rel=0.02)
    flat = u.flatten(1)
    for a, b in ((flat[:-1], flat[1:]), (flat[:, :-1], flat[:, 1:])):  # neighbours in key and in place
        corr = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(float(corr)) < 0.01


@pytest.mark.parametrize("kind", ["relative", "top_p"])
def test_a_row_that_biases_leave_nothing_has_its_best_expert(kind: str) -> None:
    """All choices at 0 or below, an expert suppressed or not: nobody goes to an arbitrary one, or without."""
    rule = RoutingRule(2, "softmax", kind=kind, tau=0.4)  # type: ignore[arg-type]
    logits, bias = logits_of(), torch.linspace(-1.3, -1.0, E)
    best = (logits.softmax(-1) + bias).argmax(-1)
    plan = select(logits, rule, bias)[1]
    assert pairs(plan) == {(row, int(e)) for row, e in enumerate(best)}
    policy = torch.zeros(E)
    policy[0] = -math.inf
    logits = logits.masked_fill(policy == -math.inf, -1e4)
    best = (logits.softmax(-1) + bias)[:, 1:].argmax(-1) + 1
    plan = select(logits, rule, bias, policy=policy)[1]
    assert pairs(plan) == {(row, int(e)) for row, e in enumerate(best)}
