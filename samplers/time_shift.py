"""Time-shift sampling: let each image say how noisy it is, and go by that instead of by the schedule.

Li et al. 2024, "Alleviating Exposure Bias in Diffusion Models through Sampling with Shifted Time Steps" (arXiv
2305.15583). During sampling the network meets its own errors, so an image scheduled for timestep t may look like
one of another timestep. The paper estimates that timestep from the image's variance: the variance over the pixels
of x_t is about ``alpha_bar_t v + 1 - alpha_bar_t``, v being the variance of clean images (0 in the published
criterion, measured on training data in the calibrated one).

Not to be confused with ``shift`` of flow matching, which warps the grid of timesteps once and for all.

Shapes: images (N, C, H, W) in any float dtype; timesteps are integers 0..T-1, T = num_train_timesteps.
"""

import math
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from torch import Tensor

from samplers.criterion import VarianceCriterion, clean_variance
from samplers.grid import Levels, StepOutput
from samplers.noise import Generators
from samplers.pndm import PNDMScheduler
from samplers.schedulers import DDIMScheduler, DDPMScheduler

# DiffusionPipeline.from_pretrained looks for SchedulerMixin in the module a saved pipeline names.
__all__ = ["SchedulerMixin", "TimeShiftOutput", "TimeShiftScheduler"]

BASES: dict[str, Any] = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "pndm": PNDMScheduler}
MODES = ("target", "network", "both")
UNIT = 0.95  # from this data variance on, the variance of x_t hardly tells one timestep from another

logger = logging.get_logger(__name__)


@cache
def say_once(sentence: str) -> None:
    """Warn, once in a program: a set of images takes a new scheduler for every batch."""
    logger.warning(sentence)


def window_of(network_calls: int, num_train_timesteps: int) -> int:
    """w = 4 T / N^2 for N network calls, at most T: the default of the samplers `ts-*`.

    A first-order step of T / N errs by the square of its length, and the shift that makes up for it goes the same way;
    4 is what was measured best (docs/samplers.md). From 52 calls on it is 1 at T = 1000: no shift.
    """
    return min(round(4 * num_train_timesteps / network_calls**2), num_train_timesteps)


@dataclass
class TimeShiftOutput(StepOutput):
    """What a step gives, and how it was shifted.

    Attributes:
        shift: (N,) int64, the chosen timestep minus the scheduled one: of this step's end in mode "target", of the
            next network call in the others.
    """

    shift: Tensor


class TimeShiftScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Time-shift over the update of DDIM, DDPM or F-PNDM; a drop-in diffusers scheduler.

    The chosen timestep of an image is the one in ``[t - w // 2, t + w // 2]`` (clipped to 0..T-1), t the scheduled
    one, whose expected variance is nearest to the image's unbiased variance over its C * H * W values; of equally
    near ones, that nearest to t. The first step is never shifted, nor is one whose t is at or below the cutoff, nor
    F-PNDM's Runge-Kutta steps. Each image is treated alone.

    Args:
        base: "ddim" (with any ``eta`` of `step`), "ddpm" (any ``variance_type``) or "pndm".
        exposure_window: w, the full width of the window in training steps, 0..T; 0 and 1 never shift and give the
            base's images to the bit. None: 4 T / N^2 for N network calls, see `window_of`.
        exposure_cutoff: t_c, a training step, 0..T.
        exposure_mode: what the chosen timestep is used for.
            "target": the step ends at its noise level, chosen round the next timestep from x_t; the network is not
            told. The released DDIM and PNDM code; works in any diffusers pipeline.
            "network": the network is asked about it, chosen round the current timestep from x_t; noise levels stay
            scheduled. Algorithm 3 of the paper, and the released DEIS code.
            "both": the network is asked about it, and the step starts at its noise level.
            The last two need a loop that asks `model_timestep` what to feed the network, as `samplers.sample` does.
        exposure_variance: v. None or "published" is the published criterion, ``1 - alpha_bar``. A number, or one for
            every training step, calibrates it, and "calibrated" takes ``data_variance``. One number is right for all
            t: noise adds exactly ``1 - alpha_bar`` to the ``alpha_bar v`` of an image.
        exposure_min_snr: do not shift where the expected variances of the window differ by less than this many
            standard deviations, sqrt(2 / (d - 1)), d = C * H * W, of an image's variance. 0 is as published.
        data_variance: mean over clean training images of their unbiased variance over the pixels; a warning is given
            when it is near 1, as for latents, where the published criterion says nothing.

    The other fields are those of the base scheduler. Raises ValueError for a value outside its range.
    """

    order = 1
    _base: DDIMScheduler | DDPMScheduler | PNDMScheduler
    _chosen: Tensor | None  # timesteps (N,) to ask the network about next

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, base: str = "ddim", exposure_window: int | None = 0, exposure_cutoff: int = 300,
        exposure_mode: str = "target", exposure_variance: float | list[float] | str | None = None,
        exposure_min_snr: float = 0.0, data_variance: float | None = None, num_train_timesteps: int = 1000,
        beta_start: float = 0.0001, beta_end: float = 0.02, beta_schedule: str = "linear",
        trained_betas: list[float] | None = None, variance_type: str = "fixed_small", clip_sample: bool = False,
        clip_sample_range: float = 1.0, thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0, prediction_type: str = "epsilon", set_alpha_to_one: bool = True,
        timestep_spacing: str = "trailing", steps_offset: int = 0, rescale_betas_zero_snr: bool = False,
    ) -> None:  # fmt: skip
        self._check()
        known = signature(BASES[base].__init__).parameters
        self._base = BASES[base](**{key: value for key, value in self.config.items() if key in known})
        if base == "ddpm":
            self.variance_type = self._base.variance_type
        self.betas, self.alphas_cumprod = self._base.betas, self._base.alphas_cumprod
        self.init_noise_sigma = 1.0
        self._alpha_bar = self._base._alpha_bar  # (T,) float64
        self._variance = clean_variance(exposure_variance, data_variance, num_train_timesteps)
        self._criterion = VarianceCriterion(self._alpha_bar, self._variance, exposure_cutoff, exposure_min_snr)
        self._restart()

    def __len__(self) -> int:
        return len(self.betas)

    @property
    def timesteps(self) -> Tensor:
        """The scheduled timesteps, one for each network call, descending int64."""
        return self._base.timesteps

    @property
    def num_inference_steps(self) -> int | None:
        """Steps of the grid, or None before `set_timesteps`."""
        return self._base.num_inference_steps

    @property
    def window(self) -> int:
        """w of this grid: the one asked for, or the one that follows the number of network calls."""
        asked = self.config.exposure_window
        return window_of(len(self.timesteps), len(self)) if asked is None else int(asked)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: torch.device | str | None = None,
        timesteps: list[int] | None = None,
    ) -> None:  # fmt: skip
        """Choose the grid, as the base does, and start again."""
        self._base.set_timesteps(num_inference_steps, device, timesteps)
        self._restart()
        self._warn()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """``sample`` itself."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of clean images, as the base has it."""
        return self._base.add_noise(original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v of clean images, as the base has it."""
        return self._base.get_velocity(sample, noise, timesteps)

    def model_timestep(self, timestep: int | Tensor) -> Tensor:
        """What to ask the network about at the scheduled ``timestep``: itself, or (N,) int64 for shifted images."""
        self._restart_at(timestep)
        self._asked = True
        return torch.as_tensor(timestep) if self._chosen is None else self._chosen

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, eta: float = 0.0,
        use_clipped_model_output: bool = False, generator: Generators = None, return_dict: bool = True,
    ) -> Any:  # fmt: skip
        """One step from the scheduled ``timestep`` (): a `TimeShiftOutput`, or with ``return_dict=False`` a tuple.

        ``eta`` and ``use_clipped_model_output`` are DDIM's, and refused for another base; ``generator`` may be one per
        image. Raises ValueError too for a timestep that is not on the grid or not one for all images.
        """
        if torch.as_tensor(timestep).ndim:
            raise ValueError("time-shift takes one scheduled timestep for all images; it shifts each image's itself")
        of_ddim = {"eta": (eta, "eta"), "use_clipped_model_output": (use_clipped_model_output, "such option")}
        for name, (asked, what) in of_ddim.items():
            if asked and self.config.base != "ddim":
                raise ValueError(f"{name} is {asked}, but base {self.config.base!r} has no {what}; use base 'ddim'")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}, but it must be from 0 (DDIM) to 1 (the noise of DDPM)")
        self._restart_at(timestep)
        if self.config.exposure_window is None and self.window <= 1:
            say_once(
                f"time-shift is for few steps: with {len(self.timesteps)} network calls its own window is "
                f"{self.window}, which shifts nothing; set exposure_window to shift all the same"
            )
        stochastic = eta > 0 or self.config.base == "ddpm"
        levels, shift = self._shifted(self._base.levels(timestep), sample, int(timestep), stochastic)
        noise: dict[str, Any] = {} if self.config.base == "pndm" else {"generator": generator}
        if self.config.base == "ddim":
            noise |= {"eta": eta, "clip_again": use_clipped_model_output}
        x_prev, x0 = self._base.update(model_output, sample, levels, **noise)
        self._calls += 1
        self._chosen = None
        if self.config.exposure_mode != "target":
            shift = self._choose_next(x_prev, int(timestep), stochastic)
        self._asked = False
        shift = torch.zeros(len(sample), dtype=torch.int64, device=sample.device) if shift is None else shift
        return TimeShiftOutput(x_prev, x0, shift) if return_dict else (x_prev, x0, shift)

    def _shifted(self, levels: Levels, sample: Tensor, timestep: int, stochastic: bool) -> tuple[Levels, Tensor | None]:
        """The step's levels after the choices that it uses, and the shift of its end."""
        mode = self.config.exposure_mode
        if mode != "target":
            if self._chosen is None:
                return levels, None
            if not self._asked:
                say_once(
                    f"exposure_mode {mode!r} is ignored: this loop does not ask scheduler.model_timestep(t) what to "
                    "tell the network; use samplers.sample, or exposure_mode 'target'"
                )
                return levels, None
            if len(self._chosen) != len(sample):
                raise ValueError(
                    f"{len(sample)} images follow {len(self._chosen)}; call set_timesteps before another batch"
                )
            net = self._alpha_bar_at(self._chosen)
            return levels._replace(net=net, start=net if mode == "both" else levels.start), None
        after = self._after(timestep, self._calls)
        if self._calls == 0 or after is None or getattr(self._base, "in_warm_up", False):
            return levels, None
        chosen = self._criterion.choose(sample, after, highest=timestep - 1 if stochastic else None)
        if chosen is None:
            return levels, None
        return levels._replace(end=self._alpha_bar_at(chosen)), chosen - after

    def _choose_next(self, x: Tensor, timestep: int, stochastic: bool) -> Tensor | None:
        """Choose for the network call that comes after this one; the shift, or None."""
        t = self._after(timestep, self._calls - 1)
        if t is None or getattr(self._base, "in_warm_up", False):
            return None
        lowest = 0
        if stochastic and self.config.exposure_mode == "both":  # a step with noise never starts below its end
            after = self._after(t, self._calls)
            lowest = (-1 if after is None else after) + 1
        self._chosen = self._criterion.choose(x, t, lowest=lowest)
        return None if self._chosen is None else self._chosen - t

    def _restart(self) -> None:
        self._calls = 0  # network calls so far
        self._chosen = None
        self._asked = False  # did the loop ask for them?
        self._grid: list[int] = self.timesteps.tolist()
        self._criterion.half = self.window // 2

    def _restart_at(self, timestep: int | Tensor) -> None:
        """A run that begins again at the first timestep has no past."""
        if self._calls and self.config.base != "pndm" and int(timestep) == self._grid[0]:
            self._restart()

    def _after(self, timestep: int, call: int) -> int | None:
        """The scheduled timestep after that of a call, None at the end. A run may begin in the middle of the grid."""
        if self.config.base == "pndm":
            return self._grid[call + 1] if call + 1 < len(self._grid) else None
        after = int(self._base.previous_timestep(timestep))
        return None if after < 0 else after

    def _alpha_bar_at(self, chosen: Tensor) -> Tensor:
        dtype = torch.float32 if chosen.device.type == "mps" else torch.float64
        return self._alpha_bar.to(dtype).to(chosen.device)[chosen]

    def _check(self) -> None:
        c, T = self.config, self.config.num_train_timesteps
        if c.base not in BASES:
            raise ValueError(f"base {c.base!r} is not one of {', '.join(BASES)}")
        if c.exposure_mode not in MODES:
            raise ValueError(f"exposure_mode {c.exposure_mode!r} is not one of {', '.join(MODES)}")
        for name, what in (("exposure_window", "the full width in training steps"), ("exposure_cutoff", "a timestep")):
            value = c[name]
            is_int = isinstance(value, int) and not isinstance(value, bool)
            if (value is not None or name != "exposure_window") and not (is_int and 0 <= value <= T):
                raise ValueError(f"{name} is {value!r}, but it is {what}: an integer from 0 to {T}")
        known = signature(BASES[c.base].__init__).parameters
        limits = ("clip_sample", "thresholding", "rescale_betas_zero_snr")
        if lacking := [name for name in limits if c[name] and name not in known]:
            raise ValueError(f"base {c.base!r} has no {lacking[0]}; leave it off, or use another base")
        if not 0 <= c.exposure_min_snr < math.inf:
            raise ValueError(f"exposure_min_snr is {c.exposure_min_snr}, but it must be 0 or more; 0 is no guard")

    def _warn(self) -> None:
        c, v = self.config, self._variance
        if c.exposure_window in (0, 1):
            return
        if c.exposure_variance in (None, "published") and (c.data_variance or 0.0) >= UNIT:
            say_once(
                f"the data has variance {c.data_variance:.2f}, so that x_t has about the same at every timestep: the "
                "published criterion only shifts to the edge of its window here; calibrate it with exposure_variance"
            )
        if isinstance(v, float) and v != 1 and abs(1 - v) <= 1 - UNIT and not c.exposure_min_snr:
            say_once(f"with a data variance of {v:.3f} the choice follows its own noise; set exposure_min_snr")
