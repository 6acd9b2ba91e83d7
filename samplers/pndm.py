"""F-PNDM: fourth-order pseudo-numerical steps along the DDIM path (Liu et al. 2022, arXiv 2202.09778).

Shapes: images (N, C, H, W) in any float dtype; timesteps are integers 0..num_train_timesteps-1.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from samplers import gaussian
from samplers.grid import ExplicitGrid, Levels, refuse_lost, stock_config, told
from samplers.noise import Generators

# DiffusionPipeline.from_pretrained looks for SchedulerMixin in the module a saved pipeline names.
__all__ = ["PNDMScheduler", "SchedulerMixin"]

_WARM_UP = 3  # Runge-Kutta steps, until there are four values of eps
_SHARES = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


class _Call(NamedTuple):
    """One network call: at ``timestep``, of the step start -> end; the image then goes to ``reach`` (-1: clean)."""

    timestep: int
    start: int
    end: int
    reach: int
    stage: int | None


class PNDMScheduler(ExplicitGrid, diffusers.PNDMScheduler):  # type: ignore[misc]
    """Three pseudo Runge-Kutta steps of four calls each, then linear multistep: N steps take N + 9 network calls.

    Takes the config of `diffusers.PNDMScheduler` and the prediction type "sample" too, with two other
    defaults: ``set_alpha_to_one=True`` and ``timestep_spacing="trailing"``; its grid is explicit, where
    the stock class steps back by ``1000 // N`` whatever the grid. It needs at least 4 steps, and
    remembers calls: use it for one batch at a time, after `set_timesteps`. Raises ValueError for
    another prediction type and for ``skip_prk_steps``.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: list[float] | None = None, skip_prk_steps: bool = False,
        set_alpha_to_one: bool = True, prediction_type: str = "epsilon", timestep_spacing: str = "trailing",
        steps_offset: int = 0, data_variance: float | None = None,
    ) -> None:  # fmt: skip
        if skip_prk_steps:
            raise ValueError("skip_prk_steps is for the stock PNDMScheduler; F-PNDM has Runge-Kutta steps")
        super().__init__(**stock_config(self.config))  # as registered just now: the stock class registers again
        self._build_chain(ends_clean=set_alpha_to_one)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As ever, but ValueError for ``rescale_betas_zero_snr``: the stock code would keep it and not obey it."""
        refuse_lost(cls.__name__, ["rescale_betas_zero_snr"], config or {}, kwargs)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def _walk(self, grid: list[int], device: torch.device | str | None) -> None:
        super()._walk(grid, device)
        calls: list[_Call] = []
        for k, (start, end) in enumerate(pairwise([*grid, -1])):
            if k >= _WARM_UP:
                calls.append(_Call(start, start, end, end, None))
                continue
            middle = (start + end) // 2
            stages = ((start, middle), (middle, middle), (middle, end), (end, end))
            calls += [_Call(t, start, end, reach, stage) for stage, (t, reach) in enumerate(stages)]
        self._calls = calls
        self._index = 0
        self._history: list[Tensor] = []
        self._origin: Tensor | None = None
        self._slope: Tensor | None = None
        self.timesteps = torch.tensor([call.timestep for call in calls], dtype=torch.int64, device=device)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: torch.device | str | None = None,
        timesteps: list[int] | None = None,
    ) -> None:  # fmt: skip
        """Choose the grid, as `ExplicitGrid.set_timesteps`; ``timesteps`` then lists every network call.

        Forgets earlier calls. Raises ValueError for fewer than 4 steps too.
        """
        steps = num_inference_steps if timesteps is None else len(timesteps)
        if isinstance(steps, int) and not isinstance(steps, bool) and 1 <= steps <= _WARM_UP:
            raise ValueError(f"num_inference_steps is {steps}, but F-PNDM needs at least {_WARM_UP + 1} steps")
        super().set_timesteps(num_inference_steps, device, timesteps)

    @property
    def in_warm_up(self) -> bool:
        """Is the next call one of a Runge-Kutta step?"""
        return self._index < 4 * _WARM_UP

    def levels(self, timestep: int | Tensor) -> Levels:
        """The levels of the next network call, which must be at ``timestep``."""
        if self._index >= len(self._calls):
            raise ValueError(f"all {len(self._calls)} steps are done; call set_timesteps before the next images")
        call = self._calls[self._index]
        if bool((self._checked(timestep) != call.timestep).any()):
            raise ValueError(
                f"timestep {timestep} is not the next of this run, {call.timestep}; take them in the order of "
                "scheduler.timesteps, after set_timesteps"
            )
        net = self._alpha_bar[call.timestep]
        return Levels(net, net, self._at(call.end), torch.tensor(call.end < 0))

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True,
        generator: Generators = None,
    ) -> Any:  # fmt: skip
        """Take in one network call: ``prev_sample`` (the image to ask about next) and ``pred_original_sample``.

        ``generator`` is taken as diffusers' pipelines give one, and not used. With ``return_dict=False``: a tuple of
        the two. Raises ValueError for a timestep out of turn and for another batch than the one the run began with.
        """
        return told(*self.update(model_output, sample, self.levels(timestep)), sample, return_dict)

    def update(self, model_output: Tensor, sample: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        """(prev_sample, pred_original_sample) of the next call; after the warm-up, between any levels."""
        if self._history and self._history[0].shape != sample.shape:
            raise ValueError(
                f"images of shape {tuple(sample.shape)} follow some of {tuple(self._history[0].shape)}; "
                "call set_timesteps before another batch"
            )
        call = self._calls[self._index]
        x0, eps = gaussian.denoise(sample, model_output, levels.net, levels.start, self.config.prediction_type)
        if call.stage is None:
            self._history = [*self._history[-3:], eps]
            a, b, c, d = reversed(self._history)
            mixed = (55 * a - 59 * b + 37 * c - 9 * d) / 24  # Adams-Bashforth
            x_prev = _transfer(sample, mixed, levels.start, levels.end)
        else:
            x_prev = self._runge_kutta(sample, eps, call)
        self._index += 1
        return x_prev.to(sample.dtype), x0.to(sample.dtype)

    def _runge_kutta(self, sample: Tensor, eps: Tensor, call: _Call) -> Tensor:
        assert call.stage is not None
        if call.stage == 0:
            self._history.append(eps)
            self._origin, self._slope = sample, torch.zeros_like(eps)
        assert self._origin is not None
        assert self._slope is not None
        self._slope = self._slope + _SHARES[call.stage] * eps
        along = self._slope if call.stage == 3 else eps
        return _transfer(self._origin, along, self._alpha_bar[call.start], self._at(call.reach))

    def _at(self, timestep: int) -> Tensor:
        return self._final_alpha_bar if timestep < 0 else self._alpha_bar[timestep]


def _transfer(x_t: Tensor, eps: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """phi of arXiv 2202.09778, eq. 11: along eps from level to level, the DDIM step."""
    signal, noise = gaussian.per_image(start.sqrt(), x_t), gaussian.per_image((1 - start).sqrt(), x_t)
    x0 = (x_t.float() - noise * eps) / signal
    return gaussian.ddim_update(x0, eps, end, torch.zeros_like(end))
