"""What a run tells TensorBoard, wandb or trackio, by Accelerate's trackers; it never costs the run."""

from collections.abc import Callable
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from ..config.file import to_dict
from ..config.sections import Config, TrainConfig


def check_tracker(train: TrainConfig) -> None:
    """ValueError where the package of `train.tracker` is not installed."""
    spec = None if train.tracker == "none" else find_spec(train.tracker)
    if train.tracker != "none" and (spec is None or spec.origin is None):  # a folder of that name has no origin
        raise ValueError(f"train.tracker {train.tracker} needs its package: pip install {train.tracker}")


class Tracking:
    """The tracker of a run, on the first process alone; a run that is resumed goes on with the same one.

    Whatever it raises is a warning, and ends it: metrics.jsonl has all rows.
    """

    def __init__(self, accelerator: Accelerator, config: Config, first_step: int) -> None:
        self._accelerator, self._name = accelerator, config.train.tracker
        self._on = accelerator.is_main_process and self._name != "none"
        place = config.out.resolve()
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": first_step + 1} if first_step else {},  # steps that are done again
            "wandb": {"name": place.name, "id": sha256(str(place).encode()).hexdigest()[:16], "resume": "allow"},
            "trackio": {"name": place.name, "resume": "allow"},
        }
        options["wandb"]["dir"] = str(place)
        project = "tensorboard" if self._name == "tensorboard" else "ditmoe"  # there: the name of the folder
        self._safely(lambda: accelerator.init_trackers(project, _flat(to_dict(config)), options))

    def row(self, row: dict[str, Any]) -> None:
        """The numbers of a row of metrics.jsonl."""
        numbers = {name: value for name, value in row.items() if isinstance(value, float)}
        self._safely(lambda: self._accelerator.log(numbers, step=row["step"]))

    def picture(self, file: Path, step: int) -> None:
        """The samples of a step, where the tracker takes pictures and they could be drawn."""
        for tracker in self._accelerator.trackers if self._on and file.exists() else []:
            shape: dict[str, Any] = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            if hasattr(tracker, "log_images"):
                pixels = np.asarray(Image.open(file).convert("RGB"))[None]
                self._safely(lambda: tracker.log_images({"samples": pixels}, step=step, **shape))  # noqa: B023

    def close(self) -> None:
        """Send what has not been sent."""
        self._safely(self._accelerator.end_training)

    def _safely(self, act: Callable[[], object]) -> None:
        if not self._on:
            return
        try:
            act()
        except Exception as error:  # whatever a service or its client may raise
            self._on = False
            print(f"warning: {self._name} failed ({error!r:.300}) and gets nothing any more", flush=True)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options as trackers take them: a name each, numbers and texts."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
