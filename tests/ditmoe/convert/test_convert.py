"""Checkpoints of others become model folders that answer as they do, and dense ones go out again bit by bit."""

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditmoe.convert import tensors as tensors_module
from ditmoe.convert.tensors import Tensors
from ditmoe.model import DiTMoETransformer2DModel
from ditmoe.pipeline import DiTMoEPipeline, load
from tests.ditmoe.convert import checkpoints
from tests.ditmoe.convert.checkpoints import CLASSES, DEPTH, EXPERTS, FLAGS, HEADS, KINDS, D, checkpoint, diffusers_dit
from tests.doors import command
from tests.reference.foreign import network, sit

PAIR = ("gate", "up")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def brought(kind: str, folder: Path, content: Any = None) -> Path:
    """The model folder of a small checkpoint."""
    torch.save(checkpoint(kind) if content is None else content, folder / "them.pt")
    assert command("convert", folder / "them.pt", folder / "ours", *FLAGS[kind]) == 0
    return folder / "ours"


def answer(net: DiTMoETransformer2DModel, x: Tensor, t: float, y: int) -> Tensor:
    with torch.no_grad():
        sample: Tensor = net.eval()(x[None], torch.tensor([t]), torch.tensor([y])).sample[0]
    return sample


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_as_the_slow_reference_does(kind: str, tmp_path: Path) -> None:
    pipe = load(brought(kind, tmp_path))
    theirs, net = checkpoint(kind), pipe.transformer
    for step, s in enumerate((0.0, 0.003, 0.31, 0.87, 1.0)):  # share of noise
        x = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(step))
        y = step % (CLASSES + 1)
        found = answer(net, x, 1000 * s, y).double()
        if kind == "sit":
            expected = -sit(theirs, x, 1 - s, y, heads=HEADS)
        elif kind == "flash":
            expected = network(theirs, x, s, y, heads=HEADS)[:4]
        else:
            expected = network(theirs, x, 1000 * s, y, heads=HEADS)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_arrives_bit_by_bit(kind: str, tmp_path: Path) -> None:
    theirs, ours = checkpoint(kind), load_file(brought(kind, tmp_path) / WEIGHTS)
    del theirs["pos_embed"]
    final = [theirs.pop(f"final_layer.linear.{part}") for part in ("weight", "bias")]
    if kind in ("sit", "flash"):  # without the half that nobody reads, and the sign of SiT
        final = [x.unflatten(0, (4, 8))[:, :4].flatten(0, 1) * (-1 if kind == "sit" else 1) for x in final]
    for part, value in zip(("weight", "bias"), final, strict=True):
        assert torch.equal(ours.pop(f"final_layer.linear.{part}"), value)
    back: dict[str, Tensor] = {}
    for name, value in ours.items():
        start = f"{name.partition('.moe.')[0]}.moe"
        if name.endswith("experts.w_in"):
            for e, both in enumerate(value):
                back |= dict(zip((f"{start}.experts.{e}.{p}_proj.weight" for p in PAIR), both.chunk(2), strict=True))
        elif name.endswith("experts.w_out"):
            back |= {f"{start}.experts.{e}.down_proj.weight": one for e, one in enumerate(value)}
        elif name.endswith("shared.fc1.weight"):
            back |= dict(zip((f"{start}.shared_experts.{p}_proj.weight" for p in PAIR), value.chunk(2), strict=True))
        else:
            renamed = name.replace("moe.router", "moe.gate").replace("moe.shared.fc2", "moe.shared_experts.down_proj")
            if kind == "flash":
                renamed = renamed.replace("attn.qkv", "attn.Wqkv").replace("attn.proj", "attn.out_proj")
            back[renamed] = value
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], value) for name, value in theirs.items())


def test_the_folder_says_what_the_model_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in KINDS:
        (tmp_path / kind).mkdir()
    dit, sit_, moe, flash = (load(brought(kind, tmp_path / kind)) for kind in KINDS)
    said = capsys.readouterr().out
    assert "null label 5" in said
    assert "finite" in said
    for pipe in (dit, sit_, moe, flash):
        c = pipe.transformer.config
        assert (c.num_classes, c.sample_size, c.patch_size, c.hidden_size, c.depth) == (CLASSES, 8, 2, D, DEPTH)
        assert pipe.config.latents["std"] == [1 / 0.18215] * 4
        assert (c.positions, c.num_heads, c.in_channels) == ("sincos", HEADS, 4)
    for pipe, kind in ((dit, "dit"), (moe, "moe")):
        c = pipe.transformer.config
        assert (c.prediction_type, c.learn_sigma, c.time_scale, c.reverse_time) == ("epsilon", True, 1000.0, False)
        assert pipe.scheduler.config.variance_type == "learned_range"
        assert (pipe.config.guidance_channels, pipe.config.sampler) == (3, "ddpm"), kind
    c = sit_.transformer.config
    assert (c.prediction_type, c.learn_sigma, c.time_scale, c.reverse_time) == ("flow_prediction", False, 1.0, True)
    assert sit_.config.guidance_channels == 3
    c = flash.transformer.config
    assert (c.prediction_type, c.learn_sigma, c.time_scale, c.reverse_time) == ("flow_prediction", False, 1.0, False)
    assert (c.num_experts, c.top_k, c.router_score, c.router_renormalize) == (EXPERTS, 2, "softmax", False)
    assert (flash.config.guidance_channels, flash.config.guidance_scale) == (None, 7.0)


def test_the_averaged_weights_win_and_notes_answer_what_else_is_asked_for(tmp_path: Path) -> None:
    weights, other = checkpoint("sit"), checkpoint("sit", seed=1)
    notes = argparse.Namespace(model="SiT-S/2", path_type="Linear", prediction="velocity", num_classes=CLASSES)
    torch.save({"model": other, "ema": weights, "opt": {"state": {0: {"step": 3}}}, "args": notes}, tmp_path / "a.pt")
    assert command("convert", tmp_path / "a.pt", tmp_path / "ours", "--num-heads", 2) == 0
    assert load(tmp_path / "ours").transformer.config.reverse_time
    found = load_file(tmp_path / "ours" / WEIGHTS)
    assert torch.equal(found["blocks.1.mlp.fc1.weight"], weights["blocks.1.mlp.fc1.weight"])
    save_file(weights, tmp_path / "a.safetensors")
    assert command("convert", tmp_path / "a.safetensors", tmp_path / "ours", *FLAGS["sit"], "--force") == 0
    again = load_file(tmp_path / "ours" / WEIGHTS)
    assert all(torch.equal(value, again[name]) for name, value in found.items())


@pytest.mark.parametrize("kind", ["dit", "diffusers"])
def test_round_trips_are_equal_bit_by_bit(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "dit":
        ours = brought("dit", tmp_path)
        assert command("convert", ours, tmp_path / "back.pt", "--to", "dit") == 0
        back = torch.load(tmp_path / "back.pt", weights_only=True)
        assert "note" not in capsys.readouterr().out
        expected = checkpoint("dit")
    else:
        net = diffusers_dit(norm_eps=2e-4)
        net.save_pretrained(tmp_path / "them")
        assert command("convert", tmp_path / "them", tmp_path / "ours") == 0
        assert command("convert", tmp_path / "ours", tmp_path / "back", "--to", "diffusers") == 0
        expected, back = net.state_dict(), load_file(tmp_path / "back" / WEIGHTS)
        again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "back" / "transformer")
        keys = {key for key in net.config if not key.startswith("_")}
        assert {key: again.config[key] for key in keys} == {key: net.config[key] for key in keys}
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], value) for name, value in expected.items())


def test_a_variant_beside_the_weights_does_not_go_out(tmp_path: Path) -> None:
    ours = brought("dit", tmp_path)
    net = load(ours).transformer
    (ours / WEIGHTS).unlink()
    net.save_pretrained(ours / "transformer", max_shard_size="40KB")
    net.half().save_pretrained(ours / "transformer", variant="fp16", max_shard_size="40KB")
    assert len(list((ours / "transformer").glob("*fp16-*.safetensors"))) > 1
    assert command("convert", ours, tmp_path / "back.pt", "--to", "dit") == 0
    back, expected = torch.load(tmp_path / "back.pt", weights_only=True), checkpoint("dit")
    assert all(torch.equal(back[name], value) for name, value in expected.items())


@pytest.mark.parametrize("option", ["local_conv", "long_skips"])
@pytest.mark.parametrize("kind", ["dit", "diffusers"])
def test_what_dit_has_not_is_not_written(
    kind: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = brought("dit", tmp_path)
    net = DiTMoETransformer2DModel.from_config({**load(ours).transformer.config, option: True})
    net.save_pretrained(ours / "transformer")
    assert command("convert", ours, out := tmp_path / "back.pt", "--to", kind) == 2
    assert f"{option} True" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not out.exists()


def test_it_answers_as_diffusers_does(tmp_path: Path) -> None:
    net = diffusers_dit()
    net.save_pretrained(tmp_path / "them")
    assert command("convert", tmp_path / "them", tmp_path / "ours") == 0
    pipe = load(tmp_path / "ours")
    assert (pipe.transformer.config.freq_shift, pipe.transformer.config.norm2_eps) == (1, 1e-5)
    assert (pipe.config.guidance_channels, pipe.transformer.config.learn_sigma) == (None, True)
    x = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t, y in ((0, 0), (3, 1), (500, 4), (999, 5)):
        with torch.no_grad():
            expected = net(x[None], torch.tensor([t]), torch.tensor([y])).sample[0]
        torch.testing.assert_close(answer(pipe.transformer, x, t, y), expected, rtol=1e-6, atol=5e-6)


def test_from_dit_to_diffusers_every_weight_is_the_same_and_a_note_says_what_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = brought("dit", tmp_path)
    assert command("convert", ours, tmp_path / "them", "--to", "diffusers") == 0
    assert "note: diffusers computes with freq_shift 1, and the model with 0" in capsys.readouterr().out
    pipe = diffusers.DiTPipeline.from_pretrained(tmp_path / "them", vae=None)  # which ours lacks
    net, weights, x = pipe.transformer, checkpoint("dit"), torch.randn(4, 8, 8)
    assert net.config.norm_eps == 1e-6
    block = net.transformer_blocks[1]
    projections = [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]
    assert torch.equal(torch.cat([p.weight for p in projections]), weights["blocks.1.attn.qkv.weight"])
    net.requires_grad_(False)
    for each in net.transformer_blocks:
        each.norm1.emb.time_proj.downscale_freq_shift = 0
    found = net(x[None], torch.tensor([77]), torch.tensor([2])).sample[0]
    torch.testing.assert_close(found.double(), network(weights, x, 77, 2, heads=HEADS), rtol=1e-5, atol=2e-5)


def test_a_diffusers_pipeline_brings_its_names_and_its_vae(tmp_path: Path) -> None:
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, scaling_factor=0.3,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    net, labels = diffusers_dit(), {i: f"thing {i}" for i in range(CLASSES)}
    whole = diffusers.DiTPipeline(transformer=net, vae=vae, scheduler=scheduler)
    whole.save_pretrained(tmp_path / "them")
    index = json.loads((tmp_path / "them/model_index.json").read_text()) | {"id2label": labels}
    (tmp_path / "them/model_index.json").write_text(json.dumps(index))
    assert command("convert", tmp_path / "them", tmp_path / "ours") == 0
    pipe = load(tmp_path / "ours")
    assert pipe.id2label == labels
    assert pipe.config.latents["std"] == [1 / 0.3] * 4
    assert pipe.vae is not None
    assert command("sample", tmp_path / "ours", "--num", 2, "--steps", 2, "--out", tmp_path / "a.png") == 0


@pytest.mark.parametrize("kind", KINDS)
def test_sample_draws_from_it_without_flags(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = brought(kind, tmp_path)
    index = json.loads((ours / "model_index.json").read_text())
    assert index["num_inference_steps"] == (50 if kind == "flash" else 250)
    (ours / "model_index.json").write_text(json.dumps(index | {"num_inference_steps": 3}))  # for the test's time
    monkeypatch.chdir(tmp_path)
    assert command("sample", ours) == 0
    assert (tmp_path / "samples.png").exists()
    pipe = load(ours)
    by_default, three, all_ = (
        pipe([1, 2], output_type="pt", guidance_channels=channels).images for channels in (None, 3, 4)
    )
    assert torch.equal(by_default, all_ if kind == "flash" else three)
    assert not torch.equal(all_, three)
    pipe([1], guidance_scale=1.0, output_type="pt")  # nothing is guided then


def test_sixteen_bits_stay_and_large_models_lie_in_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {name: value.bfloat16() for name, value in checkpoint("dit-moe").items()}
    monkeypatch.setattr(tensors_module, "SHARD", 40_000)
    monkeypatch.setattr(tensors_module, "_LET_GO", 10_000)  # the file is opened anew several times
    ours = brought("dit-moe", tmp_path, weights)
    files = sorted((ours / "transformer").glob("*.safetensors"))
    assert len(files) > 3
    found = Tensors(files)
    assert set(found.dtypes.values()) == {torch.bfloat16}
    experts = torch.stack([weights[f"blocks.1.moe.experts.{e}.down_proj.weight"] for e in range(EXPERTS)])
    assert torch.equal(found["blocks.1.moe.experts.w_out"], experts)
    pipe = DiTMoEPipeline.from_pretrained(ours)
    assert torch.equal(pipe.transformer.state_dict()["blocks.1.moe.experts.w_out"], experts.float())
    load(ours)


def test_one_expert_is_an_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "EXPERTS", 1)
    torch.save(weights := checkpoint("dit-moe"), tmp_path / "them.pt")
    words = "convert", tmp_path / "them.pt", tmp_path / "ours", *FLAGS["dit-moe"]
    assert command(*words, "--top-k", 1) == 0
    x = torch.randn(4, 8, 8)
    found = answer(load(tmp_path / "ours").transformer, x, 30, 2).double()
    torch.testing.assert_close(found, network(weights, x, 30, 2, heads=HEADS, top_k=1), rtol=1e-5, atol=2e-5)


def test_pixels_have_no_latents_and_guide_all_channels(tmp_path: Path) -> None:
    pipe = load(brought("dit", tmp_path, checkpoint("dit", channels=3)))
    assert (pipe.config.latents, pipe.config.guidance_channels) == (None, None)


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    ours = brought("flash", tmp_path)
    read = load_file(ours / WEIGHTS)
    for name, value in load(ours).transformer.state_dict().items():
        np.testing.assert_array_equal(read[name].numpy(), value.numpy())
