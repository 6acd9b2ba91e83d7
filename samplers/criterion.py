"""Which timestep does an image look like? The choice that time-shift sampling makes, apart from what it is used for.

Shapes: images (N, C, H, W), d = C * H * W; timesteps are integers 0..T-1.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Variance = float | Sequence[float]


def clean_variance(asked: Variance | str | None, measured: float | None, num_train_timesteps: int) -> Variance:
    """v, the variance of clean images that a config asks for: one number, or one for each training step.

    ``asked`` is None or "published" (0), "calibrated" (``measured``, the data's), or v itself. Raises ValueError for
    anything else, for numbers below 0, and for "calibrated" without a measurement.
    """
    check_data_variance(measured)
    if asked is None or asked == "published":
        return 0.0
    if isinstance(asked, str):
        if asked != "calibrated":
            raise ValueError(f"exposure_variance {asked!r} is neither published, calibrated nor a number")
        if measured is None:
            raise ValueError("exposure_variance 'calibrated' needs data_variance, which this model was not saved with")
        return measured
    values = [float(each) for each in asked] if isinstance(asked, Sequence) else [float(asked)]
    if isinstance(asked, Sequence) and len(values) != num_train_timesteps:
        raise ValueError(
            f"exposure_variance has {len(values)} values; give one, or one for each of {num_train_timesteps} timesteps"
        )
    wrong = [each for each in values if not 0 <= each < math.inf]
    if wrong:
        raise ValueError(f"exposure_variance {wrong[0]} must be 0 or more, and finite")
    return values if isinstance(asked, Sequence) else values[0]


def check_data_variance(measured: float | None) -> None:
    """Raise ValueError for a variance of the data that is known and no finite number above 0."""
    is_number = isinstance(measured, int | float) and not isinstance(measured, bool)
    if measured is not None and not (is_number and 0 < measured < math.inf):
        raise ValueError(f"data_variance is {measured!r:.100}, but it must be a number above 0, and finite")


class VarianceCriterion:
    """Compares an image's variance over its pixels with ``alpha_bar_t v + 1 - alpha_bar_t``.

    Args:
        alpha_bar: (T,) float64 levels of the timesteps.
        variance: v, see `clean_variance`.
        cutoff, min_snr: see `samplers.time_shift.TimeShiftScheduler`.

    Attributes:
        half: Timesteps to search on either side; 0 finds no shift.
    """

    def __init__(self, alpha_bar: Tensor, variance: Variance, cutoff: int, min_snr: float) -> None:
        # This form is exactly 1 everywhere at v = 1, so that there nothing is nearer than the scheduled timestep.
        self.expected = 1 - alpha_bar * (1 - torch.as_tensor(variance, dtype=torch.float64))  # (T,)
        self.half, self.cutoff, self.min_snr = 0, cutoff, min_snr

    def choose(self, x: Tensor, t: int, *, lowest: int = 0, highest: int | None = None) -> Tensor | None:
        """(N,) int64 on the images' device: the timesteps round t that they look like; None for no shift."""
        last = len(self.expected) - 1
        low, high = max(t - self.half, lowest), min(t + self.half, last if highest is None else highest, last)
        if self.half == 0 or x[0].numel() == 1 or t <= self.cutoff or not low <= t <= high:
            return None
        window = self.expected[low : high + 1]  # (W,)
        flat = x.detach().flatten(1)
        if float(window.max() - window.min()) < self.min_snr * math.sqrt(2 / (flat.shape[1] - 1)):
            return None
        # float64 where the device has it
        window = window.to(torch.float32 if x.device.type == "mps" else torch.float64).to(x.device)
        variance = flat.float().var(dim=1, unbiased=True).to(window.dtype)  # (N,)
        distance = (variance[:, None] - window).abs()  # (N, W)
        steps_off = torch.arange(low, high + 1, device=x.device).sub(t).abs()
        nearest = distance == distance.amin(dim=1, keepdim=True)
        chosen: Tensor = low + torch.where(nearest, steps_off, last + 2).argmin(dim=1)
        return chosen
