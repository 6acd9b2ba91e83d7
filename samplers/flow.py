"""Euler steps along the straight paths of flow matching, as a diffusers scheduler.

``x_s = (1 - s) x0 + s eps``, ``v = eps - x0`` (Liu et al. 2023, arXiv 2209.03003; Lipman et al.
2023, arXiv 2210.02747), s from 1 (noise) to 0 (data). A timestep is s on the model's scale,
``t = num_train_timesteps * s``.

Shapes: images (N, C, H, W) in any float dtype; timesteps float or int, () or (N,), one per image.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from samplers.gaussian import per_image
from samplers.grid import check_steps


@dataclass
class FlowEulerOutput(BaseOutput):  # type: ignore[misc]
    """The next image and the clean image that the velocity points to, both (N, C, H, W)."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class FlowEulerScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Explicit Euler on N equal steps of s: 1, (N-1)/N, ..., 1/N, then 0.

    The stock `diffusers.FlowMatchEulerDiscreteScheduler` puts its last point at 0.001 and so wastes
    a step. ``shift`` warps the grid once and for all, ``s' = shift s / (1 + (shift - 1) s)`` (Esser
    et al. 2024, arXiv 2403.03206, eq. 23); it is not the time-shift sampler, which moves each
    image's timestep while it runs. It keeps no state between steps. Raises ValueError for another
    prediction type than "flow_prediction" and for a shift that is not positive.
    """

    order = 1

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        prediction_type: str = "flow_prediction",
    ) -> None:
        if prediction_type != "flow_prediction":
            raise ValueError(
                f"FlowEulerScheduler cannot sample prediction_type {prediction_type!r}, only flow_prediction"
            )
        if not shift > 0:
            raise ValueError(f"shift is {shift}, but it must be positive; 1 leaves the grid alone")
        self.init_noise_sigma = 1.0
        self.set_timesteps(num_train_timesteps)
        self.num_inference_steps: int | None = None

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set ``timesteps`` (N,) float32 on ``device`` and ``sigmas`` (N + 1,) float64 on the CPU.

        Raises ValueError unless the number of steps is an int in 1..num_train_timesteps.
        """
        check_steps(num_inference_steps, len(self))
        s = torch.arange(num_inference_steps, -1, -1, dtype=torch.float64) / num_inference_steps
        shift = self.config.shift
        self.sigmas = shift * s / (1 + (shift - 1) * s)
        self.timesteps = (len(self) * self.sigmas[:-1]).to(torch.float32).to(device)
        self.num_inference_steps = num_inference_steps

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """``sample`` itself: the network sees x_s as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> Any:
        """One Euler step: ``prev_sample`` and ``pred_original_sample`` (N, C, H, W).

        ``x_prev = x_s + (s_next - s) v`` and ``x0 = x_s - s v`` in float32, then in the dtype of
        ``sample``. With ``return_dict=False``: a tuple of the two. Raises ValueError for a timestep
        that is not on the grid.
        """
        index = self._index(timestep)
        s, s_next = self.sigmas[index], self.sigmas[index + 1]
        v, x_s = model_output.float(), sample.float()
        x_prev = (x_s + per_image(s_next - s, x_s) * v).to(sample.dtype)
        x0 = (x_s - per_image(s, x_s) * v).to(sample.dtype)
        return (x_prev, x0) if not return_dict else FlowEulerOutput(x_prev, x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_s (N, C, H, W) at any ``timesteps`` () or (N,), in the images' dtype."""
        s = torch.as_tensor(timesteps, device="cpu").double() / len(self)
        x0, eps = original_samples.float(), noise.float()
        return (per_image(1 - s, x0) * x0 + per_image(s, x0) * eps).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Any = None) -> Tensor:
        """v = noise - sample (N, C, H, W), at every timestep, in the dtype of ``sample``."""
        return (noise.float() - sample.float()).to(sample.dtype)

    def _index(self, timestep: float | Tensor) -> Tensor:
        """Where on the grid ``timestep`` lies, () or (N,) int64 on the CPU."""
        t = torch.as_tensor(timestep, device="cpu").double()
        distance, nearest = (t[..., None] - len(self) * self.sigmas[:-1]).abs().min(dim=-1)
        # Half the rounding step of float32 at 1000 is 3e-5; grid points lie further apart.
        if bool((distance > 1e-4).any()):
            raise ValueError(
                f"timestep {timestep} is not on this scheduler's grid of {len(self.sigmas) - 1} "
                "steps; pass one of scheduler.timesteps"
            )
        index: Tensor = nearest
        return index
