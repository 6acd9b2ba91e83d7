"""Experts of eight bits: near what they were, half the size of bfloat16, and drawn with like any other."""

from pathlib import Path

import pytest
import torch

from ditmoe import pipeline
from ditmoe.config.convert import ConvertArgs
from ditmoe.config.sections import Config, ModelConfig, MoEConfig
from ditmoe.convert.convert import run
from ditmoe.model import build
from ditmoe.moe import Experts
from tests.ditmoe.store.test_store import layers, network, resident, saved


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(network(MoEConfig()), tmp_path / "m", torch.bfloat16)


@pytest.fixture
def small(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    run(ConvertArgs(folder, tmp_path / "int8", int8=True))
    assert "MB in bfloat16" in capsys.readouterr().out
    return tmp_path / "int8"


def test_rows_are_within_half_a_step_and_their_largest_value_is_kept() -> None:
    experts = Experts(32, 3, 16)
    before = experts.w_in.detach().clone(), experts.w_out.detach().clone()
    experts.store_int8()
    for old, new, scale in zip(before, experts.matrices(torch.float32), [*experts.buffers()], strict=True):
        assert scale.shape == (*old.shape[:2], 1)
        assert bool(((old - new).abs() <= 0.501 * scale).all())
        torch.testing.assert_close(new.abs().amax(dim=-1), old.abs().amax(dim=-1))


def test_a_folder_is_half_as_large_and_draws_the_same_but_for_its_rounding(folder: Path, small: Path) -> None:
    stored = [
        {n: v for n, v in pipeline.load(f).transformer.state_dict().items() if ".experts." in n}
        for f in (folder, small)
    ]
    wide = sum(2 * v.numel() for v in stored[0].values())
    assert {v.dtype for n, v in stored[1].items() if not n.endswith("scale")} == {torch.int8}
    assert sum(v.nbytes for v in stored[1].values()) <= 0.63 * wide  # rows of 16 and 32: scales count for much
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    nets = [pipeline.load(folder), pipeline.load(small), pipeline.DiTMoEPipeline.from_pretrained(small)]
    with torch.inference_mode():
        before, after, again = (pipe.transformer.float()(x, 500.0, y).sample for pipe in nets)
    assert 0 < float((after - before).norm()) < 0.03 * float(before.norm())
    assert torch.equal(again, after)  # as diffusers opens it


@pytest.mark.parametrize("cached", [1, 4])
def test_from_the_disk_it_is_the_same_to_the_bit(cached: int, small: Path) -> None:
    pipe = pipeline.load(small, cached_experts=cached)
    assert [w.dtype for w in layers(pipe)[0]._room[0]] == [torch.int8, torch.int8, torch.float32, torch.float32]
    assert torch.equal(pipe([2, 3], output_type="pt").images, resident(small)([2, 3], output_type="pt").images)


def test_what_cannot_be_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stores its experts as int8; change the model that it was made of"):
        run(ConvertArgs(small, tmp_path / "more", more=True))
    assert not (tmp_path / "more").exists()
    model = ModelConfig(sample_size=8, hidden_size=32, depth=1, num_heads=2)
    with pytest.raises(ValueError, match="int8 is for stacked experts, and this model has none"):
        build(Config(model=model, moe=MoEConfig(blocks="none")), 4).store_int8()
    with pytest.raises(ValueError, match="two changes"):
        ConvertArgs(small, tmp_path / "two", int8=True, more=True)
