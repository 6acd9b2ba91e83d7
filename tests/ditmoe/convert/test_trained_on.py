"""Changed models are saved, described by a configuration, and trained on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ditmoe import pipeline
from ditmoe.config.file import from_dict, to_dict
from ditmoe.config.sections import Config, MoEConfig
from ditmoe.convert.domains import split_by_domain
from ditmoe.convert.grow import merge, more
from ditmoe.convert.prune import by_chance, prune
from ditmoe.convert.rebuild import described
from ditmoe.convert.split import split
from ditmoe.convert.upcycle import upcycle
from ditmoe.data.open import open_data
from ditmoe.model import build
from ditmoe.training.loop import train
from tests import checkpoints
from tests.ditmoe.convert.toys import BATCH, MODEL, Net, drawn, network

Tiny = Callable[..., Config]


def changed(name: str) -> Net:
    dense = network(blocks="none")
    if name in ("upcycle", "copies"):
        return upcycle(dense, 6, 2, copies=name == "copies")
    if name == "split":
        return split(network(activation="gelu", blocks="none"), 6, [BATCH], steps=1).network
    if name == "domains":
        return split_by_domain(network(activation="gelu", blocks="none"), 2, [BATCH], "time", steps=1).network
    net = network(bias_rate=0.01)
    return {"prune": lambda: prune(net, 4, by_chance(net, 0)), "more": lambda: more(net), "merge": lambda: merge(net, net)}[name]()  # fmt: skip  # noqa: E501


NAMES = ["upcycle", "copies", "split", "domains", "prune", "more", "merge"]


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_model_is_saved_and_is_what_its_configuration_says(name: str, tmp_path: Path) -> None:
    net = changed(name)
    source = MoEConfig(blocks="none", hoyer_weight=0.1, router="prototype", contrastive_weight=1.0)
    config = described(net, Config(model=MODEL, moe=source))
    pipeline.save(pipeline.assemble(net, config, {}), tmp_path / "model")
    read = pipeline.load(tmp_path / "model").transformer
    for weight in read.parameters():
        weight.data = weight.data.clone()  # mapped from a file it is not aligned, by which MKL's last bits go
    assert torch.equal(drawn(read), drawn(net))
    again = build(from_dict(to_dict(config)), 10)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in net.config.items() if k[0] != "_"
    }
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}


@pytest.mark.parametrize(
    "moe", [{"router": "centroid", "centroids": Path("centres")}, {"select": "expert_choice", "capacity_start": 4.0}]
)
def test_options_of_the_rule_that_a_dense_twin_was_without_are_left_out(moe: dict[str, Any]) -> None:
    made = described(changed("upcycle"), Config(model=MODEL, moe=MoEConfig(blocks="none", **moe))).moe
    assert (made.router, made.select, made.centroids, made.capacity_start) == ("linear", "topk", None, None)


def test_centres_of_a_changed_model_are_those_of_its_weights(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(moe={"router": "centroid", "bias_rate": 0.0}, max_steps=1)
    net = build(config, 10)
    made = prune(net, 3, by_chance(net, 0))
    config = described(made, replace(config, moe=replace(config.moe, centroids=tmp_path / "of-four.safetensors")))
    pipeline.save(pipeline.assemble(made, config, {i: str(i) for i in range(10)}), tmp_path / "given")
    trained = go(replace(config, train=replace(config.train, init=tmp_path / "given")))
    assert torch.equal(trained.blocks[1].moe.router.weight, made.blocks[1].moe.router.weight)


def begun(tiny: Tiny, folder: Path, name: str = "upcycle", steps: int = 20) -> Config:
    """A run that begins with a changed toy, whose folder is written."""
    config = tiny(model={"ffn_width": 48}, moe={"blocks": "none"})
    torch.manual_seed(0)
    dense = build(config, 10)
    for p in dense.parameters():
        torch.nn.init.normal_(p, std=0.05)
    made = upcycle(dense, 4, 2, copies=name == "copies")
    config = described(made, replace(config, moe=replace(config.moe, bias_rate=0.01, z_weight=0.0)))
    pipeline.save(pipeline.assemble(made, config, {i: str(i) for i in range(10)}), folder)
    return replace(config, max_steps=steps, train=replace(config.train, init=folder))


def go(config: Config) -> Net:
    data = open_data(config.data, size=config.model.sample_size, channels=config.model.in_channels)
    assert train(config, data)
    parts, _ = checkpoints.load(checkpoints.newest(config.out / "checkpoints"))
    net = build(config, 10)
    net.load_state_dict(parts["model"])
    return net


def test_a_run_begins_with_given_weights_and_goes_on_without_them(tiny: Tiny, tmp_path: Path) -> None:
    config = begun(tiny, tmp_path / "given", steps=6)
    whole = go(replace(config, out=tmp_path / "whole"))
    go(replace(config, out=tmp_path / "parts", max_steps=3))
    (tmp_path / "given").rename(tmp_path / "gone")
    parts = go(replace(config, out=tmp_path / "parts"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    with pytest.raises(ValueError, match="given holds no model"):
        go(replace(config, out=tmp_path / "another"))
    assert not (tmp_path / "another" / "config.json").exists()
    with pytest.raises(ValueError, match="train.init: "):
        go(replace(config, out=tmp_path / "parts", train=replace(config.train, init=None)))


def test_the_first_step_is_taken_from_the_given_weights(tiny: Tiny, tmp_path: Path) -> None:
    config = begun(tiny, tmp_path / "given", steps=1)
    config = replace(config, train=replace(config.train, learning_rate=1e-12))
    given, net = pipeline.load(tmp_path / "given").transformer.state_dict(), go(config)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, given[name], rtol=1e-6, atol=1e-6) if "bias" not in name else None


def test_another_network_is_not_begun_with(tiny: Tiny, tmp_path: Path) -> None:
    config = begun(tiny, tmp_path / "given")
    with pytest.raises(ValueError, match=r"train.init .*given is another network: top_k is 2 there and 3 here"):
        go(replace(config, moe=replace(config.moe, top_k=3, scale=2.0)))


@pytest.mark.parametrize("name", ["upcycle", "copies"])
def test_experts_part_within_a_few_steps(tiny: Tiny, tmp_path: Path, name: str) -> None:
    net = go(begun(tiny, tmp_path / "given", name))
    for block in net.blocks:
        rows = block.moe.router.weight.detach()
        assert torch.pdist(rows).min() > 1e-3 * rows.norm(dim=1).mean()  # those of a set were equal
        each = block.moe.experts.w_in.detach().flatten(1)
        assert torch.pdist(each).min() > 1e-3 * each.norm(dim=1).mean()  # copies were
