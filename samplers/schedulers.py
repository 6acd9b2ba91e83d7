"""DDPM and DDIM as diffusers schedulers that walk an explicit grid of timesteps.

They take the stock classes' configs, betas and saved files, and replace the grid (`samplers.grid`)
and the update (`samplers.gaussian`); the last step adds no noise. Nothing here keeps state between
steps.

Shapes: images (N, C, H, W) in any float dtype, returned in the dtype of ``sample``; timesteps are
integers 0..num_train_timesteps-1, () for the whole batch or (N,), one per image.
"""

from typing import Any

import diffusers
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from samplers import gaussian
from samplers.grid import ExplicitGrid, Levels, stock_config, told
from samplers.noise import Generators, draw_noise

# DiffusionPipeline.from_pretrained looks for SchedulerMixin in the module a saved pipeline names.
__all__ = ["DDIMScheduler", "DDPMScheduler", "SchedulerMixin"]

# The "_log" types are the same distribution; stock schedulers only compute it by another route.
_VARIANCE_ALIASES = {"fixed_small_log": "fixed_small", "fixed_large_log": "fixed_large"}


class DDPMScheduler(ExplicitGrid, diffusers.DDPMScheduler):  # type: ignore[misc]
    """Ancestral sampling (Ho et al. 2020, arXiv 2006.11239), respaced (arXiv 2102.09672).

    Takes the config of `diffusers.DDPMScheduler` (see there for each field), with two other
    defaults: ``clip_sample=False``, since latents are not bounded, and ``timestep_spacing=
    "trailing"``, which starts from pure noise for any number of steps and spends none at t = 0.
    DiT's published protocol is 250 steps on "linspace". ``variance_type`` is fixed_small,
    fixed_large or learned_range (the network emits 2C channels). Raises ValueError for another
    prediction or variance type, and for "epsilon" with a zero terminal signal.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: list[float] | None = None, variance_type: str = "fixed_small",
        clip_sample: bool = False, prediction_type: str = "epsilon", thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995, clip_sample_range: float = 1.0, sample_max_value: float = 1.0,
        timestep_spacing: str = "trailing", steps_offset: int = 0, rescale_betas_zero_snr: bool = False,
        data_variance: float | None = None,
    ) -> None:  # fmt: skip
        kind = _VARIANCE_ALIASES.get(variance_type, variance_type)
        if kind not in gaussian.VARIANCE_TYPES:
            raise ValueError(f"variance_type {variance_type!r} is not one of {', '.join(gaussian.VARIANCE_TYPES)}")
        super().__init__(**stock_config(self.config))  # as registered just now: the stock class registers again
        self.variance_type = kind
        self._build_chain()

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:  # fmt: skip
        """One step down the grid: ``prev_sample`` and ``pred_original_sample`` (N, C, H, W).

        ``model_output`` is (N, C, H, W), or (N, 2C, H, W) with learned_range. ``generator`` may be
        one per image. The last step draws nothing. With ``return_dict=False``: a tuple of the two.
        """
        return told(*self.update(model_output, sample, self.levels(timestep), generator), sample, return_dict)

    def update(
        self, model_output: Tensor, sample: Tensor, levels: Levels, generator: Generators = None
    ) -> tuple[Tensor, Tensor]:
        """(prev_sample, pred_original_sample) of a step between any levels; `step` looks them up on the grid."""
        model_output, v = _split(model_output, sample, self.variance_type == "learned_range")
        x0, _ = gaussian.denoise(sample, model_output, levels.net, levels.start, self.config.prediction_type)
        x0 = self._bounded(x0)
        x_prev, std = gaussian.ddpm_posterior(sample, x0, levels.start, levels.end, self.variance_type, v)
        if not bool(levels.is_last.all()):
            x_prev = x_prev + std * draw_noise(sample.shape, generator, sample.device)
        return x_prev.to(sample.dtype), x0.to(sample.dtype)


class DDIMScheduler(ExplicitGrid, diffusers.DDIMScheduler):  # type: ignore[misc]
    """DDIM (Song et al. 2021, arXiv 2010.02502): deterministic, or DDPM-like noise with ``eta`` 1.

    Takes the config of `diffusers.DDIMScheduler` (see there for each field), with two other
    defaults: ``clip_sample=False``, since latents are not bounded, and ``timestep_spacing=
    "trailing"``, which starts from pure noise for any number of steps and spends none at t = 0.
    ``set_alpha_to_one=False`` ends the chain at the first noise level instead of clean data. Raises
    ValueError for another prediction type and for "epsilon" with a zero terminal signal.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: list[float] | None = None, clip_sample: bool = False,
        set_alpha_to_one: bool = True, steps_offset: int = 0, prediction_type: str = "epsilon",
        thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995, clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0, timestep_spacing: str = "trailing", rescale_betas_zero_snr: bool = False,
        data_variance: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(**stock_config(self.config))  # as registered just now: the stock class registers again
        self._build_chain(ends_clean=set_alpha_to_one)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, eta: float = 0.0,
        use_clipped_model_output: bool = False, generator: Generators = None, variance_noise: Tensor | None = None,
        return_dict: bool = True, model_output_uncond: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """One step down the grid: ``prev_sample`` and ``pred_original_sample`` (N, C, H, W).

        ``eta`` 0..1 scales the noise (ValueError outside), drawn from ``generator`` (may be one per
        image) or given as ``variance_noise``, not both. The last step adds none.
        ``use_clipped_model_output`` derives eps again from a clipped x0. ``model_output_uncond``,
        the unguided output of the same network call, makes the step a CFG++ one: x0 from the guided
        output, noise put back with the unguided eps (Chung et al. 2024, arXiv 2406.08070, Alg. 1).
        With ``return_dict=False``: a tuple of the two.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}, but it must be from 0 (DDIM) to 1 (the noise of DDPM)")
        if variance_noise is not None and generator is not None:
            raise ValueError("give either generator or variance_noise, and not both")
        x_prev, x0 = self.update(
            model_output, sample, self.levels(timestep), eta, generator,
            variance_noise=variance_noise, clip_again=use_clipped_model_output, model_output_uncond=model_output_uncond,
        )  # fmt: skip
        return told(x_prev, x0, sample, return_dict)

    def update(
        self, model_output: Tensor, sample: Tensor, levels: Levels, eta: float = 0.0, generator: Generators = None,
        *, variance_noise: Tensor | None = None, clip_again: bool = False,
        model_output_uncond: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(prev_sample, pred_original_sample) of a step between any levels; `step` looks them up on the grid."""
        kind = self.config.prediction_type
        model_output, _ = _split(model_output, sample, False)
        x0, eps = gaussian.denoise(sample, model_output, levels.net, levels.start, kind)
        x0 = self._bounded(x0)
        if clip_again:
            _, eps = gaussian.predict_x0_and_eps(sample, x0, levels.start, "sample")
        if model_output_uncond is not None:
            _, eps = gaussian.denoise(sample, model_output_uncond, levels.net, levels.start, kind)
        sigma = gaussian.ddim_sigma(levels.start, levels.end, eta) * ~levels.is_last
        noise = None
        if eta > 0 and not bool(levels.is_last.all()):
            noise = draw_noise(sample.shape, generator, sample.device) if variance_noise is None else variance_noise
        x_prev = gaussian.ddim_update(x0, eps, levels.end, sigma, noise)
        return x_prev.to(sample.dtype), x0.to(sample.dtype)


def _split(model_output: Tensor, sample: Tensor, learned_variance: bool) -> tuple[Tensor, Tensor | None]:
    """(prediction, v or None), after a check of the number of channels."""
    channels = sample.shape[1]
    wanted = 2 * channels if learned_variance else channels
    if model_output.shape[1] != wanted:
        raise ValueError(
            f"the model emits {model_output.shape[1]} channels for images of {channels}, but this "
            f"scheduler needs {wanted}: a learned variance needs variance_type 'learned_range'"
        )
    if not learned_variance:
        return model_output, None
    return model_output[:, :channels], model_output[:, channels:]
