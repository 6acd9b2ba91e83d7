"""A checkpoint becomes a state again, whole or not at all."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditmoe.config.sections import Config
from ditmoe.data.open import open_data
from ditmoe.launch import start
from ditmoe.run_folder import checkpoint
from ditmoe.training.loop import train
from ditmoe.training.parallel import Parallel
from ditmoe.training.saving import opened, resume, to_parts
from ditmoe.training.state import new_state

Tiny = Callable[..., Config]


@pytest.fixture
def saved(tiny: Tiny) -> tuple[Config, Path]:
    config = tiny(max_steps=2, model={"depth": 1})
    data = open_data(config.data, size=8, channels=1)
    train(config, data)
    return config, config.out / "checkpoints" / "step-000002"


def rewritten(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a file of a checkpoint, and the manifest with it."""
    file = path / name
    if name.endswith(".safetensors"):
        save_file(change(load_file(file)), file)
    else:
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {
        "size": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.find_fault(path) is None


def attempt(config: Config, path: Path) -> None:
    """Resume, and see that a new state is what it was where that fails."""
    parallel = Parallel(start.launched(config.train), config.parallel, config.moe.num_experts)
    state = new_state(config, 10, parallel)
    before = {part: {k: v.clone() for k, v in found.items()} for part, found in to_parts(state).items()}
    data = open_data(config.data, size=8, channels=1)
    try:
        facts = {"data": data.fingerprint(), "precision": "fp32", "num_processes": 1}
        resume(opened(path, facts), state, facts, parallel)
    finally:
        after = to_parts(state)
        untouched = all(torch.equal(v, after[part][k]) for part, found in before.items() for k, v in found.items())
        assert untouched
        assert not after["optimizer"]


def without(*words: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda found: {k: v for k, v in found.items() if not any(word in k for word in words)}


def wider(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.double() if "qkv" in k else v for k, v in found.items()}


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("model.safetensors", without("final_layer.linear.bias"), "model final_layer.linear.bias is missing"),
        ("ema.safetensors", without("qkv"), "ema blocks.0.attn.qkv.bias is missing"),
        ("model.safetensors", wider, "model blocks.0.attn.qkv.bias is torch.float64"),
        ("optimizer.safetensors", without("qkv"), "optimizer blocks.0.attn.qkv.bias.exp_avg is missing"),
        ("optimizer.safetensors", without("exp_avg_sq"), "exp_avg_sq is missing"),
        ("optimizer.safetensors", wider, "optimizer blocks.0.attn.qkv.bias.exp_avg is torch.float64"),
        ("optimizer.safetensors", lambda found: {**found, "x": torch.zeros(2)}, "optimizer x is not known"),
        ("state.json", without("data"), "state.json lacks data"),
        ("state.json", lambda _: {}, "state.json lacks step"),
        ("state.json", lambda _: [1], "holds a file that cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_touched(saved, name, change, sentence) -> None:
    config, path = saved
    rewritten(path, name, change)
    with pytest.raises(ValueError, match=sentence.replace(".", r"\.")):
        attempt(config, path)


def test_a_checkpoint_without_a_part_is_refused(saved) -> None:
    config, path = saved
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["optimizer.safetensors"]
    (path / "optimizer.safetensors").unlink()
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="is missing"):
        attempt(config, path)


def test_a_manifest_that_is_too_deep_is_damage_like_any_other(saved) -> None:
    _, path = saved
    (path / "manifest.json").write_text("[" * 100_000)
    assert checkpoint.find_fault(path) == "manifest.json cannot be read"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no /proc")
def test_a_checkpoint_that_was_read_is_let_go(tiny: Tiny) -> None:
    """Its files are mapped while they are read; kept, a removed checkpoint would go on taking its place."""
    config = tiny(max_steps=1)
    data, mapped = open_data(config.data, size=8, channels=1), list[str]()
    train(config, data)

    def look(step: int, pipe: Any) -> None:
        lines = Path("/proc/self/maps").read_text().splitlines()
        mapped.extend(line for line in lines if str(config.out / "checkpoints") in line)

    assert train(replace(config, max_steps=3, train=replace(config.train, sample_every=1)), data, on_sample=look)
    assert not mapped
