"""The grids and chains of OpenAI's and DiT's respacing, from oracles written after their papers."""

import diffusers
import numpy as np
import pytest
import torch

from samplers import DDIMScheduler, DDPMScheduler, image_generators, initial_noise, sample
from samplers.grid import timestep_grid
from tests.reference.ddpm_oracle import chain
from tests.reference.gaussian_world import ALPHA_BAR, OptimalNetwork, Z


def test_the_levels_of_the_linear_schedule():
    alpha_bar = DDPMScheduler()._alpha_bar
    torch.testing.assert_close(alpha_bar, torch.from_numpy(ALPHA_BAR), rtol=3e-6, atol=0)  # betas are float32
    for t, level in [(0, 0.9999), (601, 0.025259), (801, 0.0014833), (901, 2.6537e-4), (999, 4.0358e-5)]:
        assert float(alpha_bar[t]) == pytest.approx(level, rel=5e-5)


def respaced(count, steps=1000):
    """`space_timesteps(1000, str(count))`: equal fractional strides, rounded one by one."""
    stride = (steps - 1) / (count - 1)
    return [round(k * stride) for k in range(count)]


def test_linspace_is_the_respacing_of_dit():
    for count in (2, 5, 10, 20, 25, 50, 100, 200, 250, 333, 400, 500, 1000):
        assert timestep_grid("linspace", count, 1000)[::-1] == respaced(count)


def test_leading_is_the_ddim_respacing_where_that_exists():
    for count in (2, 10, 20, 25, 50, 100, 200, 250, 500):
        strided = next(list(range(0, 1000, i)) for i in range(1, 1000) if len(range(0, 1000, i)) == count)
        assert timestep_grid("leading", count, 1000)[::-1] == strided


def toy(x, t):
    wave = np.sin(t / 100 + np.arange(x.shape[1])).reshape(1, -1, 1, 1)
    return np.tanh(0.5 * x + wave)


def walked(scheduler, network, x, **options):
    for t in scheduler.timesteps:
        output = torch.from_numpy(network(x.double().numpy(), int(t))).float()
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("n", [10, 50, 100])
def test_ddim_on_leading_is_the_respaced_ddim(n):
    noise = initial_noise(image_generators(0, range(2)), (4, 8, 8), "cpu")
    scheduler = DDIMScheduler(timestep_spacing="leading")
    scheduler.set_timesteps(n)
    got, x = walked(scheduler, toy, noise), noise.double().numpy()
    kept = list(range(0, 1000, 1000 // n))
    for k in reversed(range(n)):
        a, before = ALPHA_BAR[kept[k]], ALPHA_BAR[kept[k - 1]] if k else 1.0
        eps = toy(x, kept[k])
        x = np.sqrt(before) * (x - np.sqrt(1 - a) * eps) / np.sqrt(a) + np.sqrt(1 - before) * eps
    np.testing.assert_allclose(got, x, atol=1e-5 * abs(x).max())


def test_another_spacing_is_another_sampler():
    """The check above can fail: on the leading grid DDPM is far from DiT's."""

    def learned(x, t):
        return np.concatenate([toy(x, t), 0.3 * toy(x, t + 50)], axis=1)

    noises = [initial_noise(image_generators(k, range(2)), (4, 8, 8), "cpu").double().numpy() for k in range(10)]
    images = {}
    for spacing in ("linspace", "leading"):
        x = initial_noise(image_generators(99, range(2)), (4, 8, 8), "cpu").double().numpy()
        images[spacing] = chain(learned, x, timestep_grid(spacing, 10, 1000), ALPHA_BAR, noises)
    difference = abs(images["linspace"] - images["leading"]).max()
    assert difference > 0.02 * abs(images["linspace"]).max()


def test_the_stock_flow_grids():
    """`sigmas` of our grid give the stock Euler our numbers; its Heun's own grid gives this one, in 2 N - 1 calls."""
    for n, std in [(10, 0.430783), (50, 0.485397)]:
        stock, x = diffusers.FlowMatchEulerDiscreteScheduler(), Z
        stock.set_timesteps(sigmas=np.linspace(1, 1 / n, n).tolist())
        for t in stock.timesteps:
            x = stock.step(OptimalNetwork("flow_prediction")(x, t.expand(3)).sample, t, x).prev_sample
        assert (x[2] - x[0]).item() / 2 == pytest.approx(std, abs=5e-6)
    network = OptimalNetwork("flow_prediction")
    images = sample(network, diffusers.FlowMatchHeunDiscreteScheduler(), Z, num_inference_steps=10).flatten()
    error = (images - torch.tensor([-0.2, 0.3, 0.8])).abs().max().item()
    assert error == pytest.approx(2.05e-3, rel=0.02)
    assert len(network.batches) == 19
