"""Drawing fast: bfloat16 but for routers, compiled blocks in batches of one size, a cache between steps."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.cache_utils import CacheMixin

from ditmoe import pipeline
from ditmoe.config.sample import SampleArgs
from ditmoe.generate import speed
from ditmoe.generate.draw import RequestedSet
from ditmoe.generate.request import facts, requested, run
from ditmoe.moe import Experts, Router
from tests.ditmoe.generate.test_request import Alone
from tests.ditmoe.pipeline.test_pipeline import make

JOINED = {"depth": 4, "local_conv": True, "long_skips": True, "refine_width": 8}


def saved(folder: Path, **options: Any) -> SampleArgs:
    pipe = make(**options)
    torch.manual_seed(1)
    for p in pipe.transformer.parameters():
        p.data += 0.02 * torch.randn_like(p)
    pipeline.save(pipe, folder / "model")
    return SampleArgs(folder, num=6, batch_size=4, steps=8, sampler="ddim", precision="fp32")


def test_bfloat16_leaves_routers_as_they_are_and_images_close(tmp_path: Path) -> None:
    args = saved(tmp_path)
    plain, half = requested(args), requested(replace(args, precision="bf16"))
    routers = [module for module in half.pipe.transformer.modules() if isinstance(module, Router)]
    assert routers
    assert all(p.dtype == torch.float32 for router in routers for p in router.parameters())
    kept = {id(p) for router in routers for p in router.parameters()}
    assert {p.dtype for p in half.pipe.transformer.parameters() if id(p) not in kept} == {torch.bfloat16}
    assert (facts(args, plain)["dtype"], facts(args, half)["dtype"]) == ("float32", "bfloat16")
    assert facts(args, plain)["guide"] == facts(args, half)["guide"]
    difference = np.abs(plain.whole(4).astype(int) - half.whole(4))
    assert 0 < difference.mean() < 3


def test_experts_of_eight_bits_and_their_scales_stay_so_in_bfloat16(tmp_path: Path) -> None:
    args = saved(tmp_path)
    pipe = pipeline.load(tmp_path)
    pipe.transformer.store_int8()
    pipeline.save(pipe, tmp_path / "small")
    half = requested(replace(args, model=tmp_path / "small", precision="bf16"))
    experts = next(m for m in half.pipe.transformer.modules() if isinstance(m, Experts))
    assert {experts.w_in.dtype, experts.w_out.dtype} == {torch.int8}
    assert {scale.dtype for scale in experts.buffers()} == {torch.float32}
    assert half.whole(4).any()


@pytest.mark.parametrize("steps", [None, (2, 3)])
def test_a_policy_of_some_steps_does_not_go_with_a_cache(tmp_path: Path, steps: tuple[int, int] | None) -> None:
    args = saved(tmp_path)
    rule = {"layer": 1, "expert": 0, "action": "suppress"} | ({} if steps is None else {"steps": [*steps]})
    (tmp_path / "p.json").write_text(json.dumps({"rules": [rule]}))
    asked = replace(args, cache="taylor:2", policy=tmp_path / "p.json")
    with nullcontext() if steps is None else pytest.raises(ValueError, match="taylor:2, which leaves steps out"):
        requested(asked)


def test_a_compiled_network_gets_batches_of_one_size_and_draws_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = saved(tmp_path)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    plain, compiled = requested(args), requested(replace(args, compile=True))
    sizes: list[int] = []
    compiled.pipe.transformer.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    assert np.array_equal(plain.whole(4), compiled.whole(4))
    assert len({*sizes}) == 1
    assert facts(args, compiled)["compiled"] is True
    assert "compiled" not in facts(args, plain)


@pytest.mark.parametrize("model", [{}, JOINED], ids=["", "joined"])
def test_cached_images_do_not_depend_on_the_batch_and_differ_little(tmp_path: Path, model: dict[str, Any]) -> None:
    args = replace(saved(tmp_path, **model), steps=20, cfg=1.5, guidance_interval=(0.0, 600.0), cache="taylor:2")
    images = requested(args)
    drawn = images.whole(4)
    assert np.array_equal(drawn, images.whole(4)), "nothing is left of another call"
    assert np.abs(drawn.astype(int) - images.whole(6)).max() <= 1
    plain = requested(replace(args, cache=None)).whole(4)
    assert 0 < np.abs(drawn.astype(int) - plain).mean() < 8
    assert facts(args, images)["cache"] == "taylor:2"


@pytest.mark.parametrize(("cache", "steps", "run"), [("taylor:2", 12, 3 + 4), ("taylor:3", 10, 3 + 2)])
def test_a_cache_runs_the_blocks_in_the_first_three_steps_and_every_nth(
    tmp_path: Path, cache: str, steps: int, run: int
) -> None:
    images = requested(replace(saved(tmp_path), num=2, steps=steps, cache=cache, cfg=1.0))
    calls: list[int] = []
    net = images.pipe.transformer
    block = net.blocks[0]
    block.adaLN_modulation.register_forward_hook(lambda *_: calls.append(1))
    images.whole(2)
    assert len(calls) == run == speed.blocks_run(cache, steps)


def test_joined_blocks_answer_as_without_a_cache_in_the_steps_that_it_always_runs(tmp_path: Path) -> None:
    args = replace(saved(tmp_path, **JOINED), num=2, steps=6, cfg=1.0)

    def answers(cache: str | None) -> list[torch.Tensor]:
        images, said = requested(replace(args, cache=cache)), list[torch.Tensor]()
        images.pipe.transformer.register_forward_hook(lambda _, __, answer: said.append(answer[0]))
        for _ in range(2):
            images.whole(2)
        return said

    same = [torch.equal(a, b) for a, b in zip(answers("taylor:2"), answers(None), strict=True)]
    assert same == 2 * (3 * [True] + 3 * [False]), "and nothing is left of another call"


def test_a_cache_is_refused_where_it_would_leave_out_no_step(tmp_path: Path) -> None:
    args = replace(saved(tmp_path), num=2, cfg=1.0)
    with pytest.raises(ValueError, match="taylor:10, which does nothing in 3 steps, as the first 3 are always run; le"):
        requested(replace(args, steps=3, cache="taylor:10"))
    for cache in ("taylor:2", "taylor:10"):
        cached, plain = (requested(replace(args, steps=4, cache=c)).whole(2) for c in (cache, None))
        assert not np.array_equal(cached, plain), "the fourth step is foretold"


def test_what_cannot_be_cached_is_refused(tmp_path: Path) -> None:
    args = saved(tmp_path)
    for word in ("taylor", "taylor:1", "taylor:11", "first-block:0.1"):
        with pytest.raises(ValueError, match=f"cache is '{word}'; give taylor:N"):
            replace(args, cache=word)
    with pytest.raises(ValueError, match="pndm calls the network more than once a step; leave it out"):
        requested(replace(args, cache="taylor:2", sampler="pndm"))


@pytest.mark.parametrize("model", [{}, JOINED], ids=["", "joined"])
def test_the_caches_of_diffusers_are_enabled_as_usual(tmp_path: Path, model: dict[str, Any]) -> None:
    args = saved(tmp_path, **model)
    pipe = pipeline.load(args.model)
    draw = {"seed": 0, "output_type": "pt", "num_inference_steps": 12}
    plain = pipe([0, 1], **draw).images
    assert isinstance(pipe.transformer, CacheMixin)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert torch.equal(pipe([0, 1], **draw).images, plain)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    cached = pipe([0, 1], **draw).images
    assert not torch.equal(cached, plain)
    assert torch.equal(pipe([0, 1], **draw).images, cached)
    pipe.transformer.disable_cache()
    assert torch.equal(pipe([0, 1], **draw).images, plain)
    with pytest.raises(ValueError, match="config is PyramidAttentionBroadcastConfig; this model takes First"):
        pipe.transformer.enable_cache(PyramidAttentionBroadcastConfig())


def test_the_batch_goes_by_tokens_on_a_cpu_and_by_memory_elsewhere(tmp_path: Path, monkeypatch) -> None:
    args = replace(saved(tmp_path), batch_size=None)
    assert requested(args).batch_size == speed.batch_size(pipeline.load(args.model)) == 64
    pipe = make()
    monkeypatch.setattr(speed, "CPU_TOKENS", 100)
    assert speed.batch_size(pipe) == 100 // speed.tokens_per_image(pipe.transformer)


@pytest.mark.parametrize("name", ["set.npz", "folder"])
def test_a_full_disk_ends_the_run_though_another_thread_writes(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = replace(saved(tmp_path), out=tmp_path / name, num=20, batch_size=2, steps=1)
    drawn: list[int] = []
    real = RequestedSet.batch

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RequestedSet, "batch", lambda images, i: (drawn.extend(i), real(images, i))[1])
    with monkeypatch.context() as patch:
        patch.setattr("ditmoe.generate.set_files.np.save", full)
        patch.setattr("PIL.Image.Image.save", full)
        with pytest.raises(OSError, match="No space left on device"):
            run(args, Alone())
    assert len(drawn) == 4  # the batch that could not be written, and the one that was drawn meanwhile
    run(args, Alone())
    assert drawn[4:] == list(range(20))
