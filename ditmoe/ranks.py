"""What the processes of a launch agree on. With one process each function is its plain form."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, gather_object

from .config import TrainConfig, differences
from .signals import REQUEST, Interrupted, Signals, end_with_parent

T = TypeVar("T")
_POLL = 0.2  # seconds


def launched(train: TrainConfig) -> Accelerator:
    """The processes of this launch, which with torchrun end with it. ValueError as `check_launch`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if resolve_precision(train.precision, device) == "bf16" else "no",
        gradient_accumulation_steps=train.accumulation,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=10))],
    )
    check_launch(accelerator)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun dies of signals that it does not know, and says nothing
        end_with_parent(signal.SIGTERM)
    return accelerator


def is_first() -> bool:
    """Whether this is the first process, or the only one."""
    return PartialState().is_main_process is True


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "auto" is bf16 where bfloat16 products are fast (recent GPUs, CPUs with AVX-512 BF16 or AMX), else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and fast else "fp32"


def total(accelerator: Accelerator, values: list[float]) -> list[float]:
    """The sums over processes."""
    if accelerator.num_processes == 1:
        return values
    summed = accelerator.reduce(torch.tensor(values, device=accelerator.device), "sum")
    found: list[float] = summed.tolist()
    return found


def everything(accelerator: Accelerator, values: list[T]) -> list[T]:
    """The values of all processes, in the order of their ranks."""
    if accelerator.num_processes == 1:
        return values
    found: list[T] = gather_object(values)
    return found


def decided_by_first(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What `decide` returns on the first process, on all of them; its ValueError is raised on all of them too."""
    if accelerator.num_processes == 1:
        return decide()
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = decide()
        except ValueError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise ValueError(answer[1])
    decided: T = answer[0]
    return decided


def agreed(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """`work` on every process; where it raises ValueError on one, it does so on all of them."""
    if accelerator.num_processes == 1:
        return work()
    done: list[T] = []
    mistakes: list[str] = []
    try:
        done = [work()]
    except ValueError as error:
        mistakes = [str(error)]
    found = everything(accelerator, mistakes)
    if found:
        raise ValueError(found[0])
    return done[0]


def check_alike(accelerator: Accelerator, facts: Mapping[str, Any]) -> None:
    """ValueError on every process, where they do not all have the same JSON values."""
    found = everything(accelerator, [facts])
    for rank, other in enumerate(found):
        if changed := differences(dict(found[0]), dict(other)):
            raise ValueError(
                f"process {rank} was started for another run than process 0 ({'; '.join(changed[:5])}); give all of "
                f"them the same options and the same images"
            )


def first_works(accelerator: Accelerator, work: Callable[[], None], signals: Signals, name: str) -> None:
    """`work` on the first process; the others wait, however long it takes. A signal to any of them ends it.

    Args:
        accelerator: The processes.
        work: What the first one does.
        signals: Those of this process; raised in the work, noted on the others.
        name: Unique in a run.
    """
    if accelerator.num_processes == 1:
        return _until_interrupted(work, signals)
    store = torch.distributed.distributed_c10d._get_default_store()
    if accelerator.is_main_process:
        finished = threading.Event()

        def watch() -> None:
            while not finished.wait(_POLL):
                if store.check([f"{name}/stop"]):
                    return os.kill(os.getpid(), REQUEST)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            _until_interrupted(work, signals)
        finally:
            finished.set()
            watcher.join()
            store.set(f"{name}/done", "1")
    else:
        while not store.check([f"{name}/done"]):
            if signals.received:
                store.set(f"{name}/stop", "1")
            time.sleep(_POLL)


def check_launch(accelerator: Accelerator | PartialState) -> None:
    """Refuse a launch that is not what it was asked to be.

    `accelerate launch --cpu --num_processes 2` quietly starts one process (Accelerate 1.15: --cpu disables its
    launchers of several); and engines that keep weights where our checkpoints cannot reach are not supported.

    Raises:
        ValueError: The process that started this one was asked for more, or for such an engine.
    """
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"the launch asks for {accelerator.distributed_type.value}; start plain processes "
            f"(launch/fsdp2.yaml) and let --parallel.shard and --parallel.experts split the model"
        )
    asked = _asked_for()
    if accelerator.num_processes == 1 and asked > 1:
        raise ValueError(
            f"the launch was asked for {asked} processes and has started 1; on CPUs write ACCELERATE_USE_CPU=true "
            f"accelerate launch --multi_gpu --num_processes {asked} ..., or torchrun --nproc-per-node {asked} ..."
        )


def _asked_for() -> int:
    """What `accelerate launch`, if it started this process, was told: by its flags or its configuration file."""
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")  # Linux alone
    except OSError:
        return 1
    program, then = (
        ("accelerate", "accelerate.commands.accelerate_cli"),
        ("accelerate-launch", "accelerate.commands.launch"),
    )
    by_name = any(Path(a).name in program and b == "launch" for a, b in pairwise(command))
    if not by_name and not any(word.endswith(then) for word in command):
        return 1
    pairs = [(word.partition("="), following) for word, following in zip(command, [*command[1:], ""], strict=True)]
    flags = {name.replace("_", "-"): value or following for (name, _, value), following in reversed(pairs)}
    if "--num-processes" in flags:
        return int(flags["--num-processes"]) if flags["--num-processes"].isdigit() else 1
    file = Path(flags.get("--config-file", "" if "--cpu" in flags else default_config_file))  # as launch_command does
    if not file.is_file():
        return 1
    return int(getattr(load_config_from_file(str(file)), "num_processes", 1) or 1)


def shutdown() -> None:
    """Leave the process group, if there is one: gloo may abort at interpreter exit otherwise (torch 2.14)."""
    gc.collect()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _until_interrupted(work: Callable[[], None], signals: Signals) -> None:
    try:
        with signals.raising():
            work()
    except Interrupted:
        pass  # noted: the loop stops at its next look
