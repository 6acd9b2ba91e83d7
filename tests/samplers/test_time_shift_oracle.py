"""Time-shift against a brute-force version in NumPy and the released code's choices."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from samplers import TimeShiftScheduler, image_generators, initial_noise, sample
from tests.reference.gaussian_world import ALPHA_BAR, OptimalNetwork
from tests.reference.time_shift_oracle import walk


class Random(nn.Module):
    """eps of data N(0, .1) plus random errors, without reductions over pixels, in float64."""

    def __init__(self, seed):
        super().__init__()
        random = np.random.default_rng(seed)
        self.mix, self.bias = random.normal(size=(3, 3)) / 1.5, random.normal(size=(3, 1, 1))
        self.told = []

    def eps(self, x, t):
        a = ALPHA_BAR[t]
        errors = np.tanh(np.einsum("ij,jhw->ihw", self.mix, x) + self.bias * np.sin(t / 90))
        return np.sqrt(1 - a) * x / (0.1 * a + 1 - a) + 0.1 * errors

    def forward(self, x, t, class_labels=None):
        self.told.append(t.tolist())
        pixels = [self.eps(image.double().numpy(), int(s)) for image, s in zip(x, t, strict=True)]
        return SimpleNamespace(sample=torch.from_numpy(np.stack(pixels)).float())


def walked(network, scheduler, noise, steps, **options):
    """(images, shifts of each step) of a run through the loop; DDIM's noise is eta 1."""
    shifts, step = [], scheduler.step

    def recorded(*args, eta=0.0, generator=None):
        result = step(*args, eta=eta, generator=generator)
        shifts.append(result.shift.tolist())
        return result

    scheduler.step = recorded
    return sample(network, scheduler, noise, num_inference_steps=steps, **options), shifts


def noise_of(n, seed=0):
    """Images of different variances, from 0.6 to 1."""
    scale = torch.linspace(0.6, 1, n).sqrt().reshape(-1, 1, 1, 1)
    return scale * initial_noise(image_generators(seed, range(n)), (3, 8, 8), "cpu")


@pytest.mark.parametrize("mode", ["target", "network", "both"])
@pytest.mark.parametrize(("seed", "v", "steps", "width"), [(0, None, 10, 100), (1, 0.02, 10, 200), (2, 0.02, 20, 51)])
def test_every_mode_is_the_brute_force(mode, seed, v, steps, width):
    network, noise = Random(seed), noise_of(4, seed)
    scheduler = TimeShiftScheduler(
        exposure_mode=mode, exposure_window=width, exposure_cutoff=150, exposure_variance=v, timestep_spacing="linspace"
    )
    got, shifts = walked(network, scheduler, noise, steps)
    grid = scheduler.timesteps.tolist()
    want, expected_shifts = walk(
        network.eps, noise.double().numpy(), grid, ALPHA_BAR, mode=mode, width=width, cutoff=150, v=v or 0.0
    )
    assert shifts == expected_shifts
    np.testing.assert_allclose(got, want, atol=2e-5 * abs(want).max())
    flat = [shift for row in shifts for shift in row]
    assert any(0 < abs(shift) < width // 2 for shift in flat)  # the network's variances decide, not the edges alone
    assert len({tuple(row) for row in zip(*shifts, strict=True)}) > 1  # each image for itself
    told = [[t] * 4 for t in grid]
    if mode != "target":
        told = [told[0], *([t + s for s in row] for t, row in zip(grid[1:], shifts, strict=False))]
    assert network.told == told


@pytest.mark.parametrize("mode", ["target", "both"])
@pytest.mark.parametrize(("base", "options"), [("ddim", {"eta": 1.0}), ("ddim", {"eta": 0.5}), ("ddpm", {})])
def test_with_noise_a_step_never_leads_up(mode, base, options):
    """The window of 300 is six strides wide; DDPM is DDIM with eta 1."""
    network, noise, grid = Random(3), noise_of(3), list(range(999, -1, -50))
    scheduler = TimeShiftScheduler(base=base, exposure_mode=mode, exposure_window=300, exposure_cutoff=60)
    got, shifts = walked(network, scheduler, noise, 20, generators=image_generators(7, range(3)), **options)
    generators = image_generators(7, range(3))
    noises = [initial_noise(generators, (3, 8, 8), "cpu").double().numpy() for _ in range(19)]
    want, expected_shifts = walk(
        network.eps, noise.double().numpy(), grid, ALPHA_BAR,
        mode=mode, width=300, cutoff=60, eta=options.get("eta", 1.0), noises=noises,
    )  # fmt: skip
    assert shifts == expected_shifts
    np.testing.assert_allclose(got, want, atol=2e-5 * abs(want).max())
    flat = [shift for row in shifts for shift in row]
    assert (49 if mode == "target" else -49) in flat  # the guard's edge was met


def test_the_authors_grid_gives_the_authors_targets():
    """Their ten steps are nine: 801, 701, ..., 1, then level 0. The noise has variance 1 exactly, as for endless d."""
    noise = initial_noise(image_generators(0, range(4)), (3, 32, 32), "cpu")
    noise = (noise - noise.mean((1, 2, 3), True)) / noise.std((1, 2, 3), keepdim=True)
    scheduler = TimeShiftScheduler(
        exposure_window=100, exposure_cutoff=300, set_alpha_to_one=False, timestep_spacing="leading"
    )
    timesteps = list(range(801, 0, -100))
    scheduler.set_timesteps(timesteps=timesteps)
    network, x, targets, levels = OptimalNetwork(), noise, [], []
    for k, t in enumerate(timesteps):
        before = x
        step = scheduler.step(network(x, torch.full((4,), t)).sample, t, x)
        x = step.prev_sample
        after = timesteps[k + 1] if k + 1 < len(timesteps) else 0
        targets.append((step.shift + after).tolist())
        # where the step ended, read off x_prev = sqrt(end) x0 + sqrt(1 - end) eps
        eps = (before - ALPHA_BAR[t] ** 0.5 * step.pred_original_sample) / (1 - ALPHA_BAR[t]) ** 0.5
        end = torch.tensor([ALPHA_BAR[target] for target in targets[-1]]).float().reshape(-1, 1, 1, 1)
        levels.append((x - (end.sqrt() * step.pred_original_sample + (1 - end).sqrt() * eps)).abs().max().item())
    assert targets == [[t] * 4 for t in (701, 651, 551, 451, 351, 201, 101, 1, 0)]
    assert max(levels) < 2e-5
