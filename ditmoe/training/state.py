"""What a run is made of: the network, its moving average, the optimiser."""

import copy
from typing import Any, NamedTuple

import torch
from torch import nn

from ..config.checks import plural
from ..config.sections import Config
from ..data.sets import ImageSet
from ..model import DiTMoETransformer2DModel, build, initial, to_compile
from ..moe import Router
from .exchange import local
from .muon import Muon
from .muon import matrices as muons
from .parallel import Parallel, expert_names


class Fake(NamedTuple):
    """The network that learns what a student draws, see `training.matching`, and what moves it."""

    model: DiTMoETransformer2DModel
    optimizer: torch.optim.AdamW


class State(NamedTuple):
    """All that learns: the network, its moving average, the optimiser; of a matched student also its fake."""

    model: DiTMoETransformer2DModel
    ema: DiTMoETransformer2DModel
    optimizer: torch.optim.AdamW
    fake: Fake | None = None


def new_state(config: Config, num_classes: int, parallel: Parallel, begun: bool = False) -> State:
    """A new network with the weights of the run's seed, its average, and AdamW or Muon (decay on matrices only).

    The routers' group has `lr_factor` D^-1/2, see `ditmoe.moe.Router`, Muon's groups theirs. Of split experts all three
    are this process's. Of a run that has `begun` the files that it began from are not read: a checkpoint follows. Nor
    are centres where `train.init` has all weights.
    """
    torch.manual_seed(config.seed)
    make = build if begun or config.train.init else initial
    if parallel.splits:
        model, ema = parallel.split(lambda: make(config, num_classes))
    else:
        model = make(config, num_classes)
        ema = copy.deepcopy(model)
    ema.eval().requires_grad_(False)
    if config.model.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    train, names = config.train, expert_names(model)
    for block in model.blocks if train.compile else ():
        to_compile(block, moving=config.moe.capacity_start is not None).compile(dynamic=False)
    muon = muons(model, experts=train.muon_on == "all") if train.optimizer == "muon" else {}
    adams = {name: p for name, p in model.named_parameters() if name not in muon}
    routers = [p for m in model.modules() if isinstance(m, Router) for p in m.parameters()]  # centroids are none
    known = {id(p) for p in routers}
    groups: list[dict[str, Any]] = [
        {"params": routers, "lr_factor": config.model.hidden_size**-0.5},
        {"params": [p for name, p in adams.items() if name in names]},  # split in another way than the rest
        {"params": [p for n, p in adams.items() if p.ndim >= 2 and id(p) not in known and n not in names]},
        {"params": [p for p in adams.values() if p.ndim < 2 and id(p) not in known], "weight_decay": 0.0},
    ]
    for parts in sorted(set(muon.values())):
        own = [p for name, p in model.named_parameters() if muon.get(name) == parts]
        groups.append({"params": own, "parts": parts, "lr_factor": train.muon_factor})
    groups, betas = [group for group in groups if group["params"]], (0.9, train.beta2)
    if muon:
        dtype = torch.bfloat16 if parallel.accelerator.mixed_precision == "bf16" else torch.float32
        return State(model.train(), ema, Muon(groups, train.learning_rate, betas, train.weight_decay, dtype))
    optimizer = torch.optim.AdamW(groups, train.learning_rate, betas, weight_decay=train.weight_decay, fused=True)
    return State(model.train(), ema, optimizer)


def num_classes(config: Config, data: ImageSet) -> int:
    """Classes of the model: those asked for, or those of the data set. ValueError when the two cannot go together."""
    asked, found = config.model.num_classes, len(data.id2label)
    if asked is None:
        return found
    if asked and (found > asked or not found):
        has = plural(found, "class") if found else "no classes"
        raise ValueError(f"model.num_classes is {asked} but the data set has {has}: {data.source}")
    return asked


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, over parameters and floating-point buffers; others are copied."""
    ours, theirs = ({n: local(v) for n, v in net.state_dict().items()} for net in (ema, model))
    floating = [name for name, value in ours.items() if value.is_floating_point()]
    torch._foreach_lerp_([ours[n] for n in floating], [theirs[n] for n in floating], 1 - decay)
    for name in ours.keys() - set(floating):
        ours[name].copy_(theirs[name])
