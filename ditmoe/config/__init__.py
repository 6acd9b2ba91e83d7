"""What a run is: frozen dataclasses, presets, and their files. Imports no torch."""

from .presets import PRESETS as PRESETS
from .sections import Config as Config
from .sections import DataConfig as DataConfig
from .sections import ModelConfig as ModelConfig
from .sections import TrainConfig as TrainConfig
