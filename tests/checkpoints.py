"""Checkpoints as a run of one process finds and reads them, whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ditmoe.config.sections import Config
from ditmoe.data.open import open_data
from ditmoe.run_folder import checkpoint
from ditmoe.training.loop import train


def newest(root: Path) -> Path | None:
    """The newest whole checkpoint; None of none, ValueError where none is whole."""
    return checkpoint.first_whole(checkpoint.newest_first(root), checkpoint.find_fault)


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(parts, state) of one checkpoint."""
    parts, state = checkpoint.opened(path)
    return {part: {key: saved.whole() for key, saved in found.items()} for part, found in parts.items()}, state


def resumed_to_the_bit(whole: Config, stop: int) -> dict[str, Tensor]:
    """The weights that a run ends with, after a check that one that ends at `stop` and goes on ends with the same."""
    data = open_data(whole.data, size=whole.model.sample_size, channels=whole.model.in_channels)
    train(whole, data)
    parts = replace(whole, out=whole.out.with_name("parts"))
    train(replace(parts, max_steps=stop), data)
    train(parts, data)
    first, second = (load_file(c.out / "model/transformer/diffusion_pytorch_model.safetensors") for c in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)
    return first
