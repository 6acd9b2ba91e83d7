"""One network for every sampler: flow matching and variance-preserving diffusion are one family.

Both mix a clean image with noise, ``signal x0 + noise eps``. A chain has ``signal = sqrt(a)``, ``noise = sqrt(1 - a)``
with ``a = alpha_bar_t``; flow matching has ``signal = 1 - s``, ``noise = s``. With equal ``r = noise / signal`` they
differ by a factor alone,

    r = sqrt((1 - a) / a) = s / (1 - s),    x_flow = x_vp / (sqrt(a) + sqrt(1 - a)),

so an answer at one is an answer at the other: from a velocity ``v = eps - x0`` at x_flow follow ``x0 = x_flow - s v``
and ``eps = x_flow + (1 - s) v`` (Kingma & Gao 2023, arXiv 2303.00848; Gao et al. 2024, "Diffusion meets flow
matching").

Shapes: images (N, C, H, W); timesteps () or (N,), integers or fractions of a chain's, ``1000 s`` of a flow's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from samplers import gaussian
from samplers.catalog import chain_of, prediction_type_of
from samplers.gaussian import per_image

FLOW = "flow_prediction"
Ask = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Translation:
    """What a network says, in the words that a scheduler expects.

    Attributes:
        trained: what the network predicts.
        wanted: what the scheduler takes it for.
        alpha_bar: (T,) float64, the chain: the scheduler's, or for a flow scheduler that of the network. Between two
            timesteps ``r`` is linear, as diffusers' Euler and Heun have it; beyond the ends it is that of the end.
        train_steps: the flow's time axis, 1000.
    """

    trained: str
    wanted: str
    alpha_bar: Tensor
    train_steps: int = 1000

    def __post_init__(self) -> None:
        known = (*gaussian.PREDICTION_TYPES, FLOW)
        for kind in (self.trained, self.wanted):
            if kind not in known:
                raise ValueError(f"prediction_type {kind!r} is not one of {', '.join(known)}")

    def __call__(self, ask: Ask, x: Tensor, t: Tensor) -> Tensor:
        """The answer (N, C, H, W), or 2C with a learned variance, that ``ask(x, t)`` means; float32.

        ``x`` (N, C, H, W) and ``t`` () or (N,) are the scheduler's; ``ask`` takes the network's.
        """
        x, channels = x.float(), x.shape[1]
        if self.wanted == FLOW:
            a, asked = self._chain_at(t.cpu().double() / self.train_steps)
            x_vp = x * per_image(a.sqrt() + (1 - a).sqrt(), x)
            output = ask(x_vp, asked.to(torch.float32).to(t.device))
            x0, eps = gaussian.predict_x0_and_eps(x_vp, output[:, :channels], a, self.trained)
            said = eps - x0
        else:
            a = self._level(t.cpu().double())
            if self.trained == FLOW:
                signal, noise = a.sqrt(), (1 - a).sqrt()
                s = noise / (signal + noise)
                x_flow = x / per_image(signal + noise, x)
                output = ask(x_flow, (self.train_steps * s).to(torch.float32).to(t.device))
                v = output[:, :channels]
                x0, eps = x_flow - per_image(s, x) * v, x_flow + per_image(1 - s, x) * v
            else:
                output = ask(x, t)
                x0, eps = gaussian.predict_x0_and_eps(x, output[:, :channels], a, self.trained)
            answers = {"epsilon": eps, "sample": x0}
            said = answers[self.wanted] if self.wanted in answers else gaussian.velocity(x0, eps, a)
        return torch.cat([said, output[:, channels:]], dim=1)

    def _level(self, t: Tensor) -> Tensor:
        """alpha_bar at timesteps of the chain, float64."""
        low = t.floor().long().clamp(0, len(self.alpha_bar) - 1)
        high = (low + 1).clamp(max=len(self.alpha_bar) - 1)
        ratio = ((1 - self.alpha_bar) / self.alpha_bar).sqrt()
        r = torch.lerp(ratio[low], ratio[high], (t - low).clamp(0, 1))
        return torch.where(t == low, self.alpha_bar[low], 1 / (1 + r**2))

    def _chain_at(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_bar and the timestep of the chain where noise over signal is s / (1 - s), at most that of its ends."""
        ratio = ((1 - self.alpha_bar) / self.alpha_bar).sqrt()
        r = (s / (1 - s)).clamp(ratio[0], ratio[-1])
        high = torch.searchsorted(ratio, r).clamp(1, len(ratio) - 1)
        low = high - 1
        t = low + (r - ratio[low]) / (ratio[high] - ratio[low])
        return 1 / (1 + r**2), t


class Translated(nn.Module):
    """A network that answers any scheduler, for pipelines of diffusers, which ask it without our loop.

    ``Translated(model, scheduler)(x, t, class_labels).sample`` is what ``scheduler.step`` takes. ``model`` says in its
    config what it predicts; the scheduler says in its own what it expects and, in ``alphas_cumprod``, the chain.
    """

    def __init__(self, model: Any, scheduler: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self._translation = translation(model, scheduler)

    @property
    def dtype(self) -> torch.dtype:
        """The network's."""
        found: torch.dtype = self.model.dtype
        return found

    @property
    def device(self) -> torch.device:
        """The network's."""
        found: torch.device = self.model.device
        return found

    def forward(
        self, x: Tensor, t: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> SimpleNamespace | tuple[Tensor]:
        """x (N, C, H, W), t () or (N,) on the scheduler's scale; the answer in x's dtype."""

        def ask(x: Tensor, t: Tensor) -> Tensor:
            output: Tensor = self.model(x.to(self.dtype), t.expand(len(x)), class_labels=class_labels).sample
            return output.float()

        time = torch.as_tensor(t, device=x.device)
        said = ask(x, time) if self._translation is None else self._translation(ask, x, time)
        return SimpleNamespace(sample=said.to(x.dtype)) if return_dict else (said.to(x.dtype),)


def translation(model: Any, scheduler: Any) -> Translation | None:
    """The translation between a network and a scheduler; None where both speak of the same thing.

    What the network predicts is in its config (``prediction_type``); one that does not say is taken at the scheduler's
    word. Raises ValueError for a prediction type that is not known, for a network of a chain where the scheduler does
    not say of which, and for one that is `Translated` already.
    """
    if isinstance(model, Translated):
        raise ValueError("Translated is for pipelines of diffusers; give the network itself, which is translated here")
    wanted = prediction_type_of(scheduler.config)
    trained = getattr(getattr(model, "config", None), "prediction_type", None) or wanted
    if trained == wanted:
        return None
    chain = getattr(scheduler, "_alpha_bar", getattr(scheduler, "alphas_cumprod", None))
    if chain is None and not {"beta_schedule", "trained_betas"} & scheduler.config.keys():
        raise ValueError(
            f"{type(scheduler).__name__} does not say on which chain the network of {trained!r} was trained; make one "
            "with samplers.make_scheduler from the scheduler of its model folder"
        )
    alpha_bar = chain_of(scheduler.config) if chain is None else torch.as_tensor(chain).double().cpu()
    return Translation(trained, wanted, alpha_bar, int(scheduler.config.get("num_train_timesteps", 1000)))
