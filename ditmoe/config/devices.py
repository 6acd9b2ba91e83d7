"""The sections `parallel` and `plan` of a configuration: a run's devices, and those it is planned for. No torch."""

from dataclasses import dataclass
from typing import Literal

from .checks import at_least, positive, require


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is split over the processes of a launch. It may change between the parts of a run."""

    experts: int = 1
    """Processes that share the experts of every layer (expert parallelism)."""
    shard: bool = False
    """Cut everything else into slices too, a slice a process (FSDP2); otherwise it is replicated (DDP)."""
    gather: Literal["float32", "bfloat16"] = "float32"
    """What --parallel.shard gathers of the float32 slices; gradients are summed in float32, routers never rounded."""

    def __post_init__(self) -> None:
        positive(self, "experts")
        if self.gather != "float32" and not self.shard:
            raise ValueError("gather bfloat16 needs --parallel.shard: else nothing is gathered")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The devices that --dry-run plans for; nothing that trains reads it."""

    devices: int = 0
    """Devices, one process each; 0 prints no plan."""
    memory: float = 80.0
    """Memory of a device, in GB (10^9 bytes)."""
    tflops: float = 989.0
    """Peak arithmetic of a device, in 10^12 operations a second (H100 SXM, dense bf16: 989)."""
    efficiency: float = 0.4
    """Share of that peak that a training step reaches, in (0, 1]."""
    bandwidth: float = 50.0
    """What a device sends, in GB (10^9 bytes) a second (InfiniBand NDR: 50)."""

    def __post_init__(self) -> None:
        at_least(self, 0, "devices")
        positive(self, "memory", "tflops", "bandwidth")
        require(0 < self.efficiency <= 1, f"efficiency is {self.efficiency}; it must lie in (0, 1]")
