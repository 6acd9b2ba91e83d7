"""What a pipeline folder may hold, checked before diffusers opens it: settings and weights, never code.

Whoever made the folder decides neither what is imported nor which files outside of it are read. Every refusal is a
ValueError of one sentence that names the file or the entry.
"""

from collections.abc import Callable
from inspect import signature
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from samplers.catalog import LIBRARY_ERRORS, SAMPLERS

from ..data.latents import is_normalization
from ..files import check_component, check_no_code, read_object
from ..model import DiTMoETransformer2DModel, check_network
from .pipeline import DiTMoEPipeline

_TABLES = 2**30  # bytes, at most, of what a network computes from its config alone, such as positions
_STEPS = 10**6  # timesteps of a scheduler, at most: it computes tables of as many values


def _is_scale(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9


def _is_interval(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_scale, value)) and value[0] < value[1]


SETTINGS: dict[str, Callable[[Any], bool]] = {  # of a pipeline folder: what each has to fulfil where it is there
    "latents": is_normalization,
    "guide_scale": _is_scale,
    "experts_off": lambda x: isinstance(x, bool),
    "guidance_interval": _is_interval,
    "guidance_channels": lambda x: type(x) is int and x > 0,
}


def check_pipeline(folder: Path) -> dict[str, Any]:
    """What model_index.json of a pipeline folder says, once all of the folder was found harmless.

    ValueError where it names anything but our classes and diffusers', holds code, or its parts do not fit.
    """
    index = read_object(folder / "model_index.json")
    known = {"_class_name", "_diffusers_version", "_name_or_path", *signature(DiTMoEPipeline).parameters}
    ours = [[sampler.scheduler.__module__, sampler.scheduler.__name__] for sampler in SAMPLERS.values()]
    scheduler, vae = (_of_diffusers(index.get(part)) for part in ("scheduler", "vae"))
    autoencoders, of_network = "diffusers.models.autoencoders", ["ditmoe.model", "DiTMoETransformer2DModel"]
    names, numbers = index.get("id2label", {}), {k: index.get(k, 1) for k in ("num_inference_steps", "guidance_scale")}
    fits = {
        "_class_name": index.get("_class_name") == DiTMoEPipeline.__name__,
        "transformer": index.get("transformer") == of_network,
        "guide": index.get("guide", [None, None]) in ([None, None], of_network),
        "scheduler": index.get("scheduler") in ours or issubclass(scheduler or object, SchedulerMixin),
        "vae": index.get("vae", [None, None]) == [None, None] or (vae or object).__module__.startswith(autoencoders),
        "id2label": isinstance(names, dict) and all(k.isdecimal() and isinstance(v, str) for k, v in names.items()),
        "sampler": isinstance(index.get("sampler", ""), str) or (index["sampler"] is None and scheduler is not None),
        **{name: index.get(name) is None or usable(index[name]) for name, usable in SETTINGS.items()},
        **{name: isinstance(value, int | float) and abs(value) < 1e9 for name, value in numbers.items()},
        **dict.fromkeys(index.keys() - known, False),
    }
    for entry, fitting in fits.items():
        if not fitting:
            raise ValueError(f"model_index.json has {entry} {index.get(entry)!r:.200}, which is not ditmoe's")
    check_no_code(folder)
    check_component(place := folder / "scheduler")
    steps = read_object(place / "scheduler_config.json").get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or not 0 < steps <= _STEPS:
        raise ValueError(f"{place} has num_train_timesteps {steps!r:.100}; it must be a number in 1..{_STEPS}")
    for part in ("transformer", "guide"):
        if index.get(part) == of_network:
            check_network(read_object(folder / part / "config.json"))
            _check_weights(DiTMoETransformer2DModel, folder / part)
    if vae:
        _check_weights(vae, folder / "vae", renamed=True)
    return index


def _of_diffusers(entry: Any) -> type | None:
    """The class of diffusers that [module, class] of model_index.json names; None where it names none."""
    match entry:
        case ["diffusers", str(name)] if isinstance(found := getattr(diffusers, name, None), type):
            return found
    return None


def _check_weights(network: Any, folder: Path, *, renamed: bool = False) -> None:
    """`check_component` for a network, whose weights must be those that its config.json asks for.

    Compared are the files' headers and a network that takes no memory; where the class still knows older names of its
    tensors (`renamed`), the sum of their sizes alone.
    """
    shapes, file = check_component(folder), folder / "config.json"
    if not shapes:
        raise ValueError(f"{folder} holds no .safetensors weights; pickled ones are never opened")
    try:
        values = read_object(file)
        empty = blank(lambda: network.from_config(values), limit=2 * len(shapes))
    except LIBRARY_ERRORS as error:
        raise ValueError(f"{file} is of no network that can be built ({' '.join(str(error).split()):.300})") from error
    wanted = {name: tuple(value.shape) for name, value in empty.state_dict().items()}
    if renamed:
        asked, there = (sum(prod(shape) for shape in found.values()) for found in (wanted, shapes))
        if asked > there:
            raise ValueError(f"its weights hold {there} values, of {asked} which its config.json asks for")
    elif missing := sorted(wanted.keys() - shapes.keys()):
        raise ValueError(f"its weights lack {', '.join(missing[:5])}, which its config.json asks for")
    elif more := sorted(shapes.keys() - wanted.keys()):
        raise ValueError(f"its weights hold {', '.join(more[:5]):.300}, which its config.json does not ask for")
    elif other := sorted(name for name, shape in wanted.items() if shape != shapes[name]):
        what = f"{other[0]} has the shape {shapes[other[0]]}"
        raise ValueError(f"{what}, but its config.json asks for {wanted[other[0]]}")


def blank(make: Callable[[], nn.Module], limit: int) -> nn.Module:
    """A network without memory for its weights; ValueError once it has more than `limit`, or large tables."""

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal limit
        limit -= 1
        if limit < 0:
            raise ValueError("it has far more tensors than its weights hold")

    with register_module_parameter_registration_hook(count), torch.device("meta"):
        empty = make()
    if sum(value.nbytes for value in empty.buffers()) > _TABLES:
        raise ValueError(f"it asks for tables of more than {_TABLES} bytes; its sizes are too large")
    return empty
