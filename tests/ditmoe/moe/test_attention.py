"""Experts in attention: the formula, kernels, batch mates, what moves, resume, compilation."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ditmoe.config.rules import with_rule
from ditmoe.config.sections import Config, ModelConfig, MoEConfig
from ditmoe.model import DiTMoETransformer2DModel, build, count_parameters
from ditmoe.model.layers import Attention, rotary_positions
from ditmoe.moe import AttentionExperts, Condition, Router
from ditmoe.training.muon import matrices
from ditmoe.training.parallel import expert_names
from tests.checkpoints import resumed_to_the_bit
from tests.reference.attention import attention as reference

D, H = 16, 2


def layer(E: int, K: int, backend: str = "auto", qk_norm: str = "rms", d: int = D // H) -> Attention:
    torch.manual_seed(0)
    made = Attention(D, H, qk_norm, AttentionExperts(D, H, d, E, K, backend), d)  # type: ignore[arg-type]
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return made


def tokens(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 9, D, generator=torch.Generator().manual_seed(1))


def gradients(y: torch.Tensor, made: Attention, x: torch.Tensor) -> dict[str, torch.Tensor]:
    to = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    names = [name for name, _ in made.named_parameters()]
    return dict(zip(["x", *names], torch.autograd.grad((y * to).sum(), [x, *made.parameters()]), strict=True))


@pytest.mark.parametrize(("E", "K", "dense"), [(1, 1, True), (3, 2, False), (4, 1, False), (3, 3, False)])
@pytest.mark.parametrize("backend", ["grouped", "loop"])
@pytest.mark.parametrize(("positions", "d"), [("rope", D // H), ("rope", 16), ("sincos", D // H)])
def test_it_is_the_formula_in_value_and_gradient(
    E: int, K: int, dense: bool, backend: str, positions: str, d: int
) -> None:
    made = layer(E, K, backend, d=d)
    rotary = rotary_positions(d, 3) if positions == "rope" else None
    x = tokens().requires_grad_()
    got, wanted = made(x, rotary), reference(made, x, rotary, dense)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    ours, theirs = gradients(got, made, x), gradients(wanted, made, x)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-4, msg=name)
        assert grad.abs().sum() > 0, name


def test_both_kernels_are_equal_and_auto_is_one_of_them() -> None:
    x = tokens().requires_grad_()
    found = []
    for backend in ("grouped", "loop", "auto"):
        made = layer(4, 2, backend)
        y = made(x, None)
        found.append((y, gradients(y, made, x)))
    for y, grads in found[1:]:
        torch.testing.assert_close(y, found[0][0], rtol=1e-6, atol=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, found[0][1][name], rtol=1e-5, atol=1e-5, msg=name)


def test_widths_that_the_grouped_kernel_cannot_have_are_refused_and_auto_loops() -> None:
    with pytest.raises(ValueError, match="got hidden_size 24 and 12 channels of 2 heads"):
        AttentionExperts(24, 2, 12, 4, 2, "grouped")
    values, project = AttentionExperts(6, 2, 3, 3, 2)(torch.randn(1, 4, 6))
    assert values.shape == (1, 2, 4, 3)
    assert project(values).shape == (1, 4, 6)


def test_gates_are_float32_in_half_precision_and_do_not_compete() -> None:
    made = layer(4, 2)
    x = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x, None)
        source, destination = made.maps.plans(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), made(x, None), rtol=0.1, atol=0.5)
    for plan in (source, destination):
        assert plan.weight.dtype == torch.float32
        assert plan.counts.sum() == 3 * 9 * H * 2
        by_row = plan.weight[plan.slot].view(-1, 2).sum(1)
        assert by_row.std() > 0.1  # they do not sum to anything
    assert not torch.equal(source.expert[source.slot], destination.expert[destination.slot])


# ------------------------------------------------------------------------------------------ in a network

MODEL = ModelConfig(sample_size=8, patch_size=2, hidden_size=32, depth=4, num_heads=2, ffn_width=64)
DENSE = Config(model=MODEL, moe=MoEConfig(num_experts=8, top_k=2, expert_width=16, shared_width=16))
CONFIG = with_rule(DENSE, "switchhead")


def network(config: Config = CONFIG) -> DiTMoETransformer2DModel:
    torch.manual_seed(0)
    model = build(config, 5)
    for p in model.parameters():  # adaLN-Zero starts as a constant: move every weight
        torch.nn.init.normal_(p, std=0.1)
    return model


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, 1, 8, 8, generator=g), torch.tensor([10.25, 500.5, 990.0, 300.1]), torch.tensor([0, 3, 5, 5])


@pytest.mark.parametrize("blocks", ["all", "none"])
def test_every_block_has_them_and_their_routing_is_not_among_the_records(blocks: str) -> None:
    config = replace(CONFIG, moe=replace(CONFIG.moe, blocks=blocks))
    model = network(config)
    assert sum(isinstance(m, AttentionExperts) for m in model.modules()) == 4
    out = model(*inputs())
    assert len(out.routing) == (4 if blocks == "all" else 0)
    alone = model(*(part[1:2] for part in inputs())).sample
    torch.testing.assert_close(alone, out.sample[1:2], rtol=1e-4, atol=1e-5)


def test_parameters_are_counted_as_they_are_activated() -> None:
    (dense, active), (total, used) = (count_parameters(build(config, 5)) for config in (DENSE, CONFIG))
    square, gates = 4 * 32**2, 4 * 2 * 2 * 4 * 32  # of four blocks; two gates of two heads for four experts
    biases = 4 * 2 * 32  # of values and of the output
    assert total - dense == (2 * 4 - 2) * square + gates - biases
    assert used - active == (2 * 2 - 2) * square + gates - biases


@pytest.mark.parametrize(("width", "hidden"), [(0, 32), (-4, 32), (6, 32), (8, 66)])
def test_heads_that_rotary_positions_cannot_turn_are_refused(width: int, hidden: int) -> None:
    with pytest.raises(ValueError, match=f"head_width {width} and hidden_size {hidden} must be multiples of 4, so th"):
        replace(MODEL, head_width=width, hidden_size=hidden)


def test_heads_as_wide_as_ever_need_not_be_named() -> None:
    assert build(replace(DENSE, model=replace(MODEL, head_width=16)), 5).config.head_width is None


def test_narrower_heads_have_the_parameters_that_their_width_says() -> None:
    """One head of 12 channels, four maps of it to values and outputs; and dense maps of as many channels."""
    one = replace(MODEL, num_heads=1, head_width=12)
    base = count_parameters(build(DENSE, 5))
    dense, routed = (count_parameters(build(replace(config, model=one), 5)) for config in (DENSE, CONFIG))
    qk_norms = 4 * 2 * (12 - 16)
    assert dense[0] - base[0] == 4 * (4 * 32 * 12 + 3 * 12 - (4 * 32**2 + 3 * 32)) + qk_norms
    assert routed[0] - dense[0] == 4 * ((2 * 4 - 2) * 32 * 12 + 2 * 4 * 32 - 12 - 32)
    assert routed[1] - dense[1] == 4 * ((2 * 2 - 2) * 32 * 12 + 2 * 4 * 32 - 12 - 32)
    model = build(replace(CONFIG, model=one), 5)
    assert model(*inputs()).sample.shape == (4, 1, 8, 8)


def test_they_start_about_as_loud_as_dense_maps() -> None:
    models = [build(replace(config, model=replace(MODEL, hidden_size=128)), 5) for config in (DENSE, CONFIG)]
    x = torch.randn(8, 16, 128)
    loud = [float(model.blocks[0].attn(x, None).detach().std()) for model in models]
    assert 0.7 < loud[1] / loud[0] < 1.1


def test_muon_moves_each_experts_matrix_and_queries_and_keys_and_no_gate() -> None:
    found = matrices(build(CONFIG, 5), experts=False)
    assert {name.split(".", 3)[-1]: n for name, n in found.items() if name.startswith("blocks.0.attn")} == {
        "qk.weight": 2,
        "maps.w_v": 1,
        "maps.w_o": 1,
    }


def test_expert_parallelism_leaves_them_whole() -> None:
    assert not any("attn" in name for name in expert_names(build(CONFIG, 5)))


def test_centres_and_biases_are_the_feed_forward_layers_own() -> None:
    model = build(replace(CONFIG, moe=replace(CONFIG.moe, bias_rate=0.1)), 5)
    routers = {name: m for name, m in model.named_modules() if isinstance(m, Router)}
    assert {name.split(".")[2] for name, m in routers.items() if m.expert_bias is not None} == {"moe"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_is_resumed_to_the_bit(optimizer: str, tiny: Callable[..., Config]) -> None:
    whole = tiny(max_steps=6, train={"optimizer": optimizer}, moe={"attention_experts": 3})
    first = resumed_to_the_bit(whole, 3)
    assert "blocks.0.attn.maps.w_v" in first
    again = DiTMoETransformer2DModel.from_pretrained(whole.out / "model/transformer")
    assert isinstance(again.blocks[0].attn.maps, AttentionExperts)


def test_a_block_compiles_into_one_graph_in_bfloat16() -> None:
    config = replace(Config(), moe=replace(MoEConfig(blocks="all"), attention_experts=4))
    block, width = build(config, 10).blocks[0], config.model.hidden_size
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch._dynamo.explain(block)(
            torch.randn(4, 16, width, requires_grad=True), Condition(*torch.randn(2, 4, width)), None
        )
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.parametrize("backend", ["auto", "loop"])
def test_what_changes_from_step_to_step_is_not_compiled_anew(backend: str) -> None:
    torch._dynamo.reset()
    made, counter, graphs = layer(4, 2, backend), CompileCounter(), []
    compiled = torch.compile(made, backend=counter, dynamic=False)
    for seed in range(8):
        torch.manual_seed(seed)
        x = torch.randn(3, 9, D, requires_grad=True)
        got = compiled(x, None)
        torch.testing.assert_close(got, made(x, None))
        got.sum().backward()
        graphs.append(counter.frame_count)
    assert graphs == [graphs[0]] * 8


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"attention_experts": -1}, "attention_experts is -1; it must be 0 or more"),
        ({"attention_experts": 1}, "attention_top_k is 2; it must be between 1 and attention_experts 1"),
        ({"attention_experts": 4, "attention_top_k": 0}, "attention_top_k is 0; it must be between"),
        ({"attention_top_k": 1}, "attention_top_k 1 needs --moe.attention-experts"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MoEConfig(**changes)  # type: ignore[arg-type]
