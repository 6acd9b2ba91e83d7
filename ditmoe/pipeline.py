"""The trained thing that people exchange: transformer + scheduler + optional VAE + class names, one folder.

Shapes: N images, C channels, H W size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import logging
from safetensors.torch import save_file
from torch import Tensor, nn

from samplers import image_generators, initial_noise, make_scheduler, sample
from samplers.catalog import LIBRARY_ERRORS, SAMPLERS, scheduler_for, shift_field

from . import handed_in
from .config.sections import Config
from .data.latents import denormalize, is_normalization, read_normalization
from .data.pixels import to_pil, to_pixels
from .data.vae import check_vae, load_vae
from .files import replacing
from .launch.start import best_device
from .model import DiTMoETransformer2DModel, check_network
from .moe.guide import EXPERTS_OFF, choose
from .moe.tau import Spans, WithTau
from .objective import scheduler_config

_DECODED_AT_ONCE = 16  # images; a VAE needs about a gigabyte for each of 256 x 256


class DiTMoEPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Class-conditional (or unconditional) image generation. `from_pretrained(folder)` needs no network.

    Args:
        transformer: The network.
        scheduler: One of `samplers`; it may read another prediction type than the network's.
        vae: Decodes latents; None for a model in pixel space.
        id2label: Class names by label, the labels as text (as JSON has them).
        sampler: Name of the sampler to use when none is asked for.
        num_inference_steps: Its steps.
        guidance_scale: Classifier-free guidance scale to use when none is asked for.
        trained_steps: Optimiser steps behind the weights, where known.
        latents: For a network of latents, which VAE made them and how they were normalised: {"vae": {"name",
            "sha256"}, "mean", "std"}, see `ditmoe.data.latents`; None: by the scaling factor of the VAE's config.
        guide: A weaker network for autoguidance (`ditmoe.moe.guide`), in the folder `guide/`; None for none.
        guide_scale: Its scale when none is asked for; None: 2.
        guidance_interval: (lowest, highest) timestep at which to guide when no other is asked for; None: all.
        guidance_channels: How many of the first channels to guide when no other number is asked for; None: all.
        experts_off: The guide is the network itself without its routed experts.

    Raises:
        ValueError: A guide and `experts_off`.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae", "guide"]  # noqa: RUF012 - diffusers adds it to a list

    def __init__(
        self, transformer: DiTMoETransformer2DModel, scheduler: Any, vae: Any = None,
        id2label: dict[str, str] | None = None, sampler: str = "ddim", num_inference_steps: int = 50,
        guidance_scale: float = 1.5, trained_steps: int | None = None, latents: dict[str, Any] | None = None,
        guide: DiTMoETransformer2DModel | None = None, guide_scale: float | None = None, experts_off: bool = False,
        guidance_interval: Sequence[float] | None = None, guidance_channels: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if guide is not None and experts_off:
            raise ValueError("experts_off is set beside a guide; a model names one of them")
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, guide=guide)
        self.register_to_config(
            id2label=id2label or {}, sampler=sampler, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, trained_steps=trained_steps, latents=latents, guide_scale=guide_scale,
            experts_off=experts_off, guidance_interval=guidance_interval, guidance_channels=guidance_channels,
        )  # fmt: skip

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by label (JSON keeps the keys as text)."""
        return {int(label): name for label, name in self.config.id2label.items()}

    def __call__(
        self, class_labels: Sequence[int] | None = None, *, num_images: int | None = None, sampler: str | None = None,
        num_inference_steps: int | None = None, guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None, guidance_channels: int | None = None,
        guidance_rule: str = "cfg", guide: nn.Module | str | None = None, guide_scale: float | None = None,
        epsilon_scale: float = 1.0, eta: float = 0.0, tau: Spans | float | None = None,
        sampler_options: Mapping[str, Any] | None = None, seed: int = 0, indices: Sequence[int] | None = None,
        output_type: str = "pil", callback: Callable[..., None] | None = None,
    ) -> ImagePipelineOutput:  # fmt: skip
        """Images: `.images` is a list of PIL images, or with output_type "pt" a tensor (N, C, H, W) about [-1, 1].

        What has no line here is as of `samplers.sample`; the steps and the guidance scale are those saved with the
        model by default.

        Args:
            class_labels: One label an image; None only for a model without labels.
            num_images: How many images of a model without labels.
            sampler: A name of samplers.SAMPLERS; default: the one saved with the model.
            guide: A weaker network, "experts-off" (this one without its routed experts) or "none"; default: the guide
                that the model names, if any, see `ditmoe.moe.guide.choose`. Beside classifier-free guidance.
            guide_scale: Its scale; default: the saved one of a saved guide, else 2.
            guidance_interval: Default: the saved one, where anything guides; (0, 1000) is all.
            guidance_channels: Likewise; as many as there are is all.
            tau: Of a model with such a rule, instead of its own: a number, or spans (lowest, highest time, tau).
            sampler_options: Fields of the sampler's scheduler, such as {"exposure_window": 40} for "ts-ddim".
            seed: Image i is a function of (seed, indices[i], label) alone.
            indices: Running numbers of the images; default 0, 1, 2, ...
            output_type: "pil" or "pt".

        Raises:
            ValueError: A label out of range, an unknown sampler, or another value that cannot be used.
        """
        labels, N = self._labels(class_labels, num_images)
        indices = range(N) if indices is None else indices
        if len(indices) != N:
            raise ValueError(f"{len(indices)} indices were given for {N} images")
        if output_type not in ("pil", "pt"):
            raise ValueError(f"output_type is {output_type!r}; it must be pil or pt")
        if guidance_scale is None:
            guidance_scale = self.config.guidance_scale if labels is not None else 1.0
        guide, w = self.guide_for(guide, guide_scale)
        scheduler = self.scheduler_for(sampler, num_inference_steps, sampler_options)
        guidance_interval = self.interval_for(guidance_interval, guidance_scale, w, scheduler.timesteps)
        guidance_channels = self.channels_for(guidance_channels, guidance_scale, w)
        net, generators = self.transformer, image_generators(seed, indices)
        spans = [(0.0, 1000.0, float(tau))] if isinstance(tau, int | float) else tau
        shape = (net.config.in_channels, net.config.sample_size, net.config.sample_size)
        x = self.decode(sample(
            net if spans is None else WithTau(net, spans), scheduler,
            initial_noise(generators, shape, net.device), class_labels=labels,
            num_inference_steps=scheduler.num_inference_steps, null_label=net.null_label, guidance_scale=guidance_scale,
            guidance_interval=guidance_interval, guidance_channels=guidance_channels, guidance_rule=guidance_rule,
            guide=guide, guide_scale=w, epsilon_scale=epsilon_scale, generators=generators, eta=eta, callback=callback,
            progress=not getattr(self, "_progress_bar_config", {}).get("disable", False),
        ))  # fmt: skip
        return ImagePipelineOutput(images=[to_pil(p) for p in to_pixels(x)] if output_type == "pil" else x)

    def scheduler_for(
        self, sampler: str | None = None, num_inference_steps: int | None = None,
        sampler_options: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        """What a call with these arguments samples with; its `timesteps` are set, one a network call."""
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        net = self.transformer.config  # it decides, whichever sampler it was saved with
        learned = {"variance_type": "learned_range"} if net.learn_sigma else {}
        config = {**self.scheduler.config, **learned, "prediction_type": net.prediction_type}
        return scheduler_for(sampler or self.config.sampler, config, steps, sampler_options)

    def guide_for(
        self, guide: nn.Module | str | None = None, guide_scale: float | None = None
    ) -> tuple[nn.Module | None, float]:
        """What guides a call with these arguments, and its scale: (None, 1) for nothing. Raises as `choose`."""
        saved = EXPERTS_OFF if self.config.experts_off else self.guide
        return choose(self.transformer, guide, guide_scale, saved, self.config.guide_scale)

    def interval_for(
        self, asked: Sequence[float] | None, guidance_scale: float, guide_scale: float, timesteps: Tensor
    ) -> tuple[float, float] | None:
        """Between which timesteps a call guides: as asked, or as saved if anything guides and one of them is within."""
        saved = self.config.guidance_interval
        if asked is not None or saved is None or guidance_scale == guide_scale == 1:
            return None if asked is None else (asked[0], asked[1])
        within = bool(((timesteps >= saved[0]) & (timesteps <= saved[1])).any())
        return (saved[0], saved[1]) if within else None

    def channels_for(self, asked: int | None, guidance_scale: float, guide_scale: float) -> int | None:
        """How many of the first channels a call guides: as asked, or as saved if anything guides."""
        return self.config.guidance_channels if asked is None and not guidance_scale == guide_scale == 1 else asked

    def network_calls(self, sampler: str | None = None, num_inference_steps: int | None = None) -> int:
        """NFE: network calls an image; each is two passes where guidance applies."""
        return len(self.scheduler_for(sampler, num_inference_steps).timesteps)

    def decode(self, x: Tensor) -> Tensor:
        """Latents (or pixels) (N, C, H, W) -> pixels about [-1, 1]; the identity without a VAE."""
        if self.vae is None:
            return x
        if self.config.latents is None:
            shift = getattr(self.vae.config, "shift_factor", None) or 0.0
            latents = x / self.vae.config.scaling_factor + shift
        else:
            latents = denormalize(x, self.config.latents)
        with torch.inference_mode():
            parts = latents.to(self.vae.dtype).split(_DECODED_AT_ONCE)
            return torch.cat([self.vae.decode(part).sample.float() for part in parts])

    def _labels(self, class_labels: Sequence[int] | None, num_images: int | None) -> tuple[list[int] | None, int]:
        classes = self.transformer.config.num_classes
        if not classes:
            if class_labels is not None:
                raise ValueError("this model was trained without labels; ask with num_images instead of class_labels")
            return None, 1 if num_images is None else num_images
        if class_labels is None:
            raise ValueError(f"this model needs class_labels, each in 0..{classes - 1}")
        if wrong := [label for label in class_labels if not 0 <= label < classes]:
            raise ValueError(f"label {wrong[0]} is out of range: this model has classes 0..{classes - 1}")
        return [int(label) for label in class_labels], len(class_labels)


def find(folder: Path) -> Path:
    """The pipeline folder that a run folder or its `model/` is; ValueError where there is none."""
    place = next((place for place in (folder, folder / "model") if (place / "model_index.json").is_file()), None)
    if place is None:
        raise ValueError(f"{folder} holds no model: neither model_index.json nor model/model_index.json is there")
    return place


def load(folder: Path, *, fast: bool = False) -> DiTMoEPipeline:
    """The pipeline of a run folder or of its `model/`, in float32. Nothing in the folder is executed.

    On the CPU, or with `fast` where this machine computes fast. Raises ValueError where there is no pipeline, saying
    what was looked for, or where what is there is not one of ours.
    """
    place = find(folder)
    try:
        check(place)
        logging.disable_progress_bar()
        pipe: DiTMoEPipeline = DiTMoEPipeline.from_pretrained(place, local_files_only=True, use_safetensors=True)
        if any(v.is_meta for part in (pipe.transformer, pipe.vae, pipe.guide) if part for v in part.parameters()):
            raise ValueError("its weights are not in the files that diffusers reads")
        pipe.transformer.float()
        if pipe.vae is not None and pipe.config.latents is not None:
            check_vae(pipe.vae, pipe.config.latents)
        return pipe.to(best_device()) if fast else pipe
    except (OSError, *LIBRARY_ERRORS) as error:
        sentence = " ".join(str(error).split())
        raise ValueError(f"{place} is not a ditmoe pipeline that can be loaded: {sentence:.600}") from error


def check(folder: Path) -> dict[str, Any]:
    """What model_index.json of a pipeline folder says, once the folder was found to be one of ours and harmless."""
    network = DiTMoETransformer2DModel
    settings = {"latents": is_normalization, "guide_scale": _is_scale, "experts_off": lambda x: isinstance(x, bool)}
    settings |= {"guidance_interval": _is_interval, "guidance_channels": lambda x: type(x) is int and x > 0}
    return handed_in.check_pipeline(folder, DiTMoEPipeline, network, check_network, settings)


def _is_scale(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9


def _is_interval(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_scale, value)) and value[0] < value[1]


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


def shift_option(sampler: str, flow_shift: float | None) -> dict[str, float]:
    """The field of a sampler's scheduler that warps its steps towards noise, if it is to; ValueError if it has none."""
    field = shift_field(sampler)
    if flow_shift is not None and field is None:
        having = ", ".join(other for other in SAMPLERS if shift_field(other))
        raise ValueError(f"sampler {sampler!r} has no flow_shift, leave it out (None); it belongs to {having}")
    return {} if flow_shift is None or field is None else {field: flow_shift}


def add_vae(pipe: DiTMoEPipeline, folder: Path) -> None:
    """Let a pipeline of latents decode them. ValueError unless the folder holds the VAE that made them."""
    pipe.register_modules(vae=load_vae(folder, pipe.config.latents))


def add_guide(pipe: DiTMoEPipeline, guide: DiTMoETransformer2DModel | str, scale: float | None = None) -> None:
    """Let a pipeline name its guide, a network or "experts-off", and its scale. ValueError as of `choose`."""
    _, scale = pipe.guide_for(guide, scale)
    experts_off = guide == EXPERTS_OFF
    pipe.register_modules(guide=None if experts_off else guide)
    pipe.register_to_config(guide_scale=scale, experts_off=experts_off)


def trained_steps(folder: Path) -> int | None:
    """Optimiser steps behind a saved pipeline; None when none is there that `load` would take, or it does not say."""
    try:
        steps = check(folder).get("trained_steps")
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
            name = f"diffusion_pytorch_model-{number:05d}.safetensors"
            save_file({key: value.contiguous() for key, value in lot.items()}, transformer / name)
            where |= dict.fromkeys(lot, name)
            size += sum(value.nbytes for value in lot.values())
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=1) + "\n"
        (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
