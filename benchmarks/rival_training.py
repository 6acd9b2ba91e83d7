"""Who trains in `benchmarks.rivals`, and a run of so many steps."""

import argparse
import copy
import hashlib
import json
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.rival_models import OPTIONS, Sized, run_as, sized
from ditmoe.config.file import to_dict
from ditmoe.config.presets import PRESETS
from ditmoe.config.sections import Config, ObjectiveConfig
from ditmoe.data.sets import ImageSet
from ditmoe.launch import start
from ditmoe.launch.signals import Signals
from ditmoe.model import build, count_parameters
from ditmoe.training.parallel import Parallel
from ditmoe.training.state import State, new_state, update_ema
from ditmoe.training.step import Run, optimise

WARM_UP = 0.02  # of the steps
NAMES = ("ours", "dense", "unet", "unet-active", "dit", "dit-active")
Row = dict[str, Any]


@dataclass(frozen=True)
class Contestant:
    """Who trains: its run, its sizes, what it is, and for a diffusers network its kind and how it is made."""

    name: str
    config: Config
    parameters: tuple[int, int]  # in all, activated
    shape: str
    kind: str = "ours"
    sized: Sized | None = None

    @property
    def digest(self) -> str:
        """Of all that it is, so that what was measured of another is not taken for it."""
        return hashlib.sha256(json.dumps([to_dict(self.config), self.shape]).encode()).hexdigest()[:12]

    def state(self, config: Config, classes: int, parallel: Parallel, option: str) -> State:
        """The network with the weights of the seed, its average, its optimiser (Muon or AdamW; a rival's is AdamW)."""
        if self.sized is None:
            return new_state(config, classes, parallel)
        torch.manual_seed(config.seed)
        model: Any = run_as(self.sized.make(), option)
        ema = copy.deepcopy(model).eval().requires_grad_(False)
        matrices: Row = {"params": [p for p in model.parameters() if p.ndim >= 2]}
        rest: Row = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
        train = config.train
        betas, decay = (0.9, train.beta2), train.weight_decay
        adamw = torch.optim.AdamW([matrices, rest], train.learning_rate, betas, weight_decay=decay, fused=True)
        return State(model.train(), ema, adamw)


def contestants(args: argparse.Namespace, classes: int) -> dict[str, Contestant]:
    """All of them, ours first; their sizes are checked against it."""
    preset = PRESETS[args.preset]
    dense = replace(preset, moe=replace(preset.moe, blocks="none"))
    with torch.device("meta"):
        ours, twin = (count_parameters(build(config, classes)) for config in (preset, dense))
    assert abs(twin[1] / ours[1] - 1) < 0.03, (twin, ours)
    moe, model = preset.moe, preset.model
    words = f"width {model.hidden_size}, depth {model.depth}, patch {model.patch_size}, "
    experts = f"top-{moe.top_k} of {moe.num_experts} experts"
    found = [Contestant("ours", preset, ours, words + experts), Contestant("dense", dense, twin, words + "dense")]
    objective = preset.objective
    if args.rival_objective != "preset":
        objective = ObjectiveConfig(
            prediction_type="flow_prediction",
            time_sampling="uniform" if args.rival_objective == "flow-uniform" else "logit_normal",
            class_dropout_prob=objective.class_dropout_prob,
        )
    train = replace(preset.train, optimizer="adamw", muon_on="trunk", muon_factor=1.0)
    train = replace(train, beta2=args.beta2 or train.beta2, batch_size=args.batch_size or train.batch_size)
    config = replace(preset, objective=objective, train=train)
    for kind in OPTIONS:
        for suffix, target in zip(("", "-active"), ours, strict=True):
            size = sized(kind, target, model, classes, objective.prediction_type)
            found.append(Contestant(kind + suffix, config, (size.parameters,) * 2, size.shape, kind, size))
    assert tuple(each.name for each in found) == NAMES
    return {each.name: each for each in found}


class Training:
    """A run of so many steps, in which nothing but training is done."""

    def __init__(self, who: Contestant, data: ImageSet, way: Row, rate: float, total: int, batch: int = 0) -> None:
        train = replace(
            who.config.train, precision=way["precision"], compile=way["compile"], learning_rate=rate, warmup_steps=0,
            decay_steps=None, batch_size=batch or who.config.train.batch_size,
        )  # fmt: skip
        config = replace(who.config, train=train, max_steps=10**9)
        parallel = Parallel(start.launched(train), config.parallel, config.moe.num_experts)
        self.state = who.state(config, len(data.id2label), parallel, way["option"])
        if way["compile"] and who.sized is not None:
            self.state.model.compile(dynamic=False)
        self.run = Run.of(config, data, parallel, self.state, Signals(), {})
        self.rate, self.total, self.steps, self.spent, self.diverged = rate, total, 0, 0.0, False
        self.losses: deque[torch.Tensor] = deque(maxlen=50)

    def step(self) -> None:
        """One optimiser step at the rate of the moment."""
        share = self.steps / self.total
        rate = self.rate * max(1e-6, min(share / WARM_UP, (1 - share) / (1 - WARM_UP)))
        config = replace(self.run.config, train=replace(self.run.config.train, learning_rate=rate))
        result = optimise(self.run._replace(config=config), self.steps)
        assert result is not None
        if not result.faults:
            decay = min(config.train.ema_decay, (1 + self.steps) / (10 + self.steps))
            update_ema(self.run.ema, self.run.raw, decay)
            self.losses.append(result.losses["mse"])
        self.steps += 1

    def go(self) -> None:
        """Train to the end."""
        begun = time.perf_counter()
        try:
            while self.steps < self.total:
                self.step()
        except FloatingPointError as error:
            print(error, flush=True)
            self.diverged = True
        self.spent = time.perf_counter() - begun

    def facts(self) -> Row:
        """What a line says of the run."""
        images = self.steps * self.run.config.train.batch_size
        loss = float(torch.stack([*self.losses]).mean()) if self.losses else None
        known = {"steps": self.steps, "images": images, "seconds": self.spent}
        return {**known, "mse": loss, "diverged": self.diverged}
