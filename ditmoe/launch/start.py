"""How a launch begins and ends: its processes, their device and precision."""

import gc
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, parse_flag_from_env

from ..config.sections import TrainConfig
from .signals import end_with_parent

CPUINFO = Path("/proc/cpuinfo")
_ENGINES = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")  # of Accelerate, by its ACCELERATE_USE_...


def best_device() -> torch.device:
    """Where this machine computes fast: its accelerator (CUDA, MPS, XPU) where there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def launched(train: TrainConfig, tracked_in: Path | None = None) -> Accelerator:
    """The processes of this launch, which with torchrun end with it. ValueError as `check_launch`.

    `tracked_in`: the run folder, where `train.tracker` is to be used. What decides over the model is said here, so that
    Accelerate does not read it from its environment.
    """
    _check_environment()
    device = torch.device("cpu") if _flag("ACCELERATE_USE_CPU") else best_device()
    AcceleratorState._reset_state()  # which has one precision a process, where one may hold runs of both
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="bf16" if resolve_precision(train.precision, device) == "bf16" else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=train.accumulation),
        dynamo_backend="no",
        log_with=None if tracked_in is None or train.tracker == "none" else train.tracker,
        project_dir=tracked_in,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=10))],
    )
    check_launch(accelerator)
    _end_with_torchrun()
    return accelerator


def joined() -> PartialState:
    """This process among those of its launch, as `launched` but to encode: one may need a day longer than another."""
    _check_environment()
    _end_with_torchrun()
    return PartialState(cpu=best_device().type == "cpu", timeout=timedelta(days=1))


def _flag(name: str) -> bool:
    """Whether a variable of the environment is set to yes. ValueError where it is neither yes nor no."""
    try:
        return bool(parse_flag_from_env(name))
    except ValueError as error:
        raise ValueError(f"{name} is {os.environ[name]!r}; give true or false, or leave it out") from error


def _check_environment() -> None:
    """ValueError where it asks for engines, which keep weights where our checkpoints cannot reach, or for a device."""
    if engines := [name for name in _ENGINES if _flag(f"ACCELERATE_USE_{name}")]:
        raise ValueError(
            f"the launch asks for {engines[0]} (ACCELERATE_USE_{engines[0]}); start plain processes "
            f"(launch/fsdp2.yaml) and let --parallel.shard and --parallel.experts split the model"
        )
    if device := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        fix = "leave it out; CUDA_VISIBLE_DEVICES and ACCELERATE_USE_CPU=true choose among devices"
        raise ValueError(f"ACCELERATE_TORCH_DEVICE is {device}, another device than the precision is chosen for; {fix}")


def overruled(train: TrainConfig, precision: str) -> list[str]:
    """Sentences on what the environment asks of Accelerate, and a run does not do: it goes by its config.json."""
    done = {
        "GRADIENT_ACCUMULATION_STEPS": ("1", str(train.accumulation)),
        "DYNAMO_BACKEND": ("no",),
        "MIXED_PRECISION": ("no", precision),  # each first value is what accelerate launch says of its own
    }
    told = {name: os.environ.get(f"ACCELERATE_{name}", values[0]) for name, values in done.items()}
    odd = [f"ACCELERATE_{name}={value}" for name, value in told.items() if value.lower() not in done[name]]
    return [f"note: {word} in the environment changes nothing, the run goes by config.json" for word in odd]


def _end_with_torchrun() -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:  # it dies of signals that it does not know, and says nothing
        end_with_parent(signal.SIGTERM)


def is_first() -> bool:
    """Whether this is the first process, or the only one."""
    return PartialState().is_main_process is True


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "auto" is bf16 where bfloat16 products are fast (recent GPUs, some CPUs), else fp32."""
    if precision != "auto":
        return precision
    fast: dict[str, Callable[[], bool]] = {
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        "xpu": lambda: torch.xpu.is_bf16_supported(including_emulation=False),
        "cpu": _is_fast_cpu,
    }
    return "bf16" if device.type in fast and fast[device.type]() else "fp32"


def _is_fast_cpu() -> bool:
    """Has it AMX, or AVX-512 BF16 and is not Intel's, whose products in bfloat16 without AMX are slower than float32's.

    One thread of a Xeon made 80 GFLOP/s of products in bfloat16, 135 in float32 (torch 2.14).
    """
    intel = CPUINFO.is_file() and "GenuineIntel" in CPUINFO.read_text()
    return bool(torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and not intel))


def check_launch(accelerator: Accelerator | PartialState) -> None:
    """Raise ValueError where `accelerate launch` was asked for more than it started.

    With `--cpu --num_processes 2` it quietly starts one process (Accelerate 1.15), which finds where the others would
    meet, and not that it is one of several.
    """
    told = os.environ  # by accelerate launch; the last two where it was asked for several
    launcher = "ACCELERATE_MIXED_PRECISION" in told and "MASTER_PORT" in told and told.get("MASTER_ADDR") == "127.0.0.1"
    if accelerator.num_processes == 1 and launcher and "WORLD_SIZE" not in told:
        raise ValueError(
            "the launch was asked for several processes (MASTER_PORT is set) and has started 1; on CPUs write "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ..., or torchrun "
            "--nproc-per-node N ..."
        )


def shutdown() -> None:
    """Leave the process group, if there is one: gloo may abort at interpreter exit otherwise (torch 2.14)."""
    gc.collect()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
