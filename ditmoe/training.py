"""The training loop, as functions over an Accelerator. No sampler and no metric is known here.

Data, noise, times and dropped labels are functions of (seed, running number of the sample), the learning rate of the
step: a run is resumed from weights, moments and the step alone, and equals the undisturbed run bit for bit.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from . import checkpoint, pipeline, plan, ranks, run_folder
from .config import Config, save, to_dict
from .data import ImageSet, fingerprint, open_data, pixel_variance
from .facts import read_rows
from .health import Evidence, Health, Watch
from .metrics import Log, StepResult, learning_rate
from .model import DiTMoETransformer2DModel, build, count_parameters
from .moe import MoELayer, Routing, balanced_bias
from .objective import Losses, Objective
from .parallel import Parallel
from .saving import Saving
from .signals import Interrupted, Signals
from .state import State, new_state, newest, num_classes, resume, update_ema
from .stream import Batch, Batches, micro_batch_size

OnSample = Callable[[int, Any], None]


def open_images(config: Config) -> ImageSet:
    """The training images, on every process of the launch: a ValueError of one of them is raised on all."""
    size, channels = config.model.sample_size, config.model.in_channels
    accelerator = ranks.launched(config.train)  # before anything that one of them may find wrong
    return ranks.agreed(accelerator, lambda: open_data(config.data, size=size, channels=channels))


def train(config: Config, data: ImageSet, on_sample: OnSample | None = None, argv: Sequence[str] = ()) -> bool:
    """Train until `max_steps`, from the newest checkpoint of the run folder when there is one.

    Writes config.json, command.txt, metrics.jsonl, checkpoints/ and, at the end, model/ into the run folder.

    Args:
        config: The run.
        data: Its training images.
        on_sample: Called on the main process every `train.sample_every` steps with (step, pipeline of the averaged
            weights), while the others wait.
        argv: The command line, kept in command.txt.

    Returns:
        False when there was nothing left to do.

    Raises:
        ValueError: The run folder is in use, belongs to another configuration, or holds no whole checkpoint; too many
            images cannot be used; the processes were started with other options, or see other images.
        Interrupted: SIGTERM, SIGINT or SIGUSR1 came; the run was saved.
        FloatingPointError: More than `train.max_skipped` steps in a row were not finite.
        OSError: A checkpoint that must be written could not be.
    """
    accelerator = ranks.launched(config.train)
    images = fingerprint(data)
    ranks.check_alike(accelerator, {**_common(config), "images": images})
    micro_batch_size(config.train, accelerator.num_processes)  # refused before anything is written
    parallel = Parallel(accelerator, config.parallel, config.moe.num_experts)
    state = new_state(config, num_classes(config, data), parallel)
    pipeline.assemble(state.ema, config, data.id2label)  # a sampler that does not fit is refused too
    with ExitStack() as stack:
        ranks.decided_by_first(accelerator, lambda: stack.enter_context(run_folder.locked(config)))
        return _train(config, data, on_sample, argv, parallel, state, images)


def _common(config: Config) -> dict[str, Any]:
    """What has to be alike on all processes: their machines may differ in paths and in numbers of readers."""
    options = to_dict(config)
    own = ("path", "vae", "download", "num_workers")
    options["data"] = {name: value for name, value in options["data"].items() if name not in own}
    split = config.parallel.shard or config.parallel.experts > 1  # then all of them write into the run folder
    return {name: value for name, value in options.items() if name != "plan" and (split or name != "out")}


def _train(
    config: Config,
    data: ImageSet,
    on_sample: OnSample | None,
    argv: Sequence[str],
    parallel: Parallel,
    state: State,
    images: str,
) -> bool:
    """`train`, in a run folder that is ours; `images` is the data's fingerprint."""
    accelerator = parallel.accelerator
    facts = {
        "data": images,
        "precision": ranks.resolve_precision(config.train.precision, accelerator.device),
        "num_processes": accelerator.num_processes,
    }
    variance = pixel_variance(data, config.seed)
    found = newest(config.out / "checkpoints", parallel)
    saved = {} if found is None else ranks.agreed(accelerator, lambda: resume(found, state, facts, parallel))
    first_step = int(saved.get("step", 0))
    last_step = max(first_step, config.max_steps)
    exported = ranks.decided_by_first(accelerator, lambda: pipeline.trained_steps(config.out / "model"))
    if exported is not None and (exported == first_step == last_step if saved else exported >= last_step):
        return False
    if not saved:
        ranks.decided_by_first(accelerator, lambda: _check_begins(config, exported))
    if accelerator.is_main_process:
        _open_folder(config, argv)
        if saved:
            (config.out / checkpoint.MARK).touch()
    _announce(config, data, accelerator, facts["precision"], first_step)
    with (
        Signals() as signals,
        Log(config, first_step, accelerator) as log,
        Saving(config, data, parallel, state, variance, first_step if saved else -1) as saving,
        closing(Run.of(config, data, parallel, state, signals, saved)) as run,
    ):
        show = None if on_sample is None else partial(_show, on_sample, run, saving, log)
        _loop(run, state, facts, saving, log, show, first_step)
        saving.export(last_step)
        if ranks.total(accelerator, [float(bool(signals.received))])[0]:
            raise Interrupted(f"stopped after step {last_step}, all saved; the same command makes the page")
    return True


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


def _loop(
    run: Run,
    state: State,
    facts: dict[str, Any],
    saving: Saving,
    log: Log,
    show: Callable[[int], None] | None,
    first_step: int,
) -> None:
    """Step after step until `max_steps`; saves, and shows samples where asked for. Raises Interrupted when stopped."""
    train, max_steps = run.config.train, run.config.max_steps

    def keep(step: int, *, wait: bool) -> None:
        saving.checkpoint(step, {**facts, **run.health.facts, "bad_images": list(run.watch.bad)}, wait=wait)

    every, due = train.sample_every if show else 0, False
    if show and every and 0 < first_step < max_steps and first_step % every == 0:
        show(first_step)  # it may have been cut short
    for step in range(first_step, max_steps):
        try:
            result = _optimise(run, step)
        except RuntimeError as error:
            if "DataLoader worker" in str(error):
                raise RuntimeError(f"{error} It was reading one of: {run.batches.awaited()}") from error
            raise
        if result is None:
            keep(step, wait=True)
            raise Interrupted(f"stopped at step {step} and saved; the same command goes on")
        if not result.faults:
            update_ema(state.ema, state.model, min(train.ema_decay, (1 + step) / (10 + step)))
        done = step + 1
        log.row(done, result)
        due = due or done % train.checkpoint_every == 0
        if done == max_steps or (due and not run.health.in_a_row):
            keep(done, wait=done == max_steps)  # while steps are skipped, what went before them stays
            due = False
        if show and every and done % every == 0:
            show(done)


def _show(on_sample: OnSample, run: Run, saving: Saving, log: Log, step: int) -> None:
    """The samples of a step, made by the first process from the averaged weights."""
    pipe = saving.pipeline(step)

    def draw() -> None:
        try:
            on_sample(step, pipe)
        except OSError as error:
            if run.config.train.on_save_error == "stop":
                raise
            print(f"warning: the samples of step {step} could not be written ({error})", flush=True)
        except FloatingPointError as error:
            print(f"warning: there are no samples of step {step} ({error})", flush=True)

    with log.paused():
        ranks.first_works(run.parallel.accelerator, draw, run.watch.signals, f"sample-{step}")


def _check_begins(config: Config, exported: int | None) -> None:
    """Refuse to begin again where a run has had checkpoints: they are gone.

    Raises:
        ValueError: The run folder holds a model, or says that something was saved.
    """
    if exported or (config.out / checkpoint.MARK).exists():
        steps = exported or max((row["step"] for row in read_rows(config.out / "metrics.jsonl")), default="some")
        raise ValueError(
            f"{config.out} has been trained for {steps} steps, but {config.out / 'checkpoints'} holds no checkpoint; "
            f"restore it, or move {config.out} away to start again"
        )


def _open_folder(config: Config, argv: Sequence[str]) -> None:
    for leftover in config.out.glob("model.tmp-*"):  # of an export that was killed
        shutil.rmtree(leftover)
    save(config, config.out / "config.json")
    (config.out / "index.html").unlink(missing_ok=True)  # it belongs to an earlier state of the run
    with (config.out / "command.txt").open("a") as file:
        file.write(shlex.join(["python", *argv]) + "\n")


def describe(config: Config) -> str:
    """The configuration as JSON and the parameter counts; allocates nothing, reads no images."""
    with torch.device("meta"):
        known = {"digits": 10, "fashion": 10}.get(config.data.name, 0)
        model = build(config, known if config.model.num_classes is None else config.model.num_classes)
    pipeline.assemble(model, config, {})  # a sampler that does not fit is refused here too
    total, activated = count_parameters(model)
    counts = f"{total / 1e6:.2f} M parameters, {activated / 1e6:.2f} M activated by a token"
    if config.model.num_classes is None and not known:
        counts += ", without the label table, whose size the data set decides"
    if config.plan.devices:
        counts += "\n" + plan.table(config, model, micro_batch_size(config.train, config.plan.devices))
    return json.dumps(to_dict(config), indent=2) + "\n" + counts


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Set the rate of every parameter group, times its `lr_factor` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)


# ------------------------------------------------------------------------------------------- one step


def _optimise(run: Run, step: int) -> StepResult | None:
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


def _ways(config: Config) -> str:
    """How the model is split, in words; nothing where it is not."""
    experts, shard = config.parallel.experts, config.parallel.shard
    ways = [*([f"experts split over {experts}"] if experts > 1 else []), *(["the rest sharded"] if shard else [])]
    return "".join(f"{way}, " for way in ways)


def _announce(config: Config, data: ImageSet, accelerator: Accelerator, precision: str, first_step: int) -> None:
    with torch.device("meta"):
        total, activated = count_parameters(build(config, num_classes(config, data)))
    accelerator.print(f"data: {data.source}")
    accelerator.print(f"model: {total / 1e6:.2f} M parameters, {activated / 1e6:.2f} M activated by a token")
    accelerator.print(
        f"training on {accelerator.num_processes} process(es), {accelerator.device.type}, {precision}, "
        f"{_ways(config)}into {config.out}"
    )
    E, processes = config.moe.num_experts if config.moe.blocks != "none" else 0, accelerator.num_processes
    if config.parallel.shard and config.parallel.experts == 1 and 0 < E < processes:
        accelerator.print(
            f"note: {E} stacked experts in slices over {processes} processes are padded to as many as there are "
            f"processes; --parallel.experts beside --parallel.shard splits them better"
        )
    if first_step:
        accelerator.print(f"resumed at step {first_step} of {config.max_steps}")
    decay = config.train.decay_steps
    if decay and config.max_steps < decay:
        accelerator.print(
            f"note: this run stops at step {config.max_steps}, but the learning rate decays until {decay}"
        )
