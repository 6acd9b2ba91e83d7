"""LoRA on attention and stacked experts: the sum that it should be, saved, loaded, merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ditmoe import pipeline
from ditmoe.config.convert import ConvertArgs
from ditmoe.config.sections import MoEConfig
from ditmoe.convert import lora
from ditmoe.convert.convert import run
from ditmoe.model import DiTMoETransformer2DModel
from tests.ditmoe.store.test_store import network, saved

pytest.importorskip("peft", reason="PEFT is not installed: pip install '.[lora]'")
X, T, Y = torch.randn(4, 1, 8, 8), torch.tensor([5.0, 300.0, 600.0, 990.0]), torch.arange(4)


def says(net: DiTMoETransformer2DModel) -> Tensor:
    with torch.inference_mode():
        return net.eval()(X, T, Y).sample


def trained(net: DiTMoETransformer2DModel, experts: bool = True) -> DiTMoETransformer2DModel:
    lora.adapt(net, rank=3, alpha=6, experts=experts)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        (net(X, T, Y).sample - X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


@pytest.mark.parametrize("moe", [MoEConfig(), MoEConfig(router_input="position"), MoEConfig(blocks="none")])
def test_it_starts_as_the_model_and_is_the_sum_that_lora_says(moe: MoEConfig) -> None:
    net, before = network(moe), network(moe).state_dict()
    start = says(net)
    lora.adapt(net, rank=3)
    assert torch.equal(says(net), start)
    learning = {name for name, p in net.named_parameters() if p.requires_grad}
    assert learning == {name for name in dict(net.named_parameters()) if ".lora_" in name}
    assert not any("router" in name for name in learning)
    net = trained(network(moe))
    state, sums = net.state_dict(), dict(before)
    for i in range(2):
        for name in (f"blocks.{i}.attn.qkv", f"blocks.{i}.attn.proj"):
            b, a = (state[f"{name}.lora_{x}.default.weight"] for x in "BA")
            sums[f"{name}.weight"] = before[f"{name}.weight"] + 2 * b @ a
        for weight, where in (("w_in", "base_layer."), ("w_out", "")) if moe.blocks != "none" else ():
            name = f"blocks.{i}.moe.experts"
            a = state[f"{name}.{where}lora_A.default.weight"].unflatten(0, (6, 3))  # (E, r, in)
            b = state[f"{name}.{where}lora_B.default.weight"].unflatten(1, (3, 6))  # (out, r, E)
            sums[f"{name}.{weight}"] = before[f"{name}.{weight}"] + 2 * torch.einsum("ore,eri->eoi", b, a)
    other = network(moe)
    other.load_state_dict(sums)
    assert float((says(net) - start).abs().max()) > 0.01
    torch.testing.assert_close(says(net), says(other), rtol=1e-4, atol=1e-4)


def test_saved_loaded_and_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, net = saved(network(MoEConfig()), tmp_path / "m"), trained(network(MoEConfig()))
    expected = says(net)
    net.save_lora_adapter(tmp_path / "lora")
    assert [file.name for file in (tmp_path / "lora").iterdir()] == [lora.FILE]
    other = network(MoEConfig())
    lora.load(other, tmp_path / "lora")
    assert torch.equal(says(other), expected)
    lora.merge(other)
    assert other.state_dict().keys() == network(MoEConfig()).state_dict().keys()
    torch.testing.assert_close(says(other), expected, rtol=1e-4, atol=1e-4)
    run(ConvertArgs(folder, tmp_path / "merged", lora=tmp_path / "lora"))
    assert torch.equal(says(pipeline.load(tmp_path / "merged").transformer), says(other))
    assert "wrote" in capsys.readouterr().out


def test_attention_alone(tmp_path: Path) -> None:
    net = trained(network(MoEConfig()), experts=False)
    assert not any(".experts." in name and ".lora_" in name for name in net.state_dict())
    net.save_lora_adapter(tmp_path)
    other = network(MoEConfig())
    lora.load(other, tmp_path)
    assert torch.equal(says(other), says(net))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"use_rslora": True}, "has use_rslora True, which"),
        ({"alpha_pattern": {"qkv": 400}}, "has alpha_pattern"),
        ({"r": 10**9}, "has r 1000000000, which"),
        ({"lora_alpha": float("nan")}, "not finite"),
        ({"lora_alpha": None}, "not an adapter that can be read"),
        ({"invented": 1}, "has invented 1, which"),
    ],
)
def test_settings_that_are_not_ours_are_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    trained(network(MoEConfig())).save_lora_adapter(tmp_path)
    with safe_open(tmp_path / lora.FILE, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        says = json.loads(file.metadata()["lora_adapter_metadata"])
    save_file(tensors, tmp_path / lora.FILE, {"lora_adapter_metadata": json.dumps(says)})
    lora.load(network(MoEConfig()), tmp_path)
    save_file(tensors, tmp_path / lora.FILE, {"lora_adapter_metadata": json.dumps({**says, **changes})})
    with pytest.raises(ValueError, match=sentence):
        lora.load(network(MoEConfig()), tmp_path)
    tensors[next(iter(tensors))].fill_(float("nan"))
    save_file(tensors, tmp_path / lora.FILE, {"lora_adapter_metadata": json.dumps(says)})
    with pytest.raises(ValueError, match="not finite"):
        lora.load(network(MoEConfig()), tmp_path)
    save_file(tensors, tmp_path / lora.FILE, {"lora_adapter_metadata": "[" * 200_000})
    with pytest.raises(ValueError, match="not an adapter that can be read"):
        lora.load(network(MoEConfig()), tmp_path)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    trained(network(MoEConfig())).save_lora_adapter(tmp_path / "lora")
    dense = network(MoEConfig(blocks="none"))
    before = says(dense)
    with pytest.raises(ValueError, match="of another model"):
        lora.load(dense, tmp_path / "lora")
    assert torch.equal(says(dense), before)
    with pytest.raises(ValueError, match="not an adapter that can be read"):
        lora.load(dense, tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / lora.FILE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not an adapter that can be read"):
        lora.load(dense, tmp_path / "bad")
    with pytest.raises(ValueError, match="rank is 0"):
        lora.adapt(dense, 0)
    small = network(MoEConfig())
    small.store_int8()
    with pytest.raises(ValueError, match="int8 take no LoRA"):
        lora.adapt(small)
    with pytest.raises(ValueError, match="two changes"):
        ConvertArgs(tmp_path, tmp_path / "b", lora=tmp_path, more=True)
