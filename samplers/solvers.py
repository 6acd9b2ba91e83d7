"""Two fast solvers of diffusers, DPM-Solver++(2M) and UniPC, on a grid that is right for every number of steps.

The stock classes build "trailing" grids by summing floats: for 111 of the numbers 1..1000 the grid is not the one
meant, and for 62 of those it is one timestep too long (61 steps: 62, the last at t = -1). A config that was saved with
a learned variance makes them cut images to three channels; their `add_noise` is right only at timesteps of the grid;
and they compute in the dtype of the images, here in float32.

Shapes: images (N, C, H, W) in any float dtype, returned in the dtype of ``sample``; timesteps are integers
0..num_train_timesteps-1.
"""

import math
from inspect import signature
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from samplers import gaussian
from samplers.grid import (
    StepOutput,
    check_chain,
    check_steps,
    checked_timestep,
    flow_grid,
    refuse_lost,
    stock_config,
    timestep_grid,
    told,
)
from samplers.noise import Generators

# DiffusionPipeline.from_pretrained looks for SchedulerMixin in the module a saved pipeline names.
__all__ = ["DPMSolverScheduler", "SchedulerMixin", "UniPCScheduler"]


class _Solver:
    """What the two share, in front of a stock class: fewer fields, of which none is obeyed unseen, and the grid.

    With ``grid_shift``, a number, the grid is `samplers.grid.flow_grid` instead of ``timestep_spacing``.

    Raises ValueError for another prediction type than those of `samplers.gaussian` and for an unknown spacing.
    """

    config: Any
    alphas_cumprod: Tensor
    model_outputs: list[Tensor]

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: list[float] | None = None, solver_order: int = 2,
        prediction_type: str = "epsilon", thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0, timestep_spacing: str = "trailing", steps_offset: int = 0,
        data_variance: float | None = None, grid_shift: float | None = None,
    ) -> None:  # fmt: skip
        check_chain(type(self).__name__, self.config)
        if grid_shift is not None and not (isinstance(grid_shift, int | float) and 0 < grid_shift < math.inf):
            raise ValueError(f"grid_shift is {grid_shift!r}; it must be above 0, and finite")
        known = {key: value for key, value in stock_config(self.config).items() if key != "grid_shift"}
        super().__init__(**known)  # as registered just now: the stock class registers again

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As ever, but with the fields of ``__init__`` alone: the stock code would obey any other that it finds.

        Raises ValueError for ``rescale_betas_zero_snr``, without which the chain would be another one.
        """
        refuse_lost(cls.__name__, ["rescale_betas_zero_snr"], config or {}, kwargs)
        known = signature(cls.__init__).parameters
        left = (config or {}).get("_use_default_values", ())  # the saving class was not told these
        fields = {key: value for key, value in (config or {}).items() if key in known and key not in left}
        fields |= {key: value for key, value in kwargs.items() if key in known}
        made = cls(**fields)
        return (made, {}) if return_unused_kwargs else made

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Set ``timesteps`` (N,) int64 on ``device`` and ``sigmas`` (N + 1,), the last 0; forgets earlier steps."""
        config = self.config
        check_steps(num_inference_steps, config.num_train_timesteps)
        super().set_timesteps(num_inference_steps, device)  # type: ignore[misc]
        if config.grid_shift is None:
            grid = timestep_grid(
                config.timestep_spacing, num_inference_steps, config.num_train_timesteps, config.steps_offset
            )
        else:
            grid = flow_grid(num_inference_steps, self.alphas_cumprod, config.grid_shift)
        alpha_bar = self.alphas_cumprod.double()[grid]
        ratio = ((1 - alpha_bar) / alpha_bar).sqrt()  # noise over signal, the solvers' sigma
        self.sigmas = torch.cat([ratio, ratio.new_zeros(1)]).float()
        self.timesteps = torch.tensor(grid, dtype=torch.int64, device=device)
        self.num_inference_steps = num_inference_steps

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t (N, C, H, W) of clean images at any ``timesteps`` () or (N,), in the images' dtype."""
        alpha_bar = self.alphas_cumprod.double()[checked_timestep(timesteps, len(self.alphas_cumprod))]
        return gaussian.noisy_image(original_samples, noise, alpha_bar).to(original_samples.dtype)

    def step(
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, return_dict: bool = True,
        generator: Generators = None,
    ) -> StepOutput | tuple[Tensor, Tensor]:  # fmt: skip
        """The stock step in float32, and what it took the clean image for, as the other samplers tell it.

        ``generator`` is taken as diffusers' pipelines give one, and not used.
        """
        x_prev = super().step(model_output.float(), timestep, sample.float(), return_dict=False)[0]  # type: ignore[misc]
        return told(x_prev, self.model_outputs[-1], sample, return_dict)  # both solvers keep data predictions


class DPMSolverScheduler(_Solver, diffusers.DPMSolverMultistepScheduler):  # type: ignore[misc]
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095), ending in clean data.

    A subset of the config of `diffusers.DPMSolverMultistepScheduler` (see there for each field); the default
    grid is "trailing". It remembers steps: call `set_timesteps` before each batch.
    """


class UniPCScheduler(_Solver, diffusers.UniPCMultistepScheduler):  # type: ignore[misc]
    """UniPC, bh2 (Zhao et al. 2023, arXiv 2302.04867), ending in clean data.

    A subset of the config of `diffusers.UniPCMultistepScheduler` (see there for each field); the default grid is
    "trailing". It remembers steps: call `set_timesteps` before each batch.
    """
