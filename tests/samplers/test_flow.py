"""Flow matching with Euler steps, against the exact values of a Gaussian world."""

import diffusers
import numpy as np
import pytest
import torch

from samplers import FlowEulerScheduler, sample
from tests.reference.gaussian_world import MEAN, VARIANCE, OptimalNetwork, Z


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(n=10, **config):
    scheduler = FlowEulerScheduler(**config)
    scheduler.set_timesteps(n)
    return scheduler


def flow_map(n):
    network = OptimalNetwork("flow_prediction")
    images = sample(network, FlowEulerScheduler(), Z, num_inference_steps=n)
    return images.flatten().double().numpy()


# N: (largest error of f(-1), f(0), f(1) against the exact flow, standard deviation)
EXACT = {
    10: (0.0692, 0.430783),
    20: (0.03575, 0.46425),
    50: (0.01460, 0.485397),
    160: (0.00461, None),
}


def test_euler_converges_to_the_exact_flow_with_order_one():
    exact = MEAN + VARIANCE**0.5 * np.array([-1.0, 0.0, 1.0])  # s = 1 is pure noise here
    errors = {}
    for n, (error, std) in EXACT.items():
        pixels = flow_map(n)
        errors[n] = abs(pixels - exact).max()
        assert errors[n] == pytest.approx(error, rel=2e-3)
        if std is not None:
            assert (pixels[2] - pixels[0]) / 2 == pytest.approx(std, abs=6e-6)
    assert 1.9 < errors[10] / errors[20] < 2


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_equals_diffusers_on_the_same_grid(shift):
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20).tolist())
    ours = make(20, shift=shift)
    torch.testing.assert_close(ours.timesteps, stock.timesteps)
    torch.testing.assert_close(ours.sigmas.float(), stock.sigmas)
    a = b = randn(2, 3, 4, 4)
    for t, u in zip(ours.timesteps, stock.timesteps, strict=True):
        a = ours.step(a.sin(), t, a).prev_sample
        b = stock.step(b.sin(), u, b).prev_sample
    torch.testing.assert_close(a, b)


def test_the_grid_ends_a_full_step_before_the_data():
    scheduler = make(4)
    assert scheduler.timesteps.tolist() == [1000, 750, 500, 250]
    assert scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]
    # s' = 3 s / (1 + 2 s)
    assert make(2, shift=3.0).timesteps.tolist() == [1000, 750]


def test_the_true_velocity_gives_the_data_from_anywhere():
    scheduler, x0, eps = make(10), randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    t = torch.tensor([1000.0, 500.0, 100.0])
    x = scheduler.add_noise(x0, eps, t)
    assert torch.equal(x[0], eps[0])
    assert torch.equal(scheduler.scale_model_input(x, t), x)
    velocity = scheduler.get_velocity(x0, eps, t)
    step = scheduler.step(velocity, t, x)
    torch.testing.assert_close(step.pred_original_sample, x0, atol=1e-6, rtol=0)
    torch.testing.assert_close(step.prev_sample, scheduler.add_noise(x0, eps, t - 100))
    torch.testing.assert_close(step.prev_sample[2], x0[2], atol=1e-6, rtol=0)
    for i in range(3):  # one timestep per image: the bits of each image alone
        alone = scheduler.step(velocity[i : i + 1], int(t[i]), x[i : i + 1], return_dict=False)
        assert torch.equal(alone[0][0], step.prev_sample[i])
        assert torch.equal(alone[1][0], step.pred_original_sample[i])


def test_every_timestep_of_every_grid_is_found():
    for n in (1, 3, 7, 333, 999, 1000):
        for shift in (0.3, 1.0, 6.0):
            scheduler = make(n, shift=shift)
            start, end = scheduler._ends(scheduler.timesteps)
            assert torch.equal(start, scheduler.sigmas[:-1])
            assert torch.equal(end, scheduler.sigmas[1:])


def test_half_precision_goes_in_and_out_and_the_arithmetic_is_float32():
    scheduler = make(7)
    x, v = randn(2, 3, 4, 4).bfloat16(), randn(2, 3, 4, 4, seed=1).bfloat16()
    half = scheduler.step(v, scheduler.timesteps[3], x)
    full = scheduler.step(v.float(), scheduler.timesteps[3], x.float())
    for key in ("prev_sample", "pred_original_sample"):
        assert half[key].dtype == torch.bfloat16
        assert torch.equal(half[key], full[key].bfloat16())


def test_save_and_load(tmp_path):
    FlowEulerScheduler(num_train_timesteps=500, shift=2.0).save_pretrained(tmp_path)
    loaded = FlowEulerScheduler.from_pretrained(tmp_path)
    assert loaded.config.shift == 2
    assert loaded.config.prediction_type == "flow_prediction"
    assert len(loaded) == 500
    assert loaded.init_noise_sigma == 1
    assert loaded.order == 1
    assert loaded.timesteps[0] == 500


def test_mistakes_are_refused_in_a_sentence():
    scheduler, x = make(10), randn(2, 3, 4, 4)
    for n in (0, 1001, 2.5, True):
        with pytest.raises(ValueError, match="must be an integer from 1 to 1000"):
            scheduler.set_timesteps(n)
    for t in (950.0, 0.9, 1000.1):
        with pytest.raises(ValueError, match="not on this scheduler's grid of 10 steps"):
            scheduler.step(x, t, x)
    for shift in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="shift is"):
            FlowEulerScheduler(shift=shift)
    with pytest.raises(ValueError, match="cannot sample prediction_type 'epsilon'"):
        FlowEulerScheduler(prediction_type="epsilon")
