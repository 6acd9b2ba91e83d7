"""What a pipeline's network says of images at any times, in the words of another's scheduler: a teacher's answers."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from samplers.catalog import chain_of, prediction_type_of, scheduler_for
from samplers.gaussian import per_image
from samplers.guidance import Guidance, Network
from samplers.translate import FLOW, translation

from ..config.sections import ObjectiveConfig
from ..objective import scheduler_config


class Answers:
    """A frozen pipeline that is asked as a network is.

    Args:
        pipe: The pipeline. Its networks are in eval mode from then on, and learn nothing.
        scheduler: Whose images and times it is asked about, and what it is to say of them (`prediction_type`).
        guided: As its folder guides it: scale, interval, channels, guide; otherwise its network alone.
    """

    def __init__(self, pipe: Any, scheduler: Any, *, guided: bool) -> None:
        self.net, self.scheduler = pipe.transformer, scheduler
        self.null_label: int | None = self.net.null_label
        scale = pipe.config.guidance_scale if guided and self.null_label is not None else 1.0
        self.guide: nn.Module | None = None
        w = 1.0
        if guided:
            self.guide, w = pipe.guide_for()
        channels = pipe.channels_for(None, scale, w)
        self.guidance = Guidance(scale=scale, guide_scale=w, channels=channels)
        span, own = None if self.guidance.off else pipe.config.guidance_interval, pipe.scheduler_for()
        last = own.config.num_train_timesteps - 1  # from 0 and to the end of its own times: of all
        self.lowest = -math.inf if span is None or span[0] <= 0 else float(_flow_time(own, torch.tensor(span[0])))
        self.highest = math.inf if span is None or span[1] >= last else float(_flow_time(own, torch.tensor(span[1])))
        self._said = translation(self.net, scheduler)
        self._guide_said = None if self.guide is None else translation(self.guide, scheduler)
        for network in (self.net, self.guide):
            if network is not None:
                network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """(N, C, H, W) float32 of x (N, C, H, W) at t (N,), labels (N,) of its own, its null label among them."""
        s = _flow_time(self.scheduler, t)
        inside = (s >= self.lowest) & (s <= self.highest)
        if not bool(inside.any() and not inside.all()):
            return self._ask(x, t, labels, guided=bool(inside.any()))
        said = torch.empty_like(x, dtype=torch.float32)
        for guided, rows in ((True, inside), (False, ~inside)):
            rows = rows.to(x.device)
            said[rows] = self._ask(x[rows], t[rows], None if labels is None else labels[rows], guided=guided)
        return said

    def _ask(self, x: Tensor, t: Tensor, labels: Tensor | None, *, guided: bool) -> Tensor:
        guidance, guide = (self.guidance, self.guide) if guided else (Guidance(), None)
        network = Network(self.net, labels, self.null_label, guidance, self._said, guide, self._guide_said)
        answer, _ = network(x, t, 0.0)
        return answer[:, : x.shape[1]]


def words(objective: ObjectiveConfig, shift: float | None = None, steps: int = 1) -> Any:
    """The scheduler that speaks as networks of an objective do, its timesteps set: flow-euler, or DDIM."""
    name = "flow-euler" if objective.prediction_type == FLOW else "ddim"
    return scheduler_for(name, scheduler_config(objective) | ({} if shift is None else {"shift": shift}), steps)


def one_step(ask: Any, x: Tensor, s: Tensor, *, midpoint: bool) -> Tensor:
    """The velocity (N, C, H, W) by which one step from x lands where a path of M steps does; float32.

    ``ask(x, t)`` is the velocity of the path at t = 1000 s; s (M + 1, N) float64 are each image's noise levels on the
    way, falling, see `samplers.flow`. By the midpoint method (two answers a step), or Euler's; neither asks at s = 0,
    where networks that have seen no clean image know nothing.
    """
    begin, x = x.float(), x.float()
    for here, there in pairwise(s):
        length = per_image(there - here, x)
        v = ask(x, _told(here, x))
        if midpoint:
            v = ask(x + length / 2 * v, _told((here + there) / 2, x))
        x = x + length * v
    velocity: Tensor = (x - begin) / per_image(s[-1] - s[0], x)
    return velocity


def _told(s: Tensor, x: Tensor) -> Tensor:
    return (1000 * s).to(x.device, torch.float32)


def _flow_time(scheduler: Any, t: Tensor) -> Tensor:
    """s in [0, 1], on the CPU, of a scheduler's times: where noise over signal is s / (1 - s)."""
    t = t.cpu().double()
    if prediction_type_of(scheduler.config) == FLOW:
        return t / int(scheduler.config.get("num_train_timesteps", 1000))
    chain = chain_of(scheduler.config)
    a = chain[t.round().long().clamp(0, len(chain) - 1)]
    s: Tensor = (1 - a).sqrt() / (a.sqrt() + (1 - a).sqrt())
    return s
