"""What every rule of routing must keep, whatever it chooses: one contract for all of them."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ditmoe.config import rules
from ditmoe.config.presets import PRESETS
from ditmoe.config.rules import RULES, with_rule
from ditmoe.config.sections import Config, ModelConfig, MoEConfig
from ditmoe.model import DiTMoETransformer2DModel, build, count_parameters, initial, to_compile
from ditmoe.moe import Condition, Experts, MoELayer, Router, Steering, attention, decide, experts
from tests.checkpoints import load, newest
from tests.faults import runs

MODEL = ModelConfig(sample_size=8, patch_size=2, hidden_size=32, depth=4, num_heads=2, ffn_width=64)
BASE = Config(model=MODEL, moe=MoEConfig(num_experts=8, top_k=2, expert_width=16, shared_width=16))
CHOOSING = [name for name in RULES if name != "mumoe"]  # whose experts are stacked


@pytest.fixture(scope="module")
def centroids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("centroids") / "centroids.safetensors"
    generator = torch.Generator().manual_seed(0)
    save_file({f"blocks.{i}": torch.randn(8, 32, generator=generator) for i in (1, 3)}, file)
    return file


def network(name: str, centroids: Path, **changes: object) -> DiTMoETransformer2DModel:
    torch.manual_seed(0)
    config = with_rule(BASE, name)
    moe = replace(config.moe, centroids=centroids if name == "centroid" else None, **changes)
    model = initial(replace(config, moe=moe), 5)
    for name_, p in model.named_parameters():  # adaLN-Zero starts as a constant: move every weight
        torch.nn.init.normal_(p, std=0.3 if "router" in name_ else 0.1)
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, 1, 8, 8, generator=g), torch.tensor([10.25, 500.5, 990.0, 300.1]), torch.tensor([0, 3, 5, 5])


@pytest.mark.parametrize("name", CHOOSING)
def test_two_backends_are_equal_in_value_and_gradient(name: str, centroids: Path) -> None:
    found = []
    for backend in ("grouped", "loop"):
        model = network(name, centroids, backend=backend).train()
        sample = model(*inputs()).sample
        sample.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        found.append((sample, grads))
    (one, grads), (other, theirs) = found
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for key, grad in grads.items():
        if grad is None or theirs[key] is None:
            assert grad is theirs[key], key
        else:
            torch.testing.assert_close(grad, theirs[key], rtol=1e-4, atol=1e-6, msg=key)
    learnt = [g for n, g in grads.items() if n.endswith("router.weight")]
    assert all(g is not None and float(g.abs().sum()) > 0 for g in learnt)
    assert bool(learnt) == (name != "centroid")


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_rows_that_only_fill_up_are_not_seen(
    name: str, backend: str, centroids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 on a CPU, with memory that holds nan where nothing was written."""
    results = []
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for filled in (True, False):
            if not filled:
                for module in (attention, experts):
                    monkeypatch.setattr(module, "evened", lambda plan, _: plan)
            model = network(name, centroids, backend=backend)
            with torch.autocast("cpu", torch.bfloat16):
                y = model(*inputs()).sample
            y.float().square().mean().backward()
            results.append([y, *(p.grad for p in model.parameters() if p.grad is not None)])
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(results[0][0], results[1][0])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.02 * float(wanted.detach().abs().max()))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("train", [False, True])
def test_batch_mates_and_guidances_other_half_change_nothing(name: str, train: bool, centroids: Path) -> None:
    model = network(name, centroids).train(train)
    x, t, y = inputs()
    together = model(x, t, y)
    for i in range(4):
        alone = model(x[i : i + 1], t[i : i + 1], y[i : i + 1]).sample
        torch.testing.assert_close(alone, together.sample[i : i + 1], rtol=1e-4, atol=1e-5)
    null = torch.full_like(y, 5)
    both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).sample
    torch.testing.assert_close(both[:4], together.sample, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[4:], model(x, t, null).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_evaluation_changes_no_state_and_a_saved_model_is_the_same(name: str, centroids: Path, tmp_path: Path) -> None:
    model = network(name, centroids).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, second = model(*inputs()).sample, model(*inputs()).sample
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    read = DiTMoETransformer2DModel.from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, before[key]) for key, value in read.state_dict().items())
    # Weights that are mapped from a file are not aligned, and MKL then adds in another order.
    torch.testing.assert_close(read(*inputs()).sample, first, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_blocks_are_compiled_whole_where_the_number_of_pairs_stays(name: str, centroids: Path) -> None:
    model = network(name, centroids).eval()
    x, t, y = inputs()
    records = [model(x + shift, t, y).routing[0] for shift in torch.linspace(-2, 2, 9)]
    numbers = {None if r.plan is None else len(r.plan.row) for r in records}
    block = next(b for b in model.blocks if hasattr(b, "moe"))
    assert (to_compile(block) is block) == (len(numbers) == 1)
    assert to_compile(block, moving=True) is block.attn
    assert all(to_compile(b, moving=True) is b for b in model.blocks if not hasattr(b, "moe"))


@pytest.mark.parametrize("name", RULES)
def test_it_activates_what_the_default_does_and_starts_as_loud(name: str, centroids: Path) -> None:
    config = with_rule(BASE, name)
    if name == "centroid":
        config = replace(config, moe=replace(config.moe, centroids=centroids))
    sizes = [count_parameters(build(c, 5))[1] for c in (BASE, config)]
    more = 4 * 2 * 32**2 if name == "switchhead" else 0  # two of four maps to values and outputs, as wide as the one
    assert sizes[1] == pytest.approx(sizes[0] + more, rel=0.03)
    record = network(name, centroids)(*inputs()).routing[0]
    if config.moe.select == "dense":
        torch.testing.assert_close(record.scores.sum(dim=1), torch.ones(len(record.scores)))
    elif config.moe.renormalize and config.moe.overflow == "none":
        served = torch.zeros(len(record.logits)).index_add_(0, record.plan.row, record.plan.weight.detach())
        torch.testing.assert_close(served[served > 0], torch.full_like(served[served > 0], config.moe.routed_scale))


def test_every_rule_is_eight_lines_at_most() -> None:
    tree = ast.parse(Path(rules.__file__).read_text())
    tables = {ast.unparse(node.target): node.value for node in tree.body if isinstance(node, ast.AnnAssign)}
    of = {name: value.end_lineno - value.lineno + 1 for name, value in zip(RULES, tables["RULES"].values, strict=True)}
    of["mumoe"] += tables["FACTORISED"].end_lineno - tables["FACTORISED"].lineno + 1
    assert max(of.values()) <= 8, of


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_described_by_its_flags_too(name: str) -> None:
    """A preset is nothing but options: its configuration survives config.json and says what it is."""
    from ditmoe.config.file import from_dict, to_dict

    config = with_rule(BASE, name)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert with_rule(config, name).moe.top_k == config.moe.top_k or name == "null"


DENSE = dict(RULES["mumoe"](8, 2, 16))
FLAGS = {name: ["--moe.preset", name] for name in RULES}
FLAGS["nucleus"] += ["--train.decay-steps", 4]
for even in ("mumoe", "nucleus", "expert-choice"):
    FLAGS[even] += ["--moe.bias-rate", 0]  # which tiny runs have
FLAGS |= {seen: ["--moe.router-input", seen] for seen in ("label", "label+position")}
FLAGS |= {"muon": ["--train.optimizer", "muon", "--train.muon-factor", 2]}
SHAPE = [
    *("--moe.blocks", "all", "--moe.num-experts", 8, "--moe.expert-width", 16, "--moe.shared-width", 16),
    *("--model.hidden-size", 32, "--model.depth", 2, "--max-steps", 4, "--train.warmup-steps", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_two_processes_and_split_experts_train_what_one_does(name: str, tmp_path: Path) -> None:
    outs, flags = {}, list(FLAGS[name])
    if name == "centroid":
        save_file({f"blocks.{i}": torch.randn(8, 32) for i in (0, 1)}, tmp_path / "centres.safetensors")
        flags += ["--moe.centroids", tmp_path / "centres.safetensors"]
    ways = [("one", 1, []), ("two", 2, []), ("split", 2, ["--parallel.experts", 2])]
    for key, world, more in ways if name != "mumoe" else ways[:2]:
        outs[key] = tmp_path / key
        group = runs.training(outs[key], *flags, *SHAPE, *more, world=world)
        assert group.wait() == [0] * world, group.err()
    wanted = load(newest(outs["one"] / "checkpoints"))[0]
    for key in outs.keys() - {"one"}:
        found = load(newest(outs[key] / "checkpoints"))[0]
        for part in ("model", "ema"):
            for value_name, value in wanted[part].items():
                torch.testing.assert_close(found[part][value_name], value, rtol=0, atol=2e-4, msg=f"{key} {value_name}")


def test_a_shared_router_decides_once_for_all_layers(centroids: Path) -> None:
    model = network("pre-gate", centroids).eval()
    assert sum(isinstance(m, Router) for m in model.modules()) == 1
    records = model(*inputs()).routing
    assert len(records) == 2
    assert records[0] is records[1]
    x, t, y = inputs()
    ahead = model(x.flip(0), t, y).routing[0]  # known before the image: other images, same decision
    assert torch.equal(ahead.plan.expert, records[0].plan.expert)


def test_the_gate_of_the_shared_expert_halves_it_at_the_start() -> None:
    torch.manual_seed(0)
    model = build(with_rule(BASE, "time-moe"), 5)
    layer = next(m for m in model.modules() if isinstance(m, MoELayer))
    assert layer.shared_gate is not None
    x = torch.randn(2, 16, 32)
    assert not layer.shared_gate.weight.any()
    torch.testing.assert_close(layer.without_routed(x), 0.5 * layer.shared(x))
    off = build(BASE, 5)
    assert all(m.shared_gate is None for m in off.modules() if isinstance(m, MoELayer))


def test_tau_may_change_when_a_model_draws(centroids: Path) -> None:
    model = network("relative", centroids).eval()
    x, t, y = inputs()
    few, many = (model(x, t, y, steering=Steering(tau=tau)).routing[0].plan for tau in (0.0, 1.0))
    assert len(few.row) == 4 * 16
    assert len(many.row) == 4 * 16 * 8
    each = model(x, t, y, steering=Steering(tau=torch.tensor([0.0, 1.0, 0.0, 1.0]))).routing[0].served()
    assert each.sum(dim=(1, 2)).tolist() == [16, 128, 16, 128]
    assert torch.equal(model(x, t, y, steering=Steering(tau=0.12)).sample, model(x, t, y).sample)
    with pytest.raises(ValueError, match="this model selects topk, which has none"):
        network("dit-moe", centroids)(x, t, y, steering=Steering(tau=0.5))


def test_centroids_are_nearest_first_and_do_not_learn(centroids: Path) -> None:
    model = network("centroid", centroids)
    router = model.blocks[1].moe.router
    assert "blocks.1.moe.router.weight" not in dict(model.named_parameters())
    z = router.weight[3:4] + 0.01 * torch.randn(1, 32)
    logits = router([z.unsqueeze(0)])[0]
    distances = (z - router.weight).norm(dim=1)
    assert int(logits.argmax()) == int(distances.argmin()) == 3
    torch.testing.assert_close(logits.flatten(), -distances.square() / (2 * 32**0.5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scope": "shared"}, "cannot look at router_input token; add --moe.router-input plain"),
        ({"select": "expert_choice", "router_input": "time"}, "which with router_input time share a decision"),
        ({"overflow": "order", "router_input": "label"}, "which with router_input label share a decision"),
        ({"overflow": "random", "router_input": "position"}, "overflow random needs a router that sees images"),
        ({"jitter": 0.1, "router_input": "position"}, "jitter needs a router that sees images"),
        ({"jitter": 1.0}, "jitter is 1.0; it must lie"),
        ({"select": "expert_choice", "bias_rate": 0.001}, "bias_rate does not apply to select expert_choice"),
        ({"select": "relative", "tau": 0.0}, "renormalize with tau 0 makes every weight alike"),
        ({"select": "threshold", "tau": 1.0}, "tau is 1.0, which no score of sigmoid reaches"),
        ({"select": "top_p", "tau": 0.125, "bias_rate": 0.001}, "to top_k 2 with a tau above 0.125, and tau is 0.125"),
        ({"select": "relative", "tau": 0.0, "bias_rate": 0.1, "renormalize": False}, "tau above 0, and tau is 0"),
        (
            {"select": "relative", "top_k": 1, "bias_rate": 0.001},
            "gives each token one expert, as topk does",
        ),
        ({"null_experts": 4, "domain_weight": 0.1}, "domain_weight gives data sets experts of their own"),
        ({"null_experts": 4, "select": "threshold"}, "take no room from experts under select threshold"),
        ({"null_experts": 4, "overflow": "order"}, "take no room from experts under overflow order"),
        ({"capacity_start": 2.0}, "capacity_start works with select expert_choice"),
        ({"shared_gate": True, "shared_width": 0}, "shared_gate needs a shared expert"),
        ({"centroids": Path("x")}, "centroids work with router centroid, not linear"),
        ({"router": "centroid", "score": "identity", "renormalize": False}, "score identity works with router proto"),
        ({"experts": "factorised"}, "experts factorised serve a token all together, and select is topk; add --moe.sel"),
        ({"rank": 8}, "rank works with experts factorised, not stacked"),
        ({"rank": 0}, "rank is 0; it must be above 0"),
        ({"select": "dense"}, "select dense needs scores that sum to 1, and score is sigmoid; add --moe.score entmax"),
        ({"select": "dense", "score": "softmax"}, "by scores that sum to 1 already; add --moe.no-renormalize"),
        ({**DENSE, "top_k": 2}, "top_k is 2, but select dense has nobody chosen; add --moe.top-k 1"),
        ({**DENSE, "scale": 2.0}, "scale is 2.0; select dense weighs by scores that sum to 1; leave it out"),
        ({**DENSE, "null_experts": 1}, "null_experts are for choices, and select dense makes none"),
        ({**DENSE, "capacity": 2.0}, "capacity works with select expert_choice, or with overflow"),
        ({**DENSE, "overflow": "order"}, "overflow works with select topk, not dense"),
        ({**DENSE, "groups": 2}, "groups work with select topk, not dense"),
        ({**DENSE, "tau": 0.5}, "tau does not apply to select dense"),
        ({**DENSE, "capacity_start": 2.0}, "capacity_start works with select expert_choice"),
        ({**DENSE, "experts": "stacked"}, "select dense works with experts factorised; take --moe.preset mumoe"),
        ({**DENSE, "backend": "loop"}, "backend loop does not apply to experts factorised"),
        (
            {**DENSE, "balance_weight": 0.1},
            "balance_weight is 0.1, but .* no load to balance; add --moe.bal",
        ),
        ({**DENSE, "bias_rate": 0.1}, "bias_rate is 0.1, but .* no load to balance; add --moe.bias-rate 0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(BASE.moe, **changes)  # type: ignore[arg-type]


def test_centroids_that_are_missing_or_do_not_fit_are_refused(tmp_path: Path, centroids: Path) -> None:
    config = with_rule(BASE, "centroid")
    with pytest.raises(ValueError, match="needs --moe.centroids FILE"):
        initial(config, 5)
    for file, sentence in ((tmp_path / "none", "cannot be read"), (centroids, r"has \(8, 32\) for blocks.1")):
        moe = replace(config.moe, centroids=file, num_experts=4 if file == centroids else 8)
        with pytest.raises(ValueError, match=sentence):
            initial(replace(config, moe=moe), 5)


def test_presets_keep_their_own_choice_of_rule() -> None:
    assert all(config.moe.select == "topk" for config in PRESETS.values())


def test_no_expert_starts_louder_than_its_share(centroids: Path) -> None:
    """Experts start by the width that is active, null experts not counted."""
    widths = {name: next(m for m in network(name, centroids).modules() if isinstance(m, Experts)) for name in CHOOSING}
    assert {name: m.active_width for name, m in widths.items() if m.active_width != 32} == {"dit-moe": 16}


@pytest.mark.parametrize("base", [name for name in PRESETS if name != "dit-moe-g/2-16e2a"])
@pytest.mark.parametrize("name", ["deepseek", "threshold", "diffmoe"])
def test_a_rule_of_sigmoids_has_them_on_every_preset(base: str, name: str) -> None:
    assert with_rule(PRESETS[base], name).moe.score == "sigmoid"


@pytest.mark.parametrize("span", [[1], [], [1, 2, 3]])
def test_a_pair_in_a_file_has_two_values(span: list[int]) -> None:
    from ditmoe.config.file import from_dict

    with pytest.raises(ValueError, match="guidance_interval"):
        from_dict({"sample": {"guidance_interval": span}})


def test_an_images_tau_is_its_own_where_places_decide(centroids: Path) -> None:
    model = network("relative", centroids, router_input="position").eval()
    x, t, y = inputs()
    tau = torch.tensor([0.0, 1.0, 0.3, 0.0])
    together = model(x, t, y, steering=Steering(tau=tau))
    assert together.routing[0].served().sum(dim=(1, 2))[:2].tolist() == [16, 128]
    for i in range(4):
        torch.testing.assert_close(
            model(x[i : i + 1], t[i : i + 1], y[i : i + 1], steering=Steering(tau=tau[i])).sample[0], together.sample[i]
        )


def test_layers_draw_lots_of_their_own(centroids: Path) -> None:
    """The same logits and times: other rows overflow in every layer."""
    model = network("switch", centroids).eval()
    routers = [m for m in model.modules() if isinstance(m, Router)]
    assert [router.salt for router in routers] == [0, 1]
    condition = Condition(torch.zeros(2, 32), torch.zeros(2, 32), timestep=torch.tensor([10.0, 700.0]))
    x = torch.ones(2, 16, 32)
    plans = []
    for router in routers:
        torch.nn.init.constant_(router.weight, 0.1)
        plans.append(decide(router, model.rule, x, condition, None).served())
    assert plans[0].sum() == plans[1].sum()
    assert not torch.equal(*plans)


@pytest.mark.parametrize("name", [name for name in RULES if name != "mumoe"])
@pytest.mark.parametrize("backend", ["grouped", "loop"])
@pytest.mark.parametrize("bf16", [False, True])
def test_an_empty_batch_gives_nothing(name: str, backend: str, bf16: bool, centroids: Path) -> None:
    for more in ({}, {"router_input": "position"} if name in ("deepseek", "expert-choice", "relative") else {}):
        model = network(name, centroids, backend=backend, **more).eval()
        nothing = torch.zeros(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            assert model(torch.zeros(0, 1, 8, 8), nothing, nothing.long()).sample.shape == (0, 1, 8, 8)
