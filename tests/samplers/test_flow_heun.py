"""Flow matching with Heun's steps: order two, two calls a step, the contract."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from samplers import FlowHeunScheduler, image_generators, initial_noise, sample
from tests.reference.gaussian_world import MEAN, VARIANCE, OptimalNetwork, Z


def noise_of(n, seed=0):
    return initial_noise(image_generators(seed, range(n)), (3, 4, 4), "cpu")


def make(n=10, **config):
    scheduler = FlowHeunScheduler(**config)
    scheduler.set_timesteps(n)
    return scheduler


def test_it_converges_to_the_exact_flow_with_order_two():
    exact = MEAN + VARIANCE**0.5 * np.array([-1.0, 0.0, 1.0])
    errors = {}
    for n, error in {10: 1.72e-3, 20: 5.08e-4, 40: 1.37e-4, 80: 3.54e-5, 160: 9.0e-6}.items():
        network = OptimalNetwork("flow_prediction")
        pixels = sample(network, FlowHeunScheduler(), Z, num_inference_steps=n).flatten().double().numpy()
        errors[n] = abs(pixels - exact).max()
        assert errors[n] == pytest.approx(error, rel=5e-3 if n < 80 else 2e-2)  # float32 is felt at 160
        assert network.batches == [3] * (2 * n)
    ratios = [errors[n] / errors[2 * n] for n in (10, 20, 40)]
    assert ratios == sorted(ratios)
    assert 3.8 < ratios[-1] < 4
    assert 3.8 < errors[80] / errors[160] < 4.1


def velocity(x, t):
    return (x * 1.3).sin() + t / 1000


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_step_is_the_mean_of_two_slopes(shift):
    scheduler, x = make(4, shift=shift), noise_of(2)
    y = x.double()
    s = [k / 4 for k in range(4, -1, -1)]
    s = [shift * k / (1 + (shift - 1) * k) for k in s]
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * s[k] for k in (0, 1, 1, 2, 2, 3, 3, 4)])
    for start, end in pairwise(s):
        v1 = velocity(y, 1000 * start)
        v2 = velocity(y + (end - start) * v1, 1000 * end)
        y = y + (end - start) * (v1 + v2) / 2
    for t in scheduler.timesteps:
        step = scheduler.step(velocity(x, t), t, x)
        torch.testing.assert_close(step.pred_original_sample, x - t / 1000 * velocity(x, t))
        x = step.prev_sample
    torch.testing.assert_close(x, y.float(), atol=1e-5, rtol=1e-5)


def test_set_timesteps_begins_again():
    used = make()
    for t in used.timesteps[:3]:  # stop in the middle of a step
        used.step(noise_of(3), t, noise_of(3))
    network = OptimalNetwork("flow_prediction")
    got, want = (sample(network, s, noise_of(2), num_inference_steps=6) for s in (used, make()))
    assert torch.equal(got, want)


def test_save_and_load(tmp_path):
    FlowHeunScheduler(num_train_timesteps=500, shift=2.0).save_pretrained(tmp_path)
    loaded = FlowHeunScheduler.from_pretrained(tmp_path)
    assert loaded.config.shift == 2
    assert len(loaded) == 500
    loaded.set_timesteps(2)
    assert loaded.timesteps.tolist() == pytest.approx([500, 500 * 2 / 3, 500 * 2 / 3, 0])
    prev, x0 = make().step(noise_of(2), 1000, noise_of(2), return_dict=False)
    assert torch.equal(prev, make().step(noise_of(2), 1000, noise_of(2)).prev_sample)
    assert torch.equal(x0, make().step(noise_of(2), 1000, noise_of(2)).pred_original_sample)


def test_mistakes_are_refused_in_a_sentence():
    x = noise_of(2)
    for n in (0, 1001, 2.5, True):
        with pytest.raises(ValueError, match="must be an integer from 1 to 1000"):
            make(n)
    with pytest.raises(ValueError, match=r"timestep 900.0 is not the next of this run"):
        make().step(x, 900.0, x)
    scheduler = make()
    scheduler.step(x, 1000, x)
    with pytest.raises(ValueError, match="not the next"):
        scheduler.step(x, 1000, x)
    with pytest.raises(ValueError, match=r"shape \(3, 3, 4, 4\) follow some of \(2, 3, 4, 4\)"):
        scheduler.step(noise_of(3), 900, noise_of(3))
    done = make(1)
    for t in done.timesteps:
        done.step(x, t, x)
    with pytest.raises(ValueError, match="after set_timesteps"):
        done.step(x, 0, x)
    with pytest.raises(ValueError, match="cannot sample prediction_type 'epsilon'"):
        FlowHeunScheduler(prediction_type="epsilon")
    with pytest.raises(ValueError, match="shift is 0"):
        FlowHeunScheduler(shift=0)
