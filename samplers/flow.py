"""Three samplers for flow matching, as diffusers schedulers: Euler, Heun, and an SDE.

``x_s = (1 - s) x0 + s eps``, ``v = eps - x0`` (Liu et al. 2023, arXiv 2209.03003; Lipman et al.
2023, arXiv 2210.02747), s from 1 (noise) to 0 (data). A timestep is s on the model's scale,
``t = num_train_timesteps * s``.

Shapes: images (N, C, H, W) in any float dtype; timesteps float or int, () or (N,), one per image.
"""

from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from samplers.gaussian import per_image
from samplers.grid import check_saved_variance, check_steps, told
from samplers.noise import Generators, draw_noise


class FlowScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """What the three share: the grid of s, and the way there from clean images.

    Raises ValueError for another prediction type than "flow_prediction", for a shift that is not positive, and for a
    ``data_variance`` below 0.
    """

    order = 1
    # the chain of a translated network is handed on, and diffusers is not to call it unexpected
    _compatibles: ClassVar = ["DDPMScheduler"]

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, num_train_timesteps: int = 1000, shift: float = 1.0, prediction_type: str = "flow_prediction",
        data_variance: float | None = None,
    ) -> None:  # fmt: skip
        self._start()

    def _start(self) -> None:
        if self.config.prediction_type != "flow_prediction":
            raise ValueError(
                f"{type(self).__name__} cannot sample prediction_type {self.config.prediction_type!r}, "
                "only flow_prediction"
            )
        if not self.config.shift > 0:
            raise ValueError(f"shift is {self.config.shift}, but it must be positive; 1 leaves the grid alone")
        check_saved_variance(self.config.data_variance)
        self.init_noise_sigma = 1.0
        self.set_timesteps(self.config.num_train_timesteps)
        self.num_inference_steps: int | None = None

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set ``timesteps``, float32 on ``device``, one a network call, and ``sigmas`` (N + 1,) float64 on the CPU.

        Raises ValueError unless the number of steps is an int in 1..num_train_timesteps.
        """
        check_steps(num_inference_steps, len(self))
        s = self._even_grid(num_inference_steps)
        shift = self.config.shift
        self.sigmas = shift * s / (1 + (shift - 1) * s)
        self.timesteps = (len(self) * self._calls(self.sigmas)).to(torch.float32).to(device)
        self.num_inference_steps = num_inference_steps

    def _even_grid(self, steps: int) -> Tensor:
        """s before the shift, (N + 1,) float64 from 1 to 0."""
        return torch.arange(steps, -1, -1, dtype=torch.float64) / steps

    def _calls(self, sigmas: Tensor) -> Tensor:
        """The values of s at which the network is called."""
        return sigmas[:-1]

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """``sample`` itself: the network sees x_s as it is."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_s (N, C, H, W) at any ``timesteps`` () or (N,), in the images' dtype."""
        s = torch.as_tensor(timesteps, device="cpu").double() / len(self)
        x0, eps = original_samples.float(), noise.float()
        return (per_image(1 - s, x0) * x0 + per_image(s, x0) * eps).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise`, by the name and in the order of diffusers' flow-matching schedulers."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Any = None) -> Tensor:
        """v = noise - sample (N, C, H, W), at every timestep, in the dtype of ``sample``."""
        return (noise.float() - sample.float()).to(sample.dtype)

    def _ends(self, timestep: float | Tensor) -> tuple[Tensor, Tensor]:
        """(s, s_next) of the step that begins at ``timestep``, () or (N,) float64 on the CPU."""
        t = torch.as_tensor(timestep, device="cpu").double()
        distance, index = (t[..., None] - len(self) * self.sigmas[:-1]).abs().min(dim=-1)
        # Half the rounding step of float32 at 1000 is 3e-5; grid points lie further apart.
        if bool((distance > 1e-4).any()):
            raise ValueError(
                f"timestep {timestep} is not on this scheduler's grid of {len(self.sigmas) - 1} "
                "steps; pass one of scheduler.timesteps"
            )
        return self.sigmas[index], self.sigmas[index + 1]


class FlowEulerScheduler(FlowScheduler):
    """Explicit Euler on N equal steps of s: 1, (N-1)/N, ..., 1/N, then 0.

    The stock `diffusers.FlowMatchEulerDiscreteScheduler` puts its last point at 0.001 and so wastes
    a step. ``shift`` warps the grid once and for all, ``s' = shift s / (1 + (shift - 1) s)`` (Esser
    et al. 2024, arXiv 2403.03206, eq. 23); it is not the time-shift sampler, which moves each
    image's timestep while it runs. It keeps no state between steps.
    """

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True,
        model_output_uncond: Tensor | None = None, generator: Generators = None,
    ) -> Any:  # fmt: skip
        """One Euler step: ``prev_sample`` and ``pred_original_sample`` (N, C, H, W).

        ``x0 = x_s - s v`` and ``x_prev = x_s + (s_next - s) v``, in float32, then in the dtype of ``sample``.
        With ``model_output_uncond``, the unguided v_u of the same network call, ``x_prev = x0 + s_next v_u``:
        CFG++ (Chung et al. 2024, arXiv 2406.08070) as flow models run it. ``generator`` is taken as diffusers'
        pipelines give one, and not used. With ``return_dict=False``: a tuple of the two. Raises ValueError for a
        timestep that is not on the grid.
        """
        s, s_next = self._ends(timestep)
        v, x_s = model_output.float(), sample.float()
        x0 = x_s - per_image(s, x_s) * v
        if model_output_uncond is None:
            x_prev = x_s + per_image(s_next - s, x_s) * v
        else:
            x_prev = x0 + per_image(s_next, x_s) * model_output_uncond.float()
        return told(x_prev, x0, sample, return_dict)


class FlowHeunScheduler(FlowScheduler):
    """Heun's method, second order: Euler, then again with the mean of the velocities at both ends.

    N steps take 2N network calls, the last at s = 0. Grid and ``shift`` are those of `FlowEulerScheduler`. It
    remembers the first half of a step: use it for one batch at a time, after `set_timesteps`.
    """

    def _calls(self, sigmas: Tensor) -> Tensor:
        self._index = 0
        self._half: tuple[Tensor, Tensor] | None = None  # x_s and v_s of a step that is half done
        return sigmas.repeat_interleave(2)[1:-1]

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True,
        generator: Generators = None,
    ) -> Any:  # fmt: skip
        """Half a step: ``prev_sample`` is where the network is to be asked next, ``pred_original_sample`` as ever.

        ``generator`` is taken as diffusers' pipelines give one, and not used. Raises ValueError for a timestep out of
        turn and for another batch in the middle of a step.
        """
        calls = len(self.timesteps)
        t = torch.as_tensor(timestep, device="cpu").double()
        if self._index >= calls or bool(((t - self.timesteps[self._index].cpu()).abs() > 1e-4).any()):
            raise ValueError(
                f"timestep {timestep} is not the next of this run; take them in the order of scheduler.timesteps, "
                "after set_timesteps"
            )
        v, x = model_output.float(), sample.float()
        k, is_second = divmod(self._index, 2)  # call 2k begins step k, call 2k + 1 ends it
        x0 = x - per_image(self.sigmas[k + is_second], x) * v
        length = per_image(self.sigmas[k + 1] - self.sigmas[k], x)
        if not is_second:
            x_prev = x + length * v
            self._half = (x, v)
        else:
            assert self._half is not None
            start, v_start = self._half
            if start.shape != x.shape:
                raise ValueError(
                    f"images of shape {tuple(x.shape)} follow some of {tuple(start.shape)} in the middle of a step; "
                    "call set_timesteps before another batch"
                )
            x_prev = start + length * (v_start + v) / 2
            self._half = None
        self._index += 1
        return told(x_prev, x0, sample, return_dict)


class FlowSDEScheduler(FlowScheduler):
    """Euler-Maruyama on the SDE with the same marginals (SiT, Ma et al. 2024, arXiv 2401.08740), diffusion w_s = s.

    ``dx = v ds + eps / 2 ds + sqrt(s) dW`` backwards in s, with ``eps = x + (1 - s) v`` (the score is -eps / s). The
    last step, of length ``last_step``, has no noise (SiT's "Mean", 0.04). N steps take N network calls; the grid
    before the last step is even, then warped by ``shift`` as in `FlowEulerScheduler`.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, num_train_timesteps: int = 1000, shift: float = 1.0, prediction_type: str = "flow_prediction",
        last_step: float = 0.04, data_variance: float | None = None,
    ) -> None:  # fmt: skip
        if not 0 < last_step < 1:
            raise ValueError(f"last_step is {last_step}, but it must lie between 0 and 1")
        self._start()

    def _even_grid(self, steps: int) -> Tensor:
        if steps == 1:
            raise ValueError("num_inference_steps is 1, but flow-sde needs at least 2, the last of them noiseless")
        before = torch.linspace(1, self.config.last_step, steps, dtype=torch.float64)
        return torch.cat([before, before.new_zeros(1)])

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:  # fmt: skip
        """One step: ``prev_sample`` and ``pred_original_sample`` (N, C, H, W).

        ``generator`` may be one per image; the last step draws nothing. With ``return_dict=False``: a tuple of the
        two. Raises ValueError for a timestep that is not on the grid.
        """
        s, s_next = self._ends(timestep)
        v, x = model_output.float(), sample.float()
        x0 = x - per_image(s, x) * v
        eps = x + per_image(1 - s, x) * v
        x_prev = x + per_image(s_next - s, x) * (v + eps / 2)
        is_last = s_next == 0
        if not bool(is_last.all()):
            spread = ((s - s_next) * s).sqrt() * ~is_last
            x_prev = x_prev + per_image(spread, x) * draw_noise(sample.shape, generator, sample.device)
        return told(x_prev, x0, sample, return_dict)
