"""What a run is: frozen dataclasses, presets, and their files. Imports no torch."""

from .presets import PRESETS as PRESETS
from .sections import Config as Config
from .sections import DataConfig as DataConfig
from .sections import DistillConfig as DistillConfig
from .sections import ModelConfig as ModelConfig
from .sections import MoEConfig as MoEConfig
from .sections import ObjectiveConfig as ObjectiveConfig
from .sections import ParallelConfig as ParallelConfig
from .sections import PlanConfig as PlanConfig
from .sections import SampleConfig as SampleConfig
from .sections import TrainConfig as TrainConfig
