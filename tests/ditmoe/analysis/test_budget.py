"""The plan of --dry-run: counts, arithmetic, what autograd keeps; real processes hold, send and grow as said."""

import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import plan_check, train_step
from ditmoe import pipeline
from ditmoe.analysis import budget
from ditmoe.analysis.budget import activations, routed_blocks
from ditmoe.analysis.plan import USABLE, describe, teaching
from ditmoe.config.experts import RouterInput
from ditmoe.config.file import save, to_dict, trained_by
from ditmoe.config.presets import PRESETS
from ditmoe.config.rules import RULES, with_rule
from ditmoe.config.sections import Config, ModelConfig, MoEConfig, PlanConfig, TrainConfig
from ditmoe.launch.start import shutdown
from ditmoe.model import DiTMoETransformer2DModel, build, layers, tokens_per_image
from ditmoe.moe import Experts
from ditmoe.pipeline.answers import flow_levels, path
from ditmoe.run_folder import place
from ditmoe.training.exchange import local
from ditmoe.training.muon import matrices, work
from tests.ditmoe.model.test_model import PAPER, meta
from tests.doors import typed
from tests.processes import start

GB = 1e9
SMALL = Config(
    model=ModelConfig(
        sample_size=16, in_channels=4, num_classes=10, hidden_size=128, depth=2, num_heads=4, ffn_width=384
    ),
    moe=MoEConfig(blocks="all", num_experts=4, expert_width=128, shared_width=256, backend="grouped"),
    train=TrainConfig(precision="fp32"),
)


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    return replace(config, **{name: replace(getattr(config, name), **new) for name, new in sections.items()})


ADAMW = changed(PRESETS["digits"], train={"optimizer": "adamw"})  # Muon does not go with FSDP2


def inputs(model: DiTMoETransformer2DModel, n: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    size = model.config.sample_size
    x = torch.zeros(n, model.config.in_channels, size, size, device=device)
    return x, torch.ones(n, device=device), torch.ones(n, dtype=torch.int64, device=device)


def plan_of(
    config: Config, way: budget.Way, d: int, images: int, again: bool = False, num_classes: int = 1000
) -> budget.Needs:
    with torch.device("meta"):
        model = build(config, num_classes)
    return budget.needs(config, model, way, d, images, again)


TABLE_PADS = 7 * 384  # 1,001 labels over 8 processes, as rows of 384: 126 each


def split(config: Config) -> tuple[int, int]:
    """Parameters of the routed experts, and all others."""
    sizes = {name: p.numel() for name, p in meta(config).named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    return experts, sum(sizes.values()) - experts


DENSE = dict(RULES["mumoe"](SMALL.moe.num_experts, SMALL.moe.top_k, SMALL.moe.expert_width))
ROUTERS = list(product(("linear", "prototype"), get_args(RouterInput)))


# ------------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe": {"blocks": "every-second", "shared_width": 0}},
        {"model": {"activation": "gelu"}, "objective": {"prediction_type": "epsilon", "learn_sigma": True}},
        {"moe": {"blocks": "none"}, "model": {"refine_width": 12}},
        {"model": {"refine_width": 8}, "objective": {"prediction_type": "epsilon", "learn_sigma": True}},
        *({"moe": {"router_input": seen, "num_experts": 64, "router": kind}} for kind, seen in ROUTERS),
        {"moe": {"router": "prototype", "num_experts": 64, "contrastive_weight": 1.0}},
        {"moe": {"router": "mlp", "num_experts": 64}},
        {"moe": {"router": "mlp", "router_input": "time", "biases": True}, "model": {"activation": "gelu"}},
        {"moe": {"attention_experts": 4}},
        {"moe": {"attention_experts": 3, "attention_top_k": 1, "blocks": "none"}, "model": {"num_heads": 2}},
        {"moe": {"attention_experts": 4}, "model": {"num_heads": 2, "head_width": 20}},
        {"moe": {"blocks": "none"}, "model": {"num_heads": 2, "head_width": 40}},
        {"model": {"head_experts": 4, "refine_width": 8}},
        {"model": {"long_skips": True, "depth": 3}},
        {"model": {"head_experts": 3}, "objective": {"prediction_type": "epsilon", "learn_sigma": True}},
        *({"moe": {**DENSE, "num_experts": 64, "router_input": x}} for x in ("token", "time+label", "label+position")),
        {"moe": {**DENSE, "blocks": "every-second", "num_experts": 64, "rank": 24}, "model": {"activation": "gelu"}},
        {"moe": {**DENSE, "router": "prototype", "num_experts": 64, "contrastive_weight": 1.0}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("again", [False, True])
def test_flops_are_those_that_torch_counts(changes: dict[str, Any], again: bool) -> None:
    config = changed(SMALL, **changes)
    if config.moe.experts == "stacked":
        config = changed(config, moe={"backend": "loop"})  # torch does not count grouped_mm
    model, n = build(config, 10), 2
    if again:
        model.enable_gradient_checkpointing()
    count = budget.flops(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.enable_grad():
        out = model(*inputs(model, n))
        forward = counter.get_total_flops()
        loss = out.sample.square().mean()
        if config.moe.contrastive_weight:
            loss = loss + sum(record.sums.sum() for record in out.routing)
        loss.backward()
    places = changes.get("moe", {}).get("router_input", "").split("+").count("position")  # seen once, not by image
    ways = 2 if changes.get("moe", {}).get("router") == "prototype" else 1
    once = places * ways * config.model.depth * 2 * tokens_per_image(model) * config.model.hidden_size * 64
    C, side, W = config.model.in_channels, config.model.sample_size, config.model.refine_width
    taps = 9 * C * (2 if config.objective.learn_sigma else 1)  # of the last convolution, filled up to a multiple of 16
    filled = n * 2 * side**2 * W * (-taps % 16)
    assert forward == n * count.forward + once + filled
    assert counter.get_total_flops() == pytest.approx(n * count.training(again) + 2 * once, rel=0.01)


def test_convolutions_of_tokens_are_counted_forward() -> None:  # backward, torch counts depthwise ones as full ones
    config = changed(SMALL, model={"local_conv": True}, moe={"backend": "loop"})
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model = build(config, 10)
        model(*inputs(model, 2))
    assert counter.get_total_flops() == 2 * budget.flops(config).forward


@pytest.mark.parametrize(
    ("name", "gflops"), [("dit-moe-s/2-8e2a", 15.43), ("dit-moe-xl/2-8e2a", 323.74), ("dit-moe-g/2-16e2a", 690.94)]
)
def test_flops_of_the_paper(name: str, gflops: float) -> None:
    config = PRESETS[name]  # its Gflops are multiply-adds, attention's own products left out
    attention = 4 * 256**2 * config.model.hidden_size * config.model.depth
    assert (budget.flops(config).forward - attention) / 2e9 == pytest.approx(gflops, rel=0.02)


# ------------------------------------------------------------------------------------------ memory


def saved_bytes(model: DiTMoETransformer2DModel, n: int, device: str) -> int:
    """Bytes that autograd keeps of a forward pass, without parameters and buffers."""
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in known:
            kept.setdefault(key, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(*inputs(model, n, device))
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return total


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bf16 autocast on a GPU that is not there: shapes, dtypes and autograd are real, values are not."""

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        return out

    monkeypatch.setattr(layers, "attend", flash)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()


KINDS: list[dict[str, Any]] = [
    {},
    {"moe": {"blocks": "every-second", "shared_width": 0}, "model": {"activation": "gelu"}},
    *({"moe": {"router_input": seen, "router": kind}} for kind, seen in ROUTERS),
    {"moe": {"router": "prototype", "score": "identity", "renormalize": False}},
    *({"moe": {**DENSE, "score": score}} for score in ("softmax", "entmax")),
    {"moe": {**DENSE, "router_input": "time", "shared_width": 0, "rank": 40}, "model": {"activation": "gelu"}},
    {"model": {"qk_norm": "none", "positions": "sincos"}, "moe": {"score": "softmax", "renormalize": False}},
    {"model": {"qk_norm": "layer", "positions": "rope"}},
    {"moe": {"attention_experts": 4}},
    {"moe": {"attention_experts": 3, "attention_top_k": 1}, "model": {"num_heads": 2, "qk_norm": "none"}},
    {"moe": {"attention_experts": 4}, "model": {"num_heads": 2, "head_width": 24}},
    {"model": {"num_heads": 2, "head_width": 48}},
    {"model": {"local_conv": True, "long_skips": True}},
]


def a_block_and_an_image(measure: Callable[[int, int], int]) -> float:
    """From measure(depth, images): what two more blocks keep of one more image."""
    return ((measure(4, 8) - measure(2, 8)) - (measure(4, 4) - measure(2, 4))) / 4


ROUTED = {"all": (True, True), "every-second": (False, True)}


def saved_by_two(config: Config, exchanged: bool = False) -> float:
    return sum(budget.activations(config, routed, exchanged)[0] for routed in ROUTED[config.moe.blocks])


@pytest.mark.parametrize("changes", KINDS)
def test_activations_are_what_autograd_keeps_in_bf16(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(changed(SMALL, train={"precision": "bf16"}), **changes)

    def measure(depth: int, n: int) -> int:
        with pretended_gpu(monkeypatch):
            return saved_bytes(build(changed(config, model={"depth": depth}), 10), n, "cuda")

    assert a_block_and_an_image(measure) == pytest.approx(saved_by_two(config), rel=0.005)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_convolutions_keep_what_is_planned(learn_sigma: bool) -> None:
    objective = {"prediction_type": "epsilon", "learn_sigma": learn_sigma}
    config = changed(SMALL, model={"refine_width": 12}, objective=objective, plan={"devices": 1})
    without = changed(config, model={"refine_width": 0})

    def measure(some: Config) -> int:
        model = build(some, 10)
        return saved_bytes(model, 8, "cpu") - saved_bytes(model, 4, "cpu")

    more = 4 * budget.refinement(config)
    assert more > 0 == budget.refinement(without)
    assert measure(config) - measure(without) == pytest.approx(more, rel=0.01)
    peaks = [plan_of(some, "DDP", 1, 8).activations for some in (config, without)]
    assert peaks[0] - peaks[1] == 2 * more


@pytest.mark.parametrize("seen", ["plain", "token+position", "time+label", "label+position"])
def test_prototypes_keep_what_is_planned_beside_what_a_linear_router_keeps(seen: str) -> None:
    found, planned = [], []
    for kind in ("linear", "prototype"):
        config = changed(SMALL, moe={"router": kind, "router_input": seen, "num_experts": 64})

        def measure(depth: int, n: int, config: Config = config) -> int:
            return saved_bytes(build(changed(config, model={"depth": depth}), 10), n, "cpu")

        found.append(a_block_and_an_image(measure))
        planned.append(saved_by_two(config))
    assert found[1] - found[0] == pytest.approx(planned[1] - planned[0], rel=1e-3)
    assert planned[1] > planned[0]


@pytest.mark.parametrize("backend", ["grouped", "loop"])
def test_experts_of_attention_keep_what_is_planned(backend: str) -> None:
    found, planned = [], []
    for many in (0, 4):
        config = changed(SMALL, moe={"attention_experts": many, "backend": backend})

        def measure(depth: int, n: int, config: Config = config) -> int:
            return saved_bytes(build(changed(config, model={"depth": depth}), 10), n, "cpu")

        found.append(a_block_and_an_image(measure))
        planned.append(saved_by_two(config))
    assert found[1] - found[0] == pytest.approx(planned[1] - planned[0], rel=1e-3)
    assert planned[1] > planned[0]


@pytest.mark.parametrize("backend", ["grouped", "loop"])
@pytest.mark.parametrize("qk_norm", ["none", "layer"])
@pytest.mark.parametrize("exchanged", [False, True])
def test_activations_are_what_autograd_keeps_in_fp32(backend: str, qk_norm: str, exchanged: bool) -> None:
    config = changed(SMALL, model={"qk_norm": qk_norm}, moe={"backend": backend})

    def measure(depth: int, n: int) -> int:
        model = build(changed(config, model={"depth": depth}), 10)
        for module in model.modules():
            if isinstance(module, Experts) and exchanged:
                module.exchange = lambda rows, counts, products: products(rows, counts)
        return saved_bytes(model, n, "cpu")

    assert a_block_and_an_image(measure) == pytest.approx(saved_by_two(config, exchanged), rel=0.01)


def test_factorised_experts_keep_what_is_planned_in_fp32() -> None:
    config = changed(SMALL, moe=DENSE, model={"qk_norm": "layer"})

    def measure(depth: int, n: int) -> int:
        return saved_bytes(build(changed(config, model={"depth": depth}), 10), n, "cpu")

    assert a_block_and_an_image(measure) == pytest.approx(saved_by_two(config), rel=0.01)


def test_factorised_experts_are_never_split() -> None:
    config = changed(ADAMW, plan={"devices": 4})
    assert cells(describe(with_rule(config, "mumoe")), "parallel.experts") == ["1"] * 4
    assert cells(describe(config), "parallel.experts") == ["1"] * 4 + ["4"] * 4


PEAKS = {
    "alone": (changed(plan_check.CASES["experts, activations"], model={"depth": 4}, train={"batch_size": 24}), 1),
    "both": (changed(plan_check.CASES["both over 2"], model={"depth": 4}, train={"batch_size": 8}), 2),
}


def grow(name: str) -> None:
    print(plan_check.measured(PEAKS[name][0]))


@pytest.mark.parametrize("name", PEAKS)
def test_real_processes_are_as_large_as_planned(tmp_path: Path, name: str) -> None:
    config, world = PEAKS[name]
    group = start(grow, name, folder=tmp_path, world=world)
    assert group.wait() == [0] * world, group.err()
    measured = max(float(group.out(rank).splitlines()[-1]) for rank in range(world))
    assert measured == pytest.approx(plan_check.predicted(config).peak, rel=0.15)


# ------------------------------------------------------------------------------------------ what is held and sent


class Traffic(TorchDispatchMode):
    """Bytes of the tensors that are handed to each collective operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")
        if name[0] == "c10d":
            self.bytes[name[1]] += sum(t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


DIGITS = changed(SMALL, model={"sample_size": 8, "in_channels": 1})
SENT = {
    "sharded, more processes than experts": changed(
        DIGITS, moe={"num_experts": 2}, train={"batch_size": 16}, parallel={"shard": True}, plan={"devices": 4}
    ),
    "gathered in bf16": changed(
        DIGITS,
        train={"batch_size": 16, "precision": "bf16"},
        parallel={"shard": True, "gather": "bfloat16"},
        plan={"devices": 2},
    ),
    "both": changed(
        DIGITS,
        model={"gradient_checkpointing": True},
        train={"batch_size": 16, "accumulation": 2},
        parallel={"experts": 2, "shard": True},
        plan={"devices": 4},
    ),
}


def send(name: str) -> None:
    config = SENT[name]
    step, state, run = train_step.prepared(config)
    step()
    before = run.parallel.bytes_sent
    with Traffic() as traffic:
        step()
    held = sum(local(p).untyped_storage().nbytes() for p in state.model.parameters())
    print(json.dumps({**traffic.bytes, "exchanged": run.parallel.bytes_sent - before, "held": held}))
    shutdown()


@pytest.mark.parametrize("name", SENT)
def test_real_processes_hold_and_send_what_is_planned(tmp_path: Path, name: str) -> None:
    config, world = SENT[name], SENT[name].plan.devices
    group = start(send, name, folder=tmp_path, world=world)
    assert group.wait() == [0] * world, group.err()
    found = [json.loads(group.out(rank).splitlines()[-1]) for rank in range(world)]
    images = config.train.batch_size // world // config.train.accumulation
    again, d = config.model.gradient_checkpointing, config.parallel.experts
    need = plan_of(config, "FSDP2", d, images, again, num_classes=10)
    assert found[0]["held"] == pytest.approx(need.weights, rel=1e-3)
    # An operation is handed its input and its output: n + 1 parts, of which n - 1 go to others.
    handed = sum(found[0][name] for name in ("_allgather_base_", "_reduce_scatter_base_"))
    assert handed * (world - 1) / (world + 1) == pytest.approx(need.gather_scatter, rel=1e-3)
    assert sum(x["exchanged"] for x in found) / world == pytest.approx(need.all_to_all, rel=0.1)  # planned: even load
    copies = world // d if d > 1 else 1  # of the experts; a ring sends 2 (n - 1) / n of what it reduces
    assert found[0]["allreduce_"] * 2 * (copies - 1) / copies == pytest.approx(need.all_reduce, rel=0.01)


@pytest.mark.parametrize("name", PAPER)
def test_state_of_the_papers_models(name: str) -> None:
    total = PAPER[name][0] * 1e6
    one = plan_of(changed(PRESETS[name], plan={"devices": 1}), "DDP", 1, 1)
    assert sum(one[:4]) == pytest.approx(20 * total, rel=1e-3)
    many = changed(PRESETS[name], plan={"devices": 8})
    assert sum(plan_of(many, "FSDP2", 1, 1)[:4]) == pytest.approx(20 * total / 8, rel=1e-3)
    experts, rest = split(many)
    assert plan_of(many, "DDP", 4, 1).weights == 4 * (rest + experts / 4)
    assert plan_of(many, "FSDP2", 4, 1).weights == pytest.approx(4 * (rest / 8 + experts / 4), rel=1e-3)


def test_more_devices_than_experts_gather_as_if_each_had_one() -> None:
    config = changed(PRESETS["dit-moe-s/2-8e2a"], plan={"devices": 64})
    experts, rest = split(config)
    alone, both = plan_of(config, "FSDP2", 1, 4), plan_of(config, "FSDP2", 8, 4)
    assert alone.weights == pytest.approx(4 * (experts / 8 + rest / 64), rel=0.01)
    assert alone.weights == both.weights
    assert alone.gather_scatter == pytest.approx(3 * 4 * (8 * experts + rest) * 63 / 64, rel=0.01)
    assert both.gather_scatter == pytest.approx(3 * 4 * rest * 63 / 64, rel=0.03)


def test_checkpointing_and_accumulation() -> None:
    config = changed(PRESETS["dit-moe-b/2-8e2a"], plan={"devices": 8})
    plain, again = (plan_of(config, "DDP", 1, 64, x) for x in (False, True))
    assert again.activations < plain.activations / 5
    assert again.peak < plain.peak
    twice = plan_of(changed(config, train={"accumulation": 2}), "DDP", 1, 64)
    assert twice.peak > plain.peak  # gradients of the first micro-batch stay
    assert twice.all_reduce == plain.all_reduce
    assert plan_of(config, "DDP", 1, 128).activations == 2 * plain.activations


def test_traffic() -> None:
    config = changed(PRESETS["dit-moe-s/2-8e2a"], plan={"devices": 8})
    model = meta(config)
    experts, rest = split(config)
    total = experts + rest
    outside = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("blocks."))
    assert plan_of(config, "DDP", 1, 4)[7:] == pytest.approx((2 * 4 * total * 7 / 8, 0, 0))
    gathered = 4 * (3 * total - outside + 2 * TABLE_PADS) * 7 / 8  # what is outside the blocks stays gathered
    assert plan_of(config, "FSDP2", 1, 4)[7:] == pytest.approx((0, gathered, 0))
    rows = 12 * 4 * tokens_per_image(model) * 2 * 384 * 2  # layers, images, tokens, experts a token, width, bf16
    copies = 2 * 4 * experts / 4 * 1 / 2  # experts/4: two copies of each
    reduced = 2 * 4 * rest * 7 / 8 + copies
    assert plan_of(config, "DDP", 4, 4)[7:] == pytest.approx((reduced, 0, 4 * rows * 3 / 4))
    assert plan_of(config, "DDP", 4, 4, True).all_to_all == pytest.approx(6 * rows * 3 / 4)
    gathered = 4 * (3 * rest - outside + 2 * TABLE_PADS) * 7 / 8
    assert plan_of(config, "FSDP2", 4, 4)[7:] == pytest.approx((copies, gathered, 4 * rows * 3 / 4))
    twice = changed(config, train={"accumulation": 2})
    inside = 4 * (rest - outside) * 7 / 8  # gathered once more for the loads of the step
    assert plan_of(twice, "FSDP2", 4, 4)[7:] == pytest.approx((copies, 2 * (gathered + inside), 12 * rows * 3 / 4))
    even = changed(twice, moe={"balance_weight": 0.0})
    assert plan_of(even, "FSDP2", 4, 4)[7:] == pytest.approx((copies, 2 * gathered, 8 * rows * 3 / 4))
    alone = changed(config, plan={"devices": 1})
    assert plan_of(alone, "DDP", 1, 4)[7:] == (0, 0, 0)


def test_gathering_in_bf16() -> None:
    config = changed(PRESETS["dit-moe-s/2-8e2a"], plan={"devices": 8})
    asked = changed(config, parallel={"shard": True, "gather": "bfloat16"})
    inside = sum(p.numel() for p in meta(config).blocks.parameters())
    outside = sum(split(config)) - inside + TABLE_PADS  # gathered once, and there all the time
    fp32, bf16 = plan_of(changed(config, train={"precision": "fp32"}), "FSDP2", 1, 4), plan_of(asked, "FSDP2", 1, 4)
    routers = 12 * 8 * 384
    assert fp32.gather_scatter == pytest.approx((12 * inside + 8 * outside) * 7 / 8)
    half = 8 * inside + 4 * routers + 6 * outside  # gradients and routers stay in float32
    assert bf16.gather_scatter == pytest.approx(half * 7 / 8)
    block = inside / 12
    assert fp32.buffers == pytest.approx(4 * 4 * block + 8 * outside, rel=1e-3)
    assert bf16.buffers == pytest.approx((2 + 2 + 2 + 4) * block + 4 * outside, rel=1e-3)
    full, half = ([plan_of(asked_or_not, "FSDP2", d, 4) for d in (1, 4)] for asked_or_not in (config, asked))
    assert plan_of(asked, "DDP", 4, 4) == plan_of(config, "DDP", 4, 4)
    assert half[0].gather_scatter == pytest.approx(full[0].gather_scatter * 2 / 3, rel=1e-3)
    experts, rest = split(config)
    for before, after, copies, kept in zip(full, half, (experts + rest, rest), (0, experts / 4), strict=True):
        assert before[:4] == after[:4]  # float32 slices all the same
        assert before.buffers - after.buffers > 2 * copies  # and no copies of what was gathered
        assert after.buffers >= 2 * kept  # but of split experts
        assert after.peak < before.peak


def test_buffers_are_those_that_are_there_at_one_time() -> None:
    config = changed(PRESETS["dit-moe-s/2-8e2a"], plan={"devices": 8})
    experts, rest = split(config)
    plain, again = (plan_of(config, "DDP", 1, 4, x).buffers for x in (False, True))
    assert plain == pytest.approx(6 * (experts + rest))  # DDP's buckets, and bf16 copies for the backward pass
    assert again == pytest.approx(4 * (experts + rest) + 2 * (rest + experts / 12))  # experts' of a block at a time
    fp32 = changed(config, train={"precision": "fp32"})
    assert plan_of(fp32, "DDP", 1, 4).buffers == 4 * (experts + rest)
    assert plan_of(fp32, "DDP", 8, 4).buffers == pytest.approx(4 * rest)  # DDP leaves split experts alone


# ------------------------------------------------------------------------------------------ the command


def cells(text: str, label: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(label)]
    return line[28:].split()


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """Guided by classes; with a loop over experts, whose products torch counts."""
    config = changed(DIGITS, moe={"backend": "loop"}, sample={"sampler": "ddim", "cfg": 2.0})
    pipe = pipeline.assemble(build(config, 10), config, {i: str(i) for i in range(10)})
    pipeline.save(pipe, tmp_path / "teacher")
    save(config, tmp_path / "teacher" / "training.json")
    return tmp_path / "teacher"


def test_teachers_are_held_and_asked_as_planned(teacher: Path) -> None:
    config = changed(DIGITS, train={"batch_size": 24}, plan={"devices": 2}, objective={"class_dropout_prob": 0.0},
                     sample={"sampler": "flow-euler", "steps": 3, "cfg": 1.0})  # fmt: skip
    config = changed(config, objective={"prediction_type": "flow_prediction"})
    taught = changed(config, distill={"teachers": (str(teacher),), "teacher_steps": 5})
    pipe = pipeline.load(teacher)
    held = 4 * sum(p.numel() for p in pipe.transformer.parameters())
    found = teaching(taught)
    asked = found.asked
    assert (found.held, found.kept, found.sent) == (held, 0, 0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        path(pipe, torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), 5, flow_levels(None, 3))
    assert asked == pytest.approx(counter.get_total_flops() / 2, rel=0.01)
    text, thrice = describe(taught), describe(changed(config, train={"batch_size": 72}))  # 3 steps of an image
    assert [float(x) for x in cells(text, "teachers  ")] == [pytest.approx(held / 1e6, abs=1e-3)] * 8
    peaks = [[float(x) for x in cells(plan, "peak")] for plan in (text, thrice)]
    assert peaks[0] == pytest.approx([x + held / 1e6 for x in peaks[1]], abs=2e-3)
    assert not any(line.startswith("teachers") for line in thrice.splitlines())
    work, more = (plan_seconds(plan) * 989e12 * 0.4 for plan in (thrice, text))
    assert more - work == pytest.approx(12 * asked, rel=0.05)  # 12 images of a device; cells have two digits


def test_teachers_of_int8_experts_take_a_byte_a_weight_and_their_scales(teacher: Path) -> None:
    pipe = pipeline.load(teacher)
    taught = changed(DIGITS, distill={"teachers": (str(teacher),)})
    whole, before = teaching(taught), [p.numel() for p in pipe.transformer.parameters()]
    assert whole.held == 4 * sum(before)
    pipe.transformer.bfloat16().store_int8()  # as `ditmoe convert --int8` does
    pipeline.save(pipe, teacher)
    small = teaching(taught)
    assert small.held == sum(value.nbytes for value in pipeline.load(teacher).transformer.state_dict().values())
    assert small.held < whole.held
    assert small.said.split(",")[0] == whole.said.split(",")[0] == f"\nteachers: {sum(before) / 1e6:.2f} M parameters"


def plan_seconds(text: str) -> float:
    return float(cells(text, "seconds a step, arithmetic")[0])


def test_a_teacher_answers_once_for_each_level_and_of_a_mixture_for_its_set(teacher: Path) -> None:
    once = budget.flops(DIGITS).forward
    plain = changed(DIGITS, distill={"teachers": (str(teacher), str(teacher))})
    assert teaching(plain).asked == 2 * once
    assert teaching(changed(plain, distill={"guided": True}, sample={"cfg": 1.0})).asked == 4 * once
    bare = changed(plain, distill={"guided": True, "cfg": 1.0}, sample={"cfg": 1.0})
    assert teaching(bare).asked == 2 * once
    data = {"mixture": ("digits=3", "fashion"), "fit": "crop"}
    assert teaching(changed(plain, distill={"by": "domain"}, data=data)).asked == once
    (teacher / "training.json").unlink()
    found = teaching(plain)
    assert (found.held > 0, found.asked) == (True, 0)
    assert f"without those of {teacher}, which does not say how it was trained" in found.said
    assert teaching(DIGITS) == (0, 0, 0, 0, "")


def test_the_largest_model_on_64_devices() -> None:
    config = changed(PRESETS["dit-moe-g/2-16e2a"], plan={"devices": 64})
    text = describe(config)
    assert cells(text, "a device") == ["DDP", "DDP", "FSDP2", "FSDP2"] * 2
    assert cells(text, "parallel.experts") == ["1"] * 4 + ["16"] * 4
    assert cells(text, "gradient checkpointing") == ["no", "yes"] * 4
    assert cells(text, "fits") == ["no", "no", "no", "yes", "no", "yes", "yes", "yes"]
    assert max(len(line) for line in text[text.index("plan (") :].splitlines()) <= 120
    for way, d, column in (("FSDP2", 1, 3), ("DDP", 16, 5), ("FSDP2", 16, 6)):
        again = column % 2 == 1
        largest = int(cells(text, "largest")[column].replace(",", ""))
        limit = USABLE * 80 * GB
        assert plan_of(config, way, d, largest, again).peak <= limit < plan_of(config, way, d, largest + 1, again).peak
    seconds = 16 * budget.flops(config).training(False) / (989e12 * 0.4)
    assert float(cells(text, "seconds")[0]) == pytest.approx(seconds, abs=1e-4)


def test_ways_that_do_not_apply_are_left_out() -> None:
    dense = changed(ADAMW, moe={"blocks": "none"}, plan={"devices": 4})
    assert cells(describe(dense), "a device") == ["DDP", "DDP", "FSDP2", "FSDP2"]
    assert cells(describe(changed(ADAMW, plan={"devices": 1})), "a device") == ["DDP", "DDP"]
    no_multiple = changed(ADAMW, train={"batch_size": 9}, plan={"devices": 3})  # 8 experts
    assert cells(describe(no_multiple), "parallel.experts") == ["1"] * 4
    assert "plan (" not in describe(ADAMW)


def test_what_muon_keeps_and_does() -> None:
    adam = changed(ADAMW, plan={"devices": 4}, parallel={"experts": 2})
    muon = changed(adam, train={"optimizer": "muon", "muon_on": "all"})
    text = describe(muon)
    assert cells(text, "a device") == ["DDP"] * 4  # slices do not go with it
    moved = matrices(meta(muon), experts=True)
    sizes = {name: p.numel() // (2 if ".experts." in name else 1) for name, p in meta(muon).named_parameters()}
    ours, theirs = (plan_of(config, "DDP", 2, 32) for config in (muon, adam))
    assert theirs.optimizer - ours.optimizer == theirs.peak - ours.peak == 4 * sum(sizes[name] for name in moved)
    trunk, more = (work(meta(muon), experts=x)[2] for x in (False, True))
    assert f"Muon {more / 1e9:.3g} a step more" in text
    seconds = (muon.train.batch_size / 4 * budget.flops(muon).training(False) + more) / (989e12 * 0.4)
    assert float(cells(text, "seconds")[0]) == pytest.approx(seconds, rel=0.05)
    assert float(cells(text, "seconds")[2]) == pytest.approx(seconds - (more - trunk) / 2 / (989e12 * 0.4), rel=0.05)


def test_the_degree_that_is_asked_for_is_planned() -> None:
    config = changed(ADAMW, plan={"devices": 4}, parallel={"experts": 4})
    assert cells(describe(config), "parallel.experts") == ["1"] * 4 + ["4"] * 4
    with pytest.raises(ValueError, match="parallel.experts 8 must divide plan.devices 4 and moe.num_experts 8"):
        describe(changed(config, parallel={"experts": 8}))
    with pytest.raises(ValueError, match="parallel.experts 2 must divide plan.devices 4 and moe.num_experts 5"):
        describe(changed(config, parallel={"experts": 2}, moe={"num_experts": 5}))
    with pytest.raises(ValueError, match="parallel.shard needs several devices, but plan.devices is 1"):
        describe(changed(config, parallel={"experts": 1, "shard": True}, plan={"devices": 1}))
    with pytest.raises(ValueError, match="parallel.gather bfloat16 needs --train.precision bf16, not fp32"):
        describe(changed(config, parallel={"shard": True, "gather": "bfloat16"}, train={"precision": "fp32"}))


def test_small_models_and_absurd_devices_stay_readable() -> None:
    small = changed(ADAMW, plan={"devices": 2})
    text = describe(small)
    assert "a device, in MB" in text
    assert float(cells(text, "weights")[0]) == pytest.approx(4 * 1.02, rel=0.01)
    absurd = changed(small, train={"batch_size": 2 * 10**21}, plan={"tflops": 1e-300, "bandwidth": 1e-300})
    text = describe(absurd)[len(json.dumps(to_dict(absurd), indent=2)) :]
    assert max(map(len, text.splitlines())) <= 120
    for label in ("weights", "peak", "largest", "seconds", "  sending"):
        assert len(cells(text, label)) == 8
    free = changed(small, plan={"memory": 1e30})
    assert set(cells(describe(free), "largest")) == {">1,048,575"}


def test_a_run_goes_on_with_another_plan(tmp_path: Path) -> None:
    config = replace(ADAMW, out=tmp_path)
    save(config, tmp_path / "config.json")
    place.check_place(changed(config, plan={"devices": 64, "memory": 40.0}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"devices": -1}, "devices is -1; it must be 0 or more"),
        ({"memory": 0.0}, "memory is 0.0; it must be above 0"),
        ({"tflops": 0.0}, "tflops is 0.0"),
        ({"bandwidth": -1.0}, "bandwidth is -1.0"),
        ({"efficiency": 0.0}, "efficiency is 0.0; it must lie in"),
        ({"efficiency": 1.5}, "efficiency is 1.5"),
    ],
)
def test_values_that_cannot_be(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PlanConfig(**values)


def test_devices_must_divide_the_batch() -> None:
    with pytest.raises(ValueError, match="batch_size 1024 is not a multiple of accumulation 1 \\* 48 processes"):
        describe(changed(PRESETS["dit-moe-g/2-16e2a"], plan={"devices": 48}))


def test_the_command(tmp_path: Path) -> None:
    argv = ["dit-moe-g/2-16e2a", "--dry-run", "--plan.devices", "64", "--out", tmp_path / "x"]
    begin = time.perf_counter()
    done = typed("train", *argv)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - begin < 60  # a few seconds on a quiet machine
    assert "plan (a calculation, not a run): 64 devices of 80 GB" in done.stdout
    assert not (tmp_path / "x").exists()
    wrong = typed("train", *argv, "--plan.memory", "0")
    assert wrong.returncode == 2
    assert "memory is 0.0" in wrong.stderr


@pytest.mark.parametrize("routed", [False, True])
def test_what_passes_through_a_block_of_wide_heads_is_queries_keys_and_values(routed: bool) -> None:
    config = changed(SMALL, model={"num_heads": 2, "head_width": 512})
    D, A, T, size = config.model.hidden_size, 1024, (config.model.sample_size // config.model.patch_size) ** 2, 4
    config = changed(config, train={"precision": "fp32"})
    assert budget.activations(config, routed)[2] == T * size * (2 * D + 3 * A)


def test_a_fake_is_held_with_its_moments_and_its_work_counted(teacher: Path) -> None:
    config = changed(DIGITS, train={"batch_size": 24}, objective={"class_dropout_prob": 0.0},
                     sample={"sampler": "flow-euler", "steps": 2, "cfg": 1.0})  # fmt: skip
    config = changed(config, objective={"prediction_type": "flow_prediction"})
    taught = changed(config, plan={"devices": 4}, distill={"teachers": (str(teacher),), "fake_steps": 3},
                     train={"init": teacher})  # fmt: skip
    net = pipeline.load(teacher).transformer
    held = sum(p.numel() * p.element_size() for p in net.parameters())
    found = teaching(taught)
    assert (found.held, found.sent) == (5 * held, 3 * held)
    assert "and a copy that learns" in found.said
    given = torch.randn(2, 1, 8, 8), torch.tensor([100.0, 900.0]), torch.tensor([1, 2])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for _ in range(3):
            net(*given).sample.square().mean().backward()
        with torch.no_grad():
            net(*given)  # the fake and the teacher, without guidance
            net(*given)
    assert found.asked == pytest.approx(counter.get_total_flops() / 2, rel=0.02)
    text, plain = describe(taught), describe(changed(config, plan={"devices": 4}, train={"batch_size": 48}))
    sent = [float(cells(plan, "sent a step: all-reduce")[0]) for plan in (text, plain)]
    assert sent[0] - sent[1] == pytest.approx(1.5 * 3 * held / 1e6, rel=0.01)  # of 4 devices each sends 3/4 twice
    assert set(cells(text, "a device, in")) == {"DDP"}
    assert set(cells(plain, "a device, in")) == {"DDP", "FSDP2"}
    rows = [float(x) for x in cells(text, "teachers  ")]
    kept = sum(activations(trained_by(teacher), routed)[0] for routed in routed_blocks(trained_by(teacher)))
    assert rows == [pytest.approx((5 * held + 6 * kept) / 1e6, rel=1e-2)] * len(rows)  # 6 images of a device
