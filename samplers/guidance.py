"""One call of the network: labels, classifier-free guidance, and epsilon scaling.

Shapes: images (N, C, H, W); labels int64 (N,); timesteps () or (N,).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import Tensor, nn

from samplers import gaussian
from samplers.translate import Translation

RULES = ("cfg", "cfg++")
MOST = 1e6  # of a scale: a larger one is a slip, and far beyond it images are not finite

Rescale = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How the answers with and without the label are joined (Ho & Salimans 2022, arXiv 2207.12598).

    Attributes:
        scale: w of ``uncond + w (cond - uncond)``; 1 is the conditional model alone, 0 the unconditional one.
        interval: (lowest, highest) timestep, on the scheduler's scale, at which to guide; elsewhere the conditional
            model alone, in a pass of half the size (Kynkäänniemi et al. 2024, arXiv 2404.07724). None: everywhere.
        channels: how many of the first channels are guided, the others staying conditional (DiT's code guides 3 of
            4 latent channels); None: all.
        rule: "cfg", or "cfg++" (Chung et al. 2024, arXiv 2406.08070): the step takes the clean image from the guided
            answer and puts noise back with the unconditional one; scales are in 0..1.
        guide_scale: w of ``guide + w (cond - guide)``, with a weaker network as guide: autoguidance (Karras et al.
            2024, arXiv 2406.02507), which sharpens images without taking their variety; 1 is off. Beside ``scale``
            both differences are added: ``cond + (scale - 1) (cond - uncond) + (guide_scale - 1) (cond - guide)``.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None
    channels: int | None = None
    rule: str = "cfg"
    guide_scale: float = 1.0

    def __post_init__(self) -> None:
        for name, scale in (("guidance_scale", self.scale), ("guide_scale", self.guide_scale)):
            if not 0 <= scale <= MOST:
                raise ValueError(f"{name} is {scale}, but it must be 0 or more, and {MOST:.0f} at most; 1 is off")
        if self.guide_scale != 1 and self.rule == "cfg++":
            raise ValueError("guidance_rule 'cfg++' has no guide; use 'cfg', or guide_scale 1")
        if self.interval is not None and not _is_interval(self.interval):
            raise ValueError(f"guidance_interval {self.interval} must be (lowest, highest) timestep")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"guidance_channels is {self.channels}, but it must be 1 or more")
        if self.rule not in RULES:
            raise ValueError(f"guidance_rule {self.rule!r} is not one of {', '.join(RULES)}")
        if self.rule == "cfg++" and self.scale > 1:
            raise ValueError(
                f"guidance_scale is {self.scale}, but guidance_rule 'cfg++' takes 0 to 1; give one such as 0.6 (--cfg)"
            )
        if self.off and (self.interval is not None or self.channels is not None):
            raise ValueError("guidance_interval and guidance_channels do nothing at guidance_scale 1; leave them out")

    @property
    def off(self) -> bool:
        """Is the conditional model all that is asked for?"""
        return not self.classifier_free and self.guide_scale == 1

    @property
    def classifier_free(self) -> bool:
        """Is the answer without the label asked for?"""
        return self.scale != 1 or self.rule != "cfg"

    def check(self, timesteps: Tensor) -> None:
        """Raise ValueError for an interval that holds none of these timesteps of a schedule."""
        if self.interval is not None and not any(map(self.applies, timesteps.tolist())):
            raise ValueError(
                f"guidance_interval {self.interval} holds none of the {len(timesteps)} timesteps of this run, "
                f"{float(timesteps.min()):g} to {float(timesteps.max()):g}, so that nothing is guided; use a wider one"
            )

    def applies(self, t: float) -> bool:
        """Is the network's answer at timestep t guided?"""
        return not self.off and (self.interval is None or self.interval[0] <= t <= self.interval[1])


def _is_interval(interval: Any) -> bool:
    try:
        lowest, highest = map(float, interval)
    except (TypeError, ValueError):
        return False
    return lowest <= highest


@dataclass(frozen=True)
class Network:
    """A model with its labels and guidance: x_t -> what the scheduler wants.

    Attributes:
        model: called as ``model(x, t, class_labels=y).sample``.
        labels: (N,), or None for a model without classes.
        null_label: the label that means "no class".
        guidance: see `Guidance`.
        translation: into what the scheduler expects, None where the model says just that.
        guide: a weaker network for ``guidance.guide_scale``, called as the model is; and its translation.
    """

    model: nn.Module
    labels: Tensor | None
    null_label: int | None
    guidance: Guidance
    translation: Translation | None = None
    guide: nn.Module | None = None
    guide_translation: Translation | None = None

    def check(self, noise: Tensor) -> None:
        """Raise ValueError for labels or guidance that cannot apply to these images."""
        scale = self.guidance.scale
        if (self.guide is None) != (self.guidance.guide_scale == 1):
            raise ValueError(
                f"guide_scale is {self.guidance.guide_scale}: a guide and a scale other than 1 belong together"
            )
        channels = self.guidance.channels
        if channels is not None and channels > noise.shape[1]:
            raise ValueError(f"guidance_channels is {channels}, but the images have {noise.shape[1]}")
        if self.labels is None:
            if self.guidance.classifier_free:
                what = f"guidance_scale {scale}" if scale != 1 else f"guidance_rule {self.guidance.rule!r}"
                raise ValueError(
                    f"{what} needs class labels; an unconditional model can only be sampled with guidance_scale 1 "
                    "and guidance_rule 'cfg'"
                )
            return
        if self.labels.shape != noise.shape[:1]:
            raise ValueError(
                f"class_labels has shape {tuple(self.labels.shape)} for {len(noise)} images; give one label per image"
            )
        if self.guidance.classifier_free and self.null_label is None:
            raise ValueError(
                f"guidance_scale {scale} needs the model's null label; pass null_label "
                "(num_classes for a DiT) or use guidance_scale 1"
            )

    def __call__(self, x: Tensor, t: Tensor, scheduled: float) -> tuple[Tensor, Tensor | None]:
        """(answer, unguided answer or None), float32; (N, C, H, W), or the answer 2C with a learned variance.

        ``t`` () or (N,) is what the network is told, ``scheduled`` what the guidance interval goes by. A learned
        variance stays the conditional one. The unguided answer is for "cfg++" steps that are guided.
        """
        labels, channels = self.labels, x.shape[1]
        if not self.guidance.applies(scheduled):
            return self._ask(x, t, labels), None
        null = None
        if self.guidance.classifier_free:
            assert labels is not None
            assert self.null_label is not None
            twice = torch.cat([labels, torch.full_like(labels, self.null_label)])
            output, uncond = self._ask(torch.cat([x, x]), torch.cat([t, t]) if t.ndim else t, twice).chunk(2)
            null = uncond[:, :channels]
        else:
            output = self._ask(x, t, labels)
        cond, rest = output[:, :channels], output[:, channels:]
        joined = cond if null is None else null + self.guidance.scale * (cond - null)
        if self.guide is not None:
            said = self._ask(x, t, labels, of_guide=True)[:, :channels]
            joined = joined + (self.guidance.guide_scale - 1) * (cond - said)
        if self.guidance.channels is not None:
            first = self.guidance.channels
            joined = torch.cat([joined[:, :first], cond[:, first:]], dim=1)
            null = None if null is None else torch.cat([null[:, :first], cond[:, first:]], dim=1)
        return torch.cat([joined, rest], dim=1), null if self.guidance.rule == "cfg++" else None

    @cached_property
    def _caching(self) -> list[CacheMixin]:
        """The networks that keep something between steps; what it is a step of is told by a context."""
        return caching(self.model, self.guide)

    @cached_property
    def _dtypes(self) -> list[torch.dtype]:
        """What the model and the guide compute in, which under layerwise casting is not what they store."""
        found = []
        for net in (self.model, self.guide):
            has = net is not None and any(p.is_floating_point() for p in net.parameters())
            found.append(get_parameter_dtype(net) if has else torch.float32)
        return found

    def _ask(self, x: Tensor, t: Tensor, labels: Tensor | None, *, of_guide: bool = False) -> Tensor:
        model = self.guide if of_guide else self.model
        translation = self.guide_translation if of_guide else self.translation
        assert model is not None
        dtype = self._dtypes[of_guide]

        def ask(x: Tensor, t: Tensor) -> Tensor:
            said: Tensor = model(x.to(dtype), t.to(x.device).expand(len(x)), class_labels=labels).sample
            return said.float()

        with ExitStack() as contexts:
            for net in self._caching:
                contexts.enter_context(net.cache_context(f"{'guide' if of_guide else 'model'} of {len(x)}"))
            output = ask(x, t) if translation is None else translation(ask, x, t)
        channels = x.shape[1]
        if output.shape[1] not in (channels, 2 * channels):
            raise ValueError(
                f"the model emits {output.shape[1]} channels for images of {channels}; "
                f"it must emit {channels}, or {2 * channels} with a learned variance"
            )
        return output


def caching(*networks: nn.Module | None) -> list[CacheMixin]:
    """Of these networks, wrapped or not, those whose cache is enabled."""
    parts = {part for net in networks if net is not None for part in net.modules()}
    return [part for part in parts if isinstance(part, CacheMixin) and part.is_cache_enabled]


def epsilon_scaling(scheduler: Any, prediction_type: str, scale: float | tuple[float, float]) -> Rescale | None:
    """A function (output, x_t, t) -> output with eps divided by lambda_t = k t + b; None where lambda is 1.

    Epsilon scaling (Ning et al. 2024, arXiv 2308.15321): a network that meets its own errors sees images that are
    too noisy and predicts too much noise. For "v_prediction" and "sample" the output is turned into eps and back.

    Args:
        scheduler: knows ``alphas_cumprod``.
        prediction_type: of the network.
        scale: b (with k = 0), or (k, b).

    Raises:
        ValueError: lambda is not above 0 everywhere, or the network has no eps to scale.
    """
    if isinstance(scale, str) or (isinstance(scale, Sequence) and len(scale) != 2):
        raise ValueError(f"epsilon_scale is {scale!r}, but it must be a number b, or (k, b) for k t + b; 1 is off")
    k, b = scale if isinstance(scale, Sequence) else (0.0, scale)
    if (k, b) == (0.0, 1.0):
        return None
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if prediction_type not in gaussian.PREDICTION_TYPES or alphas is None:
        raise ValueError(f"epsilon_scale {scale} is for Gaussian diffusion, not for {prediction_type!r}; leave it at 1")
    if not min(b, k * (len(alphas) - 1) + b) > 0 or not math.isfinite(k + b):
        raise ValueError(f"epsilon_scale {scale} must be above 0 at every timestep; 1 is off")

    def scaled(output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        channels = x_t.shape[1]
        level = alphas.double()[t.cpu().long()]
        _, eps = gaussian.predict_x0_and_eps(x_t, output[:, :channels], level, prediction_type)
        eps = eps / gaussian.per_image(k * t.cpu().double() + b, x_t)
        turned = gaussian.from_eps(x_t, eps, level, prediction_type)
        # without any signal eps says nothing about the image: left as it is
        turned = torch.where(gaussian.per_image(level, x_t) > 0, turned, output[:, :channels])
        return torch.cat([turned, output[:, channels:]], dim=1)

    return scaled
