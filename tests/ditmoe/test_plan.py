"""The plan of --dry-run: counts, arithmetic, what autograd keeps, traffic; a real process as large as said."""

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import plan_check
from ditmoe import layers, plan, run_folder
from ditmoe.config import Config, ModelConfig, MoEConfig, PlanConfig, TrainConfig, save
from ditmoe.model import DiTMoETransformer2DModel, build, tokens_per_image
from ditmoe.presets import PRESETS
from ditmoe.training import describe
from tests.ditmoe.test_model import PAPER, meta
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


def inputs(model: DiTMoETransformer2DModel, n: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    size = model.config.sample_size
    x = torch.zeros(n, model.config.in_channels, size, size, device=device)
    return x, torch.ones(n, device=device), torch.ones(n, dtype=torch.int64, device=device)


def plan_of(config: Config, way: plan.Way, d: int, images: int, again: bool = False) -> plan.Needs:
    model = meta(config)
    return plan.needs(
        config, sum(p.numel() for p in model.parameters()), plan.blocks(config, model), way, d, images, again
    )


# ------------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe": {"blocks": "every-second", "shared_width": 0}},
        {"model": {"activation": "gelu"}, "objective": {"prediction_type": "epsilon", "learn_sigma": True}},
        {"moe": {"blocks": "none"}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("again", [False, True])
def test_flops_are_those_that_torch_counts(changes: dict[str, Any], again: bool) -> None:
    config = changed(changed(SMALL, **changes), moe={"backend": "loop"})  # torch does not count grouped_mm
    model, n = build(config, 10), 2
    if again:
        model.enable_gradient_checkpointing()
    count = plan.flops(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.enable_grad():
        out = model(*inputs(model, n)).sample
        forward = counter.get_total_flops()
        out.square().mean().backward()
    assert forward == n * count.forward
    assert counter.get_total_flops() == pytest.approx(n * count.training(again), rel=0.01)


@pytest.mark.parametrize(
    ("name", "gflops"), [("dit-moe-s/2-8e2a", 15.43), ("dit-moe-xl/2-8e2a", 323.74), ("dit-moe-g/2-16e2a", 690.94)]
)
def test_flops_of_the_paper(name: str, gflops: float) -> None:
    config = PRESETS[name]  # its Gflops are multiply-adds, attention's own products left out
    attention = 4 * 256**2 * config.model.hidden_size * config.model.depth
    assert (plan.flops(config).forward - attention) / 2e9 == pytest.approx(gflops, rel=0.02)


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
    {"moe": {"router_input": "position"}},
    {"model": {"qk_norm": "none", "positions": "sincos"}, "moe": {"score": "softmax", "renormalize": False}},
    {"model": {"qk_norm": "layer", "positions": "rope"}},
]


def a_block_and_an_image(measure: Callable[[int, int], int]) -> float:
    """From measure(depth, images): what two more blocks keep of one more image."""
    return ((measure(4, 8) - measure(2, 8)) - (measure(4, 4) - measure(2, 4))) / 4


@pytest.mark.parametrize("changes", KINDS)
def test_activations_are_what_autograd_keeps_in_bf16(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = changed(changed(SMALL, train={"precision": "bf16"}), **changes)

    def measure(depth: int, n: int) -> int:
        with pretended_gpu(monkeypatch):
            return saved_bytes(build(changed(config, model={"depth": depth}), 10), n, "cuda")

    expected = sum(block.saved for block in plan.blocks(config, meta(config)))
    assert a_block_and_an_image(measure) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("backend", ["grouped", "loop"])
@pytest.mark.parametrize("qk_norm", ["none", "layer"])
def test_activations_are_what_autograd_keeps_in_fp32(backend: str, qk_norm: str) -> None:
    config = changed(SMALL, model={"qk_norm": qk_norm}, moe={"backend": backend})
    expected = sum(block.saved for block in plan.blocks(config, meta(config)))

    def measure(depth: int, n: int) -> int:
        return saved_bytes(build(changed(config, model={"depth": depth}), 10), n, "cpu")

    assert a_block_and_an_image(measure) == pytest.approx(expected, rel=0.01)


MEASURED = changed(plan_check.CASES["experts, activations"], model={"depth": 4}, train={"batch_size": 24})


def in_a_child() -> None:
    print(plan_check.measured(MEASURED))


def test_a_real_process_is_as_large_as_planned(tmp_path: Path) -> None:
    process = start(in_a_child, folder=tmp_path)
    assert process.wait() == [0], process.err()
    assert float(process.out().splitlines()[-1]) == pytest.approx(plan_check.predicted(MEASURED).peak, rel=0.15)


@pytest.mark.parametrize("name", PAPER)
def test_state_of_the_papers_models(name: str) -> None:
    total = PAPER[name][0] * 1e6
    one = plan_of(changed(PRESETS[name], plan={"devices": 1}), "DDP", 1, 1)
    assert sum(one[:4]) == pytest.approx(20 * total, rel=1e-3)
    many = changed(PRESETS[name], plan={"devices": 8})
    assert sum(plan_of(many, "FSDP2", 1, 1)[:4]) == pytest.approx(20 * total / 8, rel=1e-3)
    model = meta(many)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    rest = sum(p.numel() for p in model.parameters()) - experts
    assert plan_of(many, "experts", 4, 1).weights == 4 * (rest + experts / 4)


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
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert plan_of(config, "DDP", 1, 4)[7:] == pytest.approx((2 * 4 * total * 7 / 8, 0, 0))
    assert plan_of(config, "FSDP2", 1, 4)[7:] == pytest.approx((0, 3 * 4 * total * 7 / 8, 0))
    rows = 12 * 4 * tokens_per_image(model) * 2 * 384 * 2  # layers, images, tokens, experts a token, width, bf16
    reduced = 2 * 4 * ((total - experts) * 7 / 8 + experts / 4 * 1 / 2)  # experts/4: two copies of each
    assert plan_of(config, "experts", 4, 4)[7:] == pytest.approx((reduced, 0, 4 * rows * 3 / 4))
    assert plan_of(config, "experts", 4, 4, True).all_to_all == pytest.approx(6 * rows * 3 / 4)
    alone = changed(config, plan={"devices": 1})
    assert plan_of(alone, "DDP", 1, 4)[7:] == (0, 0, 0)


# ------------------------------------------------------------------------------------------ the command


def cells(text: str, label: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(label)]
    return line[28:].split()


def test_the_largest_model_on_64_devices() -> None:
    config = changed(PRESETS["dit-moe-g/2-16e2a"], plan={"devices": 64})
    text = describe(config)
    assert cells(text, "a device") == ["DDP", "DDP", "FSDP2", "FSDP2", "experts/16", "experts/16"]
    assert cells(text, "fits")[:2] == ["no", "no"]
    assert cells(text, "fits")[3] == cells(text, "fits")[5] == "yes"
    for way, d, column, again in (("FSDP2", 1, 2, False), ("experts", 16, 5, True)):
        largest = int(cells(text, "largest")[column].replace(",", ""))
        limit = plan.USABLE * 80 * GB
        assert plan_of(config, way, d, largest, again).peak <= limit < plan_of(config, way, d, largest + 1, again).peak
    seconds = 16 * plan.flops(config).training(False) / (989e12 * 0.4)
    assert float(cells(text, "seconds")[0]) == pytest.approx(seconds, abs=1e-4)


def test_ways_that_do_not_apply_are_left_out() -> None:
    dense = changed(PRESETS["digits"], moe={"blocks": "none"}, plan={"devices": 4})
    assert cells(describe(dense), "a device") == ["DDP", "DDP", "FSDP2", "FSDP2"]
    assert cells(describe(changed(PRESETS["digits"], plan={"devices": 1})), "a device") == ["DDP", "DDP"]
    assert "plan (" not in describe(PRESETS["digits"])


def test_a_run_goes_on_with_another_plan(tmp_path: Path) -> None:
    config = replace(PRESETS["digits"], out=tmp_path)
    save(config, tmp_path / "config.json")
    run_folder.check_place(changed(config, plan={"devices": 64, "memory": 40.0}))


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
