"""The one sampling loop: any diffusers scheduler, any network that returns ``.sample``.

Legend: N batch, C channels of an image, H W size. Labels are int64 (N,).
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from samplers.catalog import prediction_type_of
from samplers.grid import check_steps

Callback = Callable[[int, Tensor, Tensor, Tensor | None], None]


def sample(
    model: nn.Module,
    scheduler: Any,
    noise: Tensor,
    *,
    num_inference_steps: int,
    class_labels: Tensor | None = None,
    null_label: int | None = None,
    guidance_scale: float = 1.0,
    generators: Sequence[torch.Generator] | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Images (N, C, H, W), float32, not clamped, on the device of ``noise``.

    Args:
        model: called as ``model(x, t, class_labels=y).sample`` with t (N,) on the scheduler's
            scale; it may emit 2C channels, of which the second half (a learned variance) goes to
            schedulers that use it. In eval mode meanwhile; every module's mode is restored.
        scheduler: from `make_scheduler`, or a stock diffusers scheduler.
        noise: standard normal (N, C, H, W), from `initial_noise`.
        num_inference_steps: 1..num_train_timesteps.
        class_labels: (N,), or None for an unconditional model.
        null_label: the label that means "no class"; guidance needs it.
        guidance_scale: classifier-free guidance w (Ho & Salimans 2022, arXiv 2207.12598):
            ``uncond + w (cond - uncond)`` on the C predicted channels, all of them, in one forward
            of 2N images. 1 is the plain conditional model in one pass of N. A learned variance
            stays the conditional one.
        generators: one per image, from `image_generators`: what a stochastic step draws for image n
            comes from ``generators[n]``. None draws from torch's global generator.
        eta: 0..1, the noise of DDIM; only for schedulers that have it.
        callback: called after step k as ``callback(k, t, x_t, pred_x0)``, with the t and the
            (N, C, H, W) image that the step started from and the clean image it predicted (None if
            the scheduler does not tell). Clone what is to be changed or differentiated.
        progress: show a progress bar on a terminal.

    Raises:
        ValueError: for a value that cannot apply, in a sentence that names it.
    """
    train_steps = scheduler.config.get("num_train_timesteps", 1000)
    check_steps(num_inference_steps, train_steps)
    _check_objective(model, scheduler)
    labels = _labels(noise, class_labels, null_label, guidance_scale)
    step_options = _step_options(scheduler, len(noise), generators, eta)
    scheduler.set_timesteps(num_inference_steps)
    # The schedulers that read a learned variance keep its kind as an attribute of their own; a
    # config may carry the field over from another scheduler without meaning it.
    reads_variance = vars(scheduler).get("variance_type") in ("learned", "learned_range")

    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            x = noise.float() * getattr(scheduler, "init_noise_sigma", 1.0)
            bar = tqdm(scheduler.timesteps, desc="sampling", disable=None if progress else True)
            for k, t in enumerate(bar):
                output = _predict(model, scheduler, x, t, labels, guidance_scale)
                if not reads_variance:
                    output = output[:, : x.shape[1]]
                result = scheduler.step(output, t, x, **step_options)
                if callback is not None:
                    callback(k, t, x, result.get("pred_original_sample"))
                x = result.prev_sample.float()
    finally:
        for module in in_training:
            module.training = True
    images: Tensor = x.clone()  # tensors made in inference mode refuse in-place changes
    return images


def _predict(
    model: nn.Module,
    scheduler: Any,
    x: Tensor,
    t: Tensor,
    labels: Tensor | None,
    guidance_scale: float,
) -> Tensor:
    """The network's guided output (N, C or 2C, H, W), float32."""
    channels = x.shape[1]
    # diffusers' flow-matching schedulers have neither of the two scalings: they never scale.
    scale = getattr(scheduler, "scale_model_input", None)
    inputs = x if scale is None else scale(x, t)
    guided = labels is not None and len(labels) == 2 * len(x)
    if guided:
        inputs = torch.cat([inputs, inputs])
    times = t.to(x.device).expand(len(inputs))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    output: Tensor = model(inputs.to(dtype), times, class_labels=labels).sample.float()
    if output.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"the model emits {output.shape[1]} channels for images of {channels}; "
            f"it must emit {channels}, or {2 * channels} with a learned variance"
        )
    if not guided:
        return output
    cond, uncond = output.chunk(2)
    mean, variance = cond[:, :channels], cond[:, channels:]
    null = uncond[:, :channels]
    return torch.cat([null + guidance_scale * (mean - null), variance], dim=1)


def _labels(noise: Tensor, class_labels: Tensor | None, null_label: int | None, guidance_scale: float) -> Tensor | None:
    """The labels of one forward: None, (N,), or (2N,) with the null label for guidance."""
    if not math.isfinite(guidance_scale) or guidance_scale < 0:
        raise ValueError(f"guidance_scale is {guidance_scale}, but it must be 0 or more; 1 is off")
    if class_labels is None:
        if guidance_scale != 1:
            raise ValueError(
                f"guidance_scale {guidance_scale} needs class labels; an unconditional model "
                "can only be sampled with guidance_scale 1"
            )
        return None
    if class_labels.shape != noise.shape[:1]:
        raise ValueError(
            f"class_labels has shape {tuple(class_labels.shape)} for {len(noise)} images; give one label per image"
        )
    labels = class_labels.to(noise.device)
    if guidance_scale == 1:
        return labels
    if null_label is None:
        raise ValueError(
            f"guidance_scale {guidance_scale} needs the model's null label; pass null_label "
            "(num_classes for a DiT) or use guidance_scale 1"
        )
    return torch.cat([labels, torch.full_like(labels, null_label)])


def _step_options(
    scheduler: Any, images: int, generators: Sequence[torch.Generator] | None, eta: float
) -> dict[str, Any]:
    """The arguments of ``scheduler.step`` beyond the usual three, as far as it has them."""
    if generators is not None and len(generators) != images:
        raise ValueError(f"{len(generators)} generators were given for {images} images; give one per image")
    known = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {}
    if eta != 0:
        if "eta" not in known:
            raise ValueError(f"eta is {eta}, but {type(scheduler).__name__} has no eta; use 0 or sampler 'ddim'")
        options["eta"] = eta
    if generators is not None and "generator" in known:
        options["generator"] = list(generators)
    return options


def _check_objective(model: nn.Module, scheduler: Any) -> None:
    """Refuse a scheduler for another prediction type than the one in the model's config, if any."""
    trained = getattr(getattr(model, "config", None), "prediction_type", None)
    expected = prediction_type_of(scheduler.config)
    if trained is not None and trained != expected:
        raise ValueError(
            f"the model has prediction_type {trained!r}, but the scheduler expects {expected!r}; "
            "make one from the scheduler's config that was saved with the model"
        )
