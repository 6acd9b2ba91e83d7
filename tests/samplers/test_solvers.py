"""DPM-Solver++(2M) and UniPC: exact errors, the stock grid's defect, the contract."""

import diffusers
import numpy as np
import pytest
import torch

from samplers import (
    DDPMScheduler,
    DPMSolverScheduler,
    UniPCScheduler,
    image_generators,
    initial_noise,
    make_scheduler,
    sample,
)
from samplers.grid import timestep_grid
from tests.reference.gaussian_world import OptimalNetwork, Z, exact_data

PAIRS = [
    ("dpm++2m", DPMSolverScheduler, diffusers.DPMSolverMultistepScheduler),
    ("unipc", UniPCScheduler, diffusers.UniPCMultistepScheduler),
]
BOTH = [DPMSolverScheduler, UniPCScheduler]


def noise_of(n, shape=(3, 4, 4), seed=0):
    return initial_noise(image_generators(seed, range(n)), shape, "cpu")


def make(cls, n=10, **config):
    scheduler = cls(**config)
    scheduler.set_timesteps(n)
    return scheduler


def error(scheduler, n, **options):
    pixels = sample(OptimalNetwork(), scheduler, Z, num_inference_steps=n, **options).flatten().double().numpy()
    return abs(pixels - exact_data(np.array([-1.0, 0.0, 1.0]))).max()


# Largest error against the exact flow; from 50 steps on it does not fall steadily, so those are bounds.
ERRORS = [
    (DPMSolverScheduler, {10: 0.0954, 20: 0.0218}, {50: 1e-3, 61: 2e-3, 100: 1.5e-3}),
    (UniPCScheduler, {10: 0.0907, 20: 0.0203}, {50: 2e-3, 61: 1e-3, 100: 1e-3}),
]


@pytest.mark.parametrize(("cls", "values", "bounds"), ERRORS)
def test_errors_against_the_exact_flow(cls, values, bounds):
    for n, value in values.items():
        assert error(cls(), n) == pytest.approx(value, rel=5e-3)
    for n, bound in bounds.items():
        assert error(cls(), n) < bound


@pytest.mark.parametrize(("n", "value"), [(10, 0.065), (100, 1.5e-3)])
def test_the_stock_heun_in_our_loop(n, value):
    heun = diffusers.HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing")
    assert error(heun, n) == pytest.approx(value, rel=0.03)


# The grid


@pytest.mark.parametrize(("name", "cls", "stock"), PAIRS)
def test_the_stock_grid_of_61_steps_leaves_the_chain_and_ours_does_not(name, cls, stock):
    """If the first half fails, diffusers has mended its grid and `samplers.solvers` may go."""
    theirs = make(stock, 61, timestep_spacing="trailing")
    assert len(theirs.timesteps) == 62
    assert theirs.timesteps[-1] == -1
    ours = make(cls, 61)
    assert ours.timesteps.tolist() == timestep_grid("trailing", 61, 1000)
    assert ours.num_inference_steps == 61
    assert len(ours.sigmas) == 62
    assert ours.sigmas[-1] == 0


@pytest.mark.parametrize("cls", BOTH)
def test_the_grid_is_that_of_all_our_samplers(cls):
    for spacing in ("trailing", "linspace", "leading"):
        for n in (2, 7, 103, 1000):
            scheduler = make(cls, n, timestep_spacing=spacing)
            assert scheduler.timesteps.tolist() == timestep_grid(spacing, n, 1000)
            assert scheduler.timesteps.dtype == torch.int64
            a = scheduler.alphas_cumprod[scheduler.timesteps].double()
            torch.testing.assert_close(scheduler.sigmas[:-1], ((1 - a) / a).sqrt().float())


@pytest.mark.parametrize(("name", "cls", "stock"), PAIRS)
def test_the_stock_grid_differs_from_ours_for_111_numbers_of_steps_and_62_are_too_long(name, cls, stock):
    other = longer = 0
    theirs = stock(timestep_spacing="trailing")
    for n in range(1, 1001):
        theirs.set_timesteps(n)
        other += theirs.timesteps.tolist() != timestep_grid("trailing", n, 1000)
        longer += len(theirs.timesteps) == n + 1
    assert (other, longer) == (111, 62)


@pytest.mark.parametrize(("name", "cls", "stock"), PAIRS)
def test_equals_diffusers_where_diffusers_is_right(name, cls, stock):
    config = {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    network, noise = OptimalNetwork("v_prediction"), noise_of(2)
    ours, theirs = (sample(network, s(**config), noise, num_inference_steps=20) for s in (cls, stock))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cls", BOTH)
def test_every_prediction_type_walks_one_trajectory(cls):
    results = [
        sample(OptimalNetwork(kind), cls(prediction_type=kind), noise_of(2), num_inference_steps=20)
        for kind in ("epsilon", "v_prediction", "sample")
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
@pytest.mark.parametrize("cls", BOTH)
def test_the_last_step_goes_to_clean_data(cls, spacing):
    """If the network always says the image is c, whatever the step, c comes out."""
    scheduler, x, clean = (
        make(cls, timestep_spacing=spacing, prediction_type="sample"),
        noise_of(2),
        noise_of(2, seed=1),
    )
    for t in scheduler.timesteps:
        x = scheduler.step(clean, t, x).prev_sample
    torch.testing.assert_close(x, clean, atol=1e-5, rtol=0)


# The contract


@pytest.mark.parametrize(("name", "cls", "stock"), PAIRS)
def test_save_load_and_stock_configs(name, cls, stock, tmp_path):
    config = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "timestep_spacing": "linspace"}
    scheduler = make(cls, **config)
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    loaded.set_timesteps(10)
    assert {key: loaded.config[key] for key in config} == config
    assert torch.equal(loaded.sigmas, scheduler.sigmas)
    ours = cls.from_config(stock(beta_end=0.012).config)
    assert ours.config.beta_end == 0.012
    assert ours.config.timestep_spacing == "trailing"  # a default of ours, not a choice of theirs
    assert stock.from_config(ours.config).config.beta_end == 0.012


@pytest.mark.parametrize("cls", BOTH)
def test_set_timesteps_begins_again(cls):
    used = make(cls)
    for t in used.timesteps[:5]:
        used.step(noise_of(3), t, noise_of(3))
    got, want = (sample(OptimalNetwork(), s, noise_of(2), num_inference_steps=8) for s in (used, cls()))
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["dpm++2m", "unipc"])
def test_a_config_with_a_learned_variance_leaves_the_images_whole(name):
    """The stock classes cut the network's answer to its first three channels then."""
    scheduler = make_scheduler(name, DDPMScheduler(variance_type="learned_range").config)
    assert scheduler.config.get("variance_type") is None
    noise = noise_of(2, (4, 4, 4))
    images = sample(OptimalNetwork(v=[0.5]), scheduler, noise, num_inference_steps=5)
    assert torch.equal(images, sample(OptimalNetwork(), make_scheduler(name, {}), noise, num_inference_steps=5))


@pytest.mark.parametrize(
    ("name", "stock"),
    [
        ("dpm++2m", diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")),
        ("dpm++2m", diffusers.DPMSolverMultistepScheduler(solver_type="heun")),
        ("unipc", diffusers.UniPCMultistepScheduler(solver_type="bh1")),
    ],
)
def test_a_name_means_the_same_from_any_config(name, stock):
    want = sample(OptimalNetwork(), make_scheduler(name, {}), noise_of(2), num_inference_steps=10)
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "trailing"}
    try:
        scheduler = make_scheduler(name, {**stock.config, **betas})
    except ValueError:
        return  # or it is refused
    assert torch.equal(sample(OptimalNetwork(), scheduler, noise_of(2), num_inference_steps=10), want)


@pytest.mark.parametrize(("name", "cls", "stock"), PAIRS)
def test_a_network_that_they_cannot_sample_is_refused(name, cls, stock):
    flow = stock(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction").config
    sentence = "{} cannot sample prediction_type '{}', only epsilon, v_prediction, sample"
    with pytest.raises(ValueError, match=sentence.format(cls.__name__, "flow_prediction")):
        cls.from_config(flow)
    with pytest.raises(ValueError, match=sentence.format(cls.__name__, "foo")):
        cls(prediction_type="foo")
    with pytest.raises(ValueError, match=sentence.format(cls.__name__, "flow_prediction")):
        make_scheduler(name, {}, {"prediction_type": "flow_prediction"})


@pytest.mark.parametrize(("name", "cls", "stock"), PAIRS)
def test_a_rescaled_chain_is_refused_by_from_config(name, cls, stock):
    sentence = f"{cls.__name__} has no rescale_betas_zero_snr; remove it from the scheduler's config or use the diff"
    with pytest.raises(ValueError, match=sentence):
        cls.from_config(stock(rescale_betas_zero_snr=True).config)
    with pytest.raises(ValueError, match=sentence):
        cls.from_config(stock().config, rescale_betas_zero_snr=True)
    cls.from_config(stock().config, rescale_betas_zero_snr=False)


@pytest.mark.parametrize("cls", BOTH)
def test_mistakes_are_refused_in_a_sentence(cls):
    for n in (0, -1, 1001, 2.5, True):
        with pytest.raises(ValueError, match="must be an integer from 1 to 1000"):
            make(cls, n)
    with pytest.raises(ValueError, match="timestep_spacing 'leading' with 1 steps"):
        make(cls, 1, timestep_spacing="leading")
    with pytest.raises(ValueError, match="timestep_spacing is 'even'"):
        cls(timestep_spacing="even")


@pytest.mark.parametrize("scheduler", [DPMSolverScheduler, UniPCScheduler])
@pytest.mark.parametrize("steps", [1, 2, 10, 60, 400, 1000])
@pytest.mark.parametrize("shift", [0.5, 1.0, 1.7, 9.0])
def test_a_grid_even_in_the_flows_time(scheduler, steps, shift):
    made = scheduler(grid_shift=shift)
    made.set_timesteps(steps)
    grid = made.timesteps.tolist()
    assert len(grid) == steps
    assert grid[0] == 999
    assert grid == sorted(set(grid), reverse=True)
    assert grid[-1] >= 0
    signal, noise = made.alphas_cumprod.double().sqrt(), (1 - made.alphas_cumprod.double()).sqrt()
    times = (noise / (signal + noise))[grid]
    even = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    if steps <= 10:
        torch.testing.assert_close(times, shift * even / (1 + (shift - 1) * even), rtol=0, atol=8e-3)
    again = type(made).from_config(made.config)
    again.set_timesteps(steps)
    assert again.timesteps.tolist() == grid


def test_a_grid_shift_is_a_number_above_0():
    for wrong in (0, -1.0, float("nan"), float("inf"), "big"):
        with pytest.raises(ValueError, match="grid_shift is"):
            UniPCScheduler(grid_shift=wrong)


def test_a_grid_shift_is_left_behind_by_samplers_without_one():
    saved = UniPCScheduler(grid_shift=2.0).config
    assert "grid_shift" not in make_scheduler("ddim", saved).config
    assert make_scheduler("dpm++2m", saved).config.grid_shift == 2
    assert make_scheduler("unipc", saved, {"grid_shift": 3.0}).config.grid_shift == 3
