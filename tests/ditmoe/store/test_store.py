"""Experts on the disk: the same images to the bit, however few have room."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from ditmoe import pipeline
from ditmoe.config.sample import SampleArgs
from ditmoe.config.sections import Config, ModelConfig, MoEConfig
from ditmoe.generate.request import requested
from ditmoe.model import DiTMoETransformer2DModel, build
from ditmoe.moe import Experts
from ditmoe.store.experts import StoredExperts
from ditmoe.store.slices import Slices
from tests.ditmoe.pipeline.test_pipeline import make

RULES = {
    "topk": MoEConfig(),
    "place": MoEConfig(router_input="position"),
    "expert choice": MoEConfig(select="expert_choice", top_k=1, capacity=2.0, score="softmax", renormalize=False),
    "threshold": MoEConfig(select="threshold", tau=0.4),
    "gelu, biases": MoEConfig(biases=True),
}


def network(moe: MoEConfig, activation: Literal["swiglu", "gelu"] = "swiglu") -> DiTMoETransformer2DModel:
    moe = moe if moe.blocks == "none" else replace(moe, blocks="all")
    moe = replace(moe, num_experts=6, expert_width=16, shared_width=16, backend="loop")
    model = ModelConfig(sample_size=8, patch_size=2, hidden_size=32, depth=2, num_heads=2, ffn_width=48)
    torch.manual_seed(0)
    net = build(Config(model=replace(model, activation=activation), moe=moe), 4)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    net.eval()
    return net


def saved(net: DiTMoETransformer2DModel, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    pipe = make()
    pipe.register_modules(transformer=net.to(dtype))
    pipeline.save(pipe, folder)
    net.float()  # of what was saved
    return folder


def layers(pipe: pipeline.DiTMoEPipeline) -> list[StoredExperts]:
    return [m for m in pipe.transformer.modules() if isinstance(m, StoredExperts)]


def resident(folder: Path) -> pipeline.DiTMoEPipeline:
    pipe = pipeline.load(folder)
    for module in pipe.transformer.modules():
        if isinstance(module, Experts):
            module.backend = "loop"
        for weight in module.parameters(recurse=False):
            weight.data = weight.data.clone()  # mapped from a file it is not aligned, by which MKL's last bits go
    return pipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_images_are_the_same_to_the_bit(rule: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(network(RULES[rule], "gelu" if "gelu" in rule else "swiglu"), tmp_path / "m", dtype)
    expected = resident(folder)([0, 3], output_type="pt").images
    for cached in (1, 2, 4, 6, 100):
        pipe = pipeline.load(folder, cached_experts=cached)
        assert [len(layer._room) for layer in layers(pipe)] == [min(cached, 6)] * 2
        assert {w.dtype for layer in layers(pipe) for room in layer._room for w in room} == {dtype}
        assert torch.equal(pipe([0, 3], output_type="pt").images, expected)


def test_bfloat16_products_are_the_same_to_the_bit(tmp_path: Path) -> None:
    folder = saved(network(RULES["topk"]), tmp_path / "m", torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = resident(folder)([1], output_type="pt").images
        assert torch.equal(pipeline.load(folder, cached_experts=2)([1], output_type="pt").images, expected)


def test_experts_that_have_room_are_read_once_and_those_that_are_there_come_first(tmp_path: Path) -> None:
    pipe = pipeline.load(saved(network(RULES["topk"]), tmp_path / "m"), cached_experts=6)
    pipe([0, 1, 2, 3])
    assert all(layer.absent <= 6 < layer.asked for layer in layers(pipe))
    assert all(layer.waited <= 1 for layer in layers(pipe))  # the first; the others are read ahead of their turn
    layer = layers(pipeline.load(tmp_path / "m", cached_experts=3))[0]
    assert list(layer._in_turn([0, 1, 2, 3, 4, 5])) == [0, 1, 2, 3, 4, 5]
    assert list(layer._in_turn([0, 4, 5])) == [4, 5, 0]  # of 3, 4 and 5, the one not asked for makes room
    assert list(layer._place) == [4, 5, 0]
    assert (layer.asked, layer.absent, layer.waited) == (9, 7, 1)


def test_every_expert_is_read_from_the_shard_that_has_it(tmp_path: Path) -> None:
    net = network(RULES["topk"])
    pipe = make()
    pipe.register_modules(transformer=net)
    folder = tmp_path / "m"
    pipeline.save(pipe, folder, ({name: value} for name, value in net.state_dict().items()))
    slices, state = Slices(folder / "transformer"), net.state_dict()
    assert slices.places.keys() == state.keys()
    assert all(torch.equal(slices.tensor(name), value) for name, value in state.items())
    expected = pipe([2], output_type="pt").images
    assert torch.equal(pipeline.load(folder, cached_experts=2)([2], output_type="pt").images, expected)


@pytest.mark.parametrize("whole", ["1GB", "40KB"])
def test_a_variants_files_beside_the_weights_are_not_read(tmp_path: Path, whole: str) -> None:
    folder = saved(network(RULES["topk"]), tmp_path / "m")
    pipe = pipeline.load(folder)
    shutil.rmtree(folder)
    pipe.save_pretrained(folder, max_shard_size=whole)
    for size in ("1GB", "40KB"):  # in one file and in several, which come before and after the others by name
        pipe.transformer.half().save_pretrained(folder / "transformer", variant="fp16", max_shard_size=size)
    assert len(list((folder / "transformer").glob("*fp16*.safetensors"))) > 2
    state, stored = pipeline.load(folder).transformer.state_dict(), Slices(folder / "transformer")
    assert len(stored.places) == len(state)
    for name, value in state.items():
        assert torch.equal(stored.tensor(name), value), name


def test_a_failed_read_leaves_no_wrong_expert_behind(tmp_path: Path) -> None:
    folder = saved(network(RULES["topk"]), tmp_path / "m")
    pipe = pipeline.load(folder, cached_experts=2)
    expected = pipe([0], output_type="pt").images
    layer = layers(pipe)[1]
    read = layer._read

    def broken(e: int, out: tuple[torch.Tensor, ...]) -> None:
        for each in out:
            each.fill_(float("nan"))
        raise OSError("the disk is gone")

    layer._read = broken
    with pytest.raises(OSError, match="the disk is gone"):
        pipe([1, 2, 3])
    layer._read = read
    assert torch.equal(pipe([0], output_type="pt").images, expected)


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    folder = saved(network(RULES["topk"]), tmp_path / "m")
    pipe = pipeline.load(folder, cached_experts=1)
    (file,) = (folder / "transformer").glob("*.safetensors")
    with file.open("r+b") as opened:
        opened.truncate(5000)
    with pytest.raises(OSError, match="ends too early"):
        pipe([0])


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    folder = saved(network(RULES["topk"]), tmp_path / "m")
    with pytest.raises(ValueError, match="cached_experts is 0; it must be 1 or more"):
        SampleArgs(folder, cached_experts=0)
    with pytest.raises(ValueError, match="cached_experts is 0; it must be 1 or more"):
        pipeline.load(folder, cached_experts=0)
    pipe = make()
    dense = Config(model=ModelConfig(sample_size=8, hidden_size=32, depth=1, num_heads=2), moe=MoEConfig(blocks="none"))
    pipe.register_modules(transformer=build(dense, 4))
    pipeline.save(pipe, tmp_path / "dense")
    with pytest.raises(ValueError, match="stacked experts, and this one has none"):
        pipeline.load(tmp_path / "dense", cached_experts=1)
    with pytest.raises(ValueError, match="copy their folder"):
        pipeline.load(folder, cached_experts=1).save_pretrained(tmp_path / "again")
    images = requested(SampleArgs(folder, num=2, cached_experts=1))
    assert len(layers(images.pipe)) == 2
