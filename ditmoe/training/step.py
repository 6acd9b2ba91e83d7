"""One optimiser step: micro-batches, losses, gradients, what moves, and what is said of it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.sections import Config, MoEConfig, looks_ahead
from ..data.order import Batch, Batches
from ..data.sets import ImageSet
from ..launch.signals import Signals
from ..model import DiTMoETransformer2DModel
from ..moe import (
    Router,
    Routing,
    balance_loss,
    balanced_bias,
    contrastive_loss,
    domain_loss,
    whole_balance_loss,
    z_loss,
)
from ..objective import Objective, expert_loss
from .distill import Teachers
from .exchange import all_sum
from .feed import Watch
from .health import Evidence, Health
from .matching import Matching
from .parallel import Parallel
from .schedule import anneal, learning_rate
from .sparsity import hidden_units, square_hoyer
from .state import State


class Run(NamedTuple):
    """What a step needs. `raw` is the network, `model` what Accelerate made of it, `ema` its average.

    `domains` is the number of sets that the data are a mixture of, 1 of none; `teachers` is None without any,
    `matching` of a student that no fake follows.
    """

    config: Config
    parallel: Parallel
    raw: DiTMoETransformer2DModel
    model: nn.Module
    ema: nn.Module
    optimizer: Any
    objective: Objective
    batches: Batches
    watch: Watch
    health: Health
    domains: int
    teachers: Teachers | None
    matching: Matching | None

    @property
    def calls(self) -> int:
        """Rows of the network that an image of a batch gives: K of a student of few calls."""
        follows = self.teachers if self.matching is None else self.matching
        return len(follows.levels) - 1 if follows is not None and follows.levels else 1

    @classmethod
    def of(
        cls, config: Config, data: ImageSet, parallel: Parallel, state: State, signals: Signals,
        saved: dict[str, Any], teachers: Teachers | None = None,
    ) -> Self:  # fmt: skip
        """A run that goes on from what a checkpoint has `saved`; {} begins it. The state goes to its device."""
        accelerator, step = parallel.accelerator, int(saved.get("step", 0))
        rank, world = accelerator.process_index, accelerator.num_processes
        model = state.model if parallel.sharded else accelerator.prepare(state.model)  # DDP's on several processes
        optimizer = accelerator.prepare(state.optimizer)
        state.ema.to(accelerator.device)
        batches = Batches(config, data, first_step=step, rank=rank, num_processes=world)
        watch = Watch(accelerator, signals, config.data.max_bad, list(saved.get("bad_images", [])))
        health = Health(accelerator, config.train.max_skipped, saved)
        objective = Objective(config.objective)
        ours = (state.model, model, state.ema, optimizer, objective, batches, watch, health)
        matching = None
        if state.fake is not None and teachers is not None:
            matching = Matching(config, state.fake, teachers, accelerator)
        return cls(config, parallel, *ours, domains=len(data.weights), teachers=teachers, matching=matching)


class StepResult(NamedTuple):
    """One optimiser step."""

    losses: dict[str, Tensor]  # means over its micro-batches, "total" among them
    grad_norm: Tensor  # of the whole gradient, before clipping
    counts: Tensor | None  # (L, E) assignments over all processes
    domains: Tensor | None  # (2, domains) of this process: sums of its samples' "mse", and how many there were
    faults: Sequence[str]  # what was not finite, in words; the step was then skipped


def optimise(run: Run, step: int) -> StepResult | None:
    """One optimiser step; without moving the network where a value is not finite; None when asked to stop before it.

    The rate of a parameter group is the step's, times its `lr_factor` if it has one.
    """
    config, accelerator = run.config, run.parallel.accelerator
    anneal(run.raw, config, step)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config.train, step) * group.get("lr_factor", 1.0)
    sums: dict[str, Tensor] = {}
    assigned, domains, evidence = None, None, []
    ahead: list[Batch] = []
    while looks_ahead(config) and len(ahead) < config.train.accumulation:
        if (batch := run.watch.take(run.batches)) is None:
            return None
        ahead.append(batch)
    given = [_given(run, batch) for batch in ahead]
    whole = _loads_ahead(run, given)
    for i in range(config.train.accumulation):
        batch = ahead[i] if ahead else run.watch.take(run.batches)
        if batch is None or (ahead and run.watch.stopped()):
            return None
        with accelerator.accumulate(run.model):
            losses, routing, counts, own = _forward(run, given[i] if ahead else _given(run, batch), whole)
            accelerator.backward(losses["total"])
        evidence.append(Evidence(batch, losses, routing))
        tokens = run.calls * (batch.x.shape[-1] // config.model.patch_size) ** 2  # of an image, in all its rows
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.detach() / config.train.accumulation
        if counts is not None:
            assigned = counts if assigned is None else assigned + counts
        if own is not None:
            domains = own if domains is None else domains + own
    norm = run.parallel.clip(run.raw, config.train.clip or math.inf)
    faults = run.health.faults(step + 1, evidence, norm, run.raw)
    if not faults:
        run.optimizer.step()
        if assigned is not None and config.moe.bias_rate:
            _move_biases(run.raw, assigned, config.moe, config.train.batch_size * tokens)
    run.optimizer.zero_grad()
    return StepResult(sums, norm, assigned, domains, faults)


class Loads(NamedTuple):
    """Of all processes: (L, E) assignments, and of prototype routers the (L, E, I D) sums of what they saw."""

    counts: Tensor
    sums: Tensor | None


class Given(NamedTuple):
    """What the network is asked of a micro-batch, and what it should say; of few calls, all steps of its images.

    Where a fake follows the student, x_t is the noise that images are drawn of, and the target is not looked at.
    """

    x_0: Tensor
    x_t: Tensor
    t: Tensor
    labels: Tensor | None
    target: Tensor
    domain: Tensor
    indices: Sequence[int]


def _given(run: Run, batch: Batch) -> Given:
    objective, config, accelerator = run.objective, run.config, run.parallel.accelerator
    device, (C, H, W) = accelerator.device, batch.x.shape[1:]
    x_0, domain = batch.x.to(device, non_blocking=True), batch.domain.to(device, non_blocking=True)
    draws = objective.draw(config.seed, batch.indices, (C, H, W))
    t, noise = draws.t.to(device), draws.noise.to(device)
    null, teachers = run.raw.null_label, run.teachers
    labels = None if null is None else torch.where(draws.drop, null, batch.y).to(device)
    if run.matching is not None:
        return Given(x_0, noise, t, labels, x_0, domain, batch.indices)
    if teachers is None or not teachers.levels:
        x_t, target = objective.corrupt(x_0, t, noise)
        return Given(x_0, x_t, t, labels, target, domain, batch.indices)
    with accelerator.autocast():
        x_t, t, target = teachers.steps(noise, labels, domain)
    labels, domain = None if labels is None else labels.repeat(run.calls), domain.repeat(run.calls)
    return Given(x_0, x_t, t, labels, target, domain, batch.indices)


def _said(run: Run, given: Given) -> tuple[Tensor, list[Routing], list[Any], list[Tensor]]:
    """Sample, records of routing, that of several output heads, hidden units of layers that are to be sparse.

    Where a fake follows the student, the sample is the images that it draws, and the records are of all its calls.
    """
    hoyer = run.config.moe.hoyer_weight
    with run.parallel.accelerator.autocast(), hidden_units(run.raw if hoyer else None) as hidden:
        if run.matching is not None:
            return *run.matching.draw(run.model, given.x_t, given.labels), [], hidden
        sample, routing, *heads = run.model(given.x_t, given.t, given.labels, return_dict=False)
    return sample, routing, heads, hidden


def _loads(run: Run, routing: Sequence[Routing]) -> Loads | None:
    """Of records of one call, or of several, one after the other, all of which count."""
    if not routing:
        return None
    layers = len(routing) // run.calls if run.matching is not None else len(routing)

    def over_calls(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([*values]).view(-1, layers, *values[0].shape).sum(dim=0)

    counts: Any = run.parallel.accelerator.reduce(over_calls([record.counts for record in routing]), "sum")
    sums = [record.sums for record in routing if record.sums is not None]
    return Loads(counts, all_sum(over_calls(sums)) if sums else None)


@torch.no_grad()
def _loads_ahead(run: Run, given: Sequence[Given]) -> Loads | None:
    """Of all micro-batches of a step, by a pass of the network over each before the first is learnt from.

    None of none: where there is one, whose own they are, or where no loss is of loads.
    """
    found = [_loads(run, _said(run, one)[1]) for one in given]
    known = [loads for loads in found if loads is not None]
    sums = [loads.sums for loads in known if loads.sums is not None]
    return None if not known else Loads(sum(loads.counts for loads in known), sum(sums) if sums else None)  # type: ignore[arg-type]


def _forward(
    run: Run, given: Given, whole: Loads | None
) -> tuple[dict[str, Tensor], list[Routing], Tensor | None, Tensor | None]:
    """The losses of one micro-batch, the routers' last records, the (L, E) assignments of all processes, and of a
    mixture the (2, domains) sums by set, see `StepResult`. `whole`: the loads of all micro-batches, if several.

    The total is the weighted sum of the other losses. Each layer's own balance loss has the weight, as in the paper;
    "balance", "z" and "contrastive" (of prototype routers) are means over the L layers, so that 1 is even load whatever
    the depth; so is "domain", whose weight is that of the mean. Loads and the means of experts' tokens are those of the
    global batch, of all processes and micro-batches together.
    """
    config, taught = run.config, None
    x_0, x_t, t, labels, target, domain, indices = given
    if run.teachers is not None and run.matching is None and not run.teachers.levels:
        with run.parallel.accelerator.autocast():
            taught = run.teachers.target(x_t, t, labels, domain)
    sample, routing, heads, hidden = _said(run, given)
    share = 0.0 if taught is None else config.distill.weight
    if run.matching is None:
        parts = [(name, 1 - share, value) for name, value in run.objective.losses(sample, target, x_0, x_t, t).items()]
    else:
        followed = run.matching.follow(sample, labels, indices)
        parts = [("match", 1.0, run.matching.loss(sample, labels, indices)), ("fake", 0.0, followed)]
    if taught is not None:
        parts.append(("distill", share, (sample.float() - taught).square().mean()))
    if heads:
        wanted = [(1 - share, target), *([] if taught is None else [(share, taught)])]
        expert: Any = sum(part * expert_loss(heads[0], of) for part, of in wanted if part)
        parts.append(("expert", config.objective.expert_weight, expert))
    if hidden:
        parts.append(("hoyer", config.moe.hoyer_weight, torch.stack([*map(square_hoyer, hidden)]).mean()))
    own = _loads(run, routing)
    if own is not None:
        moe, L = config.moe, len(own.counts)
        counts, sums = (
            own if whole is None else (whole.counts, _all_parts(whole.sums, own.sums, config.train.accumulation))
        )
        calls, together = len(routing) // L, moe.balance_over == "model"
        every = counts.repeat(calls, 1)  # a record of each call
        layers = [whole_balance_loss(routing, counts)] if together else map(balance_loss, routing, every)
        balance = torch.stack([*layers]).mean()
        z = torch.stack([*map(z_loss, routing)]).mean()
        parts += [("balance", L * moe.balance_weight, balance), ("z", L * moe.z_weight, z)]
        if sums is not None:
            layer = zip(routing, sums.repeat(calls, 1, 1), every, strict=True)
            contrastive = torch.stack([contrastive_loss(r, moe.contrastive_temperature, s, c) for r, s, c in layer])
            parts.append(("contrastive", L * moe.contrastive_weight, contrastive.mean()))
        plans = [record.plan for record in routing if record.plan is not None and record.plan.per_row is None]
        if plans:
            parts.append(("unserved", 0.0, torch.stack([plan.unserved for plan in plans]).mean()))
        if moe.domain_weight:
            values = [domain_loss(record, domain, run.domains) for record in routing]
            parts.append(("domain", moe.domain_weight, torch.stack(values).mean()))
    total: Any = sum(weight * value for _, weight, value in parts if weight)  # a weight of 0: logged alone
    domains = None if run.domains == 1 else _by_domain(sample[:, : target.shape[1]], target, domain, run.domains)
    losses = {"total": total, **{name: value for name, _, value in parts}}
    return losses, routing[-len(own.counts) :] if own else [], None if own is None else own.counts, domains


def _all_parts(whole: Tensor | None, own: Tensor | None, parts: int) -> Tensor | None:
    """The whole's value, with the gradient of a micro-batch's part of it; gradients are means over so many parts."""
    return None if whole is None or own is None else whole + parts * (own - own.detach())


@torch.no_grad()
def _by_domain(sample: Tensor, target: Tensor, domain: Tensor, num_domains: int) -> Tensor:
    """(2, domains) float32: by set, the sum of its samples' mean squared errors, and how many there are."""
    errors = (sample.float() - target).square().mean(dim=(1, 2, 3))
    of_set = F.one_hot(domain, num_domains).float()  # (n, domains)
    return torch.stack([errors @ of_set, of_set.sum(dim=0)])


@torch.no_grad()
def _move_biases(model: nn.Module, counts: Tensor, moe: MoEConfig, tokens: int) -> None:
    """Of every router, by the (L, E) assignments of a step's tokens; one that all layers share has the first's."""
    routers = [module for module in model.modules() if isinstance(module, Router) and module.expert_bias is not None]
    wanted = moe.top_k * tokens / (moe.num_experts + moe.null_experts) if moe.rule.has_tau else None
    for router, load in zip(routers, counts, strict=moe.scope == "layer"):
        assert router.expert_bias is not None
        router.expert_bias.copy_(balanced_bias(router.expert_bias, load, moe.bias_rate, wanted))
