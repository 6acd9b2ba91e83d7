"""What a run is: frozen dataclasses, presets, and their files. Imports no torch."""

from .presets import PRESETS
from .sections import (
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
    ParallelConfig,
    PlanConfig,
    SampleConfig,
    TrainConfig,
)

__all__ = [
    "PRESETS",
    "Config",
    "DataConfig",
    "MoEConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "ParallelConfig",
    "PlanConfig",
    "SampleConfig",
    "TrainConfig",
]
