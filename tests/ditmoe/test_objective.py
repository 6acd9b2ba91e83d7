"""Objectives: their algebra, their randomness, and improved DDPM's variance loss."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from ditmoe.config.sections import ObjectiveConfig
from ditmoe.objective import Objective, scheduler_config

SHAPE = (1, 4, 4)


def batch(kind: str, n: int = 64, **more: object) -> tuple[Objective, torch.Tensor, torch.Tensor, torch.Tensor]:
    objective = Objective(ObjectiveConfig(prediction_type=kind, **more))  # type: ignore[arg-type]
    draws = objective.draw(0, range(n), SHAPE)
    x_0 = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return objective, x_0, draws.t, draws.noise


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_targets_are_what_diffusers_understands(kind: str, schedule: str) -> None:
    objective, x_0, t, noise = batch(kind, beta_schedule=schedule)
    x_t, target = objective.corrupt(x_0, t, noise)
    scheduler = DDPMScheduler(**scheduler_config(objective.config))
    torch.testing.assert_close(x_t, scheduler.add_noise(x_0, noise, t.long()))
    for i in range(0, 64, 7):
        clean = scheduler.step(target[i : i + 1], int(t[i]), x_t[i : i + 1]).pred_original_sample
        torch.testing.assert_close(clean, x_0[i : i + 1], rtol=1e-2, atol=1e-2)


def test_flow_target_is_the_velocity() -> None:
    objective, x_0, t, noise = batch("flow_prediction")
    x_t, target = objective.corrupt(x_0, t, noise)
    s = (t / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t - s * target, x_0)
    assert t.min() > 0
    assert t.max() <= 1000


@pytest.mark.parametrize(("kind", "law"), [("v_prediction", "uniform"), ("flow_prediction", "logit_normal")])
def test_times_follow_their_law(kind: str, law: str) -> None:
    objective = Objective(ObjectiveConfig(prediction_type=kind, time_sampling=law))  # type: ignore[arg-type]
    t = objective.draw(3, range(4000), (1, 1, 1)).t / 1000
    if law == "uniform":
        quantiles = torch.quantile(t, torch.tensor([0.1, 0.5, 0.9]))
        torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9]), atol=0.01, rtol=0)
    else:
        logits = torch.logit(t)
        assert abs(logits.mean()) < 0.02
        assert abs(logits.std() - 1) < 0.02


def test_randomness_depends_on_seed_and_sample_number_alone() -> None:
    objective = Objective(ObjectiveConfig())
    whole = objective.draw(1, range(10), SHAPE)
    for part in (range(0, 4), range(4, 10)):
        for a, b in zip(objective.draw(1, part, SHAPE), whole, strict=True):
            assert torch.equal(a, b[part.start : part.stop])
    assert not torch.equal(objective.draw(2, range(10), SHAPE).noise, whole.noise)
    many = objective.draw(1, range(3000), (1, 8, 8))
    assert abs(many.noise.mean()) < 0.01
    assert abs(many.noise.std() - 1) < 0.01
    assert abs(many.drop.float().mean() - 0.1) < 0.02


def test_the_losses_have_names() -> None:
    objective, x_0, t, noise = batch("v_prediction")
    x_t, target = objective.corrupt(x_0, t, noise)
    losses = objective.losses(target + 1, target, x_0, x_t, t)
    assert losses.keys() == {"mse"}
    assert losses["mse"].item() == pytest.approx(1.0, rel=1e-5)


def test_variance_bound_is_zero_for_the_exact_posterior_and_trains_only_the_variance() -> None:
    objective, x_0, t, noise = batch("epsilon", learn_sigma=True)
    t = t.clamp_min(1)
    x_t, target = objective.corrupt(x_0, t, noise)
    values = torch.full_like(x_0, -1.0)  # the small variance, that of the posterior
    eps = target.clone().requires_grad_()
    losses = objective.losses(torch.cat([eps, values], 1), target, x_0, x_t, t)
    assert losses.keys() == {"mse", "vlb"}
    assert losses["vlb"].item() == pytest.approx(0.0, abs=1e-4)
    losses["vlb"].backward() if losses["vlb"].requires_grad else None
    assert eps.grad is None or eps.grad.abs().max() == 0
    values = torch.full_like(x_0, 1.0, requires_grad=True)
    wide = objective.losses(torch.cat([target, values], 1), target, x_0, x_t, t)["vlb"]
    wide.backward()
    assert wide > 0
    assert (values.grad > 0).all()  # descent makes the variance smaller


def test_variance_bound_by_hand() -> None:
    """One pixel, t = 1: KL of two Gaussians written out with the schedule's numbers, in bits."""
    objective = Objective(ObjectiveConfig(prediction_type="epsilon", learn_sigma=True))
    a1, a0 = (float(objective.alphas_cumprod[i]) for i in (1, 0))
    beta = 1 - a1 / a0
    tilde = beta * (1 - a0) / (1 - a1)
    x_0, x_t, eps, value = 0.2, 0.5, 0.1, 0.3
    true = beta * math.sqrt(a0) / (1 - a1) * x_0 + (1 - a0) * math.sqrt(a1 / a0) / (1 - a1) * x_t
    mean = (x_t - beta / math.sqrt(1 - a1) * eps) / math.sqrt(a1 / a0)
    f = (value + 1) / 2
    log_var = f * math.log(beta) + (1 - f) * math.log(tilde)
    kl = 0.5 * (log_var - math.log(tilde) - 1 + (tilde + (true - mean) ** 2) / math.exp(log_var))
    one = [torch.full((1, 1, 1, 1), v) for v in (eps, value, x_0, x_t)]
    got = objective._variance_bound(one[0], one[1], one[2], one[3], torch.tensor([1]))
    assert got.item() == pytest.approx(kl / math.log(2), rel=1e-3)
