"""What a run is made of and how it lives on disk: the network, its moving average, the optimiser, the run folder.

A checkpoint holds all three and the facts that a resumed run must share: the data's fingerprint, the precision, the
number of processes.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checkpoint
from .config import Config, differences, to_dict
from .data import ImageSet
from .model import DiTMoETransformer2DModel, build
from .moe import Router

# What may change between the parts of one run: it has no influence on the weights at a given step.
# (data.path has: the data's fingerprint is checked instead.)
_FREE = {
    "out",
    "max_steps",
    "dry_run",
    "data.path",
    "data.download",
    "data.num_workers",
    "moe.backend",
}
_FREE |= {f"train.{name}" for name in ("log_every", "checkpoint_every", "keep", "sample_every", "tensorboard")}


class State(NamedTuple):
    """All that learns: the network, its moving average, the optimiser."""

    model: DiTMoETransformer2DModel
    ema: DiTMoETransformer2DModel
    optimizer: torch.optim.AdamW


def new_state(config: Config, num_classes: int) -> State:
    """A new network with the weights of the run's seed, its average, and AdamW (decay on matrices only).

    The routers' group has `lr_factor` D^-1/2, see `ditmoe.moe.Router`.
    """
    torch.manual_seed(config.seed)
    model = build(config, num_classes)
    if config.model.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    train = config.train
    routers = [m.weight for m in model.modules() if isinstance(m, Router)]
    known = {id(p) for p in routers}
    matrices = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in known]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": routers, "weight_decay": train.weight_decay, "lr_factor": config.model.hidden_size**-0.5},
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, betas=(0.9, train.beta2), fused=True)
    return State(model.train(), ema, optimizer)


def num_classes(config: Config, data: ImageSet) -> int:
    """Classes of the model: those asked for, or those of the data set. ValueError when the two cannot go together."""
    asked, found = config.model.num_classes, len(data.id2label)
    if asked is None:
        return found
    if asked and (found > asked or not found):
        raise ValueError(f"model.num_classes is {asked} but the data set has {found or 'no'} classes: {data.source}")
    return asked


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, over parameters and floating-point buffers; others are copied."""
    ours, theirs = ema.state_dict(), model.state_dict()
    floating = [name for name, value in ours.items() if value.is_floating_point()]
    torch._foreach_lerp_([ours[n] for n in floating], [theirs[n] for n in floating], 1 - decay)
    for name in ours.keys() - set(floating):
        ours[name].copy_(theirs[name])


def save_checkpoint(config: Config, state: State, step: int, facts: dict[str, Any]) -> None:
    """Write checkpoints/step-<step>/ with all that learns and `facts`, then prune older ones."""
    names = {p: n for n, p in state.model.named_parameters()}
    moments = {
        f"{names[p]}.{key}": torch.as_tensor(value)
        for p, entry in state.optimizer.state.items()
        for key, value in entry.items()
    }
    parts = {
        "model": state.model.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": moments,
    }
    checkpoint.save(config.out / "checkpoints", step, parts, {"config": to_dict(config), **facts})
    checkpoint.prune(config.out / "checkpoints", config.train.keep)


def resume(root: Path, state: State, facts: dict[str, Any]) -> int:
    """Load the newest whole checkpoint into the state; the number of steps it has seen, 0 without one."""
    path = checkpoint.newest(root)
    if path is None:
        return 0
    parts, meta = checkpoint.load(path)
    if meta["data"] != facts["data"]:
        raise ValueError(
            f"the data set is not the one that {path} was trained on (other images, order or classes); "
            f"restore it, or give another --out"
        )
    for name in ("precision", "num_processes"):
        if meta[name] != facts[name]:
            print(f"note: {name} was {meta[name]} and is now {facts[name]}; results may differ in the last digits")
    state.model.load_state_dict(parts["model"])
    state.ema.load_state_dict(parts["ema"])
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in parts["optimizer"].items():
        name, kind = key.rsplit(".", 1)
        moments.setdefault(name, {})[kind] = value
    for name, parameter in state.model.named_parameters():
        if name in moments:
            state.optimizer.state[parameter] = dict(moments[name])
    return int(meta["step"])


def check_folder(config: Config) -> None:
    """An existing run folder must hold the same run. Writes nothing.

    Raises:
        ValueError: It holds another run, or things that are no run, or cannot be a folder.
    """
    path = config.out / "config.json"
    parent = next(p for p in (config.out, *config.out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"out {config.out} cannot be written: {parent} is a file, or not writable")
    if path.exists():
        try:
            old = dict(json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a configuration that can be read: {error}") from error
        changed = [
            line
            for line in differences(old, to_dict(config))
            if line.split(":")[0] not in _FREE and not line.startswith("sample.")
        ]
        if changed:
            raise ValueError(
                f"{config.out} holds another run ({'; '.join(changed[:5])}); give another --out, or the same values"
            )
    elif config.out.exists() and any(config.out.iterdir()):
        raise ValueError(f"{config.out} is not empty and holds no run; give another --out")
