"""A final layer of several heads: their gate, their loss, what it leaves alone."""

from collections.abc import Callable

import pytest
import torch

from ditmoe.config.sections import Config, ModelConfig, ObjectiveConfig
from ditmoe.model import DiTMoETransformer2DModel, FinalLayer, Heads
from ditmoe.model.layers import unpatchify
from ditmoe.objective import expert_loss
from tests.checkpoints import resumed_to_the_bit
from tests.ditmoe.model.test_model import inputs, small
from tests.ditmoe.training.test_step import first_row

Tiny = Callable[..., Config]


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_value_and_gradient_are_those_of_one_head_after_another(learn_sigma: bool) -> None:
    torch.manual_seed(0)
    C, K, p, D = 2, 3, 2, 16
    final = FinalLayer(D, p, C * (1 + learn_sigma), K)
    for q in final.parameters():
        torch.nn.init.normal_(q, std=0.3)
    x, c, target = torch.randn(4, 9, D), torch.randn(4, D), torch.randn(4, C, 6, 6)
    y, (gates, each) = final(x, c)
    drawn = unpatchify(each.flatten(0, 1), p, C * (1 + learn_sigma)).unflatten(0, gates.shape)
    got = (unpatchify(y, p, C * (1 + learn_sigma))[:, :C] - target).square().mean()
    got = got + 0.3 * expert_loss(Heads(gates, drawn), target)

    shift, scale = final.adaLN_modulation(c).chunk(2, dim=1)
    wanted = torch.zeros(())
    for n in range(4):
        logits = final.router.weight @ ((c[n] - c[n].mean()) / (c[n].var(unbiased=False) + 1e-5).sqrt())
        g = logits.exp() / logits.exp().sum()
        h = final.norm_final(x[n]) * (1 + scale[n]) + shift[n]
        parts = zip(final.linear.weight.chunk(K), final.linear.bias.chunk(K), strict=True)
        says = [unpatchify((h @ w.T + b)[None], p, C * (1 + learn_sigma))[0, :C] for w, b in parts]
        whole = (sum(g[k] * says[k] for k in range(K)) - target[n]).square().mean()
        own = sum(g[k] * (says[k] - target[n]).square().mean() for k in range(K))
        wanted = wanted + (whole + 0.3 * own) / 4
    torch.testing.assert_close(got, wanted)
    ours, theirs = (torch.autograd.grad(loss, [*final.parameters()], retain_graph=True) for loss in (got, wanted))
    for (name, _), a, b in zip(final.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
        assert a.abs().sum() > 0, name


def test_the_loss_is_that_of_the_sum_and_what_heads_differ_by() -> None:
    torch.manual_seed(0)
    gates, p, target = torch.randn(5, 3).softmax(1), torch.randn(5, 3, 2, 4, 4), torch.randn(5, 2, 4, 4)
    mean = (gates[:, :, None, None, None] * p).sum(1)
    spread = (gates * (p - mean.unsqueeze(1)).square().mean(dim=(2, 3, 4))).sum(1).mean()
    torch.testing.assert_close(expert_loss(Heads(gates, p), target), (mean - target).square().mean() + spread)
    alike = Heads(gates, target.unsqueeze(1).expand(5, 3, 2, 4, 4))
    assert expert_loss(alike, target) == 0


@pytest.mark.parametrize("one", [0, 1])
def test_one_head_is_the_final_layer_that_it_was(one: int) -> None:
    model = small(head_experts=one).eval()
    assert {name for name, _ in model.final_layer.named_parameters()} == {
        "linear.weight", "linear.bias", "adaLN_modulation.1.weight", "adaLN_modulation.1.bias",
    }  # fmt: skip
    out = model(*inputs())
    assert out.heads is None
    assert torch.equal(out.sample, small().eval()(*inputs()).sample)


@pytest.mark.parametrize("changes", [{}, {"refine_width": 8}, {"learn_sigma": True, "refine_width": 8}])
def test_a_model_with_heads(changes: dict[str, int]) -> None:
    model = small(head_experts=3, **changes).eval()
    out = model(*inputs())
    C = 4 if "learn_sigma" in changes else 2
    gates, each = out.heads
    assert each.shape == (3, 3, C, 8, 8)
    torch.testing.assert_close(gates.sum(dim=1), torch.ones(3))
    assert len(gates.unique(dim=0)) == 3  # other times and labels, other gates
    if "refine_width" not in changes:
        torch.testing.assert_close((gates[:, :, None, None, None] * each).sum(dim=1), out.sample)
    x, t, y = inputs()
    torch.testing.assert_close(model(x[1:2], t[1:2], y[1:2]).sample, out.sample[1:2], rtol=1e-4, atol=1e-5)
    half = small(head_experts=3, **changes).bfloat16()
    assert half(x.bfloat16(), t, y).sample.dtype == torch.bfloat16


def test_a_new_model_predicts_zero_and_its_heads_part_at_once() -> None:
    values = {"sample_size": 8, "in_channels": 2, "num_classes": 5, "hidden_size": 32, "depth": 2, "num_heads": 2}
    model = DiTMoETransformer2DModel(**values, head_experts=3)
    out = model(*inputs())
    assert out.sample.abs().max() == 0
    (out.sample - 1).square().mean().backward()
    first, second, _ = model.final_layer.linear.weight.grad.chunk(3)
    assert (first - second).norm() > 0.1 * first.norm()


HEADS = {"model": {"head_experts": 3}}


def test_the_loss_is_a_part_of_its_own_and_adds_up(tiny: Tiny) -> None:
    moe = {"balance_weight": 0.0, "z_weight": 0.0}
    row = first_row(tiny(max_steps=1, moe=moe, objective={"expert_weight": 0.5}, **HEADS))
    assert row["loss"] == pytest.approx(row["mse"] + 0.5 * row["expert"], rel=1e-6)
    row = first_row(tiny(max_steps=1, moe=moe, out=tiny().out.with_name("without"), **HEADS))
    assert row["loss"] == row["mse"] == pytest.approx(row["expert"])  # all heads start at zero
    assert "expert" not in first_row(tiny(max_steps=1, out=tiny().out.with_name("one")))


def test_a_run_is_resumed_to_the_bit_and_its_model_says_that_it_has_heads(tiny: Tiny) -> None:
    whole = tiny(max_steps=6, objective={"expert_weight": 0.1}, **HEADS)
    resumed_to_the_bit(whole, 3)
    assert DiTMoETransformer2DModel.from_pretrained(whole.out / "model/transformer").config.head_experts == 3


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="head_experts is -1; it must be 0 or more"):
        ModelConfig(head_experts=-1)
    with pytest.raises(ValueError, match="expert_weight is -0.1; it must be 0 or more"):
        ObjectiveConfig(expert_weight=-0.1)
    with pytest.raises(ValueError, match="add --model.head-experts 4"):
        Config(objective=ObjectiveConfig(expert_weight=0.1), model=ModelConfig(head_experts=1))
