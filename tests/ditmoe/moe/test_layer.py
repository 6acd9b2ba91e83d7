"""The MoE layer: against the obvious version, backend against backend, and what must not depend on what."""

import itertools
import weakref
from dataclasses import replace
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from ditmoe.config.experts import RouterInput
from ditmoe.config.presets import PRESETS
from ditmoe.config.sections import Config, ModelConfig, MoEConfig
from ditmoe.model import build
from ditmoe.moe import Condition, Experts, FeedForward, MoELayer, Plan, Router, RoutingRule, kernels, plan_of, select
from ditmoe.moe import experts as experts_module
from tests.reference.moe_layer import expert
from tests.reference.moe_layer import moe as reference_moe

D, E, F = 16, 6, 8


def layer(rule: RoutingRule, **options: object) -> MoELayer:
    torch.manual_seed(0)
    values = {"num_experts": E, "expert_width": F, "shared_width": 12, **options}
    if values.get("positions") is not None:
        values.setdefault("inputs", ("position",))
    made = MoELayer(D, rule=rule, **values)  # type: ignore[arg-type]
    with torch.no_grad():
        made.router.weight.mul_(2)  # spread the logits
    return made


SCORES = [("softmax", False), ("softmax", True), ("sigmoid", False), ("sigmoid", True), ("identity", False)]


@pytest.mark.parametrize(("score", "renormalize"), SCORES)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("shared_width", [0, 12])
@pytest.mark.parametrize("kind", ["linear", "prototype"])
def test_equals_the_obvious_version(
    score: str, renormalize: bool, activation: str, shared_width: int, kind: str
) -> None:
    rule = RoutingRule(2, score, renormalize, 2.5)  # type: ignore[arg-type]
    options = {"activation": activation, "shared_width": shared_width, "kind": kind}
    made = layer(rule, **options, with_bias=True, backend="loop").double()
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
    served = routing.served()
    assert served.shape == (1, 5, E)  # one decision a place
    assert served.sum(-1).tolist() == [[2] * 5]
    assert len(torch.unique(served[0], dim=0)) > 1
    assert routing.counts.tolist() == (3 * served.sum((0, 1))).tolist()
    y.square().mean().backward()
    assert made.router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("kind", "biases"), [("linear", False), ("prototype", False), ("mlp", True)])
@pytest.mark.parametrize(("by_place", "backend"), [(False, "loop"), (True, "loop"), (True, "auto")])
def test_gradients_are_right(by_place: bool, backend: str, kind: str, biases: bool) -> None:
    positions = torch.randn(4, D) if by_place else None
    rule = RoutingRule(3, "sigmoid", True)
    made = layer(rule, positions=positions, backend=backend, kind=kind, biases=biases).double()
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


@pytest.mark.parametrize("backend", ["grouped", "loop"])
@pytest.mark.parametrize("biases", [False, True])
def test_products_of_16_bits_have_few_numbers_of_rows(
    backend: str, biases: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where each new one is compiled. Values and gradients are those of the rows that there are."""
    made = layer(RoutingRule(2), backend=backend, biases=biases, num_experts=5).to(torch.bfloat16)
    with torch.no_grad():
        made.router.weight[4] = -made.router.weight[:4].sum(dim=0)  # loads differ
    x, seen, found = torch.randn(3, 31, D).bfloat16(), [], {}
    own = experts_module.evened

    def spy(plan: Plan, x: Tensor) -> Plan:
        found = own(plan, x)
        seen.append(found.counts.tolist())
        return found

    for name, evened in (("as it is", spy), ("uneven", lambda plan, _: plan)):
        monkeypatch.setattr(experts_module, "evened", evened)
        made.zero_grad()
        y, routing = made(x)
        y.float().square().sum().backward()
        found[name] = [y, *(p.grad for p in made.parameters())]
    assert seen == [[-(-count // 32) * 32 for count in routing.counts.tolist()]]
    assert routing.counts.sum() == 3 * 31 * 2
    for got, wanted in zip(found["as it is"], found["uneven"], strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2 * float(wanted.detach().abs().max()))


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


@pytest.mark.parametrize("kind", ["linear", "prototype"])
@pytest.mark.parametrize("inputs", [("token",), ("time",), ("position",), ("token", "position")])
def test_an_empty_batch_gives_nothing(inputs: tuple[str, ...], kind: str) -> None:
    positions = torch.randn(4, D) if "position" in inputs else None
    made = layer(RoutingRule(2), inputs=inputs, positions=positions, kind=kind)
    nothing = torch.zeros(0, D)
    y, routing = made(torch.zeros(0, 4, D), Condition(nothing, nothing))
    assert y.shape == (0, 4, D)
    assert int(routing.counts.sum()) == 0


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
    assert routing.logits.dtype == routing.scores.dtype == routing.plan.weight.dtype == torch.float32


def test_plan_lists_every_pair_once_sorted_by_expert() -> None:
    logits = torch.randn(40, E)
    scores, plan, _ = select(logits, RoutingRule(2))
    wanted = scores.topk(2).indices
    pairs = {(int(r), int(e)) for r, e in zip(plan.row, plan.expert, strict=True)}
    assert pairs == {(r, int(e)) for r, e in itertools.product(range(40), range(E)) if e in wanted[r]}
    assert (plan.expert.diff() >= 0).all()
    assert plan.counts.tolist() == torch.bincount(wanted.flatten(), minlength=E).tolist()
    assert torch.equal(plan.row[plan.slot], torch.arange(40).repeat_interleave(2))
    assert torch.equal(plan.expert[plan.slot].view(40, 2), wanted)  # best first
    assert torch.equal(plan.weight[plan.slot].view(40, 2), scores.gather(1, wanted))
    assert plan.per_row == 2


RAGGED = [[], [3], [0, 1, 2, 3, 4, 5], [2, 5], [], [0], []]  # experts of seven rows; nobody asks expert 4 but the third


def ragged_plan(weight: torch.Tensor) -> object:
    """The plan of RAGGED with these weights of its pairs, row after row."""
    sizes = torch.tensor([len(row) for row in RAGGED])
    return plan_of(torch.tensor(list(itertools.chain(*RAGGED))), weight, sizes.cumsum(0) - sizes, E)


@pytest.mark.parametrize("backend", ["grouped", "loop", "exchange"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_may_have_any_number_of_experts(backend: str, tokens: int) -> None:
    torch.manual_seed(0)
    weight = torch.rand(sum(map(len, RAGGED)), requires_grad=True)
    experts = Experts(D, E, F, backend="grouped" if backend == "exchange" else backend)  # type: ignore[arg-type]
    if backend == "exchange":
        experts.exchange = lambda rows, counts, products: products(rows, counts)
    x = torch.randn(len(RAGGED), tokens, D, requires_grad=True)
    y = experts(x, ragged_plan(weight))
    obvious = torch.zeros_like(x)
    pairs = zip(weight, [(r, e) for r, row in enumerate(RAGGED) for e in row], strict=True)
    for w, (r, e) in pairs:
        for b in range(tokens):
            once = expert(x[r, b], experts.w_in[e], experts.w_out[e], "swiglu")
            obvious = obvious + torch.zeros_like(x).index_put((torch.tensor(r), torch.tensor(b)), w * once)
    torch.testing.assert_close(y, obvious, rtol=1e-5, atol=1e-6)
    assert y[0].abs().sum() == 0  # nobody serves it
    to = torch.randn_like(y)
    leaves = (x, weight, experts.w_in, experts.w_out)
    for got, wanted in zip(*(torch.autograd.grad((out * to).sum(), leaves) for out in (y, obvious)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_plan_of_nothing_gives_nothing() -> None:
    experts = Experts(D, E, F, backend="loop")
    none = plan_of(torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(4, dtype=torch.int64), E)
    x = torch.randn(4, 2, D, requires_grad=True)
    y = experts(x, none)
    y.sum().backward()
    assert y.abs().sum() == 0
    assert x.grad is not None
    assert x.grad.abs().sum() == 0


@pytest.mark.parametrize("seen", [kind for kind in get_args(RouterInput) if kind not in ("token", "position")])
@pytest.mark.parametrize("backend", ["loop", "auto"])
@pytest.mark.parametrize("kind", ["linear", "prototype"])
def test_routers_that_see_more_than_the_token_equal_the_obvious_version(seen: str, backend: str, kind: str) -> None:
    inputs = tuple(seen.split("+"))
    positions = torch.randn(5, D) if "position" in inputs else None
    rule = RoutingRule(2, "sigmoid", True)
    made = layer(rule, inputs=inputs, positions=positions, backend=backend, kind=kind).double()
    torch.manual_seed(1)
    x, plain = torch.randn(2, 3, 5, D, dtype=torch.float64)
    t, y = torch.randn(2, 3, D, dtype=torch.float64)
    condition = Condition(t + y, t, y, plain)
    got, routing = made(x, condition)
    torch.testing.assert_close(got, reference_moe(made, x, condition), rtol=1e-6, atol=1e-6)
    an_image = {"time", "label"} >= set(inputs)
    assert routing.served().shape == ((3, 1, E) if an_image else (3, 5, E))
    assert int(routing.counts.sum()) == 3 * 5 * 2
    for i in range(3):  # no image depends on its mates
        alone = made(x[i : i + 1], Condition(*(part[i : i + 1] for part in condition[:4])))[0]
        torch.testing.assert_close(alone[0], got[i], rtol=1e-10, atol=1e-10)
    got.square().mean().backward()
    assert all(part.abs().sum() > 0 for part in made.router.weight.grad.split(D, dim=1))


def test_one_decision_for_a_whole_batch_goes_the_same_way() -> None:
    made = layer(RoutingRule(2))
    logits = torch.randn(1, 1, E)
    made.router.forward = lambda seen, keys=None: (logits, None)  # type: ignore[method-assign]
    x = torch.randn(3, 5, D)
    y, routing = made(x)
    scores, ids = logits.flatten().softmax(0).topk(2)
    wanted = sum(s * expert_rows(made, int(e), x) for s, e in zip(scores, ids, strict=True)) + made.shared(x)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    assert sorted(routing.counts.tolist()) == [0] * (E - 2) + [15, 15]


def expert_rows(made: MoELayer, e: int, x: torch.Tensor) -> torch.Tensor:
    w_in, w_out = made.experts.w_in[e], made.experts.w_out[e]
    return torch.stack([expert(token, w_in, w_out, "swiglu") for token in x.flatten(0, 1)]).view_as(x)


def test_the_bias_moves_the_choice_and_not_the_weights() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -1.0, -1.0]])
    bias = torch.tensor([0.0, 0, 0, 0, 0, 5.0])
    _, plan, _ = select(logits, RoutingRule(2, "sigmoid"), bias)
    assert plan.expert.tolist() == [0, 5]
    torch.testing.assert_close(plan.weight, logits.sigmoid()[0, [0, 5]])


def test_identity_takes_logits_as_they_are_and_is_never_renormalised() -> None:
    logits = torch.tensor([[0.5, -0.25, 0.75]])
    assert select(logits, RoutingRule(2, "identity", scale=2.0))[1].weight.tolist() == [1.0, 1.5]
    with pytest.raises(ValueError, match="score identity cannot be renormalised"):
        RoutingRule(2, "identity", renormalize=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths_do_not_count_for_a_prototype_router(dtype: torch.dtype) -> None:
    made = layer(RoutingRule(1, "identity"), kind="prototype")
    x = torch.randn(2, 5, D).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = made(x)[1].logits
        with torch.no_grad():
            made.router.weight.mul_(torch.rand(E, 1) + 0.5)
        longer = made(4 * x)[1].logits
    assert logits.dtype == torch.float32
    assert logits.abs().max() <= 1.0
    torch.testing.assert_close(longer, logits)
    made(torch.zeros(1, 1, D))[0].sum().backward()  # a token of nothing
    assert made.router.weight.grad.isfinite().all()


@pytest.mark.parametrize("seen", ["token", "token+position", "plain+time"])
def test_a_prototype_router_starts_as_a_linear_one(seen: str) -> None:
    inputs, wide, many = tuple(seen.split("+")), 128, 512
    x, t = torch.randn(4, 64, wide), torch.randn(4, wide)
    logits = []
    for kind in ("linear", "prototype"):
        torch.manual_seed(0)
        positions = torch.nn.functional.layer_norm(torch.randn(64, wide), (wide,)) if "position" in inputs else None
        router = Router(wide, many, kind=kind, inputs=inputs, positions=positions)  # type: ignore[arg-type]
        logits.append(router(router.seen(x, Condition(t, t, plain=x)))[0])
    assert float(logits[1].std()) == pytest.approx(1, abs=0.1)
    assert float((logits[1] - logits[0]).square().mean()) < 0.05


def test_sums_are_those_of_what_experts_serve_and_a_linear_router_has_none() -> None:
    made = layer(RoutingRule(2), kind="prototype", inputs=("token", "position"), positions=torch.randn(5, D))
    x = torch.randn(3, 5, D)
    routing = made(x)[1]
    for e in range(E):
        rows = [(n, t) for n in range(3) for t in range(5) if routing.served()[n, t, e]]
        wanted = sum((torch.cat([x[n, t], made.router.positions[t]]) for n, t in rows), torch.zeros(2 * D))
        torch.testing.assert_close(routing.sums[e], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(routing.prototypes.norm(dim=1), torch.ones(E))
    assert layer(RoutingRule(2))(x)[1].sums is None


def test_paper_weights_are_not_renormalised() -> None:
    torch.testing.assert_close(select(torch.zeros(3, 8), RoutingRule(2))[1].weight, torch.full((6,), 1 / 8))


@pytest.mark.parametrize("top_k", [-1, 0, 5])
def test_a_token_goes_to_at_least_one_expert_and_at_most_to_all(top_k: int) -> None:
    with pytest.raises(ValueError, match=rf"top_k (is {top_k}; it must be 1|{top_k} is more than num_experts 4)"):
        MoELayer(8, num_experts=4, expert_width=8, shared_width=0, rule=RoutingRule(top_k))


def test_grouped_refuses_odd_widths_and_auto_takes_the_loop() -> None:
    with pytest.raises(ValueError, match="backend loop"):
        Experts(16, 4, 7, backend="grouped")
    odd = MoELayer(6, num_experts=3, expert_width=7, shared_width=0, rule=RoutingRule(1))
    assert odd(torch.randn(1, 4, 6))[0].shape == (1, 4, 6)


@pytest.mark.parametrize(
    ("width", "tokens", "dtype", "drawing", "loops"),
    [
        (1024, 512, torch.float32, False, True),
        (1024, 508, torch.float32, False, False),
        (128, 512, torch.float32, False, False),
        (128, 1024, torch.float32, False, True),
        (128, 512, torch.float32, True, True),
        (128, 508, torch.float32, True, False),
        (128, 2048, torch.bfloat16, True, False),
        (1024, 512, torch.bfloat16, True, True),
    ],
)
def test_auto_takes_the_loop_for_experts_with_many_rows_on_a_cpu(
    width: int, tokens: int, dtype: torch.dtype, drawing: bool, loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MoELayer(64, num_experts=2, expert_width=width, shared_width=0, rule=RoutingRule(1)).to(dtype)
    x = torch.randn(1, tokens, 64, dtype=dtype)

    def run() -> Tensor:
        with torch.set_grad_enabled(not drawing):
            return made(x)[0]

    expected = run()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("grouped_mm was called")

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", refuse)
    if loops:
        assert torch.equal(run(), expected)
    else:
        with pytest.raises(AssertionError, match="grouped_mm"):
            run()


@pytest.mark.parametrize("drawing", [False, True])
def test_the_loop_keeps_hidden_layers_for_gradients_alone(drawing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Experts(8, 6, 8, backend="loop")
    plan = select(torch.randn(48, 6), RoutingRule(2)).plan
    assert plan is not None
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    activate = kernels._activation

    def watched(h: Tensor, activation: Literal["swiglu", "gelu"]) -> Tensor:
        seen.append(weakref.ref(h))
        alive.append(sum(each() is not None for each in seen))
        return activate(h, activation)

    monkeypatch.setattr(kernels, "_activation", watched)
    with torch.set_grad_enabled(not drawing):
        made(torch.randn(48, 1, 8), plan)
    assert len(seen) == 6
    assert max(alive) == (1 if drawing else 6)


def block_of(**moe: object) -> torch.nn.Module:
    config = Config(moe=MoEConfig(blocks="all", **moe))  # type: ignore[arg-type]
    return build(config, 10).blocks[0]


@pytest.mark.parametrize(("activation", "kind"), [("swiglu", "linear"), ("gelu", "linear"), ("swiglu", "prototype")])
def test_a_block_compiles_into_one_graph_in_bfloat16(activation: str, kind: str) -> None:
    moe = MoEConfig(blocks="all", router=kind)  # type: ignore[arg-type]
    config = Config(model=ModelConfig(activation=activation), moe=moe)  # type: ignore[arg-type]
    block, D = build(config, 10).blocks[0], config.model.hidden_size
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch._dynamo.explain(block)(
            torch.randn(4, 16, D, requires_grad=True), Condition(*torch.randn(2, 4, D)), None
        )
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
            condition = Condition(x[:, 0], x[:, 1])
            wanted, got = block(x, condition, None)[0], compiled(x, condition, None)[0]
        torch.testing.assert_close(got, wanted)
        got.sum().backward()
        graphs.append(counter.frame_count)
    assert graphs == [graphs[0]] * 12
    assert graphs[0] > 0


OURS = [name for name, config in PRESETS.items() if config.moe.renormalize and not name.startswith("imagenet")]


@pytest.mark.parametrize("name", OURS)
def test_routed_experts_start_as_loud_as_the_dense_layer_that_they_replace(name: str) -> None:
    config = PRESETS[name]
    D, e = config.model.hidden_size, config.moe
    torch.manual_seed(0)
    with torch.device("meta"):
        scale = build(config, 10).config.router_scale
    rule = RoutingRule(e.top_k, e.score, e.renormalize, scale)
    made = MoELayer(D, num_experts=e.num_experts, expert_width=e.expert_width, shared_width=0, rule=rule)
    dense = FeedForward(D, e.top_k * e.expert_width, config.model.activation)
    x = torch.randn(2, 256, D)
    with torch.no_grad():
        assert float(made(x)[0].std() / dense(x).std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("scale", "width"), [(1.0, 32), (2.0, 64)])
def test_experts_start_by_the_width_that_their_scale_makes_of_them(scale: float, width: int) -> None:
    rule = RoutingRule(2, "sigmoid", renormalize=True, scale=scale)
    made = MoELayer(64, num_experts=4, expert_width=32, shared_width=0, rule=rule)
    assert float(made.experts.w_in.detach().abs().max()) == pytest.approx((6 / (64 + width)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("backend", ["auto", "loop", "grouped"])
@pytest.mark.parametrize("by_place", [False, True])
def test_experts_with_biases_are_dense_layers_with_biases(backend: str, by_place: bool) -> None:
    positions = torch.randn(7, D) if by_place else None
    made = layer(RoutingRule(1), positions=positions, backend=backend, activation="gelu", biases=True, num_experts=1)
    dense = FeedForward(D, made.experts.w_out.shape[2], "gelu")
    assert not made.experts.w_in[..., D:].any()
    torch.nn.init.normal_(dense.fc1.bias)
    with torch.no_grad():
        made.experts.w_in[0, :, :D] = dense.fc1.weight
        made.experts.w_in[0, :, D:] = dense.fc1.bias[:, None]
        made.experts.w_out[0] = dense.fc2.weight
    made.shared, x = None, torch.randn(3, 7, D)
    torch.testing.assert_close(made(x)[0], dense(x), rtol=1e-5, atol=1e-6)


def test_weights_that_are_one_choose_by_scores_and_leave_the_router_alone() -> None:
    logits = torch.randn(50, 6, requires_grad=True)
    for rule in (RoutingRule(2, weights="one", scale=1.5), RoutingRule(2, kind="relative", tau=0.6, weights="one")):
        plan, usual = select(logits, rule).plan, select(logits, replace(rule, weights="scores")).plan
        assert torch.equal(plan.expert, usual.expert)
        assert plan.weight.unique().tolist() == [rule.scale]
        (grad,) = torch.autograd.grad(plan.weight.sum(), logits)
        assert not grad.any()
    assert len(plan.row) > 50
    assert select(logits, RoutingRule(1, kind="relative", tau=1.0, weights="one")).plan.counts.tolist() == [50] * 6
    with pytest.raises(ValueError, match="weights one are no scores; add --moe.no-renormalize"):
        RoutingRule(2, renormalize=True, weights="one")


def test_an_mlp_router_is_its_formula() -> None:
    router = Router(D, 4, kind="mlp", inputs=("token", "time"))
    for p in router.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, t = torch.randn(2, 5, D), torch.randn(2, D)
    logits, _ = router(router.seen(x, Condition(t, t)))
    z = torch.cat([x, torch.nn.functional.layer_norm(t, (D,)).unsqueeze(1).expand(-1, 5, -1)], dim=2)
    wanted = (z @ router.hidden.weight.T + router.hidden.bias).tanh() @ router.weight.T + router.offset
    torch.testing.assert_close(logits, wanted)


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_through_frozen_experts_the_input_has_its_gradient_and_they_have_none(
    backend: Literal["loop", "grouped"], activation: Literal["swiglu", "gelu"]
) -> None:
    torch.manual_seed(0)
    layer = MoELayer(
        16, num_experts=4, expert_width=64, shared_width=0, rule=RoutingRule(2), activation=activation, backend=backend
    )
    x = torch.randn(3, 5, 16, requires_grad=True)
    found = []
    for frozen in (False, True):
        layer.requires_grad_(not frozen)
        layer.zero_grad()
        x.grad = None
        layer(x)[0].square().sum().backward()
        assert x.grad is not None
        found.append(x.grad)
        assert all((p.grad is None) == frozen for p in layer.experts.parameters())
    assert torch.equal(*found)
