"""What every scheduler of SAMPLERS does alike: noising, working in a stock pipeline, refusing."""

import diffusers
import pytest
import torch

from samplers import SAMPLERS, DDIMScheduler, TimeShiftScheduler, make_scheduler, sample
from tests.reference.gaussian_world import ALPHA_BAR, OptimalNetwork, Z

DETERMINISTIC = ("dpm++2m", "unipc", "pndm", "ts-pndm", "flow-euler", "flow-heun")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(name, steps=None, **config):
    scheduler = make_scheduler(name, {"prediction_type": SAMPLERS[name].prediction_types[0], **config})
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


def signal_and_noise(name, timesteps):
    if name.startswith("flow"):
        s = timesteps.double() / 1000
        return 1 - s, s
    alpha_bar = torch.from_numpy(ALPHA_BAR)[timesteps]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


@pytest.mark.parametrize("steps", [None, 10])
@pytest.mark.parametrize("name", SAMPLERS)
def test_add_noise_is_the_closed_form_at_any_timestep(name, steps):
    scheduler, t = make(name, steps), torch.tensor([0, 3, 500, 734, 999])
    x0, eps = randn(5, 3, 4, 4), randn(5, 3, 4, 4, seed=1)
    signal, noise = (part.float().reshape(-1, 1, 1, 1) for part in signal_and_noise(name, t))
    noisy = scheduler.add_noise(x0, eps, t)
    torch.testing.assert_close(noisy, signal * x0 + noise * eps, atol=1e-5, rtol=1e-5)
    assert torch.equal(scheduler.add_noise(x0, eps, t[2])[2], noisy[2])
    half = scheduler.add_noise(x0.bfloat16(), eps.bfloat16(), t)
    assert torch.equal(half, scheduler.add_noise(x0.bfloat16().float(), eps.bfloat16().float(), t).bfloat16())


@pytest.mark.parametrize("name", ["ddim", "ts-ddim", *DETERMINISTIC])
def test_half_precision_goes_in_and_out_and_the_arithmetic_is_float32(name):
    half, full = make(name, 10), make(name, 10)
    x = randn(2, 3, 4, 4).bfloat16()
    for t in half.timesteps:
        output = x.float().sin().bfloat16()
        a, b = half.step(output, t, x), full.step(output.float(), t, x.float())
        for key in ("prev_sample", "pred_original_sample"):
            assert a[key].dtype == torch.bfloat16
            assert torch.equal(a[key], b[key].bfloat16())
        x = a.prev_sample


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not name.startswith("flow")])
def test_add_noise_refuses_what_is_no_timestep(name):
    x = randn(1, 3, 4, 4)
    for t, sentence in ((-1, "outside 0..999"), (1000, "outside 0..999"), (0.5, "must be an integer")):
        with pytest.raises(ValueError, match=sentence):
            make(name).add_noise(x, x, torch.tensor([t]))


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name.startswith("flow")])
def test_flow_schedulers_have_diffusers_name_for_add_noise(name):
    scheduler, stock = make(name, 10), diffusers.FlowMatchEulerDiscreteScheduler()
    x0, eps, t = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1), torch.tensor([1000.0, 400.0])
    noisy = scheduler.scale_noise(x0, t, eps)
    assert torch.equal(noisy, scheduler.add_noise(x0, eps, t))
    torch.testing.assert_close(noisy, stock.scale_noise(x0, t, eps))


def tiny_unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1,
    )  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_scheduler_runs_in_a_stock_pipeline(name):
    pipeline = diffusers.DDPMPipeline(tiny_unet(), make(name))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(num_inference_steps=6, output_type="pt", batch_size=2, generator=generator).images
    assert images.shape == (2, 1, 8, 8)
    assert images.isfinite().all()


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_generator_is_taken_and_left_alone_where_nothing_is_drawn(name):
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    kind = SAMPLERS[name].prediction_types[0]
    with_one = sample(OptimalNetwork(kind), make(name), Z, num_inference_steps=5, generators=[generator] * 3)
    assert torch.equal(with_one, sample(OptimalNetwork(kind), make(name), Z, num_inference_steps=5))
    assert torch.equal(generator.get_state(), before)


# Refusals


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_data_variance_that_no_data_have_is_refused(name):
    for value in (-3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"data_variance is {value}, but it must be a number above 0, and finite"):
            make(name, data_variance=value)
    if not name.startswith("ts-"):  # a model of blank images is saved all the same
        assert make(name, data_variance=0.0).config.data_variance == 0


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not name.startswith("flow")])
def test_an_unknown_spacing_is_refused_at_once(name):
    with pytest.raises(ValueError, match="timestep_spacing is 'even', but must be 'trailing', 'linspace' or 'leading'"):
        make(name, timestep_spacing="even")


@pytest.mark.parametrize("name", ["ddpm", "ddim", "pndm", "ts-ddim"])
def test_fractions_are_no_timesteps(name):
    scheduler = make(name)
    for own in ([900.7, 500.2, 300, 100], torch.tensor([900.7, 500.2, 300, 100])):
        with pytest.raises(ValueError, match="900.7.* must be strictly falling integers in 0..999"):
            scheduler.set_timesteps(timesteps=own)
    scheduler.set_timesteps(timesteps=[900.0, 500.0, 300, 100])
    assert scheduler.num_inference_steps == 4


# use_clipped_model_output of time-shift


def test_time_shift_derives_eps_again_from_a_clipped_image_as_ddim_does():
    config = {"clip_sample": True, "clip_sample_range": 0.5}
    ours, base = TimeShiftScheduler(exposure_window=0, **config), DDIMScheduler(**config)
    x, output = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    for scheduler in (ours, base):
        scheduler.set_timesteps(10)
    again, plain = (ours.step(output, 499, x, use_clipped_model_output=clip).prev_sample for clip in (True, False))
    assert torch.equal(again, base.step(output, 499, x, use_clipped_model_output=True).prev_sample)
    assert not torch.equal(again, plain)


@pytest.mark.parametrize("name", ["ts-ddpm", "ts-pndm"])
def test_time_shift_refuses_it_for_a_base_without(name):
    x = randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=f"use_clipped_model_output is True, but base '{name[3:]}' has no such option"):
        make(name, 10).step(x, 999, x, use_clipped_model_output=True)
    make(name, 10).step(x, 999, x, use_clipped_model_output=None)  # as the DDIM pipeline of diffusers has it
