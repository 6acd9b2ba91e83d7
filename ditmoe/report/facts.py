"""What is known about a run before anything is drawn: its configuration, its log, its model, the machine."""

import platform
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ditmoe import __version__

from ..config.sections import Config
from ..data.sets import ImageSet
from ..model import DiTMoETransformer2DModel, count_parameters, moe_layer_names, tokens_per_image
from ..run_folder.place import COMMAND

MODEL_FACTS = (
    "num_classes", "patch_size", "depth", "hidden_size", "num_experts", "top_k", "expert_width", "shared_width",
    "prediction_type",
)  # fmt: skip


def describe(
    run: Path, net: DiTMoETransformer2DModel, config: Config, data: ImageSet, num_held_out: int
) -> dict[str, Any]:
    """Name, command, model, machine and images of a run, as JSON values."""
    (total, activated), c, command = count_parameters(net), net.config, run / COMMAND
    typed = command.read_text().splitlines() if command.exists() else []
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processors = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "title": run.resolve().name, "run": str(run),
        "command": next((line for line in reversed(typed) if not line.startswith("#")), None),  # not what has moved
        "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "model": {
            **{name: c[name] for name in MODEL_FACTS},
            "size": [c.sample_size, c.sample_size, c.in_channels],
            "tokens": tokens_per_image(net), "moe_layers": len(moe_layer_names(net)),
            "parameters_total": total, "parameters_activated": activated,
        },
        "teachers": list(config.distill.teachers),
        "machine": {
            "processor": processors[0] if processors else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name(net.device) if net.device.type == "cuda" else None,
            "python": platform.python_version(), "torch": str(torch.__version__), "ditmoe": __version__,
        },
        "data": {
            "name": " + ".join(config.data.mixture) or config.data.name, "source": data.source, "num_train": len(data),
            "num_held_out": num_held_out, "num_classes": len(data.id2label),
            "is_latent": data.is_latent,
        },
    }  # fmt: skip


def summarise(rows: Sequence[Mapping[str, Any]], config: Config) -> dict[str, Any]:
    """Steps, and from the log: seconds spent on them, and the mean loss of its last tenth."""
    steps = [0, *(row["step"] for row in rows)]
    images = [(b - a) * config.train.batch_size for a, b in pairwise(steps)]
    rates = [max(row["images_per_second"], 0.005) for row in rows]  # which are rounded
    seconds = sum(n / rate for n, rate in zip(images, rates, strict=True))
    last = [row["loss"] for row in rows[-max(1, len(rows) // 10) :]]
    return {
        "steps": steps[-1], "batch_size": config.train.batch_size, "seconds": round(seconds, 1),
        "images_per_second": round(sum(images) / seconds, 1) if seconds else None,
        "final_loss": float(np.mean(last)) if last else None,
    }  # fmt: skip
