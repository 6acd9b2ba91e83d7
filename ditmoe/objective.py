"""Objectives: how x_t is made, what the network has to say about it, and the losses, by name.

Shapes: N images, C channels, H W size. x_0 lies in [-1, 1] (pixels) or has unit scale (latents); t is on the 0..1000
scale at the model's door.

* Diffusion: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps, a = alphas_cumprod, t in 0..999; targets epsilon, x_0 ("sample")
  or v = sqrt(a_t) eps - sqrt(1 - a_t) x_0 (Salimans and Ho, arXiv 2202.00512).
* Flow: x_t = (1 - s) x_0 + s eps with s = t / 1000 in (0, 1]; target eps - x_0 (arXiv 2209.03003, 2403.03206).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from samplers.gaussian import ddpm_posterior, noisy_image, per_image, velocity

from .config.sections import ObjectiveConfig
from .model import Heads
from .rng import sample_rng

NUM_TIMESTEPS = 1000
_GOLDEN = 0.6180339887498949


class Draws(NamedTuple):
    """The randomness of some training samples: t (N,) on 0..1000, noise (N, C, H, W), drop (N,) bool."""

    t: Tensor
    noise: Tensor
    drop: Tensor


def scheduler_config(config: ObjectiveConfig) -> dict[str, Any]:
    """The noise schedule in diffusers' words: what a sampler needs to know, saved with the model."""
    common = {"num_train_timesteps": NUM_TIMESTEPS, "prediction_type": config.prediction_type}
    if config.prediction_type == "flow_prediction":
        return common
    variance = "learned_range" if config.learn_sigma else "fixed_small"
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": config.beta_schedule}
    return {**common, **betas, "variance_type": variance, "clip_sample": False}


class Objective:
    """Turns clean images into training pairs and predictions into losses."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config
        self.is_flow = config.prediction_type == "flow_prediction"
        if not self.is_flow:
            self.alphas_cumprod = (1 - DDPMScheduler(**scheduler_config(config)).betas.double()).cumprod(0)

    def draw(self, seed: int, indices: Sequence[int], shape: tuple[int, int, int]) -> Draws:
        """The randomness of the samples with these running numbers: a function of (seed, index) alone.

        Times are one low-discrepancy sequence over the run, u_i = frac(u + i * golden ratio), so that every batch
        covers the time axis evenly (the idea of VDM's sampler, arXiv 2107.00630, App. I.1, without its batch size).
        """
        noise = np.empty((len(indices), *shape), dtype=np.float32)
        dropped = np.empty(len(indices))
        for row, index in enumerate(indices):
            rng = sample_rng(seed, 1, index)
            dropped[row] = rng.random(2)[0]
            rng.standard_normal(out=noise[row], dtype=np.float32)
        start = sample_rng(seed, 2, 0).random()
        u = torch.from_numpy((start + np.asarray(indices, dtype=np.float64) * _GOLDEN) % 1.0)
        if self.config.time_sampling == "logit_normal":
            t = NUM_TIMESTEPS * torch.special.ndtri(u).sigmoid()
        else:
            t = NUM_TIMESTEPS * (1.0 - u) if self.is_flow else (NUM_TIMESTEPS * u).floor()
        drop = torch.from_numpy(dropped < self.config.class_dropout_prob)
        return Draws(t.float(), torch.from_numpy(noise), drop)

    def corrupt(self, x_0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, target), each (N, C, H, W)."""
        if self.is_flow:
            s = per_image(t / NUM_TIMESTEPS, x_0)
            return (1 - s) * x_0 + s * noise, noise - x_0
        a = self.alphas_cumprod[t.long().cpu()].float().to(x_0.device)
        target = {"epsilon": noise, "sample": x_0}.get(self.config.prediction_type)
        return noisy_image(x_0, noise, a), velocity(x_0, noise, a) if target is None else target

    def losses(self, sample: Tensor, target: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        """The losses of one (micro-)batch, float32 scalars: "mse", and with learn_sigma "vlb".

        `sample` (N, C or 2C, H, W) is the network's output, (x_t, target) as `corrupt` made them of x_0 and t.
        """
        C = target.shape[1]
        losses = {"mse": (sample[:, :C].float() - target).square().mean()}
        if self.config.learn_sigma:
            eps, values = sample.float().split(C, dim=1)
            losses["vlb"] = self._variance_bound(eps.detach(), values, x_0, x_t, t.long())
        return losses

    def _variance_bound(self, eps: Tensor, values: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The variational bound's term at t in bits per dimension, mean over the batch: trains the variance alone.

        log sigma^2 = f log beta_t + (1 - f) log beta~_t, f = (values + 1) / 2. Weight 1 is lambda = 0.001 on the
        whole bound of 1000 terms. Source: improved DDPM (arXiv 2102.09672) eq. 15-16.
        """
        a, t = self.alphas_cumprod, t.cpu()
        a_prev = torch.cat([a.new_ones(1), a[:-1]])
        beta = 1 - a / a_prev
        tilde = beta * (1 - a_prev) / (1 - a)
        log_tilde = torch.cat([tilde[1:2], tilde[1:]]).log()  # tilde is 0 at t = 0

        def at(table: Tensor) -> Tensor:
            return per_image(table[t], x_0)

        true_mean, _ = ddpm_posterior(x_t, x_0, a[t], a_prev[t], "fixed_small")
        mean = (x_t - at(beta / (1 - a).sqrt()) * eps) / at((a / a_prev).sqrt())
        f = (values + 1) / 2
        log_var = f * at(beta.log()) + (1 - f) * at(log_tilde)
        kl = 0.5 * (
            log_var - at(log_tilde) - 1
            + (at(log_tilde) - log_var).exp() + (true_mean - mean).square() * (-log_var).exp()
        )  # fmt: skip
        first = -_discretised_log_likelihood(x_0, mean, 0.5 * log_var)
        nats = torch.where((t == 0).to(kl.device).view(-1, 1, 1, 1), first, kl).mean(dim=(1, 2, 3))
        return nats.mean() / math.log(2.0)


def expert_loss(heads: Heads, target: Tensor) -> Tensor:
    """mean over images of sum_k g_k mean((p_k - target)^2), a float32 scalar: 0 where each head is right by itself.

    `target` is (N, C, H, W); of heads with 2C channels the first C count. It is the loss of sum_k g_k p_k plus what the
    heads differ by, sum_k g_k mean((p_k - sum_j g_j p_j)^2), so it pulls them together where a gate lets several speak.

    Source: Expert Loss Integration (arXiv 2605.10330), of which the abstract alone was seen.
    """
    errors = (heads.predictions[:, :, : target.shape[1]].float() - target.unsqueeze(1)).square().mean(dim=(2, 3, 4))
    return (heads.gates * errors).sum(dim=1).mean()


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P of 8-bit x in [-1, 1] under a Gaussian, bin by bin (DDPM, arXiv 2006.11239, eq. 13)."""
    inverse = (-log_scale).exp()
    upper = torch.where(x > 0.999, 1.0, torch.special.ndtr((x - mean + 1 / 255) * inverse))
    lower = torch.where(x < -0.999, 0.0, torch.special.ndtr((x - mean - 1 / 255) * inverse))
    return (upper - lower).clamp_min(1e-12).log()
