"""What a call tells the routers: another tau, at all times or by time; experts suppressed, forced or favoured."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch._dynamo.testing import CompileCounter

from ditmoe import pipeline
from ditmoe.config.policy import Policy, Rule
from ditmoe.config.rule import RoutingRule
from ditmoe.config.sample import SampleArgs
from ditmoe.config.sections import Config, ModelConfig, MoEConfig, ObjectiveConfig, SampleConfig
from ditmoe.files import read_object, write_json
from ditmoe.generate.request import facts, requested
from ditmoe.model import build
from ditmoe.moe import Plan, Router, select
from ditmoe.moe.policy import Steered, Steering, steered
from tests.doors import command

MODEL = ModelConfig(sample_size=8, hidden_size=32, depth=2, num_heads=2, ffn_width=32)


def made(**moe: Any) -> pipeline.DiTMoEPipeline:
    torch.manual_seed(0)
    experts = MoEConfig(**{"num_experts": 8, "expert_width": 16, "shared_width": 0, **moe})
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


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"rules": []}', encoding="utf-8-sig")
    assert Policy.read(tmp_path / "p.json") == Policy()


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


OFF, INF = -float("inf"), float("inf")
KINDS = {
    "softmax": RoutingRule(2),
    "renormalised": RoutingRule(3, "sigmoid", True, 3.0),
    "entmax": RoutingRule(2, "entmax"),
    "cosines": RoutingRule(2, "identity"),
    "groups": RoutingRule(2, "sigmoid", groups=4, top_groups=2),
    "null": RoutingRule(2, "sigmoid", null_experts=2),
    "expert-choice": RoutingRule(2, kind="expert_choice"),
    "relative": RoutingRule(2, "sigmoid", kind="relative", tau=1.0),
    "top-p": RoutingRule(2, kind="top_p", tau=1.0),
    "threshold": RoutingRule(2, "sigmoid", kind="threshold", tau=0.0),
}


def chosen(plan: Plan | None, rows: int) -> torch.Tensor:
    """Weights (rows, E), nan where an expert does not serve."""
    assert plan is not None
    table = torch.full((rows, len(plan.counts)), float("nan"))
    table[plan.row, plan.expert] = plan.weight
    return table


def plan_by(rule: RoutingRule, logits: torch.Tensor, policy: torch.Tensor | None, bias: Any = None) -> Any:
    return select(logits if policy is None else steered(logits, policy), rule, bias, images=4, policy=policy)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("balanced", [False, True])
def test_every_rule_suppresses_and_forces(name: str, balanced: bool) -> None:
    rule = KINDS[name]
    torch.manual_seed(0)
    logits = torch.randn(64, 8 + rule.null_experts)
    bias = torch.linspace(0.3, -0.2, logits.shape[1]) if balanced else None
    policy = torch.zeros(logits.shape[1])
    policy[1], policy[6] = OFF, INF
    weights = chosen(plan_by(rule, logits, policy, bias).plan, 64)
    assert weights[:, 1].isnan().all()
    assert weights[:, 6].isfinite().all()
    free = chosen(plan_by(rule, logits, None, bias).plan, 64)
    assert free[:, 1].isfinite().any()
    if name not in ("relative", "top-p", "threshold"):  # at these taus all are chosen
        assert free[:, 6].isnan().any()
    if rule.kind == "topk" and not rule.null_experts:
        assert (weights.isfinite().sum(dim=1) == rule.top_k).all()


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("groups", "expert-choice")])
def test_one_that_is_suppressed_is_as_if_it_were_not_there(name: str) -> None:
    rule = KINDS[name]
    torch.manual_seed(0)
    logits = torch.randn(64, 8 + rule.null_experts)
    policy = torch.zeros(logits.shape[1])
    policy[2] = OFF
    without = chosen(plan_by(rule, torch.cat([logits[:, :2], logits[:, 3:]], dim=1), None).plan, 64)
    weights = chosen(plan_by(rule, logits, policy).plan, 64)
    assert weights[:, 2].isnan().all()
    found = torch.cat([weights[:, :2], weights[:, 3:]], dim=1)
    torch.testing.assert_close(found.nan_to_num(), without.nan_to_num())  # of entmax several may have weight 0


def test_the_weight_of_one_that_is_forced_is_that_of_the_best() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, -3.0], [0.0, 1.0, 0.5, 3.0]])
    policy = torch.tensor([0.0, 0.0, 0.0, INF])
    wanted = torch.softmax(torch.tensor([[2.0, 1.0, 0.5, 2.0], [0.0, 1.0, 0.5, 3.0]]), dim=1)
    weights = chosen(plan_by(RoutingRule(2), logits.repeat(4, 1), policy).plan, 8)[:2]
    nan = float("nan")
    expected = torch.tensor([[wanted[0, 0], nan, nan, wanted[0, 3]], [nan, wanted[1, 1], nan, wanted[1, 3]]])
    torch.testing.assert_close(weights, expected, equal_nan=True)


def test_a_bias_is_added_to_the_logit() -> None:
    torch.manual_seed(0)
    logits, policy = torch.randn(64, 8), torch.tensor([0.0, 0.7, 0, 0, -0.4, 0, 0, 0])
    for rule in (KINDS["softmax"], KINDS["expert-choice"], KINDS["threshold"]):
        moved = chosen(plan_by(rule, logits + policy, None).plan, 64)
        assert torch.equal(moved.nan_to_num(), chosen(plan_by(rule, logits, policy).plan, 64).nan_to_num())
        assert not torch.equal(moved.nan_to_num(), chosen(plan_by(rule, logits, None).plan, 64).nan_to_num())


def rules(action: str, *cells: tuple[int, int], **more: Any) -> Policy:
    return Policy(tuple(Rule(layer, expert, action, **more) for layer, expert in cells))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "moe",
    [
        {}, {"router_input": "position"}, {"router_input": "label+position"}, {"router_input": "time"},
        {"router_input": "plain", "scope": "shared"}, {"router_input": "time+label", "scope": "shared"},
        {"select": "expert_choice"}, {"select": "relative", "scope": "shared", "router_input": "label"},
    ],
)  # fmt: skip
def test_each_layer_has_its_own_whoever_decides(moe: dict[str, Any]) -> None:
    net = made(blocks="all", **moe).transformer
    x, t, y = torch.randn(4, 1, 8, 8), torch.tensor([100.0, 400.0, 600.0, 900.0]), torch.tensor([0, 1, 2, 3])
    free = net(x, t, y)
    often, seldom = (int(record.counts.argsort()[i]) for record, i in zip(free.routing, (-1, 0), strict=True))
    policy = Policy((Rule(0, often, "suppress"), Rule(1, seldom, "force"), Rule(0, (often + 1) % 8, "favour", 0.3)))
    first, second = (record.served().expand(4, 16, 8) for record in Steered(net, policy)(x, t, y).routing)
    assert free.routing[0].served()[..., often].sum() > 0
    assert first[..., often].sum() == 0
    assert second[..., seldom].sum() == 4 * 16
    zeros = net(x, t, y, steering=Steering(bias=torch.zeros(2, 8)))
    assert torch.equal(zeros.sample, free.sample)
    assert Steered(net, Policy()).table is None
    assert torch.equal(Steered(net, Policy())(x, t, y).sample, free.sample)
    assert not torch.equal(Steered(net, policy)(x, t, y).sample, free.sample)
    alone = Steered(net, policy)(x[1:2], t[1:2], y[1:2]).sample
    torch.testing.assert_close(alone[0], Steered(net, policy)(x, t, y).sample[1])


def test_policy_and_tau_together() -> None:
    net = made(select="relative", tau=0.25, blocks="all").transformer
    x, t, y = torch.randn(4, 1, 8, 8), torch.tensor([100.0, 400.0, 600.0, 900.0]), torch.tensor([0, 1, 2, 3])
    both = Steered(net, rules("suppress", (0, 3), (1, 3)), [(500, 1000, 1.0)])(x, t, y).routing[0].served()
    assert both[..., 3].sum() == 0
    assert (both[2:].sum(dim=-1) == 7).all()
    assert (both[:2].sum(dim=-1) < 7).any()


def routers_asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each time that any router is asked."""
    asked, ask = list[int](), Router.forward
    monkeypatch.setattr(Router, "forward", lambda self, seen, keys=None: (asked.append(1), ask(self, seen, keys))[1])
    return asked


@pytest.mark.parametrize(
    ("moe", "times"),
    [
        ({"router_input": "position"}, 2 * 2),  # two layers, and with and without guidance two numbers of images
        ({"router_input": "position", "select": "relative", "tau": 0.4}, 2 * 2),
        ({"router_input": "position", "capacity": 1.0, "overflow": "order"}, 2 * 2),
        ({"router_input": "label+position"}, 2 * 4),
        ({}, 2 * 4),
    ],
)
def test_routers_that_see_the_place_alone_decide_once_in_a_call(
    moe: dict[str, Any], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = made(blocks="all", **moe)
    asked = routers_asked(monkeypatch)
    how: dict[str, Any] = {"guidance_scale": 2.0, "guidance_interval": (0, 500), "output_type": "latent"}
    found = pipe([0, 1, 2], **how).images
    assert len(asked) == times
    with torch.no_grad():
        pipe.transformer.blocks[0].moe.router.weight.neg_()  # the next call goes by them
    changed = pipe([0, 1, 2], **how).images
    assert not torch.equal(changed, found)
    assert len(asked) == 2 * times
    monkeypatch.setattr(type(pipe.transformer.blocks[0]), "by_place", lambda self, x: None)
    assert torch.equal(pipe([0, 1, 2], **how).images, changed)
    assert len(asked) == 2 * times + 2 * 4


def test_offloaded_routers_are_asked_in_their_turn() -> None:
    pipe = made(blocks="all", router_input="position")
    how: dict[str, Any] = {"output_type": "latent", "seed": 3}
    found = pipe([0, 1, 2], **how).images
    x, net = torch.randn(3, 16, 32), pipe.transformer
    assert all(block.by_place(x) is not None for block in net.blocks)
    cpu = torch.device("cpu")
    apply_group_offloading(net, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    assert all(block.by_place(x) is None for block in net.blocks)
    torch.testing.assert_close(pipe([0, 1, 2], **how).images, found)


def test_decisions_are_kept_without_gradients_and_steering_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    net = made(blocks="all", router_input="position").transformer
    asked = routers_asked(monkeypatch)
    x, t, y = torch.randn(4, 1, 8, 8), torch.tensor([100.0, 400.0, 600.0, 900.0]), torch.tensor([0, 1, 2, 3])
    decided: dict[tuple[int, ...], Any] = {}
    with torch.no_grad():
        first = net(x, t, y, decided=decided)
        again = net(x, t / 2, y, decided=decided)
        assert sorted(decided) == [(0, 4, 16), (1, 4, 16)]
        assert len(asked) == 2
        for kept, one, other in zip(decided.values(), first.routing, again.routing, strict=True):
            assert one is kept is other
        assert torch.equal(again.sample, net(x, t / 2, y).sample)
        bias = torch.zeros(2, 8)
        bias[:, 0] = math.inf
        forced = net(x, t, y, decided=decided, steering=Steering(bias=bias))
        assert torch.equal(forced.sample, net(x, t, y, steering=Steering(bias=bias)).sample)
        assert not torch.equal(forced.sample, first.sample)
    fresh: dict[tuple[int, ...], Any] = {}
    net(x, t, y, decided=fresh).sample.sum().backward()
    assert not fresh
    assert net.blocks[0].moe.router.weight.grad.any()


def test_another_policy_is_not_compiled_anew() -> None:
    net = made(blocks="all").transformer
    counter = CompileCounter()
    torch.compiler.reset()
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([100.0, 400.0]), torch.tensor([0, 1])
    compiled, frames = torch.compile(net, backend=counter), []
    policies = rules("suppress", (0, 1)), rules("force", (1, 2), (0, 5), steps=(1, 9)), rules("favour", (1, 1), bias=2)
    with torch.no_grad():
        for policy in policies:
            one = Steered(compiled, policy, steps=3)
            for one.step in range(3):
                found = one(x, t, y).sample
                frames.append(counter.frame_count)
                assert one.table is not None
                plain = net(x, t, y, steering=Steering(bias=one.table[one.step])).sample
                torch.testing.assert_close(found, plain)
    assert frames == 9 * frames[:1]
    assert frames[0] > 0


@pytest.mark.parametrize("sampler", ["flow-euler", "ts-ddim", "pndm", "flow-heun"])
def test_steps_are_those_of_the_callback(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, told, ends = made(blocks="all"), [], []
    forward = pipe.transformer.forward

    def spy(*args: Any, steering: Steering | None = None, **options: Any) -> Any:
        assert steering is not None
        told.append(bool(steering.bias[1, 4] == OFF))
        return forward(*args, steering=steering, **options)

    monkeypatch.setattr(pipe.transformer, "forward", spy)
    policy = {"rules": [{"layer": 1, "expert": 4, "action": "suppress", "steps": [1, 2]}]}
    pipe([0, 1], sampler=sampler, num_inference_steps=6, policy=policy, output_type="pt",
         callback_on_step_end=lambda _, k, *__: ends.append(k))  # fmt: skip
    assert ends == list(range(len(told)))
    assert told == [k in (1, 2) for k in ends]


def test_image_to_image_counts_the_steps_that_are_taken() -> None:
    pipe = made()
    image = torch.zeros(1, 1, 8, 8)
    late = rules("suppress", (1, 4), steps=(2, 3))
    with pytest.raises(ValueError, match="begins at step 2, but there are 0 to 1"):
        pipe.image_to_image(image, [0], strength=0.5, num_inference_steps=4, policy=late)
    assert pipe([0], num_inference_steps=4, policy=late).images


def test_sample_py_draws_with_a_policy_and_notes_it(tmp_path: Path) -> None:
    pipeline.save(made(), tmp_path / "model")
    policies = {
        "none": Policy(), "on": rules("force", (1, 4)), "late": rules("force", (1, 4), steps=(2, 3)),
    }  # fmt: skip
    images = {None: requested(SampleArgs(tmp_path, num=3)).batch(range(3))}
    for name, policy in policies.items():
        write_json(tmp_path / f"{name}.json", policy.to_dict())
        args = SampleArgs(tmp_path, num=3, policy=tmp_path / f"{name}.json")
        images[name] = requested(args).batch(range(3))
        noted = facts(args, requested(args))["sampler"].get("policy")
        assert noted == (policy.to_dict()["rules"] or None)
    assert np.array_equal(images[None], images["none"])
    assert len({images[name].tobytes() for name in ("none", "on", "late")}) == 3


def test_a_set_and_its_policy_belong_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.save(made(), tmp_path / "model")
    words = (tmp_path, "--num", 3, "--steps", 2)
    write_json(tmp_path / "p.json", rules("force", (1, 4)).to_dict())
    write_json(tmp_path / "q.json", rules("force", (1, 9)).to_dict())
    assert command("sample", *words, "--out", tmp_path / "set", "--policy", tmp_path / "p.json") == 0
    assert read_object(tmp_path / "set" / "sampling.json")["sampler"]["policy"][0]["action"] == "force"
    assert command("sample", *words, "--out", tmp_path / "set") == 2
    assert "holds a part of another set (other sampler)" in capsys.readouterr().err
    assert command("sample", *words, "--out", tmp_path / "new", "--policy", tmp_path / "q.json") == 2
    assert "policy: there is no expert 9 of layer 1; it has 0 to 7" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_dense_twin_and_wrong_types_are_refused() -> None:
    with pytest.raises(ValueError, match="policy: it is for experts, and this model has none"):
        made(blocks="none")([0], policy={"rules": [{"layer": 1, "expert": 4, "action": "suppress"}]})
    with pytest.raises(ValueError, match="policy: it is 'p.json'; it must be"):
        made()([0], policy="p.json")  # type: ignore[arg-type]


def test_of_factorised_experts_one_that_is_suppressed_has_no_weight_and_the_others_theirs() -> None:
    pipe = made(experts="factorised", select="dense", score="entmax", renormalize=False, top_k=1, balance_weight=0)
    net, (x, t, y) = pipe.transformer, (torch.randn(4, 1, 8, 8), torch.full((4,), 500.0), torch.tensor([0, 1, 2, 3]))
    _, whole = net(x, t, y, return_dict=False)
    expert = int(whole[0].scores.sum(dim=0).argmax())
    layer = next(i for i, block in enumerate(net.blocks) if hasattr(block, "moe"))
    off = Steered(net, rules("suppress", (layer, expert)))(x, t, y).sample
    bias = torch.zeros(2, 8)
    bias[layer, expert] = -math.inf
    _, routing = net(x, t, y, return_dict=False, steering=Steering(bias=bias))
    expected = whole[0].scores.clone()
    assert expected[:, expert].max() > 0
    expected[:, expert] = 0
    assert torch.equal(routing[0].scores, expected)
    assert not torch.equal(off, net(x, t, y).sample)
    with pytest.raises(ValueError, match="policy: force is for experts that are chosen"):
        pipe([0], policy=rules("force", (1, 4)))
