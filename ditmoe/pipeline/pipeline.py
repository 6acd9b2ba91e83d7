"""The trained thing that people exchange: transformer + scheduler + optional VAE + class names, one folder.

Shapes: N images, C channels, H W size.
"""

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor, nn

from samplers import sample
from samplers.catalog import adopted, check_nothing_lost, name_of, scheduler_for

from ..data import decode
from ..model import DiTMoETransformer2DModel
from ..moe.policy import Policy, Spans, Steered
from ..objective import NUM_TIMESTEPS
from . import asked
from .edit import Edit
from .guide import EXPERTS_OFF, choose


class DiTMoEPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Class-conditional (or unconditional) image generation. `from_pretrained(folder)` needs no network.

    Args:
        transformer: The network.
        scheduler: One of `samplers` or of diffusers; it may read another prediction type than the network's.
        vae: Decodes latents; None for a model in pixel space.
        id2label: Class names by label, the labels as text (as JSON has them).
        sampler: As saved, for readers of the file: the scheduler decides what draws when no sampler is asked for.
        num_inference_steps: Its steps.
        guidance_scale: Classifier-free guidance scale to use when none is asked for.
        trained_steps: Optimiser steps behind the weights, where known.
        latents: For a network of latents, which VAE made them and how they were normalised: {"vae": {"name",
            "sha256"}, "mean", "std"}, see `ditmoe.data.latents`; None: by the scaling factor of the VAE's config.
        guide: A weaker network for autoguidance (`ditmoe.pipeline.guide`), in the folder `guide/`; None for none.
        guide_scale: Its scale when none is asked for; None: 2.
        guidance_interval: (lowest, highest) timestep at which to guide when no other is asked for; None: all.
        guidance_channels: How many of the first channels to guide when no other number is asked for; None: all.
        experts_off: The guide is the network itself without its routed experts; beside a guide: ValueError.
    """

    __module__ = "ditmoe.pipeline"  # which its users import

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ("latents",)
    _optional_components = ["vae", "guide"]  # noqa: RUF012 - diffusers adds it to a list

    def __init__(
        self, transformer: DiTMoETransformer2DModel, scheduler: Any, vae: Any = None,
        id2label: dict[str, str] | None = None, sampler: str | None = None, num_inference_steps: int = 50,
        guidance_scale: float = 1.5, trained_steps: int | None = None, latents: dict[str, Any] | None = None,
        guide: DiTMoETransformer2DModel | None = None, guide_scale: float | None = None, experts_off: bool = False,
        guidance_interval: Sequence[float] | None = None, guidance_channels: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if guide is not None and experts_off:
            raise ValueError("experts_off is set beside a guide; a model names one of them")
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, guide=guide)
        self.register_to_config(
            id2label=id2label or {}, sampler=name_of(scheduler), num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, trained_steps=trained_steps, latents=latents, guide_scale=guide_scale,
            experts_off=experts_off, guidance_interval=guidance_interval, guidance_channels=guidance_channels,
        )  # fmt: skip

    def __setattr__(self, name: str, value: Any) -> None:
        """A scheduler that is set is what is drawn with from then on, and what is saved."""
        replaced = name == "scheduler" and "scheduler" in vars(self)
        if replaced and not (hasattr(value, "config") and hasattr(value, "set_timesteps")):
            raise ValueError(f"scheduler is {value!r:.100}; give one of diffusers' or of samplers.make_scheduler")
        super().__setattr__(name, value)
        if replaced:
            self.register_to_config(sampler=name_of(value))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """As of diffusers, of a folder or a Hub's OWNER/NAME, and of .safetensors weights alone unless told otherwise.

        Raises ValueError for `sampler`, which is a call's.
        """
        if "sampler" in options:
            what = f"sampler {options['sampler']!r} is of a call: pipe(..., sampler={options['sampler']!r})"
            raise ValueError(f"{what}; what from_pretrained takes is scheduler=samplers.make_scheduler(...)")
        return super().from_pretrained(pretrained_model_name_or_path, **{"use_safetensors": True, **options})

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by label (JSON keeps the keys as text)."""
        return {int(label): name for label, name in self.config.id2label.items()}

    @property
    def labels(self) -> dict[str, int]:
        """Labels by class name, as of DiTPipeline; a name of several classes has the last."""
        return {name: labels[-1] for name, labels in sorted(asked.names_of(self.id2label).items())}

    def get_label_ids(self, label: int | str | Sequence[int | str]) -> list[int]:
        """The labels of class names. ValueError for a name that no class has, or several."""
        return asked.labels_of(label, self.transformer.config.num_classes, self.id2label)

    @asked.guarded
    def __call__(
        self, class_labels: int | str | Sequence[int | str] | None = None, *, num_images: int | None = None,
        sampler: str | None = None, num_inference_steps: int | None = None, guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None, guidance_channels: int | None = None,
        guidance_rule: str = "cfg", guide: nn.Module | str | None = None, guide_scale: float | None = None,
        epsilon_scale: float = 1.0, eta: float = 0.0, tau: Spans | float | None = None,
        policy: Policy | Mapping[str, Any] | None = None, sampler_options: Mapping[str, Any] | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None, indices: Sequence[int] | None = None,
        latents: Tensor | None = None, num_images_per_label: int = 1, output_type: str = "pil",
        return_dict: bool = True, callback: Callable[..., None] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",), edit: Edit | None = None,
    ) -> Any:  # fmt: skip
        """Images: `.images` is a list of PIL images, or with another output_type an array or a tensor.

        What has no line here is as of `samplers.sample`; the steps and the guidance scale are those saved with the
        model by default.

        Args:
            class_labels: The label or class name of every image, or of one; None only for a model without labels.
            num_images: How many images of a model without labels.
            sampler: A name of samplers.SAMPLERS; default: `scheduler`, whatever it was set to.
            guide: A weaker network, "experts-off" (this one without its routed experts) or "none"; default: the guide
                that the model names, if any, see `ditmoe.pipeline.guide.choose`. Beside classifier-free guidance.
            guide_scale: Its scale; default: the saved one of a saved guide, else 2.
            guidance_interval: Default: the saved one, where anything guides; (0, 1000) is all.
            guidance_channels: Likewise; as many as there are is all.
            tau: Of a model with such a rule, instead of its own: a number, or spans (lowest, highest time, tau).
            policy: Experts that are suppressed, forced or favoured, all the time or in some steps; not the guide's.
            sampler_options: Fields of the sampler's scheduler, such as {"exposure_window": 40} for "ts-ddim".
            seed: Image i is a function of (seed, indices[i], label) alone; default 0.
            generator: Instead: a seed, see `asked.generators_of`; or one for each image, which draws all of it.
            indices: Running numbers of the images; default 0, 1, 2, ...
            latents: The initial noise (N, C, H, W), standard normal; default: drawn.
            num_images_per_label: Images of each label, one after the other.
            output_type: "pil"; "np", (N, H, W, C) in [0, 1]; "pt", (N, C, H, W) about [-1, 1]; "latent", not decoded.
            return_dict: False: a tuple of the images alone.
            callback_on_step_end: As in diffusers: called with (pipeline, step, timestep, {"latents": ...}) after each
                step; goes on with the latents of the dictionary that it returns. It changes no weights.
            edit: Of `image_to_image` and `inpaint`.

        Raises:
            ValueError: A label out of range, an unknown sampler, or another value that cannot be used.
        """
        net, device = self.transformer, self._execution_device
        labels, N = asked.images_of(class_labels, num_images, num_images_per_label, net.config, self.id2label)
        numbers = {"guidance_scale": guidance_scale, "guide_scale": guide_scale, "eta": eta}
        numbers["epsilon_scale"] = epsilon_scale
        told = (output_type, callback, guidance_interval, guidance_channels, indices, sampler, sampler_options)
        asked.check_call(*told, numbers)
        if not isinstance(edit, Edit | None):
            raise ValueError(f"edit is {edit!r:.100}; leave it out: image_to_image and inpaint give it")
        on_step_end = asked.step_end(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        if guidance_scale is None:
            guidance_scale = self.config.guidance_scale if labels is not None else 1.0
        guide, w = self.guide_for(guide, guide_scale)
        scheduler = self.scheduler_for(sampler, num_inference_steps, sampler_options)
        steps = self.steps_for(num_inference_steps)
        first = 0 if edit is None else edit.skipped(steps) * scheduler.order
        guidance_interval = self.interval_for(guidance_interval, guidance_scale, w, scheduler.timesteps[first:])
        guidance_channels = self.channels_for(guidance_channels, guidance_scale, w)
        generators = asked.generators_of(N, seed, generator, indices)
        spans = [(0.0, 1000.0, float(tau))] if isinstance(tau, int | float) else tau
        policy = policy if policy is None or isinstance(policy, Policy) else Policy.from_dict(policy)
        steered = Steered(net, policy, spans, len(scheduler.timesteps) - first)
        shape = (net.config.in_channels, net.config.sample_size, net.config.sample_size)
        noise = asked.noise_of(latents, generators, shape, device)
        known = None if edit is None else edit.begin(self, noise, scheduler, first)
        x = sample(
            steered, scheduler, noise if known is None else known.start,
            class_labels=labels, num_inference_steps=steps, null_label=net.null_label, guidance_scale=guidance_scale,
            guidance_interval=guidance_interval, guidance_channels=guidance_channels, guidance_rule=guidance_rule,
            guide=guide, guide_scale=w, epsilon_scale=epsilon_scale, generators=generators, eta=eta, callback=callback,
            progress=getattr(self, "_progress_bar_config", {}), first=first,
            on_step_end=steered.after(on_step_end if known is None else known.after(on_step_end)),
        )  # fmt: skip
        if output_type != "latent":
            x = self.decode(x) if known is None else known.pasted(self.decode(x))
        self.maybe_free_model_hooks()
        made = ImagePipelineOutput(images=asked.output(x, output_type))
        return made if return_dict else (made.images,)

    def image_to_image(self, image: Any, class_labels: Any = None, *, strength: float = 0.5, **call: Any) -> Any:
        """Images drawn from noised ones on (SDEdit, Meng et al. 2022, arXiv 2108.01073); else as a call.

        Args:
            image: One, or one for each image that is drawn, see `ditmoe.pipeline.edit.pixels_of`.
            class_labels: As of a call.
            strength: Share of the steps that are taken, the last ones; 1 is all, which ignores the image.
            call: Further arguments of a call.
        """
        return self(class_labels, edit=Edit(image, strength), **call)

    def inpaint(
        self, image: Any, mask_image: Any, class_labels: Any = None, *, strength: float = 1.0, **call: Any
    ) -> Any:
        """Images drawn anew where the mask is white, and kept to the bit elsewhere (RePaint, arXiv 2201.09865, eq. 8).

        Args: see `image_to_image`; mask_image: see `ditmoe.pipeline.edit.mask_of`.
        """
        if mask_image is None:
            raise ValueError("mask_image is None; give a picture, white where something new is to be drawn")
        return self(class_labels, edit=Edit(image, strength, mask_image), **call)

    def enable_attention_slicing(self, slice_size: Any = "auto") -> None:
        """Refused, as of xformers: neither changes anything."""
        if slice_size is not None:  # which asks for none
            raise ValueError("slices and xformers do nothing here: attention is torch's fused kernel; leave them out")

    enable_xformers_memory_efficient_attention = enable_attention_slicing

    def scheduler_for(
        self, sampler: str | None = None, num_inference_steps: int | None = None,
        sampler_options: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        """What a call with these arguments samples with; its `timesteps` are set, one a network call."""
        steps = self.steps_for(num_inference_steps)
        net = self.transformer.config  # it decides, whichever sampler it was saved with
        learned = {"variance_type": "learned_range"} if net.learn_sigma else {}
        config = {**self.scheduler.config, **learned, "prediction_type": net.prediction_type}
        if (length := config.get("num_train_timesteps", NUM_TIMESTEPS)) != NUM_TIMESTEPS:
            raise ValueError(
                f"scheduler has num_train_timesteps {length}; the time of this network has {NUM_TIMESTEPS}"
            )
        if self.config.sampler is None:
            if sampler is None:
                return adopted(self.scheduler, net.prediction_type, steps, sampler_options)
            check_nothing_lost(self.scheduler, sampler)
        return scheduler_for(self.config.sampler if sampler is None else sampler, config, steps, sampler_options)

    def steps_for(self, num_inference_steps: int | None = None) -> int:
        """How many steps a call with this argument takes. ValueError unless it is a whole number."""
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
            raise ValueError(f"num_inference_steps is {steps!r}; it must be a whole number, 1 or more")
        return int(steps)

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

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pictures."""
        return decode.image_shape(self.vae, self.transformer.config)

    def decode(self, x: Tensor) -> Tensor:
        """Latents (or pixels) (N, C, H, W) -> pixels about [-1, 1]; the identity without a VAE."""
        return decode.decode(self.vae, x, self.config.latents)


diffusers.DiTMoEPipeline = DiTMoEPipeline  # where DiffusionPipeline.from_pretrained looks a saved class up
