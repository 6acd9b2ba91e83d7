"""Autoguidance of a pipeline: the network without its experts, guides that are given or saved, and what is refused."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from ditmoe import pipeline
from ditmoe.model import DiTMoETransformer2DModel
from ditmoe.moe import Experts, Router
from ditmoe.pipeline.guide import ExpertsOff
from samplers import SAMPLERS
from tests.ditmoe.model.test_model import inputs, small
from tests.ditmoe.pipeline.test_pipeline import make


def without_expert_weights(net: DiTMoETransformer2DModel) -> DiTMoETransformer2DModel:
    zeroed = deepcopy(net)
    for module in zeroed.modules():
        if isinstance(module, Experts):
            torch.nn.init.zeros_(module.w_in)
            torch.nn.init.zeros_(module.w_out)
    return zeroed


def weaker() -> DiTMoETransformer2DModel:
    """Another network, of the images and classes of `make`: smaller, without experts, of another objective."""
    torch.manual_seed(3)
    net = DiTMoETransformer2DModel(8, 1, 4, 4, 16, 1, 2, 16, moe_blocks="none", prediction_type="flow_prediction")
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net


def drawn(pipe: pipeline.DiTMoEPipeline, **options: Any) -> torch.Tensor:
    options = {"num_inference_steps": 8, "output_type": "pt", **options}
    pipe.set_progress_bar_config(disable=True)
    images: torch.Tensor = pipe([0, 3], **options).images
    return images


@pytest.mark.parametrize("router_input", ["token", "position", "time+label", "label+position"])
@pytest.mark.parametrize("shared_width", [16, 0])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_experts_off_is_the_network_with_zero_experts(router_input: str, shared_width: int, activation: str) -> None:
    net = small(router_input=router_input, shared_width=shared_width, activation=activation, moe_blocks="all")
    x, t, y = inputs()
    with torch.no_grad():
        off = ExpertsOff(net)(x, t, class_labels=y)
        assert torch.equal(off.sample, without_expert_weights(net)(x, t, y).sample)
        assert off.routing == []
        assert (off.sample - net(x, t, y).sample).abs().max() > 1e-3
    assert len(net(x, t, y).routing) == 4  # as before


def test_experts_off_runs_no_expert_and_holds_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small()
    off, (x, t, y) = ExpertsOff(net), inputs()
    assert [p.data_ptr() for p in off.parameters()] == [p.data_ptr() for p in net.parameters()]
    for part in (Experts, Router):
        monkeypatch.setattr(part, "forward", lambda *_: pytest.fail("it was run"))
    off(x, t, class_labels=y)
    with pytest.raises(pytest.fail.Exception):
        net(x, t, class_labels=y)


def test_experts_off_through_gradient_checkpointing() -> None:
    net = small()
    x, t, y = inputs()
    plain = ExpertsOff(net)(x, t, y).sample
    net.enable_gradient_checkpointing()
    net.train()
    again = ExpertsOff(net)(x, t, y).sample
    assert torch.equal(again, plain)
    again.sum().backward()
    assert net.blocks[1].moe.experts.w_in.grad is None
    assert net.blocks[1].moe.shared.fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_is_guided_within_an_interval(sampler: str) -> None:
    pipe = make()
    options: dict[str, Any] = {"sampler": sampler, "guide_scale": 3.0, "guidance_scale": 1.0}
    off = drawn(pipe, guide="experts-off", **options)
    zeroed = without_expert_weights(pipe.transformer)
    assert torch.equal(off, drawn(pipe, guide=zeroed, **options))
    calls: list[float] = []
    zeroed.register_forward_pre_hook(lambda module, args: calls.append(float(args[1][0])))
    within = drawn(pipe, guide=zeroed, guidance_interval=(250, 750), **options)
    times = [float(t) for t in pipe.scheduler_for(sampler, 8).timesteps]
    assert len(calls) == sum(250 <= t <= 750 for t in times)
    assert 0 < len(calls) < len(times)
    plain = drawn(pipe, sampler=sampler, guidance_scale=1.0)
    assert min(float((a - b).abs().max()) for a, b in ((off, plain), (off, within), (within, plain))) > 1e-3


def test_the_differences_of_guide_and_null_label_are_added() -> None:
    pipe, guide = make(), weaker()
    one = {"sampler": "ddim", "num_inference_steps": 1}  # linear in what the network says
    plain = drawn(pipe, guidance_scale=1.0, **one)
    cfg, auto = drawn(pipe, guidance_scale=1.7, **one), drawn(pipe, guidance_scale=1.0, guide=guide, **one)
    both = drawn(pipe, guidance_scale=1.7, guide=guide, guide_scale=2.0, **one)
    assert min((cfg - plain).abs().max(), (auto - plain).abs().max()) > 1e-2
    torch.testing.assert_close(both - plain, cfg - plain + auto - plain, rtol=1e-4, atol=1e-4)
    half = drawn(pipe, guidance_scale=1.0, guide=guide, guide_scale=1.5, **one)
    torch.testing.assert_close(auto - plain, 2 * (half - plain), rtol=1e-4, atol=1e-4)  # the default is 2


@pytest.mark.parametrize("kind", ["network", "experts-off"])
def test_a_model_folder_names_its_guide(tmp_path: Path, kind: str) -> None:
    pipe = make()
    plain, guide = drawn(pipe), weaker() if kind == "network" else "experts-off"
    guided = drawn(pipe, guide=guide, guide_scale=3.0)
    pipeline.add_guide(pipe, guide, 3.0)
    pipeline.save(pipe, tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert (index["guide_scale"], index["experts_off"]) == (3.0, kind == "experts-off")
    assert (tmp_path / "model" / "guide" / "config.json").exists() == (kind == "network")
    for again in (
        pipe,
        pipeline.load(tmp_path / "model"),
        pipeline.DiTMoEPipeline.from_pretrained(tmp_path / "model"),
    ):
        assert torch.equal(drawn(again), guided)
        assert torch.equal(drawn(again, guide="none"), plain)
        assert torch.equal(drawn(again, guide_scale=1.0), plain)
        assert torch.equal(drawn(again, guide_scale=2.0), drawn(make(), guide=guide))
        other = without_expert_weights(pipe.transformer)
        assert torch.equal(drawn(again, guide=other), drawn(make(), guide=other, guide_scale=2.0))  # not its scale


def test_a_model_names_one_guide_and_the_last_one() -> None:
    pipe, net = make(), weaker()
    pipeline.add_guide(pipe, net, 3.0)
    pipeline.add_guide(pipe, "experts-off")
    assert isinstance(pipe.guide_for()[0], ExpertsOff)
    assert pipe.guide_for()[1] == 2.0
    pipeline.add_guide(pipe, net)
    assert pipe.guide_for() == (net, 2.0)
    with pytest.raises(ValueError, match="experts_off is set beside a guide; a model names one of them"):
        pipeline.DiTMoEPipeline(make().transformer, make().scheduler, guide=net, experts_off=True)


def test_what_wraps_a_network_guides_as_it_does() -> None:
    pipe, guide = make(), make().transformer
    expected = drawn(pipe, guide=guide)
    assert torch.equal(drawn(pipe, guide=torch.nn.DataParallel(guide)), expected)
    torch.testing.assert_close(drawn(pipe, guide=torch.compile(guide, backend="eager")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"guide_scale": 3.0}, "guide_scale is 3.0, but there is no guide; give one, a model or experts-off"),
        ({"guide": "none", "guide_scale": 3.0}, "guide_scale is 3.0, but there is no guide"),
        ({"guide": "experts-off", "guide_scale": 1.0}, "guide_scale is 1.0; with a guide it must be 0 or more, and "),
        ({"guide": "experts-off", "guide_scale": -1.0}, "guide_scale is -1.0; with a guide it must be 0 or more"),
        ({"guide": "experts-off", "guide_scale": float("nan")}, "guide_scale is nan; with a guide"),
        ({"guide": "expert-off"}, "guide is 'expert-off'; it must be a network, .*, 'experts-off' or 'none'"),
        ({"guide": {"sample_size": 16}}, "the guide has sample_size 16, but the model has 8; give a guide of the same"),
        ({"guide": {"in_channels": 3}}, "the guide has in_channels 3, but the model has 1"),
        ({"guide": {"num_classes": 0}}, "the guide has num_classes 0, but the model has 4"),
        (
            {"guide": "experts-off", "guidance_rule": "cfg++", "guidance_scale": 0.5},
            r"guidance_rule 'cfg\+\+' has no guide",
        ),
    ],
)
def test_what_cannot_guide_is_refused(options: dict[str, Any], sentence: str) -> None:
    if isinstance(changes := options.get("guide"), dict):
        values = {"sample_size": 8, "in_channels": 1, "num_classes": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}
        options = {"guide": DiTMoETransformer2DModel(**{**values, **changes})}
    with pytest.raises(ValueError, match=sentence):
        drawn(make(), **options)


def test_a_model_without_labels_has_a_guide() -> None:
    pipe = make(num_classes=0)
    plain, guided = (pipe(num_images=2, output_type="pt", guide=guide).images for guide in ("none", "experts-off"))
    assert (guided - plain).abs().max() > 1e-3


def test_a_model_without_experts_has_none_to_switch_off() -> None:
    pipe = make()
    pipe.transformer = weaker()
    with pytest.raises(ValueError, match="guide is experts-off, but this model has no experts; give a smaller or an"):
        drawn(pipe, guide="experts-off")


def test_a_saved_scale_of_one_guides_nothing() -> None:
    pipe = make()
    plain = drawn(pipe)
    pipe.register_to_config(experts_off=True, guide_scale=1.0)
    assert torch.equal(drawn(pipe), plain)
    assert not torch.equal(drawn(pipe, guide_scale=3.0), plain)
