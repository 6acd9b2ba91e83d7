"""The training loop, as functions over an Accelerator. No sampler and no metric is known here.

Data, noise, times and dropped labels are functions of (seed, running number of the sample), the learning rate of the
step: a run is resumed from weights, moments and the step alone, and equals the undisturbed run bit for bit.
"""

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
from ..run_folder.checkpoint import check_begins, newest_first
from ..run_folder.log import Log
from . import distill, matching, muon
from .parallel import Parallel
from .row import log_row
from .saving import Saving, begin, newest, opened, resume
from .state import new_state, num_classes, update_ema
from .step import Run, optimise
from .tracking import Tracking, check_tracker

OnSample = Callable[[int, Any], None]


def open_images(config: Config) -> ImageSet:
    """The training images, on every process of the launch: a ValueError of one of them is raised on all."""
    size, channels = config.model.sample_size, config.model.in_channels
    check_tracker(config.train)
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
        ValueError: The run folder is in use, belongs to another configuration, or holds no whole checkpoint; what
            it is to begin with is no model, or another one; too many images cannot be used; the processes were started
            with other options, or see other images.
        Interrupted: SIGTERM, SIGINT or SIGUSR1 came; the run was saved.
        FloatingPointError: More than `train.max_skipped` steps in a row were not finite.
        OSError: A checkpoint that must be written could not be.
    """
    check_tracker(config.train)
    accelerator = start.launched(config.train, tracked_in=config.out)
    agree.agreed(accelerator, data.check_labels)
    images, processes = data.fingerprint(), accelerator.num_processes
    agree.check_alike(accelerator, {**_common(config), "images": images})
    micro_batch_size(config.train, processes)  # refused before anything is written
    if config.moe.capacity_start is not None and config.train.decay_steps is None:
        raise ValueError("moe.capacity_start needs --train.decay-steps N, the step at which capacity ends its way")
    parallel = Parallel(accelerator, config.parallel, config.moe.num_experts)
    begun = bool(newest_first(config.out / place.CHECKPOINTS))
    state = new_state(config, num_classes(config, data), parallel, begun)
    pipeline.assemble(state.ema, config, data.id2label, latents=data.normalization)  # refuses what does not fit, too

    def teachers() -> distill.Teachers | None:
        made, device, named = state.model, accelerator.device, config.distill.teachers
        return agree.agreed(accelerator, lambda: distill.Teachers(config, data, made, device) if named else None)

    taught = None if begun else teachers()
    with ExitStack() as stack:
        agree.decided_by_first(accelerator, lambda: stack.enter_context(place.locked(config)))
        precision = start.resolve_precision(config.train.precision, accelerator.device)
        facts = {"data": images, "precision": precision, "num_processes": processes, **distill.facts(config)}
        variance = pixel_variance(data, config.seed)
        found = newest(config.out / place.CHECKPOINTS, parallel)
        begins = None if found is None else agree.agreed(accelerator, lambda: opened(found, facts))
        saved = {} if begins is None else begins.values
        first, last = int(saved.get("step", 0)), max(int(saved.get("step", 0)), config.max_steps)
        exported = agree.decided_by_first(accelerator, lambda: pipeline.trained_steps(config.out / place.MODEL))
        if exported is not None and (exported == first == last if saved else exported >= last):
            return False
        taught = teachers() if begun else taught  # a finished run needs none
        if config.distill.fake_steps:
            assert taught is not None, "config refuses it"
            state = state._replace(fake=matching.new_fake(config, taught.pipes[0].transformer))
        if begins is not None:
            agree.agreed(accelerator, partial(resume, begins, state, facts, parallel))
            begins = None  # which would keep its files
        else:
            agree.decided_by_first(accelerator, lambda: check_begins(config, exported))
            agree.agreed(accelerator, lambda: begin(config.train.init, state, parallel))
        if accelerator.is_main_process:
            place.open_folder(config, argv, goes_on=bool(saved))
        _announce(config, data, accelerator, precision, first)
        signals = stack.enter_context(Signals())
        tracking = stack.enter_context(closing(Tracking(accelerator, config, first)))
        log = stack.enter_context(Log(config, first, shown=accelerator.is_main_process, track=tracking.row))
        saving = Saving(config, data, parallel, state, variance, first if saved else -1)
        stack.push(saving.__exit__)
        run = Run.of(config, data, parallel, state, signals, saved, taught)
        stack.enter_context(closing(run.batches))
        _loop(run, facts, saving, log, on_sample and _tracked(on_sample, config, tracking), first)
        saving.export(last)
        if agree.total(accelerator, [float(bool(signals.received))])[0]:
            raise Interrupted(f"stopped after step {last}, all saved; the same command makes the page")
    return True


def _common(config: Config) -> dict[str, Any]:
    """What has to be alike on all processes: their machines may differ in paths and in numbers of readers."""
    options = to_dict(config)
    for name in ("path", "mixture", "vae", "download", "num_workers"):
        del options["data"][name]
    options["distill"]["teachers"] = len(config.distill.teachers)
    split = config.parallel.shard or config.parallel.experts > 1  # then all of them write into the run folder
    return {name: value for name, value in options.items() if name != "plan" and (split or name != "out")}


def _loop(run: Run, facts: dict[str, Any], saving: Saving, log: Log, on_sample: OnSample | None, first: int) -> None:
    """Step after step until `max_steps`; saves, and shows samples where asked for. Raises Interrupted when stopped."""
    train, last, due = run.config.train, run.config.max_steps, False

    def keep(step: int, *, wait: bool) -> None:
        saving.checkpoint(step, {**facts, **run.health.facts, "bad_images": list(run.watch.bad)}, wait=wait)

    def show(step: int) -> None:
        if on_sample and train.sample_every and step % train.sample_every == 0:
            _show(on_sample, run, saving, log, step)

    if 0 < first < last:
        show(first)  # it may have been cut short
    for step in range(first, last):
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
            update_ema(run.ema, run.raw, min(train.ema_decay, (1 + step) / (10 + step)))
        done = step + 1
        if log.count(done) or result.faults:
            log.write(log_row(run, done, result))
        due = due or done % train.checkpoint_every == 0
        if done == last or (due and not run.health.in_a_row):
            keep(done, wait=done == last)  # while steps are skipped, what went before them stays
            due = False
        show(done)


def _tracked(on_sample: OnSample, config: Config, tracking: Tracking) -> OnSample:
    """The same, and the tracker gets the grid that it has written."""

    def show(step: int, pipe: Any) -> None:
        on_sample(step, pipe)
        tracking.picture(config.out / place.PROGRESS / f"step-{step:06d}.png", step)

    return show


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
        net = build(config, num_classes(config, data))
    total, activated = count_parameters(net)
    say, split, processes = accelerator.print, config.parallel, accelerator.num_processes
    for sentence in start.overruled(config.train, precision):
        say(sentence)
    say(f"data: {data.source}")
    say(f"model: {total / 1e6:.2f} M parameters, {activated / 1e6:.2f} M activated by a token")
    ways = (f"experts split over {split.experts}, " if split.experts > 1 else "") + "the rest sharded, " * split.shard
    say(f"training on {processes} process(es), {accelerator.device.type}, {precision}, {ways}into {config.out}")
    if config.train.optimizer == "muon":
        moved, count, operations = muon.work(net, experts=config.train.muon_on == "all")
        say(f"muon: {moved / 1e6:.2f} M of them in {count:,} matrices, {operations / 1e9:.3g} GFLOP a step more")
    elif config.train.muon_factor != 1:  # of a preset, say
        say(f"note: train.muon_factor {config.train.muon_factor} changes nothing without --train.optimizer muon")
    E = config.moe.num_experts if config.moe.blocks != "none" else 0
    if split.shard and split.experts == 1 and 0 < E < processes:
        say(
            f"note: {E} stacked experts in slices over {processes} processes are padded to as many as there are "
            f"processes; --parallel.experts beside --parallel.shard splits them better"
        )
    if first_step:
        say(f"resumed at step {first_step} of {config.max_steps}")
    if (decay := config.train.decay_steps) and config.max_steps < decay:
        say(f"note: this run stops at step {config.max_steps}, but the learning rate decays until {decay}")
