"""A pipeline as a teacher: what its network says at any times in another's words, and the images it draws through."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samplers.catalog import CHAIN, chain_of, make_scheduler, prediction_type_of, scheduler_for
from samplers.guidance import Guidance, Network
from samplers.translate import FLOW, translation

from ..config.file import known
from ..config.sections import ObjectiveConfig
from ..objective import scheduler_config

ONE_CALL = ("ddim", "dpm++2m", "unipc", "flow-euler")  # samplers without noise of their own, of one call a step


class Answers:
    """A frozen pipeline that is asked as a network is.

    Args:
        pipe: The pipeline. Its networks are in eval mode from then on.
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
                network.eval()

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


def words(objective: ObjectiveConfig, pipe: Any) -> Any:
    """The scheduler that speaks as networks of an objective do, flow-euler or DDIM, of a pipeline's chain if it is one.

    Raises:
        ValueError: Both are chains, and not the same: at a time one is noisier than the other.
    """
    own, theirs = scheduler_config(objective), pipe.scheduler.config
    chain = {name: theirs[name] for name in CHAIN if name in theirs}
    if objective.prediction_type == FLOW:
        return make_scheduler("flow-euler", {**chain, **own})
    of_chain = pipe.transformer.config.prediction_type != FLOW
    if of_chain and bool((chain_of(own) - chain_of(chain)).abs().max() > 1e-6):
        said = ", ".join(f"{name} {value}" for name, value in chain.items())
        raise ValueError(
            f"it is of another noise schedule ({said}); give the student the same, or "
            f"--objective.prediction-type flow_prediction"
        )
    return make_scheduler("ddim", own)


def calls_of(folder: Path) -> int:
    """Of a student of few calls how many they are; 0 of a model of all noise levels, or that does not say."""
    config = known(folder)
    return config.sample.steps if config is not None and config.distill.few else 0


def flow_levels(shift: float | None, steps: int) -> tuple[float, ...]:
    """The noise levels of flow-euler: 1 of its first step, those of the next, and 0."""
    config = {"prediction_type": FLOW} | ({} if shift is None else {"shift": shift})
    return (1.0, *scheduler_for("flow-euler", config, steps).sigmas.tolist()[1:])


def path(pipe: Any, noise: Tensor, labels: Tensor | None, steps: int, levels: Sequence[float]) -> Tensor:
    """The images (L, N, C, H, W) through which a pipeline draws, at some of a flow's noise levels; float32.

    Args:
        pipe: Draws by a sampler of `ONE_CALL`, as its folder guides it.
        noise: (N, C, H, W), standard normal, the image at s = 1.
        labels: (N,), its own.
        steps: Steps of its sampler.
        levels: s, falling from 1, where the image is the noise, to 0, where it is what is drawn. Between two steps
            the way is straight, as a flow's is, see `samplers.translate`.
    """
    known: list[tuple[float, Tensor]] = [(1.0, noise.float())]

    def keep(k: int, t: Tensor, x: Tensor, clean: Tensor | None) -> None:
        s = float(_flow_time(scheduler, t))
        if s < 1:
            of_chain = prediction_type_of(scheduler.config) != FLOW  # x_vp = x_flow / hypot(1 - s, s)
            known.append((s, x.float() * (math.hypot(1 - s, s) if of_chain else 1.0)))

    scheduler = pipe.scheduler_for(None, steps)
    drawn = pipe(
        None if labels is None else labels.tolist(), num_images=len(noise) if labels is None else None,
        latents=noise, num_inference_steps=steps, output_type="latent", callback=keep,
    )  # fmt: skip
    known.append((0.0, drawn.images.float()))
    found = []
    for s in levels:
        (a, before), (b, after) = next((p, q) for p, q in pairwise(known) if p[0] >= s >= q[0])
        found.append(torch.lerp(before, after, (a - s) / (a - b)))
    return torch.stack(found)


def _flow_time(scheduler: Any, t: Tensor) -> Tensor:
    """s in [0, 1], on the CPU, of a scheduler's times: where noise over signal is s / (1 - s)."""
    t = t.cpu().double()
    if prediction_type_of(scheduler.config) == FLOW:
        return t / int(scheduler.config.get("num_train_timesteps", 1000))
    chain = chain_of(scheduler.config)
    ratio, low = ((1 - chain) / chain).sqrt(), t.floor().long().clamp(0, len(chain) - 2)
    r = torch.lerp(ratio[low], ratio[low + 1], (t - low).clamp(0, 1))
    s: Tensor = r / (1 + r)
    return s
