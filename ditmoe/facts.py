"""What is known about a run before anything is drawn: its configuration, its log, its model, the machine."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import __version__
from .config import Config
from .handed_in import check_run
from .metrics import read_lines
from .model import DiTMoETransformer2DModel, count_parameters, tokens_per_image
from .moe import MoELayer

MODEL_FACTS = (
    "num_classes", "patch_size", "depth", "hidden_size", "num_experts", "top_k", "expert_width", "shared_width",
    "prediction_type",
)  # fmt: skip


def read_config(run: Path, name: str = "config.json") -> Config:
    """The configuration of a run folder, or with "training.json" of an exported model.

    Raises:
        ValueError: The file is missing or is none of ours.
    """
    path = run / name
    try:
        values = json.loads(path.read_text())
        values["out"] = Path(values["out"])
        for place in ("path", "vae"):
            if values["data"].get(place) is not None:
                values["data"][place] = Path(values["data"][place])
        for field in dataclasses.fields(Config):
            if callable(field.default_factory):
                values[field.name] = field.default_factory(
                    **values.get(field.name, {})
                )  # {}: an older version wrote it
        config = Config(**values)
        check_run(config)
        return config
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not the configuration of a run: {error}") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, oldest first, without torn ones and those of skipped steps; none without the file.

    Raises:
        ValueError: A row is none of ours.
    """
    rows = [row for _, row in read_lines(path) if row["loss"] is not None]
    for row in rows:
        if not all(isinstance(row.get(name), int | float) for name in ("loss", "images_per_second")):
            raise ValueError(f"{path} has a row for step {row['step']} without a loss or images_per_second")
    return rows


def describe(run: Path, net: DiTMoETransformer2DModel) -> dict[str, Any]:
    """Name, command, model and machine of a run, as JSON values."""
    total, activated = count_parameters(net)
    c, command = net.config, run / "command.txt"
    return {
        "title": run.resolve().name,
        "run": str(run),
        "command": command.read_text().splitlines()[-1] if command.exists() else None,
        "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "model": {
            **{name: c[name] for name in MODEL_FACTS},
            "size": [c.sample_size, c.sample_size, c.in_channels],
            "tokens": tokens_per_image(net),
            "moe_layers": len(moe_layer_names(net)),
            "parameters_total": total,
            "parameters_activated": activated,
        },
        "machine": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name(net.device) if net.device.type == "cuda" else None,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "ditmoe": __version__,
        },
    }


def moe_layer_names(net: DiTMoETransformer2DModel) -> list[str]:
    """Names of the blocks that hold experts, counted from 0."""
    return [f"block {i}" for i, b in enumerate(net.blocks) if any(isinstance(m, MoELayer) for m in b.modules())]


def _processor() -> str:
    """The name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def summarise(rows: Sequence[Mapping[str, Any]], config: Config) -> dict[str, Any]:
    """Steps, and from the log: seconds spent on them, and the mean loss of its last tenth."""
    steps = [0, *(row["step"] for row in rows)]
    images = [(b - a) * config.train.batch_size for a, b in pairwise(steps)]
    rates = [max(row["images_per_second"], 0.005) for row in rows]  # which are rounded
    seconds = sum(n / rate for n, rate in zip(images, rates, strict=True))
    last = [row["loss"] for row in rows[-max(1, len(rows) // 10) :]]
    return {
        "steps": steps[-1],
        "batch_size": config.train.batch_size,
        "seconds": round(seconds, 1),
        "images_per_second": round(sum(images) / seconds, 1) if seconds else None,
        "final_loss": float(np.mean(last)) if last else None,
    }
