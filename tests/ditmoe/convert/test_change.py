"""Experts made of dense layers, left out, joined, doubled: the same function at the start, refusals in a sentence."""

from typing import Any

import pytest
import torch

from ditmoe.convert.grow import merge, more
from ditmoe.convert.prune import by_chance, check_keep, prune, usage
from ditmoe.convert.split import split
from ditmoe.convert.upcycle import upcycle
from ditmoe.model import count_parameters
from tests.ditmoe.convert.toys import BATCH, Net, drawn, network, off


@pytest.fixture(scope="module")
def sharp() -> Net:
    return network(num_experts=4, expert_width=16, shared_width=16, blocks="all")


# ------------------------------------------------------------------------------------------ upcycle


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("seen", ["token", "plain+time", "position", "time+label"])
def test_an_upcycled_model_starts_as_the_dense_one(activation: str, copies: bool, seen: Any) -> None:
    dense = network(activation=activation, blocks="none")
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    made = upcycle(dense, 6, 2, copies=copies, router_input=seen)
    assert off(drawn(made), drawn(dense)) < 1e-6
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    if not copies:
        router = 4 * 6 * 32 * len(seen.split("+"))
        biases = 4 * (2 * 32 * 7) if activation == "gelu" else 0  # eight numbers for each of 2 F
        assert count_parameters(made)[1] == count_parameters(dense)[0] + router + biases


def test_experts_of_slices_are_other_cuts_of_the_layer() -> None:
    dense = network(blocks="none")
    made = upcycle(dense, 6, 2, blocks="every-second")
    assert [hasattr(block, "moe") for block in made.blocks] == [False, True] * 2
    rows = made.blocks[1].moe.experts.w_in.unflatten(1, (2, 32))[:, 0]  # (E, F, D)
    whole = dense.blocks[1].mlp.fc1.weight[:96]
    *units, shared = (
        (one[:, None] == whole).all(dim=2).nonzero()[:, 1].tolist()
        for one in (*rows, made.blocks[1].moe.shared.fc1.weight[:32])
    )
    for pair in range(0, 6, 2):
        assert sorted(units[pair] + units[pair + 1] + shared) == list(range(96))
    assert len({tuple(sorted(some)) for some in units}) == 6


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((6, 1), "top_k is 1; to upcycle to 6 experts it must be between 2 and 6"),
        ((4, 6), "top_k is 6"),
        ((7, 2), "num_experts is 7; slices of a dense layer come in sets of top_k 2"),
        ((200, 100), "ffn_width 96 is too small"),
    ],
)
def test_numbers_that_do_not_fit(numbers: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        upcycle(network(blocks="none"), *numbers)


def test_what_has_experts_is_not_made_to(sharp: Net) -> None:
    for change in (lambda: upcycle(sharp, 6, 2), lambda: split(sharp, 4, [BATCH])):
        with pytest.raises(ValueError, match="has experts already"):
            change()
    for change in (lambda net: prune(net, 2, torch.ones(1)), more, lambda net: merge(net, net)):
        with pytest.raises(ValueError, match="the model is dense"):
            change(network(blocks="none"))


# ------------------------------------------------------------------------------------------ prune, merge, more

KINDS: list[dict[str, Any]] = [
    {}, {"router_input": "position"}, {"router_input": "plain", "scope": "shared"}, {"router": "mlp"},
    {"router": "prototype", "bias_rate": 0.01}, {"score": "softmax", "renormalize": False}, {"null_experts": 2},
]  # fmt: skip


@pytest.mark.parametrize("moe", KINDS)
def test_all_experts_kept_are_the_model_to_the_bit(moe: dict[str, Any]) -> None:
    net = network(**moe)
    measured = usage(net, [BATCH, BATCH])
    assert torch.equal(drawn(prune(net, 8, measured.contribution)), drawn(net))
    fewer = prune(net, 6, measured.load)
    assert [len(block.moe.experts.w_in) for block in fewer.blocks[1::2]] == [6, 6]
    assert drawn(fewer).isfinite().all()
    pairs = 2 * 6 * 16 * 2
    assert measured.load.sum(dim=1).tolist() == [pairs] * 2 or moe.get("null_experts")


def test_each_layer_keeps_its_own_and_a_shared_router_the_same() -> None:
    scores = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 10]])
    for moe, kept in (({}, ([0, 1], [2, 3])), ({"scope": "shared", "router_input": "plain"}, ([0, 3], [0, 3]))):
        net = network(num_experts=4, **moe)
        made = prune(net, 2, scores)
        for i, rows in zip((1, 3), kept, strict=True):
            assert torch.equal(made.blocks[i].moe.experts.w_in, net.blocks[i].moe.experts.w_in[rows])
            if not moe:
                assert torch.equal(made.blocks[i].moe.router.weight, net.blocks[i].moe.router.weight[rows])
        if moe:
            assert torch.equal(made.router.weight, net.router.weight[[0, 3]])


def test_contribution_finds_experts_that_do_nothing() -> None:
    """Loads do not know that an expert that serves tokens adds next to nothing. (No other takes its place here.)"""
    net = network(blocks="all", select="threshold", renormalize=False)
    for block, load in zip(net.blocks, usage(net, [BATCH]).load, strict=True):
        with torch.no_grad():
            block.moe.experts.w_out[load.argsort()[-3:-1]] *= 1e-4
    measured = usage(net, [BATCH])
    wanted = drawn(net)
    by = {"contribution": measured.contribution, "load": measured.load}
    error = {name: off(drawn(prune(net, 6, scores)), wanted) for name, scores in by.items()}
    chance = sum(off(drawn(prune(net, 6, by_chance(net, seed))), wanted) for seed in range(5)) / 5
    assert error["contribution"] < 1e-3
    assert min(chance, error["load"]) > 0.1
    assert torch.equal(by_chance(net, 3), by_chance(net, 3))


def test_numbers_that_cannot_be_kept(sharp: Net) -> None:
    for keep in (1, 5):
        with pytest.raises(ValueError, match=f"{keep} experts cannot be kept of 4 with top_k 2; give 2 to 4"):
            prune(sharp, keep, torch.ones(4, 4))
    free = network(select="relative")  # a token has as many as it has
    assert prune(free, 1, torch.ones(2, 8)).config.top_k == 1
    with pytest.raises(ValueError, match="no image was given"):
        usage(sharp, [])
    with pytest.raises(ValueError, match="the experts form 2 groups"):
        prune(network(groups=2, top_groups=2), 6, torch.ones(2, 8))


def test_merged_experts_are_those_of_both_and_the_rest_is_the_mean(sharp: Net) -> None:
    other = network(1, num_experts=4, expert_width=16, shared_width=16, blocks="all")
    made = merge(sharp, other)
    a, b, both = (net.state_dict() for net in (sharp, other, made))
    for name in ("experts.w_in", "experts.w_out", "router.weight"):
        key = f"blocks.2.moe.{name}"
        assert torch.equal(both[key], torch.cat([a[key], b[key]]))
    torch.testing.assert_close(both["blocks.2.attn.qkv.weight"], (a["blocks.2.attn.qkv.weight"] + b["blocks.2.attn.qkv.weight"]) / 2)  # fmt: skip  # noqa: E501
    assert made.config.num_experts == 8


def test_with_equal_trunks_and_the_experts_of_one_it_is_that_one() -> None:
    a = network(bias_rate=0.01)
    b = network(bias_rate=0.01)
    for block in b.blocks[1::2]:
        torch.nn.init.normal_(block.moe.experts.w_in)
        torch.nn.init.normal_(block.moe.router.weight)
    made = merge(a, b)
    for block in made.blocks[1::2]:
        block.moe.router.expert_bias[8:] = -10
    assert off(drawn(made), drawn(a)) < 1e-6


@pytest.mark.parametrize(("score", "share"), [("softmax", 0.5), ("sigmoid", 1.0)])
def test_biases_weigh_as_much_among_twice_as_many(score: str, share: float) -> None:
    a, b = (network(bias_rate=0.01, score=score) for _ in "ab")
    for net in (a, b):
        torch.nn.init.normal_(net.blocks[1].moe.router.expert_bias)
    both = torch.cat([net.blocks[1].moe.router.expert_bias for net in (a, b)])
    torch.testing.assert_close(merge(a, b).blocks[1].moe.router.expert_bias, share * both)


def test_experts_that_training_could_not_hold_at_their_number_are_not_all_pruned() -> None:
    held = network(bias_rate=0.001, select="top_p", score="softmax", tau=0.45)
    with pytest.raises(ValueError, match="2 experts cannot be kept of 8 with top_k 2; give 3 to 8"):
        check_keep(held, 2)
    check_keep(held, 3)


@pytest.mark.parametrize(("moe", "words"), [({"expert_width": 64}, "expert_width is 128 and 64"), ({"groups": 2}, "")])
def test_models_that_cannot_be_merged(moe: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words or "router_groups 2 cannot be merged"):
        merge(network(**moe) if not words else network(), network(**moe))


@pytest.mark.parametrize("moe", [k for k in KINDS if "null_experts" not in k and "score" not in k])
def test_twice_the_experts_start_as_they_were(moe: dict[str, Any]) -> None:
    net = network(**moe)
    made = more(net)
    assert off(drawn(made), drawn(net)) < 2e-5
    assert made.config.num_experts == 16
    assert made.rule.active(16) == 2
    records = made(*BATCH).routing
    twins = torch.stack([record.counts.view(2, 8).sum(dim=1) for record in records]).double()
    if moe.get("router_input") != "position":
        assert (twins / twins.sum(dim=1, keepdim=True)).min() > 0.2  # both groups have work


@pytest.mark.parametrize("moe", [{"null_experts": 2}, {"groups": 2}, {"score": "softmax", "renormalize": False}])
def test_experts_that_cannot_be_doubled(moe: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="twins"):
        more(network(**moe))
