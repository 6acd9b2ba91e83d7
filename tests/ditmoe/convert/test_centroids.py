"""Centres of a trained model's tokens: known clusters, even loads, a run with them, refusals in a sentence."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ditmoe import pipeline
from ditmoe.config.file import save
from ditmoe.config.sections import Config
from ditmoe.convert.centroids import fitted, tokens_seen
from ditmoe.model import build, initial
from tests import checkpoints
from tests.doors import command
from tests.faults import runs
from tests.faults.halts import save_run

centroids = partial(command, "centroids")
Tiny = Callable[..., Config]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """run(name, classes=10, section={...}) makes the folder of a run on digits; its weights are random."""

    def make(name: str, classes: int = 10, **sections: Any) -> Path:
        config = replace(tiny(**sections), out=tmp_path / name)
        torch.manual_seed(0)
        net = build(config, classes)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
        names = {i: str(i) for i in range(classes)}
        pipeline.save(pipeline.assemble(net, config, names), config.out / "model")
        save(config, config.out / "config.json")
        return config.out

    return make


# ------------------------------------------------------------------------------------------ the fit


@pytest.mark.parametrize("seed", range(5))
def test_known_clusters_are_found(seed: int) -> None:
    true = 20 * torch.randn(7, 16, generator=seeded(9))
    sizes = [200, 150, 100, 100, 200, 90, 180]
    tokens = torch.cat([c + torch.randn(n, 16, generator=seeded(i)) for i, (c, n) in enumerate(zip(true, sizes))])  # noqa: B905
    fit = fitted(tokens, 7, seeded(seed))
    nearest = torch.cdist(true, fit.centres).argmin(dim=1)
    assert sorted(nearest.tolist()) == list(range(7))
    assert float((fit.centres[nearest] - true).norm(dim=1).max()) < 1
    assert fit.loads[nearest].tolist() == sizes
    assert fit.distance == pytest.approx(4, rel=0.05)  # of 16 normal numbers


def test_loads_are_even_where_kmeans_leaves_them_uneven() -> None:
    tokens = torch.cat([torch.randn(2000, 8, generator=seeded(1)), 50 + torch.randn(100, 8, generator=seeded(2))])
    for seed in range(3):
        fit = fitted(tokens, 4, seeded(seed))
        assert fit.ratio <= 3 or fit.loads.min() == 100  # the far ones stay together
        assert torch.equal(fit.loads, torch.bincount(torch.cdist(tokens, fit.centres).argmin(dim=1), minlength=4))
    heavy = torch.randn(3000, 4, generator=seeded(3)).exp()
    assert fitted(heavy, 16, seeded()).ratio <= 3


def test_as_many_centres_as_different_tokens_and_no_more() -> None:
    tokens = torch.eye(5).repeat(10, 1)
    fit = fitted(tokens, 5, seeded())
    assert fit.loads.tolist() == [10] * 5
    with pytest.raises(ValueError, match=r"blocks.2: 6 centres were asked for, and only 5 of its 50 tokens differ"):
        fitted(tokens, 6, seeded(), "blocks.2")


# ------------------------------------------------------------------------------------------ what routers see


@pytest.mark.parametrize("router_input", ["plain", "token"])
@pytest.mark.parametrize("blocks", ["none", "all"])
def test_tokens_are_those_that_a_router_would_see(tiny: Tiny, router_input: str, blocks: str) -> None:
    config = tiny(moe={"blocks": blocks, "router_input": router_input})
    torch.manual_seed(0)
    net = build(config, 10).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    batches = [(torch.randn(3, 1, 8, 8), torch.tensor([10.0, 500.0, 900.0]), torch.tensor([1, 2, 3]))]
    seen = tokens_seen(net, batches, router_input, seeded(5))
    assert [z.shape for z in seen] == [(12, 32)] * 2
    for block in net.blocks:
        assert not block.norm2._forward_hooks
        part = block.moe if blocks == "all" else block.mlp
        assert not part._forward_hooks
    if blocks == "all":
        asked: list[torch.Tensor] = []
        for block in net.blocks:
            router = block.moe.router
            see = router.seen
            router.seen = lambda z, c, see=see: asked.append(see(z, c)[0]) or see(z, c)
        tokens_seen(net, batches, router_input, seeded(5))
        for z, wanted in zip(seen, asked, strict=True):
            assert torch.equal(z.sort(dim=0).values, wanted.flatten(0, 1).sort(dim=0).values)


# ------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize("moe", [{"blocks": "none"}, {"blocks": "every-second"}])
def test_a_file_has_centres_of_every_block_and_says_what_they_are(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], moe: dict[str, Any]
) -> None:
    model, out = run("a", moe=moe), tmp_path / "c.safetensors"
    assert centroids(model, "--experts", 8, "--num", 100, "--out", out) == 0
    text = capsys.readouterr().out
    assert "100 images, 1497 real 8x8 digits (train), bundled" in text
    assert "--moe.preset centroid --moe.centroids" in text
    centres = load_file(out)
    assert {name: (c.shape, c.dtype) for name, c in centres.items()} == {
        f"blocks.{i}": ((8, 32), torch.float32) for i in range(2)
    }
    with safe_open(out, framework="pt") as opened:
        facts = opened.metadata()
    assert facts["router_input"] == "plain"
    assert facts["tokens"] == "400"
    assert all(sum(loads) == 400 for loads in json.loads(facts["loads"]).values())
    again = tmp_path / "again.safetensors"
    assert centroids(model / "model", "--experts", 8, "--num", 100, "--out", again) == 0
    assert all(torch.equal(c, centres[name]) for name, c in load_file(again).items())
    other = tmp_path / "other.safetensors"
    assert centroids(model, "--experts", 8, "--num", 100, "--seed", 1, "--out", other) == 0
    assert not torch.equal(load_file(other)["blocks.0"], centres["blocks.0"])


def test_a_small_folder_is_gone_through_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = save_run(tmp_path / "run", ("cat", "dog"), "python train.py"), tmp_path / "c.safetensors"
    assert centroids(model, "--experts", 4, "--num", 20, "--out", out) == 0
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert centroids(model, "--experts", 4, "--num", 20, "--out", out) == 2
    assert centroids(model, "--experts", 4, "--num", 20, "--data.path", tmp_path / "moved", "--out", out) == 0


def test_mistakes_are_one_sentence(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, few, foreign = run("a"), run("few", classes=3), tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    out = ("--out", tmp_path / "c.safetensors")
    for argv, sentence in (
        ([tmp_path / "gone", "--experts", 4, *out], "gone has neither config.json nor training.json"),
        ([foreign, "--experts", 4, *out], "foreign has neither config.json nor training.json"),
        ([few, "--experts", 4, *out], "10 classes, but the model knows 3"),
        ([good, "--experts", 50, "--num", 10, *out], "50 centres were asked for, and only 40 of its 40 tokens differ"),
        ([good, "--experts", 4, "--data.path", tmp_path, *out], "path does not apply to digits"),
    ):
        assert centroids(*argv) == 2
        error = capsys.readouterr().err
        assert sentence in error, error
        assert error.startswith("error: ")
        assert len(error.splitlines()) == 1, error
        assert not (tmp_path / "c.safetensors").exists()
    for argv, sentence in (
        ([good, "--experts", 0, *out], "experts is 0"),
        ([good, "--experts", 4, "--num", 30000, *out], "num is 30000; it must be at most 20000"),
        ([good, "--experts", 4, "--out", tmp_path / "c.pt"], ".safetensors file in a folder that exists"),
        (
            [good, "--experts", 4, "--out", tmp_path / "no" / "c.safetensors"],
            ".safetensors file in a folder that exists",
        ),
        ([good, *out], "--experts"),
    ):
        assert centroids(*argv) == 2
        assert sentence in " ".join(capsys.readouterr().err.replace("│", " ").replace("|", " ").split())


def test_a_file_for_other_routers_is_refused(run: Callable[..., Path], tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "c.safetensors"
    assert centroids(run("a"), "--experts", 4, "--num", 50, "--router-input", "token", "--out", out) == 0
    centroid = {"router": "centroid", "centroids": out, "bias_rate": 0.0}
    initial(tiny(moe={**centroid, "router_input": "token"}), 10)
    with pytest.raises(ValueError, match=r"made for router_input token, not plain; add --moe.router-input token"):
        initial(tiny(moe={**centroid, "router_input": "plain"}), 10)


def test_from_a_dense_run_to_one_with_its_centres_resumed_to_the_bit(tmp_path: Path) -> None:
    steps = ["--train.log-every", 1, "--train.checkpoint-every", 2]
    dense, out = tmp_path / "dense", tmp_path / "c.safetensors"
    group = runs.training(dense, "--moe.blocks", "none", "--moe.bias-rate", 0, "--max-steps", 30, *steps, name="d")
    assert group.wait() == [0], group.err()
    assert centroids(dense, "--experts", 4, "--num", 300, "--out", out) == 0
    with safe_open(out, framework="pt") as opened:
        loads = json.loads(opened.metadata()["loads"])
    assert all(max(found) <= 3 * min(found) for found in loads.values())
    centroid = ["--moe.preset", "centroid", "--moe.centroids", out, "--moe.bias-rate", 0, *steps]
    for name, parts in (("once", [4]), ("twice", [2, 4])):
        for part in parts:
            if part == 4 and name == "twice":
                out = out.rename(tmp_path / "moved.safetensors")  # a run that has begun needs it no more
            group = runs.training(tmp_path / name, *centroid, "--max-steps", part, name=f"{name}{part}")
            assert group.wait() == [0], group.err()
    once, twice = (checkpoints.load(checkpoints.newest(tmp_path / n / "checkpoints"))[0] for n in ("once", "twice"))
    for part, found in once.items():
        for key, value in found.items():
            assert torch.equal(value, twice[part][key]), f"{part} {key}"
    assert torch.equal(once["model"]["blocks.1.moe.router.weight"], load_file(out)["blocks.1"])
    busiest = runs.rows(tmp_path / "once")[0]["load_max_over_mean"][0]
    assert busiest < 2.5
