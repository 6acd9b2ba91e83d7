"""The one sampling loop: any diffusers scheduler, any network that returns ``.sample``.

Legend: N batch, C channels of an image, H W size. Labels are int64 (N,).
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from samplers.catalog import prediction_type_of
from samplers.flow import FlowHeunScheduler
from samplers.grid import check_steps
from samplers.guidance import Guidance, Network, Rescale, caching, epsilon_scaling
from samplers.translate import translation

Callback = Callable[[int, Tensor, Tensor, Tensor | None], None]
StepEnd = Callable[[int, Tensor, Tensor], Tensor]


def sample(
    model: nn.Module, scheduler: Any, noise: Tensor, *, num_inference_steps: int,
    class_labels: Tensor | Sequence[int] | None = None, null_label: int | None = None, guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] | None = None, guidance_channels: int | None = None,
    guidance_rule: str = "cfg", guide: nn.Module | None = None, guide_scale: float = 1.0,
    epsilon_scale: float | tuple[float, float] = 1.0, generators: Sequence[torch.Generator] | None = None,
    eta: float = 0.0, callback: Callback | None = None, progress: bool | Mapping[str, Any] = False, first: int = 0,
    on_step_end: StepEnd | None = None,
) -> Tensor:  # fmt: skip
    """Images (N, C, H, W), float32, not clamped, on the device of ``noise``.

    Args:
        model: called as ``model(x, t, class_labels=y).sample`` with t (N,) on its own
            scale; it may emit 2C channels, of which the second half (a learned variance) goes to
            schedulers that use it. In eval mode meanwhile; every module's mode is restored.
        scheduler: from `make_scheduler`, or a stock diffusers scheduler. A network whose config names another
            prediction type is translated, see `samplers.translate`.
        noise: standard normal (N, C, H, W), from `initial_noise`.
        num_inference_steps: 1..num_train_timesteps.
        class_labels: (N,), or None for an unconditional model.
        null_label: the label that means "no class"; guidance needs it.
        guidance_scale: classifier-free guidance ``uncond + w (cond - uncond)``, in one forward of 2N
            images. 1 is the plain conditional model in one pass of N. See `samplers.guidance.Guidance`.
        guidance_interval: (lowest, highest) timestep at which to guide, some of the run's within; None: all.
        guidance_channels: guide only so many first channels; None: all.
        guide: a weaker network, called as ``model`` is: a smaller or an earlier one. In eval mode meanwhile too.
        guide_scale: autoguidance ``guide + w (cond - guide)``, within the interval; 1 is off.
        guidance_rule: "cfg", or "cfg++" where the scheduler has it (DDIM and flow Euler), with a scale in 0..1.
        epsilon_scale: lambda of epsilon scaling, a number or (k, b) for ``k t + b``; 1 is off. See
            `samplers.guidance.epsilon_scaling`.
        generators: one per image, from `image_generators`: what a stochastic step draws for image n
            comes from ``generators[n]``. None draws from torch's global generator.
        eta: 0..1, the noise of DDIM; only for schedulers that have it.
        callback: called after step k as ``callback(k, t, x_t, pred_x0)``, with the t and the
            (N, C, H, W) image that the step started from and the clean image it predicted (None if
            the scheduler does not tell). Clone what is to be changed or differentiated.
        progress: show a progress bar on a terminal, with what tqdm is to be told.
        first: of the scheduler's timesteps the one to start at; after 0, ``noise`` is the image there (`noised`).
        on_step_end: called after step k as ``on_step_end(k, t, x)`` with the image that it led to; what it returns
            goes on.

    Raises:
        ValueError: for a value that cannot apply, in a sentence that names it.
    """
    train_steps = scheduler.config.get("num_train_timesteps", 1000)
    check_steps(num_inference_steps, train_steps)
    guidance = Guidance(
        scale=guidance_scale,
        interval=guidance_interval,
        channels=guidance_channels,
        rule=guidance_rule,
        guide_scale=guide_scale,
    )
    labels = None if class_labels is None else torch.as_tensor(class_labels, device=noise.device)
    guide_says = None if guide is None else translation(guide, scheduler)
    network = Network(model, labels, null_label, guidance, translation(model, scheduler), guide, guide_says)
    network.check(noise)
    step_options = _step_options(scheduler, len(noise), generators, eta, guidance)
    rescaled = epsilon_scaling(scheduler, prediction_type_of(scheduler.config), epsilon_scale)
    scheduler.set_timesteps(num_inference_steps)
    check_start(scheduler, first)
    guidance.check(scheduler.timesteps[first:])

    networks = [model] if guide is None else [model, guide]
    in_training = [module for each in networks for module in each.modules() if module.training]
    for each in networks:
        each.eval()
    for kept in caching(*networks):
        kept._reset_stateful_cache()  # of another call
    try:
        with torch.inference_mode():
            x = noise.float() if first else noise.float() * getattr(scheduler, "init_noise_sigma", 1.0)
            told = dict(progress) if isinstance(progress, Mapping) else {} if progress else {"disable": True}
            bar = tqdm(scheduler.timesteps[first:], **{"desc": "sampling", "disable": None, **told})
            for k, t in enumerate(bar):
                result = _step(network, scheduler, rescaled, x, t, step_options)
                if callback is not None:
                    callback(k, t, x, result.get("pred_original_sample"))
                x = result.prev_sample.float()
                if on_step_end is not None:
                    x = on_step_end(k, t, x).float()
    finally:
        for module in in_training:
            module.training = True
    images: Tensor = x.clone()  # tensors made in inference mode refuse in-place changes
    return images


def check_start(scheduler: Any, first: int) -> None:
    """Let a scheduler, its timesteps set, start at number ``first`` of them. ValueError for one that cannot."""
    if not first:
        return
    base = scheduler.config.get("base")
    runge_kutta = isinstance(scheduler, diffusers.PNDMScheduler) and not scheduler.config.skip_prk_steps
    whole = (FlowHeunScheduler, diffusers.LMSDiscreteScheduler, diffusers.FlowMatchHeunDiscreteScheduler)
    if runge_kutta or base == "pndm" or isinstance(scheduler, whole):
        raise ValueError(f"{type(scheduler).__name__} cannot start at a noise level; use another sampler, such as ddim")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)


def noised(scheduler: Any, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Clean images (N, C, H, W) as the scheduler, its timesteps set, has them at one of those, t ()."""
    times = t.expand(len(x0))
    if hasattr(scheduler, "add_noise"):
        noisy: Tensor = scheduler.add_noise(x0, noise, times)
    else:
        noisy = scheduler.scale_noise(x0, times, noise)
    return noisy.float()


def _step(
    network: Network, scheduler: Any, rescaled: Rescale | None, x: Tensor, t: Tensor, options: dict[str, Any]
) -> Any:
    """One network call and what the scheduler makes of it."""
    # diffusers' flow-matching schedulers never scale and have no such method
    scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
    # time-shift may ask about another timestep than the scheduled one
    told = scheduler.model_timestep(t) if hasattr(scheduler, "model_timestep") else t
    output, uncond = network(scaled, told, float(t))
    # The schedulers that read a learned variance keep its kind as an attribute of their own; a
    # config may carry the field over from another scheduler without meaning it.
    if vars(scheduler).get("variance_type") not in ("learned", "learned_range"):
        output = output[:, : x.shape[1]]
    if rescaled is not None:
        output = rescaled(output, scaled, told)
        uncond = None if uncond is None else rescaled(uncond, scaled, told)
    if uncond is not None:
        options = {**options, "model_output_uncond": uncond}
    return scheduler.step(output, t, x, **options)


def _step_options(
    scheduler: Any, images: int, generators: Sequence[torch.Generator] | None, eta: float, guidance: Guidance
) -> dict[str, Any]:
    """The arguments of ``scheduler.step`` beyond the usual three, as far as it has them."""
    if generators is not None and len(generators) != images:
        raise ValueError(f"{len(generators)} generators were given for {images} images; give one per image")
    known = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {}
    if eta != 0:
        if "eta" not in known:
            raise ValueError(f"eta is {eta}, but {type(scheduler).__name__} has no eta; use 0, or 'ddim' or 'ts-ddim'")
        options["eta"] = eta
    if guidance.rule == "cfg++" and "model_output_uncond" not in known:
        raise ValueError(f"guidance_rule 'cfg++' works with ddim and flow-euler, not with {type(scheduler).__name__}")
    if generators is not None and "generator" in known:
        options["generator"] = list(generators)
    return options
