"""Muon: orthogonal updates matrix by matrix, AdamW for the rest, exactly resumed."""

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from ditmoe.config.sections import Config, ModelConfig, MoEConfig, ParallelConfig, TrainConfig
from ditmoe.data.open import open_data
from ditmoe.model import build
from ditmoe.training.loop import train
from ditmoe.training.muon import MOMENTUM, Muon, matrices, orthogonal, work
from ditmoe.training.state import new_state
from tests import checkpoints
from tests.checkpoints import resumed_to_the_bit


@pytest.mark.parametrize("shape", [(4, 16, 16), (3, 24, 8), (2, 8, 40)])
def test_the_result_is_nearly_orthogonal_and_keeps_the_directions(shape: tuple[int, int, int]) -> None:
    u = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal(u)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(u, full_matrices=False)
    inside = left.mT @ found @ right.mT  # diagonal in the basis of u
    off = inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-3
    torch.testing.assert_close(orthogonal(1000 * u), found, rtol=1e-3, atol=1e-3)
    assert 0 < (orthogonal(u, torch.bfloat16) - found).norm() < 0.03 * found.norm()


def test_stacked_matrices_are_moved_each_for_itself() -> None:
    torch.manual_seed(0)
    stacked = torch.nn.Parameter(torch.randn(3, 8, 5))  # three experts of two matrices (4, 5)
    alone = [torch.nn.Parameter(part.clone()) for part in stacked.detach().view(6, 4, 5)]
    together = Muon([{"params": [stacked], "parts": 2, "weight_decay": 0.1}], lr=0.01, betas=(0.9, 0.99))
    apart = Muon([{"params": alone, "parts": 1, "weight_decay": 0.1}], lr=0.01, betas=(0.9, 0.99))
    for _ in range(3):
        stacked.grad = torch.randn(3, 8, 5)
        for p, g in zip(alone, stacked.grad.view(6, 4, 5), strict=True):
            p.grad = g.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stacked.detach().view(6, 4, 5), torch.stack([p.detach() for p in alone]))


def test_steps_are_the_formula() -> None:
    torch.manual_seed(0)
    p, m = torch.nn.Parameter(torch.randn(6, 4)), torch.zeros(6, 4)
    want = p.detach().clone()
    muon = Muon([{"params": [p], "parts": 1, "weight_decay": 0.5}], lr=0.1, betas=(0.9, 0.99))
    for g in torch.randn(4, 6, 4):
        p.grad = g.clone()
        muon.step()
        m = MOMENTUM * m + (1 - MOMENTUM) * g
        move = orthogonal(((1 - MOMENTUM) * g + MOMENTUM * m)[None])[0]
        want = want * (1 - 0.05) - 0.1 * 0.2 * 6**0.5 * move
    torch.testing.assert_close(p.detach(), want)


def test_other_groups_are_adamws_to_the_bit() -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    weight = torch.nn.Parameter(torch.randn(4, 4))
    muon = Muon([{"params": [ours]}, {"params": [weight], "parts": 1}], lr=0.01, betas=(0.9, 0.95))
    adamw = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0, fused=True)
    for _ in range(4):
        ours.grad = torch.randn(5, 3)
        theirs.grad, weight.grad = ours.grad.clone(), torch.randn(4, 4)
        muon.step()
        adamw.step()
    assert torch.equal(ours, theirs)
    assert set(muon.state[weight]) == {"step", "momentum"}
    assert set(muon.state[ours]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("experts", [False, True])
def test_which_weights_are_muons(experts: bool) -> None:
    options = ModelConfig(depth=2, long_skips=True, local_conv=True)
    model = build(Config(model=options, moe=MoEConfig(bias_rate=0.1)), 10)
    found = matrices(model, experts=experts)
    names = {name for name, _ in model.named_parameters()}
    assert found.keys() <= names
    assert {n.split(".", 2)[-1]: k for n, k in found.items() if n.startswith("blocks.1.")} == {
        "skip.weight": 1, "attn.qkv.weight": 3, "attn.proj.weight": 1, "moe.shared.fc1.weight": 2,
        "moe.shared.fc2.weight": 1,
        **({"moe.experts.w_in": 2, "moe.experts.w_out": 1} if experts else {}),
    }  # fmt: skip
    left = {name for name in names - found.keys() if name.startswith("blocks.")}
    assert all(any(x in n for x in ("adaLN", "norm", "local_conv", "bias", "router", "experts")) for n in left)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert all(shapes[name][-2] % parts == 0 for name, parts in found.items())


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("no", torch.float32)])
def test_products_are_in_the_precision_of_the_run(precision: str, dtype: torch.dtype) -> None:
    parallel: Any = SimpleNamespace(splits=False, accelerator=SimpleNamespace(mixed_precision=precision))
    optimizer = new_state(Config(train=TrainConfig(optimizer="muon")), 10, parallel).optimizer
    assert isinstance(optimizer, Muon)
    assert optimizer.dtype == dtype


@pytest.mark.parametrize("experts", [False, True])
def test_the_work_is_what_torch_counts(experts: bool) -> None:
    model = build(Config(model=ModelConfig(depth=2), moe=MoEConfig(num_experts=3)), 10)
    found = matrices(model, experts=experts)
    stacks = [p.view(-1, p.shape[-2] // found[n], p.shape[-1]) for n, p in model.named_parameters() if n in found]
    with FlopCounterMode(display=False) as counter:
        for stack in stacks:
            orthogonal(stack.detach())
    weights, count, operations = work(model, experts=experts)
    assert operations == counter.get_total_flops()
    assert (weights, count) == (sum(s.numel() for s in stacks), sum(len(s) for s in stacks))


def test_a_copy_of_weights_and_state_goes_on_to_the_bit() -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(8, 8))
    grads = torch.randn(6, 8, 8)
    muon = Muon([{"params": [p], "parts": 2}], lr=0.01, betas=(0.9, 0.99))
    for g in grads[:3]:
        p.grad = g
        muon.step()
    q = torch.nn.Parameter(p.detach().clone())
    other = Muon([{"params": [q], "parts": 2}], lr=0.01, betas=(0.9, 0.99))
    other.state[q] = copy.deepcopy(muon.state[p])
    for g in grads[3:]:
        p.grad, q.grad = g, g.clone()
        muon.step()
        other.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("on", ["trunk", "all"])
def test_a_run_with_muon_is_resumed_to_the_bit(on: str, tiny: Callable[..., Config]) -> None:
    whole = tiny(max_steps=6, train={"optimizer": "muon", "muon_on": on, "muon_factor": 2.0, "weight_decay": 0.1})
    resumed_to_the_bit(whole, 3)
    saved = load_file(whole.out / "checkpoints/step-000006/optimizer.safetensors")
    assert "blocks.1.attn.qkv.weight.momentum" in saved
    assert ("blocks.1.moe.experts.w_in.momentum" in saved) == (on == "all")


def test_matrices_go_by_their_own_rate_and_the_rest_by_adamws(tiny: Callable[..., Config]) -> None:
    """One step of equal gradients: what Muon moves goes `muon_factor` times as far, all else is the same."""

    def moved(factor: float) -> dict[str, torch.Tensor]:
        config = tiny(max_steps=1, train={"optimizer": "muon", "muon_factor": factor, "warmup_steps": 0})
        config = replace(config, out=config.out.with_name(f"factor-{factor}"))
        torch.manual_seed(config.seed)
        net = build(config, 10)
        train(config, open_data(config.data, size=8, channels=1))
        parts, _ = checkpoints.load(config.out / "checkpoints/step-000001")
        return {name: parts["model"][name] - value for name, value in net.named_parameters()}

    once, four = moved(1.0), moved(4.0)
    ends = (".qkv.weight", ".proj.weight", ".fc1.weight", ".fc2.weight")
    of_muon = {name for name in once if name.startswith("blocks.") and name.endswith(ends)}
    assert of_muon
    for name, move in once.items():
        torch.testing.assert_close(four[name], (4 if name in of_muon else 1) * move, rtol=1e-4, atol=1e-6)


def test_a_factor_without_muon_changes_nothing_and_says_so(
    tiny: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for factor in (1.0, 4.0):
        config = tiny(max_steps=2, train={"muon_factor": factor})
        config = replace(config, out=config.out.with_name(f"factor-{factor}"))
        train(config, open_data(config.data, size=8, channels=1))
        found.append(load_file(config.out / "model/transformer/diffusion_pytorch_model.safetensors"))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    said = capsys.readouterr().out
    assert said.count("note: train.muon_factor 4.0 changes nothing without --train.optimizer muon") == 1


def test_a_run_of_another_optimiser_is_not_gone_on_with(tiny: Callable[..., Config]) -> None:
    config = tiny(max_steps=2)
    data = open_data(config.data, size=8, channels=1)
    train(config, data)
    with pytest.raises(ValueError, match=r"holds another run \(train.optimizer: adamw -> muon\)"):
        train(replace(config, max_steps=4, train=replace(config.train, optimizer="muon")), data)


def test_what_does_not_go_with_muon_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="muon_on all needs --train.optimizer muon"):
        TrainConfig(muon_on="all")
    with pytest.raises(ValueError, match="muon_factor"):
        TrainConfig(optimizer="muon", muon_factor=0)
    with pytest.raises(ValueError, match="muon_on all does not apply to a model without experts"):
        Config(train=TrainConfig(optimizer="muon", muon_on="all"), moe=MoEConfig(blocks="none"))
    with pytest.raises(ValueError, match="train.optimizer muon needs whole matrices, which parallel.shard cuts"):
        Config(train=TrainConfig(optimizer="muon"), parallel=ParallelConfig(shard=True))
