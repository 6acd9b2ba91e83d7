"""A pipeline's folder: what it may hold, how it is read and written."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from safetensors.torch import save_file
from torch import Tensor

from samplers.catalog import LIBRARY_ERRORS, SAMPLERS, shift_field

from ..data.latents import is_normalization
from ..data.vae import check_vae, load_vae
from ..files import replacing
from ..model import DiTMoETransformer2DModel, check_network
from ..store.load import stored_network
from . import handed_in
from .guide import EXPERTS_OFF


def _is_scale(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9


def _is_interval(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_scale, value)) and value[0] < value[1]


SETTINGS = {  # of a pipeline folder: what each has to fulfil where it is there
    "latents": is_normalization,
    "guide_scale": _is_scale,
    "experts_off": lambda x: isinstance(x, bool),
    "guidance_interval": _is_interval,
    "guidance_channels": lambda x: type(x) is int and x > 0,
}


def checked(kind: type, folder: Path) -> dict[str, Any]:
    """What model_index.json of a pipeline folder says, once the folder was found to be one of ours and harmless."""
    return handed_in.check_pipeline(folder, kind, DiTMoETransformer2DModel, check_network, SETTINGS)


def find(folder: Path) -> Path:
    """The pipeline folder that a run folder or its `model/` is; ValueError where there is none."""
    if folder.is_file():
        raise ValueError(f"{folder} holds no model: it is a file; python -m ditmoe convert {folder} FOLDER makes one")
    place = next((place for place in (folder, folder / "model") if (place / "model_index.json").is_file()), None)
    if place is None:
        raise ValueError(f"{folder} holds no model: neither model_index.json nor model/model_index.json is there")
    return place


def opened(kind: Any, folder: Path, cached_experts: int | None = None) -> Any:
    """The pipeline, of the class `kind`, of a run folder or of its `model/`, see `ditmoe.pipeline.load`."""
    place = find(folder)
    try:
        checked(kind, place)
        logging.disable_progress_bar()
        own = {} if cached_experts is None else {"transformer": stored_network(place / "transformer", cached_experts)}
        pipe = kind.from_pretrained(place, local_files_only=True, use_safetensors=True, **own)
        if any(v.is_meta for part in (pipe.transformer, pipe.vae, pipe.guide) if part for v in part.parameters()):
            raise ValueError("its weights are not in the files that diffusers reads")
        pipe.transformer.float()
        if pipe.vae is not None and pipe.config.latents is not None:
            check_vae(pipe.vae, pipe.config.latents)
        return pipe
    except (OSError, *LIBRARY_ERRORS) as error:
        sentence = " ".join(str(error).split())
        raise ValueError(f"{place} is not a ditmoe pipeline that can be loaded: {sentence:.600}") from error


def save_settings(pipeline: Any, folder: Path) -> Path:
    """Write all of a pipeline folder but the transformer's weights; where they belong comes back."""
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if name != "transformer" and part is not None:
            part.save_pretrained(folder / name)
    pipeline.transformer.save_config(folder / "transformer")
    return folder / "transformer"


def save(pipeline: Any, folder: Path, weights: Iterable[dict[str, Tensor]] | None = None) -> None:
    """Write a pipeline folder; an older one at the same place is replaced once the new one is on the disk.

    `weights` are the transformer's tensors, a few at a time, each lot for a file of its own: for a transformer on the
    meta device, whose weights are nowhere in one piece. None takes its own.
    """
    with replacing(folder) as temporary:
        if weights is None:
            pipeline.save_pretrained(temporary)
            return
        transformer = save_settings(pipeline, temporary)
        where: dict[str, str] = {}
        size = 0
        for number, lot in enumerate(weights, start=1):  # diffusers' layout of a sharded model
            name = f"diffusion_pytorch_model-{number:05d}.safetensors"
            save_file({key: value.contiguous() for key, value in lot.items()}, transformer / name)
            where |= dict.fromkeys(lot, name)
            size += sum(value.nbytes for value in lot.values())
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=1) + "\n"
        (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(text)


def shift_option(sampler: str | None, flow_shift: float | None) -> dict[str, float]:
    """The field of a sampler's scheduler that warps its steps towards noise, if it is to; ValueError if it has none."""
    field = None if sampler is None else shift_field(sampler)
    if flow_shift is not None and field is None:
        having = ", ".join(other for other in SAMPLERS if shift_field(other))
        name = "of diffusers" if sampler is None else repr(sampler)
        raise ValueError(f"sampler {name} has no flow_shift, leave it out (None); it belongs to {having}")
    return {} if flow_shift is None or field is None else {field: flow_shift}


def add_vae(pipe: Any, folder: Path) -> None:
    """Let a pipeline of latents decode them. ValueError unless the folder holds the VAE that made them."""
    pipe.register_modules(vae=load_vae(folder, pipe.config.latents))


def add_guide(pipe: Any, guide: DiTMoETransformer2DModel | str, scale: float | None = None) -> None:
    """Let a pipeline name its guide, a network or "experts-off", and its scale. ValueError as of `choose`."""
    _, scale = pipe.guide_for(guide, scale)
    experts_off = guide == EXPERTS_OFF
    pipe.register_modules(guide=None if experts_off else guide)
    pipe.register_to_config(guide_scale=scale, experts_off=experts_off)
