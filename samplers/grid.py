"""The grid of timesteps a Gaussian chain is walked on, and what every scheduler over it shares.

The previous timestep is the next one of the grid, never ``t - 1000 // N``, and the grid ends in
clean data, so every spacing and every number of steps is right.

Shapes: images (N, C, H, W) in any float dtype; timesteps are integers 0..T-1, T =
num_train_timesteps, () for the whole batch or (N,), one per image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from samplers import gaussian
from samplers.criterion import check_data_variance

SPACINGS = ("trailing", "linspace", "leading")
_NOT_ON_GRID = -2


class Levels(NamedTuple):
    """The noise levels of one step: alpha_bar, float64, () for all images or (N,), one per image.

    Attributes:
        net: level of the timestep that the network was asked about.
        start: level that the image is taken to be at; the same tensor as ``net`` but for time-shift.
        end: level that the step goes to.
        is_last: bool (), on the CPU: does the step end the chain, and so add no noise?
    """

    net: Tensor
    start: Tensor
    end: Tensor
    is_last: Tensor


@dataclass
class StepOutput(BaseOutput):  # type: ignore[misc]
    """The next image and the clean image that the network's answer points to, both (N, C, H, W)."""

    prev_sample: Tensor
    pred_original_sample: Tensor


def told(x_prev: Tensor, x0: Tensor, sample: Tensor, return_dict: bool) -> StepOutput | tuple[Tensor, Tensor]:
    """What a step gives, in the dtype of ``sample``: a `StepOutput`, or with ``return_dict=False`` a tuple."""
    both = x_prev.to(sample.dtype), x0.to(sample.dtype)
    return StepOutput(*both) if return_dict else both


def stock_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A registered config for the stock class beneath ours: without ``data_variance``, which only ours carry.

    ``data_variance`` is the mean variance over pixels of clean training images (see `samplers.time_shift`); every
    scheduler of ours keeps it, so that it survives from sampler to sampler and on disk.
    """
    return {key: value for key, value in config.items() if key != "data_variance"}


def check_saved_variance(variance: float | None) -> None:
    """Raise ValueError for a variance that no data have; 0 is that of blank images, and of no use to time-shift."""
    if variance != 0:
        check_data_variance(variance)


def check_chain(who: str, config: Any) -> None:
    """Raise ValueError unless the scheduler ``who`` over a Gaussian chain can sample what its ``config`` says."""
    check_saved_variance(config.data_variance)
    kind, spacing = config.prediction_type, config.timestep_spacing
    if kind not in gaussian.PREDICTION_TYPES:
        raise ValueError(f"{who} cannot sample prediction_type {kind!r}, only {', '.join(gaussian.PREDICTION_TYPES)}")
    if spacing not in SPACINGS:
        raise ValueError(f"timestep_spacing is {spacing!r}, but must be 'trailing', 'linspace' or 'leading'")


def refuse_lost(who: str, fields: Sequence[str], *configs: Mapping[str, Any]) -> None:
    """Raise ValueError if one of ``configs`` sets one of ``fields``, which change the chain and which ``who`` lacks."""
    for field in fields:
        if any(config.get(field) for config in configs):
            raise ValueError(
                f"{who} has no {field}; remove it from the scheduler's config or use the diffusers scheduler that "
                "wrote it, which draws where no sampler is named"
            )


def check_steps(num_inference_steps: int, num_train_timesteps: int) -> None:
    """Raise ValueError unless the number of steps is an int in 1..``num_train_timesteps``."""
    is_int = isinstance(num_inference_steps, int) and not isinstance(num_inference_steps, bool)
    if not is_int or not 1 <= num_inference_steps <= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps is {num_inference_steps!r}, but it must be an integer from 1 to {num_train_timesteps}"
        )


def checked_timestep(timestep: int | Tensor, num_train_timesteps: int) -> Tensor:
    """``timestep`` () or (N,) as int64 on the CPU; raises ValueError unless it is an integer in 0..T-1."""
    t = torch.as_tensor(timestep, device="cpu")
    if t.is_floating_point() or t.dtype == torch.bool:
        raise ValueError(f"timestep {timestep} must be an integer, not {t.dtype}")
    if bool(((t < 0) | (t >= num_train_timesteps)).any()):
        raise ValueError(f"timestep {timestep} lies outside 0..{num_train_timesteps - 1}")
    return t.long()


def timestep_grid(spacing: str, steps: int, num_train_timesteps: int, offset: int = 0) -> list[int]:
    """``steps`` descending timesteps (names of Lin et al. 2024, arXiv 2305.08891, table 2).

    "trailing" holds T-1 but not 0, "linspace" both (the grid of DiT's respacing; a single step is
    T-1), "leading" climbs from ``offset`` in strides of T // steps and so misses T-1. Raises
    ValueError for a grid beyond 0..T-1 or, with one step, without noise.
    """
    last = num_train_timesteps - 1
    if spacing == "trailing":
        grid = [round(num_train_timesteps * k / steps) - 1 for k in range(steps, 0, -1)]
    elif spacing == "linspace":
        grid = [round(t) for t in np.linspace(0, last, steps)[::-1]] if steps > 1 else [last]
    else:
        assert spacing == "leading"  # `check_chain` knows the names
        stride = num_train_timesteps // steps
        grid = [k * stride + offset for k in range(steps - 1, -1, -1)]
    if spacing == "leading" and (steps == 1 or grid[0] > last or grid[-1] < 0):
        raise ValueError(
            f"timestep_spacing 'leading' with {steps} steps and steps_offset {offset} gives the "
            f"timesteps {grid[0]}..{grid[-1]}, which cannot start from noise; use 'trailing'"
        )
    return grid


def flow_grid(steps: int, alpha_bar: Tensor, shift: float) -> list[int]:
    """``steps`` descending timesteps, evenly spread over the flow's time and warped towards noise.

    s = noise / (signal + noise), which is a flow's time, goes from 1 down in equal steps to 0, which is clean data, and
    s' = shift s / (1 + (shift - 1) s) (SD3, arXiv 2403.03206, eq. 23); each becomes the timestep of ``alpha_bar`` (T,)
    nearest to it. A linear chain spends four of ten even timesteps where nothing but noise is to be seen, s > 0.87.
    """
    signal, noise = alpha_bar.double().sqrt(), (1 - alpha_bar.double()).sqrt()
    times = noise / (signal + noise)  # ascending
    wanted = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    wanted = shift * wanted / (1 + (shift - 1) * wanted)
    grid, last = [], len(times)
    for k, s in enumerate(wanted):
        nearest = int((times - s).abs().argmin())
        last = max(steps - 1 - k, min(nearest, last - 1)) if k else len(times) - 1  # room for those to come
        grid.append(last)
    return grid


class ExplicitGrid:
    """What DDPM, DDIM and every later scheduler over the same chain share: levels and a grid.

    A mixin in front of a stock class, which brings ``betas``, ``config``, ``_threshold_sample``.
    """

    config: Any
    betas: Tensor
    alphas_cumprod: Tensor
    timesteps: Tensor
    num_inference_steps: int | None
    _threshold_sample: Callable[[Tensor], Tensor]

    def _build_chain(self, ends_clean: bool = True) -> None:
        """Levels in float64 and the full grid, ending in clean data or else at level 0."""
        check_chain(type(self).__name__, self.config)
        if self.config.get("rescale_betas_zero_snr") and self.config.prediction_type == "epsilon":
            raise ValueError(
                "rescale_betas_zero_snr leaves no signal at the first step, where prediction_type "
                "'epsilon' says nothing about the image; use 'v_prediction' or 'sample'"
            )
        self._alpha_bar = torch.cumprod(1 - self.betas.double(), dim=0)  # (T,)
        one = torch.ones((), dtype=torch.float64)
        self._final_alpha_bar = one if ends_clean else self._alpha_bar[0]
        self.alphas_cumprod = self._alpha_bar.float()
        self.final_alpha_cumprod = self._final_alpha_bar.float()
        self._walk(list(range(len(self.betas) - 1, -1, -1)), None)

    def _walk(self, grid: list[int], device: torch.device | str | None) -> None:
        self.timesteps = torch.tensor(grid, dtype=torch.int64, device=device)
        self._previous = torch.full((len(self.betas),), _NOT_ON_GRID, dtype=torch.int64)
        self._previous[grid] = torch.tensor([*grid[1:], -1])

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: torch.device | str | None = None,
        timesteps: list[int] | None = None,
    ) -> None:  # fmt: skip
        """Choose the grid: a number of steps (spaced as the config says) or the timesteps.

        Sets ``timesteps`` (descending int64 on ``device``). Raises ValueError unless exactly one of
        the two is given, the number is in 1..T, and the timesteps fall strictly within 0..T-1.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give either num_inference_steps or timesteps, and not both")
        if timesteps is None:
            assert num_inference_steps is not None
            check_steps(num_inference_steps, len(self.betas))
            config = self.config
            timesteps = timestep_grid(
                config.timestep_spacing, num_inference_steps, len(self.betas), config.steps_offset
            )
        grid = [int(t) for t in timesteps]
        whole = all(t == asked for t, asked in zip(grid, timesteps, strict=True))
        falling = all(high > low for high, low in pairwise(grid))
        if not grid or not whole or not falling or grid[0] >= len(self.betas) or grid[-1] < 0:
            given = grid if whole else [float(t) for t in timesteps]
            raise ValueError(f"timesteps {given} must be strictly falling integers in 0..{len(self.betas) - 1}")
        self.num_inference_steps = len(grid)
        self._walk(grid, device)

    def previous_timestep(self, timestep: int | Tensor) -> Tensor:
        """The next timestep of the grid, () or (N,) int64 on the CPU; -1 after the last one.

        Raises ValueError for a timestep that is not on the grid.
        """
        previous = self._previous[self._checked(timestep)]
        if bool((previous == _NOT_ON_GRID).any()):
            raise ValueError(
                f"timestep {timestep} is not on this scheduler's grid of {len(self.timesteps)} "
                "steps; pass one of scheduler.timesteps"
            )
        return previous

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t (N, C, H, W) of clean images at ``timesteps`` () or (N,), in the images' dtype."""
        alpha_bar = self._alpha_bar[self._checked(timesteps)]
        return gaussian.noisy_image(original_samples, noise, alpha_bar).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v (N, C, H, W) of clean images ``sample`` at ``timesteps`` () or (N,), in their dtype."""
        alpha_bar = self._alpha_bar[self._checked(timesteps)]
        return gaussian.velocity(sample, noise, alpha_bar).to(sample.dtype)

    def _checked(self, timestep: int | Tensor) -> Tensor:
        return checked_timestep(timestep, len(self.betas))

    def levels(self, timestep: int | Tensor) -> Levels:
        """The levels of the step from ``timestep`` () or (N,) to the next one of the grid."""
        previous = self.previous_timestep(timestep)
        is_last = previous < 0
        start = self._alpha_bar[self._checked(timestep)]
        end = torch.where(is_last, self._final_alpha_bar, self._alpha_bar[previous.clamp(min=0)])
        return Levels(start, start, end, is_last)

    def _bounded(self, x0: Tensor) -> Tensor:
        """x0 after the config's thresholding or clipping; both are off by default."""
        if self.config.get("thresholding"):
            return self._threshold_sample(x0)
        if self.config.get("clip_sample"):
            return x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x0
