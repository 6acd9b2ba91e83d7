"""What time-shift chooses, and where it is exactly its base sampler."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from samplers import (
    DDIMScheduler,
    DDPMScheduler,
    PNDMScheduler,
    TimeShiftScheduler,
    image_generators,
    initial_noise,
    sample,
)
from samplers.time_shift import window_of
from tests.reference.gaussian_world import ALPHA_BAR, OptimalNetwork

MODES = ["target", "network", "both"]
KINDS = ["epsilon", "v_prediction", "sample"]
BASES = {
    "ddim": (DDIMScheduler, {}, {}),
    "ddim, eta 1": (DDIMScheduler, {}, {"eta": 1.0}),
    "ddpm": (DDPMScheduler, {"variance_type": "fixed_large"}, {}),
    "ddpm, learned": (DDPMScheduler, {"variance_type": "learned_range"}, {}),
    "pndm": (PNDMScheduler, {}, {}),
}


def noise_of(n, shape=(3, 8, 8), seed=0):
    return initial_noise(image_generators(seed, range(n)), shape, "cpu")


def images(scheduler, base, noise, steps=6, network=None, indices=None):
    learned = BASES[base][1].get("variance_type") == "learned_range"
    network = network or OptimalNetwork(scheduler.config.prediction_type, v=[0.3] if learned else None)
    indices = range(len(noise)) if indices is None else indices
    generators = image_generators(1, indices)
    return sample(network, scheduler, noise, num_inference_steps=steps, generators=generators, **BASES[base][2])


def time_shift(base, **config):
    return TimeShiftScheduler(base=base[:4], **BASES[base][1], **{"exposure_cutoff": 0, **config})


def with_variance(x, variance):
    """x (N, C, H, W) with exactly this unbiased variance over the pixels of each image."""
    flat = x.double().flatten(1)
    flat = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)
    return (torch.as_tensor(variance).double().sqrt().reshape(-1, 1) * flat).float().reshape(x.shape)


def chosen_shift(x, call=4, steps=10, **config):
    """What step number ``call`` of a "target" run chooses for the image x: shift of each image."""
    scheduler = TimeShiftScheduler(**{"exposure_cutoff": 0, **config})
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps[:call]:
        scheduler.step(x, t, x)
    return scheduler.step(x, scheduler.timesteps[call], x).shift.tolist()


# Where it is its base


@pytest.mark.parametrize("base", BASES)
def test_a_window_of_zero_or_one_is_the_base_to_the_bit(base):
    cls, config, _ = BASES[base]
    for kind, spacing in product(KINDS, ["trailing", "linspace"]):
        common = {"prediction_type": kind, "timestep_spacing": spacing}
        want = images(cls(**config, **common), base, noise_of(2))
        for window, mode in product((0, 1), MODES):
            scheduler = time_shift(base, exposure_window=window, exposure_mode=mode, **common)
            assert torch.equal(images(scheduler, base, noise_of(2)), want)
    shifted = time_shift(base, exposure_window=100, **common)
    assert not torch.equal(images(shifted, base, noise_of(2)), want)  # and so the window does something


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("base", BASES)
def test_a_cutoff_at_the_top_is_the_base_to_the_bit(base, mode):
    cls, config, _ = BASES[base]
    want = images(cls(**config), base, noise_of(2))
    for cutoff in (999, 1000):
        scheduler = time_shift(base, exposure_window=200, exposure_mode=mode, exposure_cutoff=cutoff)
        assert torch.equal(images(scheduler, base, noise_of(2)), want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("v", [1.0, [1.0] * 1000])
def test_calibrated_for_unit_variance_it_never_shifts(base, mode, v):
    """All candidates expect a variance of 1: ties stay on the grid."""
    cls, config, _ = BASES[base]
    scheduler = time_shift(base, exposure_window=100, exposure_mode=mode, exposure_variance=v)
    assert torch.equal(images(scheduler, base, noise_of(2)), images(cls(**config), base, noise_of(2)))


# The choice


@pytest.mark.parametrize("v", [None, 0.25, 2.0])
def test_an_image_with_the_expected_variance_of_a_step_gets_that_step(v):
    steps = torch.tensor([399, 425, 440, 449, 450, 480, 499, 520, 549])
    a = torch.from_numpy(ALPHA_BAR)[steps]
    x = with_variance(noise_of(len(steps)), a * (v or 0.0) + 1 - a)
    # call 4 goes from 599 to 499, and its window reaches from 399 to 599
    assert chosen_shift(x, exposure_window=200, exposure_variance=v) == (steps - 499).tolist()


def test_a_table_has_one_variance_for_every_step():
    table = [0.25] * 1000
    table[470] = 0.9
    a = ALPHA_BAR[470]
    x = with_variance(noise_of(1), a * 0.9 + 1 - a)
    assert chosen_shift(x, exposure_window=100, exposure_variance=table) == [-29]
    assert chosen_shift(x, exposure_window=100, exposure_variance=0.25) == [50]  # more than all others expect


def test_calibrated_takes_the_variance_that_was_saved_with_the_model():
    x = with_variance(noise_of(3), [0.85, 0.92, 0.95])
    named = chosen_shift(x, exposure_window=100, exposure_variance="calibrated", data_variance=0.3)
    assert named == chosen_shift(x, exposure_window=100, exposure_variance=0.3)
    published = chosen_shift(x, exposure_window=100, exposure_variance="published", data_variance=0.3)
    assert published == chosen_shift(x, exposure_window=100)
    assert named != published


@pytest.mark.parametrize("mode", ["network", "both"])
def test_the_network_is_told_the_step_that_fits_the_image(mode):
    """From x = 0, DDIM goes to ``c eps``: an eps of the right variance puts the next image where it should be."""
    wanted = torch.tensor([420, 455, 499, 530, 549])
    scheduler = TimeShiftScheduler(exposure_window=100, exposure_mode=mode, exposure_cutoff=0)
    scheduler.set_timesteps(10)
    zeros, eps = noise_of(5) * 0, with_variance(noise_of(5), torch.ones(5))
    for t in scheduler.timesteps[:4]:
        scheduler.model_timestep(t)
        scheduler.step(zeros, t, zeros)
    told = scheduler.model_timestep(scheduler.timesteps[4])
    assert told.tolist() == [549] * 5  # zeros look clean: the bottom of the window round 599
    # what step 4, which starts at 549 in mode "both", makes of eps = 1
    start = scheduler._alpha_bar[599 if mode == "network" else 549]
    end = scheduler._alpha_bar[499]
    c = (1 - end).sqrt() - (end * (1 - start) / start).sqrt()
    scale = (1 - scheduler._alpha_bar[wanted]).sqrt() / c
    step = scheduler.step(eps * scale.float().reshape(-1, 1, 1, 1), scheduler.timesteps[4], zeros)
    assert scheduler.model_timestep(scheduler.timesteps[5]).tolist() == wanted.clamp(min=449).tolist()
    assert step.shift.tolist() == (wanted.clamp(min=449) - 499).tolist()


def test_the_window_is_its_full_width():
    low, high = with_variance(noise_of(2), [1e-3, 4.0]).split(1)
    for window, half in [(2, 1), (3, 1), (40, 20), (41, 20), (200, 100)]:
        assert chosen_shift(low, exposure_window=window) == [-half]
        assert chosen_shift(high, exposure_window=window) == [half]


def test_the_window_ends_with_the_chain():
    low, high = with_variance(noise_of(2), [1e-9, 4.0]).split(1)
    assert chosen_shift(low, call=8, exposure_window=1000) == [-99]  # from 199 to 99, and so to 0
    assert chosen_shift(high, call=1, exposure_window=1000) == [200]  # from 899 to 799, and so to 999


def test_the_first_step_is_never_shifted_and_none_at_the_cutoff():
    x = with_variance(noise_of(1), [0.01])
    assert chosen_shift(x, call=0, exposure_window=100) == [0]
    assert chosen_shift(x, call=1, exposure_window=100) == [-50]
    assert chosen_shift(x, call=9, exposure_window=100) == [0]  # the end is clean data, no timestep
    assert chosen_shift(x, call=4, exposure_window=100, exposure_cutoff=498) == [-50]
    assert chosen_shift(x, call=4, exposure_window=100, exposure_cutoff=499) == [0]
    for cutoff, told in [(898, 849), (899, 899)]:
        scheduler = TimeShiftScheduler(exposure_window=100, exposure_mode="network", exposure_cutoff=cutoff)
        scheduler.set_timesteps(10)
        assert scheduler.model_timestep(999).tolist() == 999
        scheduler.step(x, 999, 0 * x)
        assert scheduler.model_timestep(899).flatten().tolist() == [told]


def test_runge_kutta_steps_of_pndm_are_never_shifted():
    x = with_variance(noise_of(2), [0.5, 4.0])
    for mode in MODES:
        scheduler = TimeShiftScheduler(base="pndm", exposure_window=60, exposure_mode=mode, exposure_cutoff=0)
        scheduler.set_timesteps(10)
        shifts = [scheduler.step(x, t, x).shift.tolist() for t in scheduler.timesteps]
        first = 12 if mode == "target" else 11  # the end of call 12, or what to tell the network there
        assert not any(map(any, shifts[:first]))
        assert all(map(any, shifts[first : first + 5]))


def test_the_noise_guard_looks_at_what_the_window_can_tell():
    x = with_variance(noise_of(1), [0.01])  # sqrt(2 / 191) = 0.102 is the noise of its variance
    expected = 1 - ALPHA_BAR
    for call, after in [(1, 799), (3, 599), (5, 399), (7, 199)]:
        range_of_window = expected[after + 50] - expected[after - 50]
        snr = range_of_window / (2 / 191) ** 0.5
        assert chosen_shift(x, call=call, exposure_window=100, exposure_min_snr=0.999 * snr) == [-50]
        assert chosen_shift(x, call=call, exposure_window=100, exposure_min_snr=1.001 * snr) == [0]


# Each image alone


class Elementwise(nn.Module):
    """A network without reductions: an image's bits cannot depend on its batch mates."""

    def __init__(self, channels=1):
        super().__init__()
        self.channels = channels

    def forward(self, x, t, class_labels=None):
        output = 0.7 * x + (t.reshape(-1, 1, 1, 1) / 300).sin() * 0.2
        return SimpleNamespace(sample=output.repeat(1, self.channels, 1, 1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("base", BASES)
def test_an_image_is_the_same_in_any_batch(base, mode):
    scheduler = time_shift(base, exposure_window=90, exposure_mode=mode, exposure_cutoff=200)
    network = Elementwise(2 if base == "ddpm, learned" else 1)
    noise = noise_of(3) * torch.tensor([0.7, 1.0, 1.1]).reshape(3, 1, 1, 1)
    whole = images(scheduler, base, noise, network=network, steps=9)
    assert whole.isfinite().all()
    for i in range(3):
        alone = images(scheduler, base, noise[i : i + 1], network=network, steps=9, indices=[i])
        assert torch.equal(alone[0], whole[i])
    plain = images(BASES[base][0](**BASES[base][1]), base, noise, network=network, steps=9)
    assert not (plain == whole).flatten(1).all(1).any()


@pytest.mark.parametrize("mode", MODES)
def test_the_two_halves_of_a_doubled_batch_shift_alike(mode):
    """Pipelines that guide pass images twice, with one answer for both."""
    runs = []
    for copies in (1, 2):
        scheduler = TimeShiftScheduler(exposure_window=90, exposure_mode=mode, exposure_cutoff=200)
        scheduler.set_timesteps(10)
        x, shifts = noise_of(2).repeat(copies, 1, 1, 1), []
        for t in scheduler.timesteps:
            scheduler.model_timestep(t)
            step = scheduler.step((0.8 * x).sin(), t, x)
            x = step.prev_sample
            shifts.append(step.shift.tolist())
        runs.append((x, shifts))
    (single, shifts), (double, both) = runs
    assert both == [row * 2 for row in shifts]
    assert any(map(any, shifts))
    assert torch.equal(double, single.repeat(2, 1, 1, 1))


# The window that follows the network calls


def test_the_window_that_follows_the_network_calls():
    widths = {N: window_of(N, 1000) for N in (1, 2, 5, 10, 20, 50, 100)}
    assert widths == {1: 1000, 2: 1000, 5: 160, 10: 40, 20: 10, 50: 2, 100: 0}
    assert window_of(10, 400) == 16


@pytest.mark.parametrize(("base", "steps", "width"), [("ddim", 10, 40), ("ddpm", 20, 10), ("pndm", 11, 10)])
@pytest.mark.parametrize("mode", ["target", "network", "both"])
def test_a_window_that_follows_the_calls_is_that_window(base, steps, width, mode):
    given, following = (
        TimeShiftScheduler(base=base, exposure_mode=mode, exposure_window=w, exposure_cutoff=0) for w in (width, None)
    )
    a, b = (images(scheduler, base, noise_of(2), steps) for scheduler in (given, following))
    assert following.window == width
    assert torch.equal(a, b)
    following.set_timesteps(2 * steps)
    assert following.window < width


def test_a_window_that_shifts_nothing_is_said_once(monkeypatch):
    said = []
    monkeypatch.setattr("samplers.time_shift.logger.warning", said.append)
    scheduler = TimeShiftScheduler(exposure_window=None, exposure_mode="both")
    assert not said
    for _ in range(2):
        a, b = (images(s, "ddim", noise_of(2), 60) for s in (scheduler, DDIMScheduler()))
        assert torch.equal(a, b)
    assert said == [
        "time-shift is for few steps: with 60 network calls its own window is 1, which shifts nothing; "
        "set exposure_window to shift all the same"
    ]
