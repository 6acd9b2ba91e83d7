"""DDPM and DDIM: exact moments, order of convergence, grids, and the diffusers contract."""

from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch

import samplers.schedulers
from samplers import DDIMScheduler, DDPMScheduler, image_generators, initial_noise, sample
from samplers.grid import timestep_grid
from tests.reference.ddpm_oracle import chain
from tests.reference.gaussian_world import ALPHA_BAR, MEAN, VARIANCE, OptimalNetwork, Z, exact_data

BOTH = [DDPMScheduler, DDIMScheduler]
SPACINGS = ["linspace", "trailing", "leading"]
AWKWARD = [2, 3, 7, 10, 61, 103, 150, 333, 600, 999, 1000]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(cls, n=10, **config):
    scheduler = cls(**config)
    scheduler.set_timesteps(n)
    return scheduler


# What comes out of a chain


def ddpm_variance(scheduler, network, monkeypatch):
    """Variance and mean of the images, from each step's affine map with noise 0 and 1."""
    mean, variance = 0.0, 1.0
    for t in scheduler.timesteps:
        output = network(Z, t.expand(3)).sample
        pixels = []
        for value in (0.0, 1.0):
            noise = torch.full_like(Z, value)
            monkeypatch.setattr(samplers.schedulers, "draw_noise", lambda *_, n=noise: n)
            pixels.append(scheduler.step(output, t, Z).prev_sample.flatten().double())
        slope, sigma = (pixels[0][2] - pixels[0][0]) / 2, (pixels[1] - pixels[0])[1]
        mean, variance = slope * mean + pixels[0][1], slope**2 * variance + sigma**2
    return float(variance), float(mean)


SMALL = {10: 0.10422, 50: 0.19642, 100: 0.21898, 250: 0.23602, 1000: 0.24613}
LARGE = {10: 0.35852, 50: 0.26788, 100: 0.25865, 250: 0.25335, 1000: 0.25075}


CASES = [
    *(("fixed_small", None, n, SMALL[n]) for n in SMALL),
    *(("fixed_large", None, n, LARGE[n]) for n in LARGE),
    *(("learned_range", [-1.0], n, SMALL[n]) for n in (10, 100)),
    *(("learned_range", [1.0], n, LARGE[n]) for n in (10, 100)),
]


@pytest.mark.parametrize(("kind", "v", "n", "expected"), CASES)
def test_ddpm_has_the_exact_moments(kind, v, n, expected, monkeypatch):
    scheduler = make(DDPMScheduler, n, variance_type=kind, timestep_spacing="linspace")
    variance, mean = ddpm_variance(scheduler, OptimalNetwork(v=v), monkeypatch)
    assert variance == pytest.approx(expected, abs=1.1e-5)
    assert mean == pytest.approx(MEAN, abs=1e-5)


def test_ddpm_samples_have_those_moments():
    noise = initial_noise(image_generators(0, [0]), (1, 256, 256), "cpu")
    scheduler = DDPMScheduler(timestep_spacing="linspace")
    images = sample(
        OptimalNetwork(),
        scheduler,
        noise,
        num_inference_steps=10,
        generators=image_generators(1, [0]),
    )
    assert images.var().item() == pytest.approx(SMALL[10], abs=5 * SMALL[10] * (2 / 2**16) ** 0.5)
    assert images.mean().item() == pytest.approx(MEAN, abs=5 * (SMALL[10] / 2**16) ** 0.5)


DDIM_ERROR = {
    10: (0.130, 0.3700),
    20: (0.0688, 0.4314),
    40: (0.0356, 0.4645),
    100: (0.0146, 0.4854),
    200: (0.00739, 0.4926),
}


def ddim_map(n, **config):
    images = sample(OptimalNetwork(), DDIMScheduler(**config), Z, num_inference_steps=n)
    return images.flatten().double().numpy()


def test_ddim_converges_to_the_exact_flow_with_order_one():
    exact = exact_data(np.array([-1.0, 0.0, 1.0]))
    errors = {}
    for n, (error, std) in DDIM_ERROR.items():
        pixels = ddim_map(n, timestep_spacing="trailing")
        errors[n] = abs(pixels - exact).max()
        assert errors[n] == pytest.approx(error, rel=5e-3)
        assert (pixels[2] - pixels[0]) / 2 == pytest.approx(std, abs=6e-5)
    assert 1.85 < errors[10] / errors[20] < 2
    assert 1.9 < errors[20] / errors[40] < 2
    assert 1.95 < errors[100] / errors[200] < 2


@pytest.mark.parametrize(("n", "std"), [(150, 0.4902), (300, 0.4950), (400, 0.4962)])
def test_ddim_is_right_where_the_stride_is_no_integer(n, std):
    """`t - 1000 // n` gives .5277, .5316, .5716 here, above the truth of .5 (diffusers #11347)."""
    pixels = ddim_map(n, timestep_spacing="trailing")
    assert (pixels[2] - pixels[0]) / 2 == pytest.approx(std, abs=6e-5)
    assert std < VARIANCE**0.5


def toy_network(x, t):
    """Any smooth function of (x, t) with twice the channels, in NumPy."""
    wave = np.sin(t / 100 + np.arange(8)).reshape(1, 8, 1, 1)
    return np.tanh(np.concatenate([x, 0.5 * x], axis=1) + wave)


@pytest.mark.parametrize("n", [1, 10, 50, 250])
def test_ddpm_with_a_learned_variance_is_the_papers(n):
    scheduler = make(DDPMScheduler, n, variance_type="learned_range", timestep_spacing="linspace")
    generators = image_generators(0, range(2))
    x = initial_noise(generators, (4, 8, 8), "cpu")
    noises = [initial_noise(generators, (4, 8, 8), "cpu").double().numpy() for _ in range(n - 1)]
    want = chain(toy_network, x.double().numpy(), scheduler.timesteps.tolist(), ALPHA_BAR, noises)

    generators = image_generators(0, range(2))
    x = initial_noise(generators, (4, 8, 8), "cpu")
    for t in scheduler.timesteps:
        output = torch.from_numpy(toy_network(x.double().numpy(), int(t))).float()
        x = scheduler.step(output, t, x, generator=generators).prev_sample
    np.testing.assert_allclose(x, want, atol=1e-5 * abs(want).max())


@pytest.mark.parametrize("cls", BOTH)
def test_every_prediction_type_walks_one_trajectory(cls):
    noise = initial_noise(image_generators(0, range(2)), (3, 4, 4), "cpu")
    results = [
        sample(
            OptimalNetwork(kind),
            cls(prediction_type=kind),
            noise,
            num_inference_steps=20,
            generators=image_generators(1, range(2)),
        )
        for kind in ("epsilon", "v_prediction", "sample")
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=2e-5, rtol=1e-5)


def test_a_chain_without_any_signal_at_its_start_stays_finite():
    for cls in BOTH:
        scheduler = make(cls, prediction_type="v_prediction", rescale_betas_zero_snr=True)
        assert scheduler.alphas_cumprod[-1] == 0
        x, velocity = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
        step = scheduler.step(velocity, scheduler.timesteps[0], x)
        assert step.prev_sample.isfinite().all()
        assert torch.equal(step.pred_original_sample, -velocity)
        with pytest.raises(ValueError, match="rescale_betas_zero_snr leaves no signal"):
            cls(prediction_type="epsilon", rescale_betas_zero_snr=True)


# The grid


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_each_step_leads_to_the_next_timestep_of_the_grid(cls, spacing):
    for n in AWKWARD:
        scheduler = make(cls, n, timestep_spacing=spacing)
        steps = scheduler.timesteps
        assert scheduler.previous_timestep(steps).tolist() == [*steps[1:].tolist(), -1]


def test_the_grids_are_those_of_diffusers_but_never_leave_the_chain():
    for n in range(2, 1001, 7):
        for spacing in ("linspace", "leading"):
            stock = make(diffusers.DDIMScheduler, n, timestep_spacing=spacing)
            assert timestep_grid(spacing, n, 1000) == stock.timesteps.tolist()
    for n in range(1, 1001):  # diffusers gives 62 timesteps for n = 61, the last of them -1
        grid = timestep_grid("trailing", n, 1000)
        gaps = {high - low for high, low in pairwise([*grid, -1])}
        assert len(grid) == n
        assert grid[0] == 999
        assert max(gaps) - min(gaps) <= 2
        assert min(gaps) >= 1


def test_one_step_starts_from_noise():
    assert timestep_grid("linspace", 1, 1000) == [999]
    assert timestep_grid("trailing", 1, 1000) == [999]
    with pytest.raises(ValueError, match="'leading' with 1 steps"):
        timestep_grid("leading", 1, 1000)


def test_own_timesteps_make_the_grid():
    for cls in BOTH:
        scheduler = cls()
        scheduler.set_timesteps(timesteps=[900, 50, 3])
        assert scheduler.timesteps.tolist() == [900, 50, 3]
        assert scheduler.num_inference_steps == 3
        assert scheduler.previous_timestep(50) == 3
        for wrong in ([3, 50], [50, 50], [1000, 3], [3, -1], []):
            with pytest.raises(ValueError, match="strictly falling"):
                scheduler.set_timesteps(timesteps=wrong)
        with pytest.raises(ValueError, match="not both"):
            scheduler.set_timesteps(2, timesteps=[4, 2])


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large", "learned_range"])
def test_the_last_step_of_ddpm_adds_no_noise(spacing, kind):
    x = randn(2, 1, 4, 4)
    output = randn(2, 2 if kind == "learned_range" else 1, 4, 4, seed=1)
    for n in AWKWARD:
        scheduler = make(DDPMScheduler, n, variance_type=kind, timestep_spacing=spacing)
        generator = torch.Generator().manual_seed(0)
        before = generator.get_state()
        step = scheduler.step(output, scheduler.timesteps[-1], x, generator)
        assert torch.equal(step.prev_sample, step.pred_original_sample)
        assert torch.equal(generator.get_state(), before)  # nor draws any
        other = [scheduler.step(output, scheduler.timesteps[0], x).prev_sample for _ in "ab"]
        assert not torch.equal(*other)  # the first step does


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("to_one", [True, False])
def test_the_last_step_of_ddim_adds_no_noise(spacing, to_one):
    x, output = randn(2, 1, 4, 4), randn(2, 1, 4, 4, seed=1)
    for n in AWKWARD:
        scheduler = make(DDIMScheduler, n, timestep_spacing=spacing, set_alpha_to_one=to_one)
        last, first = scheduler.timesteps[-1], scheduler.timesteps[0]
        steps = [scheduler.step(output, last, x, eta=1.0) for _ in "ab"]
        assert torch.equal(steps[0].prev_sample, steps[1].prev_sample)
        generator = torch.Generator().manual_seed(0)
        before = generator.get_state()
        deterministic = scheduler.step(output, last, x, eta=0.0).prev_sample
        assert torch.equal(scheduler.step(output, last, x, eta=1.0, generator=generator)[0], deterministic)
        assert torch.equal(generator.get_state(), before)  # nor draws any
        assert torch.equal(steps[0].prev_sample, steps[0].pred_original_sample) == to_one
        assert not torch.equal(*[scheduler.step(output, first, x, eta=1.0)[0] for _ in "ab"])


# One timestep per image


@pytest.mark.parametrize("cls", BOTH)
def test_images_at_timesteps_of_their_own_step_as_if_alone(cls):
    scheduler = make(cls, 10)
    x, output = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    t = torch.tensor([999, 499, 99])  # the last of them ends its chain
    options = {"eta": 1.0} if cls is DDIMScheduler else {}
    together = scheduler.step(output, t, x, generator=image_generators(0, range(3)), **options)
    for i in range(3):
        alone = scheduler.step(
            output[i : i + 1],
            int(t[i]),
            x[i : i + 1],
            generator=image_generators(0, [i]),
            **options,
        )
        assert torch.equal(together.prev_sample[i], alone.prev_sample[0])
        assert torch.equal(together.pred_original_sample[i], alone.pred_original_sample[0])


# The contract of a diffusers scheduler


@pytest.mark.parametrize("cls", BOTH)
def test_save_and_load(cls, tmp_path):
    config = {
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "timestep_spacing": "linspace",
        "num_train_timesteps": 500,
        "clip_sample": True,
    }
    scheduler = cls(**config)
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert {key: loaded.config[key] for key in config} == config
    assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)
    assert len(loaded) == 500
    assert loaded.init_noise_sigma == 1
    assert loaded.order == 1


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("stock", [diffusers.DDPMScheduler, diffusers.DDIMScheduler])
def test_stock_configs_fit_both_ways(cls, stock):
    config = {"beta_end": 0.012, "prediction_type": "sample", "clip_sample": True}
    ours = cls.from_config(stock(**config).config)
    assert {key: ours.config[key] for key in config} == config
    assert ours.config.timestep_spacing == "trailing"  # a default of ours, not a choice of theirs
    assert not cls.from_config(stock().config).config.clip_sample
    back = stock.from_config(ours.config)
    assert {key: back.config[key] for key in config} == config


@pytest.mark.parametrize("bound", [{}, {"clip_sample": True}, {"thresholding": True}])
def test_equals_diffusers_where_diffusers_is_right(bound):
    config = {"timestep_spacing": "leading", "clip_sample": False, **bound}
    x, output = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    for ours_class, stock_class in [
        (DDPMScheduler, diffusers.DDPMScheduler),
        (DDIMScheduler, diffusers.DDIMScheduler),
    ]:
        ours, stock = make(ours_class, 20, **config), make(stock_class, 20, **config)
        for t in (950, 500, 50, 0):
            option_sets = (
                [{}]
                if ours_class is DDPMScheduler
                else [{"eta": 0.0}, {"eta": 0.7}, {"use_clipped_model_output": True}]
            )
            for options in option_sets:
                got, want = (
                    s.step(output, t, x, generator=torch.Generator().manual_seed(2), **options) for s in (ours, stock)
                )
                # alpha_bar is float32 there and float64 here: 1 - alpha_bar differs in digit 4
                torch.testing.assert_close(got.prev_sample, want.prev_sample, atol=2e-4, rtol=1e-3)
                torch.testing.assert_close(got.pred_original_sample, want.pred_original_sample, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("cls", BOTH)
def test_a_stock_pipeline_saves_loads_and_runs_them(cls, tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
    )
    diffusers.DDPMPipeline(unet, cls(beta_end=0.012)).save_pretrained(tmp_path)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(pipeline.scheduler) is cls
    assert pipeline.scheduler.config.beta_end == 0.012
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(num_inference_steps=3, output_type="np", batch_size=2).images
    assert images.shape == (2, 8, 8, 1)
    assert np.isfinite(images).all()


@pytest.mark.parametrize("cls", BOTH)
def test_half_precision_goes_in_and_out_and_the_arithmetic_is_float32(cls):
    scheduler = make(cls, 10)
    x, output = randn(2, 3, 4, 4).bfloat16(), randn(2, 3, 4, 4, seed=1).bfloat16()
    options = {"eta": 1.0} if cls is DDIMScheduler else {}
    for t in scheduler.timesteps:
        half, full = (
            scheduler.step(o, t, i, generator=image_generators(0, range(2)), **options)
            for o, i in ((output, x), (output.float(), x.float()))
        )
        for key in ("prev_sample", "pred_original_sample"):
            assert half[key].dtype == torch.bfloat16
            assert torch.equal(half[key], full[key].bfloat16())
    t = torch.tensor([0, 999])
    half = scheduler.add_noise(x, output, t)
    assert torch.equal(half, scheduler.add_noise(x.float(), output.float(), t).bfloat16())
    half = scheduler.get_velocity(x, output, t)
    assert torch.equal(half, scheduler.get_velocity(x.float(), output.float(), t).bfloat16())


@pytest.mark.parametrize("cls", BOTH)
def test_generators_decide_everything_that_is_drawn(cls):
    scheduler = make(cls, 10)
    x, output = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    options = {"eta": 1.0} if cls is DDIMScheduler else {}

    def step(seed):
        generators = image_generators(seed, range(2))
        return scheduler.step(output, 999, x, generator=generators, **options).prev_sample

    assert torch.equal(step(0), step(0))
    assert not torch.equal(step(0), step(1))
    with pytest.raises(ValueError, match="1 generators were given for 2 images"):
        scheduler.step(output, 999, x, generator=image_generators(0, [0]), **options)


@pytest.mark.parametrize("cls", BOTH)
def test_noising_is_undone_by_a_step_with_the_true_noise(cls):
    scheduler = make(cls, 10)
    x0, eps = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    t = torch.tensor([99, 299, 499])
    x_t = scheduler.add_noise(x0, eps, t)
    assert torch.equal(scheduler.scale_model_input(x_t, t), x_t)
    torch.testing.assert_close(scheduler.step(eps, t, x_t).pred_original_sample, x0, atol=5e-6, rtol=0)
    wants_v = make(cls, 10, prediction_type="v_prediction")
    v = scheduler.get_velocity(x0, eps, t)
    torch.testing.assert_close(wants_v.step(v, t, x_t).pred_original_sample, x0, atol=1e-6, rtol=0)


@pytest.mark.parametrize("cls", BOTH)
def test_nothing_is_left_over_from_one_chain_to_the_next(cls):
    scheduler = make(cls, 50)
    x, output = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    scheduler.step(output, 999, x)
    scheduler.set_timesteps(10)
    got, want = (
        s.step(output[:1], 899, x[:1], generator=image_generators(0, [0])).prev_sample
        for s in (scheduler, make(cls, 10))
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("cls", BOTH)
def test_return_dict_false_gives_a_tuple(cls):
    scheduler = make(cls, 10)
    x, output = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    prev, x0 = scheduler.step(output, 99, x, return_dict=False)
    assert torch.equal(prev, scheduler.step(output, 99, x).prev_sample)
    assert torch.equal(x0, scheduler.step(output, 99, x).pred_original_sample)


# Refusals


@pytest.mark.parametrize("cls", BOTH)
def test_mistakes_are_refused_in_a_sentence(cls):
    scheduler = make(cls, 10)
    x, output = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    for n in (0, -1, 1001, 2.5, True, "10"):
        with pytest.raises(ValueError, match="must be an integer from 1 to 1000"):
            scheduler.set_timesteps(n)
    with pytest.raises(ValueError, match="998 is not on this scheduler's grid of 10 steps"):
        scheduler.step(output, 998, x)
    with pytest.raises(ValueError, match="must be an integer"):
        scheduler.step(output, 999.0, x)
    for t in (-1, 1000):
        with pytest.raises(ValueError, match=r"outside 0\.\.999"):
            scheduler.step(output, t, x)
    with pytest.raises(ValueError, match="emits 6 channels for images of 3"):
        scheduler.step(torch.cat([output, output], dim=1), 999, x)
    with pytest.raises(ValueError, match="timestep_spacing is 'even'"):
        cls(timestep_spacing="even").set_timesteps(10)
    with pytest.raises(ValueError, match="cannot sample prediction_type 'flow_prediction'"):
        cls(prediction_type="flow_prediction")


def test_mistakes_of_one_scheduler():
    x = randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="'learned' is not one of"):
        DDPMScheduler(variance_type="learned")
    with pytest.raises(ValueError, match="needs 6"):
        make(DDPMScheduler, variance_type="learned_range").step(x, 999, x)
    ddim = make(DDIMScheduler)
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="eta is"):
            ddim.step(x, 999, x, eta=eta)
    with pytest.raises(ValueError, match="not both"):
        ddim.step(x, 999, x, eta=1.0, generator=torch.Generator(), variance_noise=x)
