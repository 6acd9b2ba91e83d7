"""The arithmetic of Gaussian diffusion as pure functions: no scheduler, no state, no randomness.

The forward process is ``x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps`` (Ho et al. 2020,
arXiv 2006.11239, eq. 4), the velocity ``v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0``
(Salimans & Ho 2022, arXiv 2202.00512).

Shapes: images are (N, C, H, W), any float dtype; every ``alpha_bar`` is () or (N,), one noise level
for all images or one per image. Coefficients are computed in the dtype of ``alpha_bar`` (float64 in
our schedulers), rounded once to float32, and always applied as (1 or N, 1, 1, 1) tensors, so one
shared level and N equal levels give the same bits. Arithmetic on images is float32 and so is
what comes out.
"""

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned_range")


def per_image(coefficient: Tensor, x: Tensor) -> Tensor:
    """``coefficient`` () or (N,) as a float32 (1 or N, 1, 1, 1) tensor on the device of ``x``."""
    return coefficient.to(torch.float32).to(x.device).reshape(-1, *[1] * (x.ndim - 1))


def predict_x0_and_eps(
    x_t: Tensor, model_output: Tensor, alpha_bar: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """(x0, eps), both (N, C, H, W), as the network's output at ``x_t`` implies them.

    ``prediction_type`` says what the output is: "epsilon", "v_prediction" or "sample" (x0); any
    other name raises ValueError. "epsilon" has no finite x0 at ``alpha_bar == 0``.
    """
    x_t, output = x_t.float(), model_output.float()
    signal = per_image(alpha_bar.sqrt(), x_t)
    noise = per_image((1 - alpha_bar).sqrt(), x_t)
    if prediction_type == "epsilon":
        return (x_t - noise * output) / signal, output
    if prediction_type == "v_prediction":
        return signal * x_t - noise * output, signal * output + noise * x_t
    if prediction_type == "sample":
        return output, (x_t - signal * output) / noise
    raise ValueError(f"prediction_type {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")


def from_eps(x_t: Tensor, eps: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The network output (N, C, H, W) of ``prediction_type`` that implies ``eps`` at ``x_t``."""
    if prediction_type == "epsilon":
        return eps.float()
    signal = per_image(alpha_bar.sqrt(), x_t)
    noise = per_image((1 - alpha_bar).sqrt(), x_t)
    x0 = (x_t.float() - noise * eps.float()) / signal
    if prediction_type == "sample":
        return x0
    assert prediction_type == "v_prediction"
    return signal * eps.float() - noise * x0


def denoise(
    x_t: Tensor, model_output: Tensor, net: Tensor, start: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """(x0, eps) of images taken to be at level ``start``, from a network that was asked about level ``net``.

    The output says what eps is at ``net``; x0 then follows from ``x_t`` and eps at ``start``. Images
    whose two levels are equal get the very bits of `predict_x0_and_eps`.
    """
    x0, eps = predict_x0_and_eps(x_t, model_output, net, prediction_type)
    if net is start:
        return x0, eps
    moved = (x_t.float() - per_image((1 - start).sqrt(), x_t) * eps) / per_image(start.sqrt(), x_t)
    return torch.where(per_image(net == start, x_t) > 0, x0, moved), eps


def ddim_sigma(alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float) -> Tensor:
    """Standard deviation () or (N,) of the noise that a DDIM step adds, in the alphas' dtype.

    ``eta`` times the square root of the DDPM posterior variance (Song et al. 2021, arXiv
    2010.02502, eq. 16): 0 is deterministic, 1 has the noise of DDPM.
    """
    beta = 1 - alpha_bar / alpha_bar_prev
    # below 0 for a step up to a noisier level, which time-shift may take and which has no noise of its own
    return eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * beta).clamp(min=0).sqrt()


def ddim_update(x0: Tensor, eps: Tensor, alpha_bar_prev: Tensor, sigma: Tensor, noise: Tensor | None = None) -> Tensor:
    """The image one DDIM step nearer to the data (N, C, H, W) (arXiv 2010.02502, eq. 12).

    ``sqrt(alpha_bar_prev) x0 + sqrt(1 - alpha_bar_prev - sigma^2) eps + sigma noise``, with
    ``sigma`` () or (N,); ``noise=None`` leaves the last term out and is meant for sigma 0.
    """
    direction = (1 - alpha_bar_prev - sigma**2).clamp(min=0).sqrt()
    x_prev = per_image(alpha_bar_prev.sqrt(), x0) * x0.float()
    x_prev = x_prev + per_image(direction, eps) * eps.float()
    if noise is None:
        return x_prev
    return x_prev + per_image(sigma, noise) * noise.float()


def ddpm_posterior(
    x_t: Tensor, x0: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor, variance_type: str, v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(mean, standard deviation) of q(x_prev | x_t, x0) between any two levels of the chain.

    With ``beta = 1 - alpha_bar / alpha_bar_prev`` and ``beta_tilde = beta (1 - alpha_bar_prev) /
    (1 - alpha_bar)``: the mean is arXiv 2006.11239, eq. 7; the variance is ``beta_tilde``
    ("fixed_small"), ``beta`` ("fixed_large"), or ``exp(f log beta + (1 - f) log beta_tilde)``, f =
    (v + 1) / 2 ("learned_range"; Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 15), where ``v`` is
    the network's (N, C, H, W), -1..1 between the two bounds. The deviation is (1 or N, 1, 1, 1),
    or (N, C, H, W) for "learned_range". It is 0 where ``alpha_bar_prev`` is 1: the last step of a
    chain adds no noise, whatever the variance type. An unknown ``variance_type`` raises ValueError.
    """
    beta = 1 - alpha_bar / alpha_bar_prev
    beta_tilde = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
    x0_weight = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)
    x_t_weight = (alpha_bar / alpha_bar_prev).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
    mean = per_image(x0_weight, x0) * x0.float() + per_image(x_t_weight, x_t) * x_t.float()

    if variance_type == "fixed_small":
        std = per_image(beta_tilde.sqrt(), x_t)
    elif variance_type == "fixed_large":
        std = per_image(beta.sqrt(), x_t)
    elif variance_type == "learned_range":
        assert v is not None, "learned_range needs the network's v"
        fraction = (v.float() + 1) / 2
        log_max = per_image(beta.log(), x_t)
        log_min = per_image(beta_tilde.clamp(min=1e-20).log(), x_t)
        std = (0.5 * (fraction * log_max + (1 - fraction) * log_min)).exp()
    else:
        raise ValueError(f"variance_type {variance_type!r} is not one of {', '.join(VARIANCE_TYPES)}")
    return mean, torch.where(per_image(alpha_bar_prev, x_t) < 1, std, torch.zeros_like(std))


def noisy_image(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t (N, C, H, W): the clean image ``x0`` at noise level ``alpha_bar``."""
    signal, noise = per_image(alpha_bar.sqrt(), x0), per_image((1 - alpha_bar).sqrt(), x0)
    return signal * x0.float() + noise * eps.float()


def velocity(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """v (N, C, H, W), the target of a "v_prediction" network."""
    signal, noise = per_image(alpha_bar.sqrt(), x0), per_image((1 - alpha_bar).sqrt(), x0)
    return signal * eps.float() - noise * x0.float()
