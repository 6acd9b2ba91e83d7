"""What a pipeline folder may hold, checked before diffusers opens it: settings and weights, never code.

Whoever made the folder decides neither what is imported nor which files outside of it are read. Every refusal is a
ValueError of one sentence that names the file or the entry.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
from diffusers import SchedulerMixin
from safetensors import SafetensorError, safe_open

from samplers.catalog import SAMPLERS

CODE = ("auto_map", "quantization_config")  # entries that name further code


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object")
    return found


def is_scheduler(entry: Any) -> bool:
    """Whether [module, class] of model_index.json is one of `SAMPLERS` or of diffusers' schedulers."""
    ours = [[sampler.scheduler.__module__, sampler.scheduler.__name__] for sampler in SAMPLERS.values()]
    found = _of_diffusers(entry)
    return entry in ours or (found is not None and issubclass(found, SchedulerMixin))


def is_vae(entry: Any) -> bool:
    """Whether [module, class] of model_index.json is no VAE or one of diffusers' autoencoders."""
    found = _of_diffusers(entry)
    return entry == [None, None] or (found is not None and found.__module__.startswith("diffusers.models.autoencoders"))


def _of_diffusers(entry: Any) -> type | None:
    if not isinstance(entry, list) or len(entry) != 2 or entry[0] != "diffusers" or not isinstance(entry[1], str):
        return None
    found = getattr(diffusers, entry[1], None)
    return found if isinstance(found, type) else None


def check_component(folder: Path) -> set[str]:
    """The names of the tensors in the `.safetensors` files of a component's folder, once it has been found harmless."""
    for script in sorted(folder.glob("*.py")):
        raise ValueError(f"{script} is code, and a model folder holds settings and weights alone; remove it")
    for file in sorted(folder.glob("*.json")):
        values = read_object(file)
        for entry in values.keys() & CODE:
            raise ValueError(f"{file} has the entry {entry}, which names code; remove it")
        if file.name.endswith(".index.json"):
            _check_shards(file, values.get("weight_map"))
    return {name for file in sorted(folder.glob("*.safetensors")) for name in _tensor_names(file)}


def _check_shards(file: Path, shards: Any) -> None:
    """An index of weights may name `.safetensors` files beside it and nothing else."""
    for shard in shards.values() if isinstance(shards, dict) else [shards]:
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{file} names {shard!r}; weights are .safetensors files in the same folder")


def _tensor_names(file: Path) -> list[str]:
    """From the file's header; safetensors checks its length and that the tensors fill the rest of the file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error})") from error
