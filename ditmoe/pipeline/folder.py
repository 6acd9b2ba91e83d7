"""A pipeline's folder, read and written; the pipeline of a network that was trained."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from safetensors.torch import save_file
from torch import Tensor

from samplers import make_scheduler
from samplers.catalog import LIBRARY_ERRORS, SAMPLERS, shift_field

from ..config.checks import near
from ..config.sections import Config
from ..data.latents import read_normalization
from ..data.vae import check_vae, load_vae
from ..files import WEIGHTS, replacing
from ..launch.start import best_device
from ..model import DiTMoETransformer2DModel
from ..objective import scheduler_config
from ..store.load import stored_network
from .guide import EXPERTS_OFF
from .handed_in import check_pipeline
from .pipeline import DiTMoEPipeline


def find(folder: Path) -> Path:
    """The pipeline folder that a run folder or its `model/` is; ValueError where there is none."""
    if folder.is_file():
        raise ValueError(f"{folder} holds no model: it is a file; python -m ditmoe convert {folder} FOLDER makes one")
    place = next((place for place in (folder, folder / "model") if (place / "model_index.json").is_file()), None)
    if place is None:
        beside = folder.parent.iterdir() if not folder.exists() and folder.parent.is_dir() else ()
        hint = near(folder.name, [other.name for other in beside if other.is_dir()])
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)) and not folder.parent.exists():
            hint = near(str(folder), map(str, Path().glob(f"*/{folder.name}")))
            hint = hint or f"one of the Hugging Face Hub comes with: hf download {folder} --local-dir {folder.name}; "
        raise ValueError(f"{folder} holds no model: {hint}neither model_index.json nor model/model_index.json is there")
    return place


def load(folder: Path, *, fast: bool = False, cached_experts: int | None = None) -> DiTMoEPipeline:
    """The pipeline of a run folder or of its `model/`, in float32. Nothing in the folder is executed.

    On the CPU, or with `fast` where this machine computes fast. With `cached_experts` so many experts of a layer have
    room in memory, and are read from the folder when they are needed, see `ditmoe.store`.

    Raises ValueError where there is no pipeline, saying what was looked for, or where what is there is not one of ours.
    """
    place = find(folder)
    try:
        check_pipeline(place)
        logging.disable_progress_bar()
        own = {} if cached_experts is None else {"transformer": stored_network(place / "transformer", cached_experts)}
        pipe: DiTMoEPipeline = DiTMoEPipeline.from_pretrained(place, local_files_only=True, use_safetensors=True, **own)
        if any(v.is_meta for part in (pipe.transformer, pipe.vae, pipe.guide) if part for v in part.parameters()):
            raise ValueError("its weights are not in the files that diffusers reads")
        pipe.transformer.float()
        if pipe.vae is not None and pipe.config.latents is not None:
            check_vae(pipe.vae, pipe.config.latents)
    except (OSError, *LIBRARY_ERRORS) as error:
        sentence = " ".join(str(error).split())
        raise ValueError(f"{place} is not a ditmoe pipeline that can be loaded: {sentence:.600}") from error
    return pipe.to(best_device()) if fast else pipe


def trained_steps(folder: Path) -> int | None:
    """Optimiser steps behind a saved pipeline; None when none is there that `load` would take, or it does not say."""
    try:
        steps = check_pipeline(folder).get("trained_steps")
    except ValueError:
        return None
    return steps if isinstance(steps, int) else None


def save_settings(pipeline: DiTMoEPipeline, folder: Path) -> Path:
    """Write all of a pipeline folder but the transformer's weights; where they belong comes back."""
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if name != "transformer" and part is not None:
            part.save_pretrained(folder / name)
    pipeline.transformer.save_config(folder / "transformer")
    return folder / "transformer"


def save(pipeline: DiTMoEPipeline, folder: Path, weights: Iterable[dict[str, Tensor]] | None = None) -> None:
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
            name = f"{WEIGHTS}-{number:05d}.safetensors"
            save_file({key: value.contiguous() for key, value in lot.items()}, transformer / name)
            where |= dict.fromkeys(lot, name)
            size += sum(value.nbytes for value in lot.values())
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=1) + "\n"
        (transformer / f"{WEIGHTS}.safetensors.index.json").write_text(text)


def shift_option(sampler: str | None, flow_shift: float | None) -> dict[str, float]:
    """The field of a sampler's scheduler that warps its steps towards noise, if it is to; ValueError if it has none."""
    field = None if sampler is None else shift_field(sampler)
    if flow_shift is not None and field is None:
        having = ", ".join(other for other in SAMPLERS if shift_field(other))
        name = "of diffusers" if sampler is None else repr(sampler)
        raise ValueError(f"sampler {name} has no flow_shift, leave it out (None); it belongs to {having}")
    return {} if flow_shift is None or field is None else {field: flow_shift}


def assemble(
    model: DiTMoETransformer2DModel, config: Config, id2label: dict[int, str], data_variance: float | None = None,
    trained_steps: int | None = None, latents: dict[str, Any] | None = None,
) -> DiTMoEPipeline:  # fmt: skip
    """The pipeline of a trained network, with the sampling defaults of its configuration.

    `data_variance` (`ditmoe.data.open.pixel_variance`) goes into the scheduler's config, for time-shift sampling. For
    latents it knows how they were normalised: as `latents` says (`ImageSet.normalization`), else as the folder of the
    data does; the VAE is in it where `data.vae` gives one. Raises ValueError where there is no such sampler,
    or the VAE is not that of the latents.
    """
    known: dict[str, Any] = {} if data_variance is None else {"data_variance": data_variance}
    known |= shift_option(config.sample.sampler, config.sample.flow_shift)
    scheduler = make_scheduler(config.sample.sampler, {**scheduler_config(config.objective), **known})
    names = {str(label): name for label, name in id2label.items()}
    guidance = config.sample.cfg if model.null_label is not None else 1.0
    sampler, steps = config.sample.sampler, config.sample.steps
    if latents is None and config.data.name == "latents":
        latents = read_normalization(config.data.path)
    vae = None if config.data.vae is None else load_vae(config.data.vae, latents)
    interval = config.sample.guidance_interval if guidance != 1 else None
    return DiTMoEPipeline(
        model, scheduler, vae, names, sampler, steps, guidance, trained_steps, latents, guidance_interval=interval
    )


def add_vae(pipe: DiTMoEPipeline, folder: Path) -> None:
    """Let a pipeline of latents decode them. ValueError unless the folder holds the VAE that made them."""
    pipe.register_modules(vae=load_vae(folder, pipe.config.latents))


def add_guide(pipe: DiTMoEPipeline, guide: DiTMoETransformer2DModel | str, scale: float | None = None) -> None:
    """Let a pipeline name its guide, a network or "experts-off", and its scale. ValueError as of `choose`."""
    _, scale = pipe.guide_for(guide, scale)
    experts_off = guide == EXPERTS_OFF
    pipe.register_modules(guide=None if experts_off else guide)
    pipe.register_to_config(guide_scale=scale, experts_off=experts_off)
