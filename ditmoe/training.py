"""The training loop, as functions over an Accelerator. No sampler and no metric is known here.

Data, noise, times and dropped labels are functions of (seed, running number of the sample), the learning rate of the
step: a run is resumed from weights, moments and the step alone, and equals the undisturbed run bit for bit.
"""

from __future__ import annotations

import gc
import json
import math
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from . import pipeline
from .config import Config, TrainConfig, save, to_dict
from .data import ImageSet, fingerprint, pixel_variance
from .metrics import Log, StepResult, learning_rate
from .model import DiTMoETransformer2DModel, build, count_parameters
from .moe import MoELayer, Routing, balanced_bias
from .objective import Losses, Objective
from .state import State, check_folder, new_state, num_classes, resume, save_checkpoint, update_ema
from .stream import Batch, stream

OnSample = Callable[[int, pipeline.DiTMoEPipeline], None]


class Interrupted(Exception):  # noqa: N818 - not an error: the run was saved and can go on
    """A signal asked the run to stop; it was saved first."""


def train(config: Config, data: ImageSet, on_sample: OnSample | None = None, argv: Sequence[str] = ()) -> bool:
    """Train until `max_steps`, from the newest checkpoint of the run folder when there is one.

    Writes config.json, command.txt, metrics.jsonl, checkpoints/ and, at the end, model/ into the run folder.

    Args:
        config: The run.
        data: Its training images.
        on_sample: Called on the main process every `train.sample_every` steps with (step, pipeline of the averaged
            weights).
        argv: The command line, kept in command.txt.

    Returns:
        False when there was nothing left to do.

    Raises:
        ValueError: The run folder belongs to another configuration, or holds no whole checkpoint.
        Interrupted: SIGTERM or SIGINT came; the run was saved.
    """
    accelerator = _accelerator(config.train)
    state = new_state(config, num_classes(config, data))
    pipeline.assemble(state.ema, config, data.id2label)  # a sampler that does not fit is refused before training
    check_folder(config)
    facts = {
        "data": fingerprint(data),
        "precision": resolve_precision(config.train.precision, accelerator.device),
        "num_processes": accelerator.num_processes,
    }
    variance = pixel_variance(data, config.seed)
    first_step = resume(config.out / "checkpoints", state, facts)
    if first_step >= config.max_steps and (config.out / "model").exists():
        return False
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        config.out.mkdir(parents=True, exist_ok=True)
        save(config, config.out / "config.json")
        (config.out / "index.html").unlink(missing_ok=True)  # it belongs to an earlier state of the run
        with (config.out / "command.txt").open("a") as file:
            file.write(shlex.join(["python", *argv]) + "\n")
    batches = stream(
        config,
        data,
        first_step=first_step,
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    _announce(config, state.model, data, accelerator, first_step)
    model, optimizer = accelerator.prepare(state.model, state.optimizer)
    state.ema.to(accelerator.device)
    objective = Objective(config.objective)
    with Log(config, first_step, accelerator) as log, _Signals() as signals:
        for step in range(first_step, config.max_steps):
            set_learning_rate(optimizer, learning_rate(config.train, step))
            result = _optimise(accelerator, model, optimizer, state.model, objective, batches, config)
            update_ema(state.ema, state.model, min(config.train.ema_decay, (1 + step) / (10 + step)))
            done = step + 1
            log.row(done, result)
            stop = _any_process(accelerator, signals.received)
            if done % config.train.checkpoint_every == 0 or done == config.max_steps or stop:
                _save(config, state, done, accelerator, result, facts)
            if stop and done < config.max_steps:
                raise Interrupted(f"stopped at step {done} and saved; the same command goes on")
            every = config.train.sample_every
            if on_sample and every and done % every == 0 and accelerator.is_main_process:
                with log.paused():
                    on_sample(done, pipeline.assemble(state.ema, config, data.id2label, variance))
    if accelerator.is_main_process:
        pipeline.save(pipeline.assemble(state.ema.cpu(), config, data.id2label, variance), config.out / "model")
    accelerator.wait_for_everyone()
    return True


def shutdown() -> None:
    """Leave the process group, if there is one: gloo may abort at interpreter exit otherwise (torch 2.14)."""
    gc.collect()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
    return json.dumps(to_dict(config), indent=2) + "\n" + counts


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Set the rate of every parameter group, times its `lr_factor` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "auto" is bf16 where bfloat16 products are fast (recent GPUs, CPUs with AVX-512 BF16 or AMX), else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and fast else "fp32"


def _save(
    config: Config, state: State, step: int, accelerator: Accelerator, result: StepResult, facts: dict[str, Any]
) -> None:
    if not math.isfinite(float(result.grad_norm)):
        raise FloatingPointError(f"the gradient norm is {float(result.grad_norm)} at step {step}: nothing was saved")
    if accelerator.is_main_process:
        save_checkpoint(config, state, step, facts)
    accelerator.wait_for_everyone()


# ------------------------------------------------------------------------------------------- one step


def _optimise(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    raw: DiTMoETransformer2DModel,
    objective: Objective,
    batches: Iterator[Batch],
    config: Config,
) -> StepResult:
    sums: dict[str, Tensor] = {}
    assigned: Tensor | None = None
    for _ in range(config.train.accumulation):
        with accelerator.accumulate(model):
            losses, counts = _forward(accelerator, model, objective, next(batches), config)
            accelerator.backward(losses.total)
        for name, value in losses._asdict().items():
            if value is not None:
                sums[name] = sums.get(name, 0.0) + value.detach() / config.train.accumulation
        if counts is not None:
            assigned = counts if assigned is None else assigned + counts
    norm = accelerator.clip_grad_norm_(model.parameters(), config.train.clip or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    if assigned is not None and config.moe.bias_rate:
        _move_biases(raw, assigned, config.moe.bias_rate)
    return StepResult(sums, norm, assigned)


def _forward(
    accelerator: Accelerator, model: nn.Module, objective: Objective, batch: Batch, config: Config
) -> tuple[Losses, Tensor | None]:
    """The losses of one micro-batch and the (L, E) assignments of all processes."""
    x_0 = batch.x.to(accelerator.device, non_blocking=True)
    C, H, W = x_0.shape[1:]
    draws = objective.draw(config.seed, batch.indices, (C, H, W))
    t, noise = draws.t.to(x_0.device), draws.noise.to(x_0.device)
    labels = None
    null = accelerator.unwrap_model(model).null_label
    if null is not None:
        labels = torch.where(draws.drop, null, batch.y).to(x_0.device)
    x_t, target = objective.corrupt(x_0, t, noise)
    sample, routing = model(x_t, t, labels, return_dict=False)
    counts = _global_counts(accelerator, routing)
    losses = objective.losses(sample, routing, target, x_0, x_t, t, config.moe, counts)
    return losses, counts


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


# --------------------------------------------------------------------------------- processes, signals, log


def _accelerator(train: TrainConfig) -> Accelerator:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(train.precision, device)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if precision == "bf16" else "no",
        gradient_accumulation_steps=train.accumulation,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],  # one process samples, the others wait
    )


def _announce(
    config: Config,
    model: DiTMoETransformer2DModel,
    data: ImageSet,
    accelerator: Accelerator,
    first_step: int,
) -> None:
    total, activated = count_parameters(model)
    accelerator.print(f"data: {data.source}")
    accelerator.print(f"model: {total / 1e6:.2f} M parameters, {activated / 1e6:.2f} M activated by a token")
    accelerator.print(
        f"training on {accelerator.num_processes} process(es), {accelerator.device.type}, "
        f"{resolve_precision(config.train.precision, accelerator.device)}, into {config.out}"
    )
    if first_step:
        accelerator.print(f"resumed at step {first_step} of {config.max_steps}")
    decay = config.train.decay_steps
    if decay and config.max_steps < decay:
        accelerator.print(
            f"note: this run stops at step {config.max_steps}, but the learning rate decays until {decay}"
        )


def _any_process(accelerator: Accelerator, flag: bool) -> bool:
    if accelerator.num_processes == 1:
        return flag
    total = accelerator.reduce(torch.tensor([float(flag)], device=accelerator.device), "sum")
    return bool(total.item())


class _Signals:
    """While entered, SIGTERM and SIGINT are noted instead of obeyed; a second one is obeyed at once."""

    def __enter__(self) -> _Signals:
        self.received = False
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, frame: object) -> None:
        if self.received:
            raise SystemExit(128 + number)
        self.received = True

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
