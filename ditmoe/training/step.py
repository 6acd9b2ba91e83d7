"""One optimiser step: micro-batches, losses, gradients, and what moves."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config.sections import Config
from ..data.order import Batch, Batches
from ..data.sets import ImageSet
from ..launch.signals import Signals
from ..model import DiTMoETransformer2DModel
from ..moe import MoELayer, Routing, balanced_bias
from ..objective import Losses, Objective
from ..run_folder.log import StepResult, learning_rate
from .feed import Watch
from .health import Evidence, Health
from .parallel import Parallel
from .state import State


class Run(NamedTuple):
    """What a step needs. `raw` is the network, `model` what Accelerate made of it."""

    config: Config
    parallel: Parallel
    raw: DiTMoETransformer2DModel
    model: nn.Module
    optimizer: Any
    objective: Objective
    batches: Batches
    watch: Watch
    health: Health

    @classmethod
    def of(
        cls, config: Config, data: ImageSet, parallel: Parallel, state: State, signals: Signals, saved: dict[str, Any]
    ) -> Run:
        """A run that goes on from what a checkpoint has `saved`; {} begins it. The state goes to its device."""
        accelerator, step = parallel.accelerator, int(saved.get("step", 0))
        rank, world = accelerator.process_index, accelerator.num_processes
        model, optimizer = parallel.prepare(state.model, state.optimizer)
        state.ema.to(accelerator.device)
        skipped, in_a_row = (int(saved.get(name, 0)) for name in ("skipped_steps", "skipped_in_a_row"))
        return cls(
            config=config,
            parallel=parallel,
            raw=state.model,
            model=model,
            optimizer=optimizer,
            objective=Objective(config.objective),
            batches=Batches(config, data, first_step=step, rank=rank, num_processes=world),
            watch=Watch(accelerator, signals, config.data.max_bad, list(saved.get("bad_images", []))),
            health=Health(accelerator, config.train.max_skipped, skipped, in_a_row),
        )

    def close(self) -> None:
        """End the processes that read data."""
        self.batches.close()


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Set the rate of every parameter group, times its `lr_factor` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)


def optimise(run: Run, step: int) -> StepResult | None:
    """One optimiser step; without moving anything where a value is not finite; None when asked to stop before it."""
    config, accelerator = run.config, run.parallel.accelerator
    set_learning_rate(run.optimizer, learning_rate(config.train, step))
    sums: dict[str, Tensor] = {}
    assigned: Tensor | None = None
    evidence = []
    for _ in range(config.train.accumulation):
        batch = run.watch.take(run.batches)
        if batch is None:
            return None
        with accelerator.accumulate(run.model):
            losses, routing, counts = _forward(run, batch)
            accelerator.backward(losses.total)
        evidence.append(Evidence(batch, losses, routing))
        for name, value in losses._asdict().items():
            if value is not None:
                sums[name] = sums.get(name, 0.0) + value.detach() / config.train.accumulation
        if counts is not None:
            assigned = counts if assigned is None else assigned + counts
    norm = run.parallel.clip(run.raw, config.train.clip or math.inf)
    faults = run.health.faults(step + 1, evidence, norm, run.raw)
    if not faults:
        run.optimizer.step()
        if assigned is not None and config.moe.bias_rate:
            _move_biases(run.raw, assigned, config.moe.bias_rate)
    run.optimizer.zero_grad()
    return StepResult(sums, norm, assigned, faults, run.health.skipped)


def _forward(run: Run, batch: Batch) -> tuple[Losses, list[Routing], Tensor | None]:
    """The losses of one micro-batch, the routers' records, and the (L, E) assignments of all processes."""
    objective, config, accelerator = run.objective, run.config, run.parallel.accelerator
    device = accelerator.device
    x_0 = batch.x.to(device, non_blocking=True)
    C, H, W = x_0.shape[1:]
    draws = objective.draw(config.seed, batch.indices, (C, H, W))
    t, noise = draws.t.to(device), draws.noise.to(device)
    labels = None
    if run.raw.null_label is not None:
        labels = torch.where(draws.drop, run.raw.null_label, batch.y).to(device)
    x_t, target = objective.corrupt(x_0, t, noise)
    with accelerator.autocast():
        sample, routing = run.model(x_t, t, labels, return_dict=False)
    counts = _global_counts(accelerator, routing)
    losses = objective.losses(sample, routing, target, x_0, x_t, t, config.moe, counts)
    return losses, routing, counts


def _global_counts(accelerator: Accelerator, routing: list[Routing]) -> Tensor | None:
    if not routing:
        return None
    counts = torch.stack([record.counts for record in routing])  # (L, E)
    total: Tensor = accelerator.reduce(counts, "sum") if accelerator.num_processes > 1 else counts
    return total


@torch.no_grad()
def _move_biases(model: nn.Module, counts: Tensor, rate: float) -> None:
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    for layer, load in zip(layers, counts, strict=True):
        bias = layer.router.expert_bias
        assert bias is not None
        bias.copy_(balanced_bias(bias, load, rate))
