"""How a launch begins and ends: its processes, their device and precision."""

from __future__ import annotations

import gc
import os
import signal
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from ..config.sections import TrainConfig
from .signals import end_with_parent


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


def joined() -> PartialState:
    """This process among those of its launch, as `launched` but to encode: one may need a day longer than another."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun dies of signals that it does not know, and says nothing
        end_with_parent(signal.SIGTERM)
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
