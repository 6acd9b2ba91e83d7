"""A loss in the hidden states of a frozen network: where a step of few calls arrives, beside where it should.

The squared error of pixels lets a student be smooth where its teacher is sharp. A network that denoises sees texture,
and is there already: it is given both images at the noise level that the step leads to, the finished ones with a little
noise again. Source: the self-perceptual objective of "Diffusion Model with Perceptual Loss" (Lin and Yang, arXiv
2401.00110), there in training at all levels, here between the steps of student and teacher.

Shapes: n images, K steps of each, C channels, H W size, T tokens, D width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import pipeline
from ..model import DiTMoETransformer2DModel
from ..objective import NUM_TIMESTEPS
from ..pipeline.answers import calls_of

LOW, HIGH = 0.05, 0.35  # noise levels of finished images


class Features:
    """The frozen network whose hidden states are compared, on a device. `normalization` is that of the data.

    Raises:
        ValueError: It is no model, no flow, of other images, latents or classes, or knows the noise levels of few calls
            alone.
    """

    def __init__(
        self, folder: str, student: DiTMoETransformer2DModel, normalization: Any, device: torch.device
    ) -> None:  # fmt: skip
        pipe = pipeline.load(Path(folder))
        self.net: DiTMoETransformer2DModel = pipe.transformer.eval().requires_grad_(False).to(device)
        for name in ("sample_size", "in_channels", "num_classes"):
            if self.net.config[name] != student.config[name]:
                raise ValueError(
                    f"distill.features {folder} has {name} {self.net.config[name]}, the student {student.config[name]}"
                )
        if pipe.config.latents != normalization:
            raise ValueError(f"distill.features {folder} is of other latents than the data (or one is of pixels)")
        if self.net.config.prediction_type != "flow_prediction":
            raise ValueError(f"distill.features {folder} is no flow, as few calls are; give a model that is")
        if calls := calls_of(Path(folder)):
            raise ValueError(
                f"distill.features {folder} was taught {calls} calls and knows their noise levels alone; "
                f"give its teacher"
            )
        self._seen = list[Tensor]()
        for block in self.net.blocks:
            block.register_forward_hook(lambda _block, _given, out: self._seen.append(out[0].float()))

    def loss(
        self, sample: Tensor, target: Tensor, x_t: Tensor, labels: Tensor | None, levels: Sequence[float], drawn: Tensor
    ) -> Tensor:
        """The mean, over blocks and rows, of the squared error of hidden states over their variance; float32.

        Args:
            sample: (K n, C, H, W), what the student says, step by step.
            target: (K n, C, H, W), what it should.
            x_t: (K n, C, H, W), where the steps begin; the first n are the noise of the images.
            labels: (K n,), or None.
            levels: Noise levels of the K steps, and 0.
            drawn: (n,), a time of each image on the 0..1000 scale, which says how noisy the finished one is looked at.
        """
        s, n = torch.tensor(levels, device=x_t.device).repeat_interleave(len(drawn)).view(-1, 1, 1, 1), len(drawn)
        step, end = s[n:] - s[:-n], s[n:].clone()
        end[-n:] = (LOW + (HIGH - LOW) * drawn / NUM_TIMESTEPS).view(-1, 1, 1, 1)
        keep = torch.ones_like(end)
        keep[-n:] -= end[-n:]
        more = torch.zeros_like(x_t)
        more[-n:] = end[-n:] * x_t[:n].flip(-1)  # mirrored, as an image is of the noise that it came from
        t = NUM_TIMESTEPS * end.flatten()
        with torch.no_grad():
            wanted = self._states(keep * (x_t + step * target) + more, t, labels)
        found = self._states(keep * (x_t + step * sample.float()) + more, t, labels)
        dims = (1, 2)  # of (K n, T, D)
        parts = [(a - b).square().mean(dims) / b.var(dims) for a, b in zip(found, wanted, strict=True)]
        return torch.stack(parts).mean()

    def _states(self, x: Tensor, t: Tensor, labels: Tensor | None) -> list[Tensor]:
        """What the blocks give, (K n, T, D) each."""
        self.net(x, t, labels, return_dict=False)
        seen, self._seen[:] = [*self._seen], []
        return seen
