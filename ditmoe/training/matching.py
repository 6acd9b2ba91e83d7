"""Few calls by distribution matching: the images that a student draws become as likely as those of its teacher.

A step of squared errors lets a student be smooth where its teacher is sharp. Here nothing says which image belongs to
which noise: the student draws in its K calls, the gradient goes through all of them, and the images move to where the
teacher finds them more likely and a second network, the fake, which is trained all the while on what the student draws,
finds them less so. With x the images, x_s = (1 - s) x + s e, and x^ = x_s - s v what a network takes for the image:

    d loss / d x = (x^fake - x^teacher) / mean |x - x^teacher|, a mean over each image

Source: DMD (Yin et al., arXiv 2311.18828) eq. 7 and 8, without their factor alpha, as in its code; DMD2 (arXiv
2405.14867) for several steps of the fake to one of the student and for a loss without pairs. No adversary, and no noise
between calls.

Shapes: n images of a micro-batch, C channels, H W size.
"""

import copy
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config.sections import Config
from ..model import DiTMoETransformer2DModel, to_compile
from ..moe import Routing
from ..objective import NUM_TIMESTEPS
from ..pipeline.answers import flow_levels
from ..rng import sample_rng
from .distill import Teachers
from .state import Fake

STREAM = 16  # of `ditmoe.rng`: the loss's noise; those after it are the fake's steps
LOW, HIGH = 0.02, 0.98  # noise levels at which teacher and fake are asked, evenly
CLIP = 1.0


def new_fake(config: Config, teacher: DiTMoETransformer2DModel) -> Fake:
    """A copy of the teacher, which learns, in eval mode: its router has no jitter."""
    model = copy.deepcopy(teacher).requires_grad_(True)
    if config.model.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    for block in model.blocks if config.train.compile else ():
        to_compile(block, moving=False).compile(dynamic=False)
    rate, betas = config.distill.fake_learning_rate, (0.9, config.train.beta2)
    return Fake(model, torch.optim.AdamW(model.parameters(), rate, betas, weight_decay=0.0, fused=True))


class Matching:
    """The two networks that say where the images of a student of few calls should go.

    `fake` is moved by `follow`; `teachers` (one) answers as the run asks it to, guided or not.
    """

    def __init__(self, config: Config, fake: Fake, teachers: Teachers, accelerator: Accelerator) -> None:
        self.fake, self.teachers, self.accelerator, self.seed = fake, teachers, accelerator, config.seed
        self.steps, self.levels = config.distill.fake_steps, flow_levels(config.sample.flow_shift, config.sample.steps)

    def draw(self, model: nn.Module, noise: Tensor, labels: Tensor | None) -> tuple[Tensor, list[Routing]]:
        """Images (n, C, H, W), float32, of noise, through the steps of flow-euler, and all calls' records of routing.

        Gradients reach the network through all of its calls.
        """
        x, records = noise, list[Routing]()
        for s, end in pairwise(self.levels):
            v, routing, *_ = model(x, x.new_full((len(x),), NUM_TIMESTEPS * s), labels, return_dict=False)
            x = x + (end - s) * v.float()
            records += routing
        return x, records

    def follow(self, images: Tensor, labels: Tensor | None, indices: Sequence[int]) -> Tensor:
        """Let the fake learn from images, in `distill.fake_steps` steps; its mean loss, the squared error of a flow.

        A step that is not finite moves nothing. Of several processes all must call it.
        """
        x, net, losses = images.detach(), self.fake.model, list[Tensor]()
        for number in range(self.steps):
            s, noise = self._draws(x, indices, 1 + number)
            with self.accelerator.autocast():
                v = net(torch.lerp(x, noise, s), NUM_TIMESTEPS * s.flatten(), labels, return_dict=False)[0]
            losses.append((v[:, : x.shape[1]].float() - (noise - x)).square().mean())
            losses[-1].backward()
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            norm = nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            if norm.isfinite():
                self.fake.optimizer.step()
            self.fake.optimizer.zero_grad()
        return torch.stack(losses).mean().detach()

    def loss(self, images: Tensor, labels: Tensor | None, indices: Sequence[int]) -> Tensor:
        """A scalar with the gradient above; its value is half the mean square of that of the images."""
        x = images.detach()
        s, noise = self._draws(x, indices, 0)
        x_s, t = torch.lerp(x, noise, s), NUM_TIMESTEPS * s.flatten()
        with torch.no_grad(), self.accelerator.autocast():
            wanted = x_s - s * self.teachers.target(x_s, t, labels, torch.zeros_like(t, dtype=torch.long))
            fake = x_s - s * self.fake.model(x_s, t, labels, return_dict=False)[0][:, : x.shape[1]].float()
        scale = (x - wanted).abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-3)
        value: Tensor = 0.5 * (images - (x - (fake - wanted) / scale)).square().mean()
        return value

    def _draws(self, x: Tensor, indices: Sequence[int], stream: int) -> tuple[Tensor, Tensor]:
        """Noise levels (n, 1, 1, 1), even for the loss (stream 0) and logit-normal for the fake, and noise like x."""
        found = np.empty((len(indices), 1 + x[0].numel()), dtype=np.float32)
        for row, index in enumerate(indices):
            sample_rng(self.seed, STREAM + stream, index).standard_normal(out=found[row], dtype=np.float32)
        numbers = torch.from_numpy(found)
        normal = numbers[:, :1, None, None]
        s = normal.sigmoid().clamp(0.005, 0.995) if stream else LOW + (HIGH - LOW) * torch.special.ndtr(normal)
        return s.to(x.device), numbers[:, 1:].reshape(x.shape).to(x.device)
