"""Epsilon scaling: eps / (k t + b), whatever the network predicts."""

import diffusers
import numpy as np
import pytest
import torch

from samplers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverScheduler,
    FlowEulerScheduler,
    PNDMScheduler,
    TimeShiftScheduler,
    UniPCScheduler,
    gaussian,
    image_generators,
    initial_noise,
    sample,
)
from tests.reference.gaussian_world import ALPHA_BAR, MEAN, VARIANCE, OptimalNetwork, Z

KINDS = ["epsilon", "v_prediction", "sample"]


def run(scheduler, kind="epsilon", noise=Z, steps=20, v=None, **options):
    return sample(OptimalNetwork(kind, v=v), scheduler, noise, num_inference_steps=steps, **options)


def test_a_hundredth_raises_the_variance_of_ddim():
    for scale, variance in [(1.0, 0.186), (1.01, 0.214)]:
        pixels = run(DDIMScheduler(), epsilon_scale=scale).flatten()
        assert ((pixels[2] - pixels[0]) / 2).item() ** 2 == pytest.approx(variance, abs=5e-4)


@pytest.mark.parametrize("scale", [1.02, (1e-4, 0.97)])
def test_it_divides_eps_by_lambda(scale):
    k, b = scale if isinstance(scale, tuple) else (0.0, scale)
    x, grid = np.array([-1.0, 0.0, 1.0]), [999 - 100 * n for n in range(10)]
    for t, after in zip(grid, [*grid[1:], None], strict=True):
        a, end = ALPHA_BAR[t], 1.0 if after is None else ALPHA_BAR[after]
        eps = np.sqrt(1 - a) * (x - np.sqrt(a) * MEAN) / (a * VARIANCE + 1 - a) / (k * t + b)
        x = np.sqrt(end / a) * (x - np.sqrt(1 - a) * eps) + np.sqrt(1 - end) * eps
    got = run(DDIMScheduler(), steps=10, epsilon_scale=scale).flatten()
    np.testing.assert_allclose(got, x, atol=1e-5 * abs(x).max())


@pytest.mark.parametrize(
    "cls", [DDIMScheduler, DDPMScheduler, PNDMScheduler, DPMSolverScheduler, UniPCScheduler, TimeShiftScheduler]
)
def test_every_sampler_and_prediction_type_has_it_alike(cls):
    generators = [image_generators(0, range(3)) for _ in KINDS]
    scaled = [
        run(cls(prediction_type=kind), kind, epsilon_scale=1.02, generators=g)
        for kind, g in zip(KINDS, generators, strict=True)
    ]
    for other in scaled[1:]:
        torch.testing.assert_close(other, scaled[0], atol=2e-3, rtol=1e-4)  # x0 -> eps magnifies rounding at the start
    plain = run(cls(), generators=image_generators(0, range(3)))
    assert (scaled[0] - plain).abs().max() > 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_of_one_leaves_every_bit(kind):
    noise = initial_noise(image_generators(0, range(2)), (3, 4, 4), "cpu")
    scheduler = DDIMScheduler(prediction_type=kind)
    plain = run(scheduler, kind, noise)
    for scale in (1, 1.0, (0.0, 1.0), (0, 1)):
        assert torch.equal(run(scheduler, kind, noise, epsilon_scale=scale), plain)


def test_the_learned_variance_is_left_alone():
    scheduler = DDPMScheduler(variance_type="learned_range")
    fixed = DDPMScheduler(variance_type="fixed_small")
    results = [
        run(s, v=v, epsilon_scale=1.05, generators=image_generators(0, range(3)))
        for s, v in ((scheduler, [-1.0]), (fixed, None))
    ]
    torch.testing.assert_close(*results)


def test_guided_eps_is_what_is_scaled():
    options = {"class_labels": torch.zeros(3, dtype=torch.int64), "null_label": 1, "guidance_scale": 0.6}
    x, grid = np.array([-1.0, 0.0, 1.0]), [999 - 100 * n for n in range(10)]
    for t, after in zip(grid, [*grid[1:], None], strict=True):
        a, end = ALPHA_BAR[t], 1.0 if after is None else ALPHA_BAR[after]

        def eps(mean, x=x, a=a):
            return np.sqrt(1 - a) * (x - np.sqrt(a) * mean) / (a * VARIANCE + 1 - a) / 1.05

        guided, null = eps(-MEAN + 0.6 * 2 * MEAN), eps(-MEAN)
        x = np.sqrt(end / a) * (x - np.sqrt(1 - a) * guided) + np.sqrt(1 - end) * null
    for kind in KINDS:
        scheduler = DDIMScheduler(prediction_type=kind)
        got = run(scheduler, kind, steps=10, epsilon_scale=1.05, guidance_rule="cfg++", **options)
        np.testing.assert_allclose(got.flatten(), x, atol=2e-4 * abs(x).max())


def test_lambda_goes_by_the_step_that_the_network_was_told():
    network, noise = OptimalNetwork(), initial_noise(image_generators(0, range(2)), (3, 8, 8), "cpu")
    noise[0] *= 0.8  # so that the two are told different steps
    scheduler = TimeShiftScheduler(exposure_window=150, exposure_mode="network", exposure_cutoff=0)
    told, step, outputs = [], scheduler.step, []

    def recorded(output, t, x, **options):
        outputs.append((output, x))
        return step(output, t, x, **options)

    scheduler.step = recorded
    network.register_forward_pre_hook(lambda _, inputs: told.append(inputs[1]))
    sample(network, scheduler, noise, num_inference_steps=10, epsilon_scale=(1e-4, 0.95))
    assert any(t[0] != t[1] for t in told)
    for t, (output, x) in zip(told, outputs, strict=True):
        want = OptimalNetwork()(x, t).sample / (1e-4 * t + 0.95).reshape(-1, 1, 1, 1)
        torch.testing.assert_close(output, want, atol=1e-6, rtol=1e-5)


def test_a_stock_scheduler_that_scales_its_input_has_it_too():
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "trailing"}
    results = [
        run(diffusers.EulerDiscreteScheduler(prediction_type=kind, **betas), kind, epsilon_scale=1.02)
        for kind in ("epsilon", "v_prediction")
    ]
    torch.testing.assert_close(*results, atol=2e-3, rtol=1e-3)


def test_a_chain_without_any_signal_at_its_start_stays_finite():
    scheduler = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert run(scheduler, "v_prediction", epsilon_scale=1.01).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_eps_becomes_the_output_that_implies_it(kind):
    x, eps = (initial_noise(image_generators(s, range(2)), (3, 4, 4), "cpu") for s in (0, 1))
    for t in (0, 300, 700):
        level = torch.tensor(ALPHA_BAR[t])
        _, got = gaussian.predict_x0_and_eps(x, gaussian.from_eps(x, eps, level, kind), level, kind)
        torch.testing.assert_close(got, eps, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "kind", "scale", "sentence"),
    [
        (
            FlowEulerScheduler(),
            "flow_prediction",
            1.01,
            "epsilon_scale 1.01 is for Gaussian diffusion, not for 'flow_pred",
        ),
        (DDIMScheduler(), "epsilon", 0.0, "epsilon_scale 0.0 must be above 0 at every timestep; 1 is off"),
        (DDIMScheduler(), "epsilon", -1.0, "must be above 0"),
        (DDIMScheduler(), "epsilon", (-2e-3, 1.5), "must be above 0 at every timestep"),
        (DDIMScheduler(), "epsilon", float("nan"), "must be above 0"),
        (DDIMScheduler(), "epsilon", float("inf"), "must be above 0"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(scheduler, kind, scale, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(scheduler, kind, epsilon_scale=scale)
    assert run(FlowEulerScheduler(), "flow_prediction", epsilon_scale=1.0).isfinite().all()
