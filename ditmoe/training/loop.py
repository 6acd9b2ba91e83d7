"""The training loop, as functions over an Accelerator. No sampler and no metric is known here.

Data, noise, times and dropped labels are functions of (seed, running number of the sample), the learning rate of the
step: a run is resumed from weights, moments and the step alone, and equals the undisturbed run bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from .. import pipeline
from ..config.file import to_dict
from ..config.sections import Config, micro_batch_size
from ..data.open import open_data, pixel_variance
from ..data.sets import ImageSet
from ..launch import agree, start
from ..launch.signals import Interrupted, Signals
from ..model import build, count_parameters
from ..run_folder import place
from ..run_folder.checkpoint import check_begins
from ..run_folder.log import Log
from .parallel import Parallel
from .saving import Saving, newest, resume
from .state import State, new_state, num_classes, update_ema
from .step import Run, log_row, optimise

OnSample = Callable[[int, Any], None]


def open_images(config: Config) -> ImageSet:
    """The training images, on every process of the launch: a ValueError of one of them is raised on all."""
    size, channels = config.model.sample_size, config.model.in_channels
    accelerator = start.launched(config.train)  # before anything that one of them may find wrong
    return agree.agreed(accelerator, lambda: open_data(config.data, size=size, channels=channels))


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
    accelerator = start.launched(config.train)
    images = data.fingerprint()
    agree.check_alike(accelerator, {**_common(config), "images": images})
    micro_batch_size(config.train, accelerator.num_processes)  # refused before anything is written
    parallel = Parallel(accelerator, config.parallel, config.moe.num_experts)
    state = new_state(config, num_classes(config, data), parallel)
    pipeline.assemble(state.ema, config, data.id2label, latents=data.normalization)  # refuses what does not fit, too
    with ExitStack() as stack:
        agree.decided_by_first(accelerator, lambda: stack.enter_context(place.locked(config)))
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
    precision = start.resolve_precision(config.train.precision, accelerator.device)
    facts = {"data": images, "precision": precision, "num_processes": accelerator.num_processes}
    variance = pixel_variance(data, config.seed)
    found = newest(config.out / place.CHECKPOINTS, parallel)
    saved = {} if found is None else agree.agreed(accelerator, lambda: resume(found, state, facts, parallel))
    first_step = int(saved.get("step", 0))
    last_step = max(first_step, config.max_steps)
    exported = agree.decided_by_first(accelerator, lambda: pipeline.trained_steps(config.out / place.MODEL))
    if exported is not None and (exported == first_step == last_step if saved else exported >= last_step):
        return False
    if not saved:
        agree.decided_by_first(accelerator, lambda: check_begins(config, exported))
    if accelerator.is_main_process:
        place.open_folder(config, argv, goes_on=bool(saved))
    _announce(config, data, accelerator, precision, first_step)
    with (
        Signals() as signals,
        Log(config, first_step, shown=accelerator.is_main_process) as log,
        Saving(config, data, parallel, state, variance, first_step if saved else -1) as saving,
        closing(Run.of(config, data, parallel, state, signals, saved)) as run,
    ):
        show = on_sample and partial(_show, on_sample, run, saving, log)
        _loop(run, state, facts, saving, log, show, first_step)
        saving.export(last_step)
        if agree.total(accelerator, [float(bool(signals.received))])[0]:
            raise Interrupted(f"stopped after step {last_step}, all saved; the same command makes the page")
    return True


def _loop(
    run: Run, state: State, facts: dict[str, Any], saving: Saving, log: Log, show: partial[None] | None, first_step: int
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
            result = optimise(run, step)
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
        if log.count(done) or result.faults:
            log.write(log_row(run, done, result))
        due = due or done % train.checkpoint_every == 0
        if done == max_steps or (due and not run.health.in_a_row):
            keep(done, wait=done == max_steps)  # while steps are skipped, what went before them stays
            due = False
        if show and every and done % every == 0:
            show(done)


def _show(on_sample: OnSample, run: Run, saving: Saving, log: Log, step: int) -> None:
    """The samples of a step, made by the first process from the averaged weights."""
    pipe = saving.pipeline(step)
    if pipe is not None:
        pipe.to(run.parallel.accelerator.device)

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
        agree.first_works(run.parallel.accelerator, draw, run.watch.signals, f"sample-{step}")


def _announce(config: Config, data: ImageSet, accelerator: Accelerator, precision: str, first_step: int) -> None:
    with torch.device("meta"):
        total, activated = count_parameters(build(config, num_classes(config, data)))
    size = f"{total / 1e6:.2f} M parameters, {activated / 1e6:.2f} M activated by a token"
    accelerator.print(f"data: {data.source}\nmodel: {size}")
    split, processes = config.parallel, accelerator.num_processes
    ways = (f"experts split over {split.experts}, " if split.experts > 1 else "") + "the rest sharded, " * split.shard
    where = f"{processes} process(es), {accelerator.device.type}, {precision}"
    accelerator.print(f"training on {where}, {ways}into {config.out}")
    E = config.moe.num_experts if config.moe.blocks != "none" else 0
    if split.shard and split.experts == 1 and 0 < E < processes:
        accelerator.print(
            f"note: {E} stacked experts in slices over {processes} processes are padded to as many as there are "
            f"processes; --parallel.experts beside --parallel.shard splits them better"
        )
    if first_step:
        accelerator.print(f"resumed at step {first_step} of {config.max_steps}")
    if (decay := config.train.decay_steps) and config.max_steps < decay:
        accelerator.print(
            f"note: this run stops at step {config.max_steps}, but the learning rate decays until {decay}"
        )
