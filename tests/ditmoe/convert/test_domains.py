"""Dense layers cut by domain: the units of a domain are those most active on it, and its images get these alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ditmoe import pipeline
from ditmoe.config.file import read_config, save
from ditmoe.config.sections import Config, DataConfig, MoEConfig
from ditmoe.convert import domains
from ditmoe.convert.domains import activity, chosen, split_by_domain
from ditmoe.convert.rebuild import rebuilt
from ditmoe.moe import FeedForward
from tests.ditmoe.convert.test_change_command import convert, saved
from tests.ditmoe.convert.toys import MODEL, Net, drawn, network, off

SETS = torch.tensor([0, 1] * 5)
X, T = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(10) * 100.0 + 20
LABELLED = (X, T, torch.arange(10))
WAYS = [("time", 4), ("class", 10), ("class", 5), ("data", 2)]


def split(net: Net, E: int, of: Any, **options: Any) -> domains.ByDomain:
    return split_by_domain(net, E, [LABELLED], of, sets=SETS if of == "data" else None, **options)


def sizes(net: Net, y: Tensor | None) -> list[Tensor]:
    """Of each layer (10, H): the mean size of a unit's activity in each of the images."""
    found: list[Tensor] = []
    hooks = [b.mlp.fc2.register_forward_pre_hook(lambda _, x: found.append(x[0].abs().mean(1))) for b in net.blocks]
    with torch.no_grad():
        net(X, T, y)
    for hook in hooks:
        hook.remove()
    return found


def masked(net: Net, masks: list[Tensor], y: Tensor | None) -> Tensor:
    """What the dense network says of the images where each has units of its own: masks (10, H)."""
    hooks = [
        block.mlp.fc2.register_forward_pre_hook(lambda _, x, mask=mask: (x[0] * mask.unsqueeze(1),))
        for block, mask in zip(net.blocks, masks, strict=True)
    ]
    with torch.no_grad():
        out: Tensor = net(X, T, y).sample
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(("of", "E"), WAYS)
def test_an_image_gets_the_units_that_are_most_active_in_its_domain(of: str, E: int, activation: str) -> None:
    dense = network(activation=activation, blocks="none")
    made, domain, known = split(dense, E, of)
    assert known > 0.99 if of == "time" else known == 1.0
    mine = domain[T.long()] if of == "time" else domain[:10]
    expected = {"time": T.long() * 4 // 1000, "data": SETS, "class": mine}[of]
    assert torch.equal(mine, expected)
    tops = []
    for size in sizes(dense, LABELLED[2]):
        activities = torch.stack([size[mine == e].mean(dim=0) for e in range(E)])
        tops.append(torch.zeros(E, 96).scatter(1, activities.topk(48, dim=1).indices, 1.0))
    with torch.no_grad():
        assert off(made(*LABELLED).sample, masked(dense, [top[mine] for top in tops], LABELLED[2])) < 1e-5
    common = min(int(top.prod(dim=0).sum()) for top in tops) // 8 * 8
    assert made.config.expert_width == 48 - common
    assert made.config.shared_width == (common or 8 * (activation == "gelu"))
    if of == "time":
        return
    own = [torch.zeros(96).scatter(0, size.mean(dim=0).topk(48).indices, 1.0) for size in sizes(dense, None)]
    best = sum((top * one).sum(dim=1) for top, one in zip(tops, own, strict=True))
    assert best[domain[10]] == best.max()
    with torch.no_grad():
        free = masked(dense, [top[domain[10]].expand(10, -1) for top in tops], None)
        assert off(made(X, T).sample, free) < 1e-5


def test_both_experts_of_two_domains_that_need_all_units_are_the_dense_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, active = network(activation="gelu", blocks="none"), torch.arange(96.0)
    monkeypatch.setattr(domains, "activity", lambda *_: torch.stack([active, active.flip(0)]).expand(4, 2, 96))
    made = split(dense, 2, "time", keep=0.75).network
    assert (made.config.shared_width, made.config.expert_width) == (48, 24)
    assert off(drawn(made), drawn(dense)) > 0.01
    assert off(drawn(rebuilt(made, {}, {"top_k": 2})), drawn(dense)) < 1e-5


def test_units_that_all_domains_need_are_shared_as_many_in_every_layer() -> None:
    """32 units of which a domain has 16: in common are 8, and in the second layer 12, of which experts have 4."""
    wanted = [[range(16), range(8, 24)], [range(16), [*range(12), *range(20, 24)]]]
    active = torch.rand(2, 2, 32, generator=torch.Generator().manual_seed(0))
    for at, layer in enumerate(wanted):
        for e, units in enumerate(layer):
            active[at, e, [*units]] += 1
    common, own = chosen(active, 16)
    assert sorted(common[0].tolist()) == [*range(8, 16)]
    assert [sorted(own[0, e].tolist()) for e in (0, 1)] == [[*range(8)], [*range(16, 24)]]
    assert {*common[1].tolist()} < {*range(12)}
    for at, layer in enumerate(wanted):
        for e, units in enumerate(layer):
            assert sorted([*common[at].tolist(), *own[at, e].tolist()]) == [*units]
    with pytest.raises(ValueError, match="the 16 most active units are the same in all domains"):
        chosen(active[:, :1].expand(-1, 2, -1), 16)


def test_activity_is_the_mean_size_by_kind_of_image() -> None:
    """A unit an input: tokens (0.5, -2) and so on, of three images of which the second is of another kind."""
    layer = FeedForward(2, 2, "swiglu")
    with torch.no_grad():
        layer.fc1.weight.copy_(torch.eye(2).repeat(2, 1))  # silu(x) x
    tokens = torch.tensor([[0.5, -2], [1, 1], [3, 0], [0, 0], [-1, -1], [2, 0]])
    found = activity([layer], [tokens], torch.tensor([1, 0, 1]), 2)
    size = (tokens * tokens.sigmoid() * tokens).abs()
    torch.testing.assert_close(found, torch.stack([size[[2, 3]].mean(0), size[[0, 1, 4, 5]].mean(0)]).unsqueeze(0))
    with pytest.raises(ValueError, match="none of 3 images is of domain or class 2"):
        activity([layer], [tokens], torch.tensor([1, 0, 1]), 3)


def test_classes_that_are_alike_share_an_expert_and_routers_know_their_domain() -> None:
    dense = network(blocks="none")
    with torch.no_grad():
        table = dense.y_embedder.embedding_table.weight
        table[:10] = 3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(2)).repeat(2, 1)
        table[5:10] += 0.1 * torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    batch = X[:1].expand(10, -1, -1, -1), torch.full((10,), 500.0), torch.arange(10)
    made, domain, known = split_by_domain(dense, 5, [batch], "class", blocks="every-second")
    assert domain[:10].tolist() == [0, 1, 2, 3, 4] * 2
    assert known == 1
    for t in (1.0, 500.0, 999.0):
        with torch.no_grad():
            routing = made(X, torch.tensor(t), torch.arange(10)).routing
        assert [record.plan.expert[record.plan.slot].tolist() for record in routing] == [domain[:10].tolist()] * 2


@pytest.mark.parametrize("axis", [{}, {"reverse_time": True}, {"time_scale": 1.0}])
def test_the_router_knows_the_range_of_nearly_every_time(axis: dict[str, Any]) -> None:
    dense = network(blocks="none")
    dense.register_to_config(**axis)
    made, domain, known = split(dense, 4, "time")
    times = torch.arange(0, 1001, 7.0)
    with torch.no_grad():
        (routing, *_) = made(X[:1].expand(len(times), -1, -1, -1), times).routing
    right = (routing.plan.expert[routing.plan.slot] == domain[::7]).float().mean()
    assert domain[[0, 249, 250, 500, 999, 1000]].tolist() == [0, 0, 1, 2, 3, 3]
    assert min(known, right) > (0.9 if "time_scale" in axis else 0.98)


@pytest.mark.parametrize(
    ("E", "of", "options", "words"),
    [
        (1, "time", {}, "num_experts is 1"),
        (3, "class", {}, "num_experts is 3; with domains class it must divide the model's 10 classes"),
        (3, "data", {}, "num_experts is 3, and the model was trained on 2 data sets; give 2"),
        (4, "time", {"keep": 0.05}, "keep is 0.05; of ffn_width 96 it must leave 8 units or more"),
        (20, "time", {}, "none of 10 images is of domain or class 1"),
    ],
)
def test_splits_that_cannot_be(E: int, of: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        split(network(blocks="none"), E, of, **options)


def test_a_split_by_domain_needs_images_and_labels_and_no_experts() -> None:
    with pytest.raises(ValueError, match="no image"):
        split_by_domain(network(blocks="none"), 4, [], "time")
    with pytest.raises(ValueError, match="has experts already"):
        split(network(), 4, "time")


# ------------------------------------------------------------------------------------------ the command


def pictures(folder: Path, classes: int) -> str:
    for i in range(24):
        (folder / f"c{i % classes}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * i).save(folder / f"c{i % classes}" / f"{i}.png")
    return str(folder)


def test_data_sets_get_an_expert_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = DataConfig(mixture=(pictures(tmp_path / "a", 2), pictures(tmp_path / "b", 3)))
    source, out = saved(tmp_path / "model", blocks="none"), tmp_path / "out"
    save(Config(model=MODEL, moe=MoEConfig(blocks="none"), data=data), source / "training.json")
    assert convert(source, out, "--split", 2, "--domains", "data", "--num", 40) == 0
    made = pipeline.load(out).transformer.eval()
    with torch.no_grad():
        (routing, *_) = made(X[:5], torch.tensor(300.0), torch.arange(5)).routing
    assert routing.plan.expert[routing.plan.slot].tolist() == [0, 0, 1, 1, 1]
    moe = read_config(out, "training.json").moe
    assert (moe.scope, moe.router_input, moe.weights, moe.balance_weight) == ("shared", "label", "one", 0)
    assert "expert 1: labels 2 3 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--domains", "time"], "--domains works with --split"),
        (["--split", 4, "--keep", 0.6], "--keep is of a split with --domains"),
        (["--split", 4, "--domains", "time", "--tau", 1], "--tau is of a split without --domains"),
        (["--split", 4, "--domains", "time", "--keep", 1], "keep is 1.0; it must lie between 0 and 1"),
        (["--split", 4, "--domains", "time", "--keep", 0.05], "keep is 0.05; of ffn_width 96"),
        (["--split", 3, "--domains", "class", "--num", 40], "it must divide the model's 10 classes"),
        (["--split", 2, "--domains", "data", "--num", 40], "domains data needs a model of several sets (data.mixture)"),
        (["--split", 10, "--domains", "class", "--num", 5], "none of 5 images is of domain or class"),
    ],
)
def test_what_does_not_go_together_is_refused_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[Any], sentence: str
) -> None:
    source = saved(tmp_path / "model", blocks="none")
    assert convert(source, tmp_path / "out", *words) == 2
    assert sentence in " ".join(capsys.readouterr().err.replace("│", " ").replace("|", " ").split())
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("source", "words", "sentence"),
    [
        ({}, ["--split", 4], "the model has experts already"),
        ({}, ["--split", 2, "--domains", "data"], "the model has experts already"),
        ({"blocks": "none"}, ["--split", 7], "num_experts is 7; it must be 2 or more, and divide ffn_width 96"),
        ({"blocks": "none"}, ["--split", 4, "--domains", "time", "--keep", 0.05], "keep is 0.05; of ffn_width 96"),
        ({"blocks": "none"}, ["--split", 3, "--domains", "class"], "it must divide the model's 10 classes"),
        ({"blocks": "none"}, ["--split", 2, "--domains", "data", "--keep", 0.05], "keep is 0.05; of ffn_width 96"),
        ({"blocks": "none"}, ["--split", 3, "--domains", "data"], "was trained on 2 data sets; give 2"),
    ],
)
def test_what_needs_no_image_is_refused_before_one_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: dict[str, Any], words: list[Any], sentence: str
) -> None:
    place = saved(tmp_path / "model", **source)
    data = DataConfig(mixture=("nowhere", "elsewhere"))
    save(Config(model=MODEL, moe=MoEConfig(**source), data=data), place / "training.json")
    assert convert(place, tmp_path / "out", *words) == 2
    assert sentence in " ".join(capsys.readouterr().err.replace("│", " ").replace("|", " ").split())
