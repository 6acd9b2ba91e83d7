"""What cannot be converted is refused in a sentence, and nothing is left of it."""

import argparse
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ditmoe.config.convert import ConvertArgs
from ditmoe.convert.convert import run
from tests.ditmoe.convert.checkpoints import FLAGS, checkpoint, diffusers_dit
from tests.doors import command

ROOT = Path(__file__).parents[3]
DIT = FLAGS["dit"]


class Code:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (print, ("it ran",))


def refused(capsys: pytest.CaptureFixture[str], sentence: str, src: Path, *flags: object) -> None:
    """`convert` says this sentence, ends with 2, and leaves nothing behind."""
    before = sorted(src.parent.rglob("*"))
    capsys.readouterr()
    assert command("convert", src, src.parent / "out", *flags) == 2
    said = capsys.readouterr()
    assert sentence in " ".join(said.err.split()), said.err
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    assert "it ran" not in said.out
    assert sorted(src.parent.rglob("*")) == before


@pytest.mark.parametrize("where", ["bare", "args", "beside"])
def test_code_in_a_pickle_is_not_run(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights: dict[str, Any] = checkpoint("dit")
    content = {"bare": Code(), "args": {"ema": weights, "args": Code()}, "beside": {**weights, "x": Code()}}
    torch.save(content[where], tmp_path / "them.pt")
    refused(capsys, "them.pt asks for print, and only tensors are read", tmp_path / "them.pt", *DIT)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop("blocks.1.attn.proj.bias"), "lacks blocks.1.attn.proj.bias, of which blocks.1.attn.proj.bias"),
        (lambda w: w.pop("pos_embed"), "the checkpoint lacks pos_embed"),
        (lambda w: w.pop("x_embedder.proj.weight"), "the checkpoint lacks x_embedder.proj.weight"),
        (lambda w: w.update({"projector.weight": torch.ones(2)}), "has projector.weight, which dit has no place for"),
        (lambda w: w.update({"blocks.9999.x": torch.ones(2)}), "the checkpoint lacks blocks.2.attn.qkv.weight"),
        (lambda w: w.update({"blocks.1.mlp.fc2.weight": torch.ones(32, 64)}), "fc2.weight has the shape (32, 64)"),
        (lambda w: w.update({"x_embedder.proj.weight": torch.ones(48, 4, 2, 2)}), "with the other sizes it must be"),
        (lambda w: w.update({"x_embedder.proj.weight": torch.ones(30, 4, 2, 2)}), "hidden_size 30 must be a multiple"),
        (lambda w: w.update({"final_layer.linear.weight": torch.ones(33, 32)}), "the last layer has 33 rows"),
        (lambda w: w.update({"final_layer.linear.bias": torch.ones(16)}), "linear.bias has the shape (16,)"),
        (lambda w: w.update({"pos_embed": torch.zeros(1, 16, 32)}), "pos_embed is not the table of sines and cosines"),
        (lambda w: w.update({"pos_embed": torch.zeros(1, 15, 32)}), "pos_embed is not the table of sines and cosines"),
        (lambda w: w.update({"pos_embed": torch.full((1, 16, 32), torch.nan)}), "pos_embed is not the table"),
        (lambda w: w.update({"final_layer.linear.bias": torch.full((32,), torch.nan)}), "answer is not finite"),
        (lambda w: w.update({"final_layer.linear.bias": torch.ones(32).half()}), ""),
        (lambda w: w.update({"y_embedder.embedding_table.weight": torch.ones(6, 32).long()}), "no dense floating"),
        (lambda w: w.update({"x_embedder.proj.bias": torch.ones(1).expand(32)}), "no dense floating point tensor"),
        (lambda w: w.update({"x_embedder.proj.bias": 3}), "no dense floating point tensor"),
        (lambda w: w.update({3: torch.ones(1)}), "no dense floating point tensor"),
    ],
)  # fmt: skip
def test_each_tensor_is_accounted_for(
    change: Callable[[dict[Any, Any]], None], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights: dict[Any, Any] = dict(checkpoint("dit"))
    change(weights)
    torch.save(weights, tmp_path / "them.pt")
    if sentence:
        refused(capsys, sentence, tmp_path / "them.pt", *DIT)
    else:  # one of another precision than the rest is taken as it is
        assert command("convert", tmp_path / "them.pt", tmp_path / "out", *DIT) == 0


def test_experts_are_accounted_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, sentence in (("gate.weight", "router"), ("experts.3.up_proj.weight", "of which blocks.1.moe.experts")):
        weights = checkpoint("dit-moe")
        del weights[f"blocks.1.moe.{name}"]
        torch.save(weights, tmp_path / "them.pt")
        refused(capsys, sentence, tmp_path / "them.pt", *FLAGS["dit-moe"])
    weights = checkpoint("dit-moe")
    weights["blocks.1.moe.experts.2.up_proj.weight"] = weights["blocks.1.moe.experts.2.up_proj.weight"].half()
    torch.save(weights, tmp_path / "them.pt")
    refused(capsys, "has another precision than", tmp_path / "them.pt", *FLAGS["dit-moe"])


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("kept", [0, 1000, 0.5, 0.999])
def test_a_half_written_file(suffix: str, kept: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    file = tmp_path / f"them.{suffix}"
    torch.save(checkpoint("dit"), file) if suffix == "pt" else save_file(checkpoint("dit"), file)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    refused(capsys, "them." + suffix + " is damaged or no", file, *DIT)


class FullDisk:
    """A file that takes so many bytes and no more."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> int:
        self.room -= len(content)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.file.write(content))


@pytest.mark.parametrize("to", ["ditmoe", "diffusers", "dit"])
def test_a_full_disk(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(checkpoint("dit"), src := tmp_path / "them.pt")
    if to != "ditmoe":
        assert command("convert", src, tmp_path / "ours", *DIT) == 0
        src = tmp_path / "ours"
    before, opened, made = sorted(tmp_path.rglob("*")), Path.open, os.fdopen
    monkeypatch.setattr(Path, "open", lambda path, *how, **more: _limited(opened(path, *how, **more), *how))
    monkeypatch.setattr(os, "fdopen", lambda *how, **more: _limited(made(*how, **more), *how[1:]))
    out = tmp_path / ("out.pt" if to == "dit" else "out")
    capsys.readouterr()
    assert command("convert", src, out, "--to", to, *(DIT if to == "ditmoe" else ())) == 2
    assert f"error: out {out} cannot be written (No space left on device); nothing is left" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def _limited(file: Any, mode: str = "r") -> Any:
    return FullDisk(file, 100_000) if "w" in mode else file


def test_what_is_ambiguous_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = tmp_path / "them.pt"
    torch.save(checkpoint("dit"), src)
    refused(capsys, "add --from dit or --from sit", src)
    refused(capsys, "how many heads its width 32 has; add --num-heads N", src, "--from", "dit")
    torch.save(checkpoint("flash"), src)
    refused(capsys, "noise or a flow's velocity; add --prediction-type epsilon or flow_prediction", src)
    notes = argparse.Namespace(rf=True, num_experts_per_tok=3)
    torch.save({"model": checkpoint("flash"), "args": notes}, src)
    assert command("convert", src, tmp_path / "out") == 0
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())
    assert (config["top_k"], config["prediction_type"]) == (3, "flow_prediction")


@pytest.mark.parametrize(
    ("kind", "flags", "sentence"),
    [
        ("dit", ("--from", "dit-moe"), "--from is dit-moe, but src"),
        ("flash", ("--num-heads", "4", "--prediction-type", "epsilon"), "--num-heads is 4, but q_norm is of 2 heads"),
        ("dit", (*DIT, "--top-k", "2"), "--top-k is 2, but dit has no experts"),
        ("dit", (*DIT, "--prediction-type", "flow_prediction"), "a flow with its names is SiT's"),
        ("sit", (*FLAGS["sit"], "--prediction-type", "epsilon"), "SiT predicts a flow's velocity; leave it out"),
        ("dit", ("--from", "dit", "--num-heads", "3"), "must be a multiple of 4 * num_heads = 12"),
        ("dit-moe", (*FLAGS["dit-moe"], "--top-k", "5"), "top_k 5 is more than num_experts 4"),
        ("dit", ("--to", "dit", "--from", "dit"), "must be a .pt file with --to dit"),
        ("dit", ("--to", "diffusers", "--num-heads", "2"), "--num-heads does not apply to --to diffusers"),
        ("nowhere", (), "them.pt does not exist"),
        ("dit", ("--num-heads", "0"), "num_heads is 0; it must be 1 or more"),
        ("dit", (*DIT, "--vae", "nowhere"), "vae nowhere is not a VAE that can be loaded"),
        ("dit", ("--to", "diffusers"), "holds no model"),
    ],
)
def test_what_does_not_apply_is_refused(
    kind: str, flags: tuple[str, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind != "nowhere":
        torch.save(checkpoint(kind), tmp_path / "them.pt")
    before = sorted(tmp_path.rglob("*"))
    assert command("convert", tmp_path / "them.pt", tmp_path / "out", *flags) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert sentence in said, said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"a": torch.ones(1)}, "neither DiT's, SiT's, DiT-MoE's nor diffusers' DiT (it has a"),
        ({"module": {"a": torch.ones(1)}}, "DeepSpeed checkpoint; its zero_to_fp32.py makes one file"),
        ([torch.ones(1)], "holds no dict of tensors"),
        (
            {"model": checkpoint("dit"), "args": argparse.Namespace(model="DiT", num_classes=6)},
            "6 labels for num_classes 6",
        ),
        ({"model": checkpoint("sit"), "args": argparse.Namespace(path_type="GVP")}, "path GVP and predicts velocity"),
        ({"blocks.0.mlp.w12.weight": torch.ones(1)}, "LightningDiT's"),
        ({"blocks.1.mlp.cluster_centers": torch.ones(1)}, "ProMoE's"),
        ({"blocks.1.mlp.expert_threshold": torch.ones(1)}, "DiffMoE's"),
        ({"blocks.1.mlp.gate_weight": torch.ones(1)}, "EC-DiT's"),
        ({"blocks.1.mlp.gate.e_score_correction_bias": torch.ones(1)}, "DSMoE's"),
    ],
)
def test_what_is_of_no_layout_is_refused(
    content: Any, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "them.pt")
    refused(capsys, sentence, tmp_path / "them.pt", "--num-heads", 2)


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("config.json", {"activation_fn": "geglu"}, "has activation_fn 'geglu'"),
        ("config.json", {"_class_name": "PixArt"}, "is of 'PixArt', not DiTTransformer2DModel"),
        ("config.json", {"auto_map": {"AutoModel": "x.py"}}, "names code; remove it"),
        ("config.json", {"num_attention_heads": "2"}, "num_heads is '2', which it cannot be"),
        ("config.json", {"norm_eps": 0}, "norm2_eps 0"),
        ("config.json", {"sample_size": 9}, "sample_size 9 is not a multiple of patch_size 2"),
    ],
)
def test_a_diffusers_folder_that_does_not_fit(
    file: str, change: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diffusers_dit().save_pretrained(them := tmp_path / "them")
    (them / file).write_text(json.dumps(json.loads((them / file).read_text()) | change))
    refused(capsys, sentence, them)


@pytest.mark.parametrize(
    ("change", "flags", "sentence"),
    [
        ({"beta_schedule": "scaled_linear"}, (), "has beta_schedule 'scaled_linear', and DiT's chain has linear"),
        ({}, ("--prediction-type", "sample"), "--prediction-type is sample, but"),
        ({"id2label": [1]}, (), "has an id2label that is no dict"),
        ({}, ("--num-heads", "2"), "--num-heads does not apply to a diffusers folder"),
        ({}, ("--top-k", "2"), "--top-k does not apply to a diffusers folder"),
        ({"prediction_type": "noise"}, (), "prediction_type 'noise' is not one of"),
    ],
)
def test_a_scheduler_that_does_not_fit(
    change: dict[str, Any], flags: tuple[str, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diffusers_dit().save_pretrained(tmp_path / "them/transformer")
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "them/scheduler")
    (tmp_path / "them/model_index.json").write_text(json.dumps(change))
    place = tmp_path / "them/scheduler/scheduler_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    refused(capsys, sentence, tmp_path / "them", *flags)


def test_embeddings_that_differ_from_block_to_block_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = diffusers_dit()
    with torch.no_grad():
        net.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias[3] += 1e-6
    net.save_pretrained(tmp_path / "them")
    refused(capsys, "linear_1.bias, and ours has one for all blocks", tmp_path / "them")


def test_only_dense_models_of_dit_go_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentences = {"moe_blocks every-second; DiT has none": ROOT / "models/digits"}
    for sentence, src in sentences.items():
        for to, out in (("dit", tmp_path / "out.pt"), ("diffusers", tmp_path / "out")):
            assert command("convert", src, out, "--to", to) == 2
            assert sentence in capsys.readouterr().err
    torch.save(checkpoint("sit"), tmp_path / "them.pt")
    assert command("convert", tmp_path / "them.pt", tmp_path / "ours", *FLAGS["sit"]) == 0
    assert command("convert", tmp_path / "ours", tmp_path / "out", "--to", "diffusers") == 2
    assert "has time_scale 1.0; DiT has 1000.0, so it cannot be taken out" in capsys.readouterr().err
    torch.save(checkpoint("dit"), tmp_path / "them.pt")
    assert command("convert", tmp_path / "them.pt", tmp_path / "ours", *DIT, "--force") == 0
    index = json.loads((tmp_path / "ours/model_index.json").read_text())
    index["latents"]["std"] = [1.0, 2.0, 3.0, 4.0]
    (tmp_path / "ours/model_index.json").write_text(json.dumps(index))
    assert command("convert", tmp_path / "ours", tmp_path / "out", "--to", "diffusers") == 2
    assert "latents normalised channel by channel, and diffusers has one factor" in capsys.readouterr().err
    refused(capsys, "is a model folder of ours; --to diffusers or dit takes it out", tmp_path / "ours")


def test_what_is_there_stays_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    torch.save(checkpoint("dit"), tmp_path / "them.pt")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"out .* exists; give another one, or --force"):
        ConvertArgs(tmp_path / "them.pt", tmp_path / "out")
    with pytest.raises(ValueError, match="src lies in out"):
        ConvertArgs(tmp_path / "them.pt", tmp_path, force=True)
    with pytest.raises(ValueError, match="must be in a folder that exists"):
        ConvertArgs(tmp_path / "them.pt", tmp_path / "a" / "b")
    (tmp_path / "out" / "kept").touch()
    with pytest.raises(ValueError, match="holds files and no model"):
        ConvertArgs(tmp_path / "them.pt", tmp_path / "out", force=True)
    (tmp_path / "out" / "model_index.json").touch()
    broken: dict[str, Tensor] = checkpoint("dit")
    del broken["pos_embed"]
    torch.save(broken, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match="lacks pos_embed"):
        run(ConvertArgs(tmp_path / "broken.pt", tmp_path / "out", source="dit", num_heads=2, force=True))
    assert (tmp_path / "out" / "kept").exists()
    run(ConvertArgs(tmp_path / "them.pt", tmp_path / "out", source="dit", num_heads=2, force=True))
    assert not (tmp_path / "out" / "kept").exists()
