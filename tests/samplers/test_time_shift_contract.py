"""Time-shift as a diffusers scheduler: files, pipelines, warnings, state."""

import diffusers
import pytest
import torch

import samplers.time_shift
from samplers import (
    DDIMScheduler,
    DDPMScheduler,
    TimeShiftScheduler,
    image_generators,
    initial_noise,
    sample,
)
from tests.reference.gaussian_world import OptimalNetwork

MODES = ["target", "network", "both"]


def noise_of(n, shape=(3, 8, 8), seed=0):
    return initial_noise(image_generators(seed, range(n)), shape, "cpu")


def make(n=10, **config):
    scheduler = TimeShiftScheduler(**{"exposure_window": 80, "exposure_cutoff": 100, **config})
    scheduler.set_timesteps(n)
    return scheduler


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(samplers.time_shift.logger, "warning", said.append)
    return said


# Files and configs


@pytest.mark.parametrize("base", ["ddim", "ddpm", "pndm"])
def test_save_and_load(base, tmp_path):
    table = [0.2 + t / 1e4 for t in range(1000)]
    scheduler = make(base=base, exposure_mode="network", exposure_variance=table, prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path)
    loaded = TimeShiftScheduler.from_pretrained(tmp_path)
    assert {**loaded.config, "_use_default_values": 0} == {**scheduler.config, "_use_default_values": 0}
    assert loaded.config.exposure_variance == table
    assert len(loaded) == 1000
    assert loaded.order == loaded.init_noise_sigma == 1
    runs = []
    for s in (scheduler, loaded):
        generators = image_generators(1, range(2))
        network = OptimalNetwork("v_prediction")
        runs.append(sample(network, s, noise_of(2), num_inference_steps=10, generators=generators))
    assert torch.equal(*runs)


@pytest.mark.parametrize("stock", [diffusers.DDIMScheduler, diffusers.DDPMScheduler, diffusers.PNDMScheduler])
def test_a_pipelines_scheduler_is_swapped_by_its_config(stock):
    config = stock(beta_end=0.012, prediction_type="v_prediction", timestep_spacing="linspace").config
    scheduler = TimeShiftScheduler.from_config(config, exposure_window=50)
    assert scheduler.config.exposure_window == 50
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.timestep_spacing == "linspace"
    assert not scheduler.config.clip_sample  # a default of the stock class, not a choice
    torch.testing.assert_close(scheduler.alphas_cumprod, stock(beta_end=0.012).alphas_cumprod)
    assert TimeShiftScheduler.from_config(diffusers.DDIMScheduler().config).config.exposure_window == 0


def test_nothing_is_said_when_one_is_made(caplog, monkeypatch):
    monkeypatch.setattr(diffusers.utils.logging.get_logger("diffusers"), "propagate", True)
    for base in ("ddim", "ddpm", "pndm"):
        make(base=base)
    assert not caplog.records


def tiny_unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1,
    )  # fmt: skip


def piped(pipeline_class, scheduler):
    pipeline = pipeline_class(tiny_unet(), diffusers.DDIMScheduler())
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(
        pipeline(num_inference_steps=10, output_type="np", batch_size=2, generator=generator).images
    )


@pytest.mark.parametrize("base", ["ddim", "ddpm", "pndm"])
def test_target_mode_works_in_a_pipeline_of_diffusers(base, warnings, monkeypatch):
    shifts, step = [], TimeShiftScheduler.step

    def recorded(*args, **options):
        result = step(*args, **options)
        shifts.append(result.shift)
        return result

    monkeypatch.setattr(TimeShiftScheduler, "step", recorded)
    images = piped(diffusers.DDPMPipeline, make(base=base))
    plain = piped(diffusers.DDPMPipeline, make(base=base, exposure_window=0))
    assert torch.stack(shifts).any()
    assert images.isfinite().all()
    assert not torch.equal(images, plain)
    assert warnings == []


def test_target_mode_works_in_the_ddim_pipeline():
    assert piped(diffusers.DDIMPipeline, make()).isfinite().all()


@pytest.mark.parametrize("mode", ["network", "both"])
def test_a_loop_that_does_not_ask_is_told_once_and_gets_the_base(mode, warnings):
    scheduler, base = make(exposure_mode=mode), DDIMScheduler()
    for _ in "ab":
        scheduler.set_timesteps(10)
        base.set_timesteps(10)
        x = y = noise_of(2)
        for t in scheduler.timesteps:
            x = scheduler.step(x.sin(), t, x).prev_sample
            y = base.step(y.sin(), t, y).prev_sample
        assert torch.equal(x, y)
    assert len(warnings) == 1
    assert f"exposure_mode '{mode}' is ignored" in warnings[0]
    assert "samplers.sample" in warnings[0]
    sample(OptimalNetwork(), make(exposure_mode=mode), noise_of(2), num_inference_steps=10)
    assert len(warnings) == 1  # our loop asks


def test_unit_variance_data_is_warned_of_where_the_criterion_is_the_published_one(warnings):
    make(data_variance=0.9)
    make(data_variance=1.02, exposure_variance=1.02, exposure_min_snr=1.0)
    make(data_variance=1.02, exposure_window=0)
    assert warnings == []
    make(data_variance=1.02)
    assert len(warnings) == 1
    assert "the data has variance 1.02" in warnings[0]
    assert "exposure_variance" in warnings[0]


# State


@pytest.mark.parametrize("base", ["ddim", "pndm"])
@pytest.mark.parametrize("mode", MODES)
def test_set_timesteps_begins_again(base, mode):
    used = make(20, base=base, exposure_mode=mode)
    for t in used.timesteps[:14]:  # stop in the middle, with a choice made
        used.model_timestep(t)
        used.step(noise_of(3), t, noise_of(3))
    got, want = (
        sample(OptimalNetwork(), s, noise_of(2), num_inference_steps=10)
        for s in (used, make(base=base, exposure_mode=mode))
    )
    assert torch.equal(got, want)
    used.set_timesteps(10)
    assert used.num_inference_steps == 10
    assert int(used.model_timestep(used.timesteps[0])) == 999


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("base", "options"), [("ddim", {"eta": 1.0}), ("ddpm", {})])
def test_the_same_generators_give_the_same_images(base, mode, options):
    def images(seed):
        scheduler = make(base=base, exposure_mode=mode)
        return sample(
            OptimalNetwork(), scheduler, noise_of(2), num_inference_steps=10,
            generators=image_generators(seed, range(2)), **options,
        )  # fmt: skip

    assert torch.equal(images(0), images(0))
    assert not torch.equal(images(0), images(1))


def test_a_run_may_begin_in_the_middle_of_the_grid():
    """Image-to-image pipelines walk timesteps[k:]; the next step lies below, and is what the window is round."""
    scheduler, noise = make(exposure_window=100), noise_of(2)
    x = 3 * noise  # looks noisier than any step: the top of the window
    scheduler.step(x, 499, x)
    step = scheduler.step(x, 399, x)
    assert step.shift.tolist() == [50, 50]
    x0, eps = step.pred_original_sample, x
    end = scheduler.alphas_cumprod[349].double()
    torch.testing.assert_close(step.prev_sample, (end.sqrt() * x0 + (1 - end).sqrt() * eps).float())


def test_a_second_run_shifts_like_the_first_or_is_refused():
    scheduler, runs = make(), []
    for _ in "ab":
        x, shifts = noise_of(2), []
        for t in scheduler.timesteps:
            try:
                step = scheduler.step(0.9 * x, t, x)
            except ValueError:
                return
            x = step.prev_sample
            shifts.append(step.shift.tolist())
        runs.append(shifts)
    assert any(map(any, runs[0]))
    assert runs[0] == runs[1]


def test_noising_is_the_bases():
    x, eps, t = noise_of(2), noise_of(2, seed=1), torch.tensor([99, 700])
    ours, base = make(base="ddpm"), DDPMScheduler()
    assert torch.equal(ours.add_noise(x, eps, t), base.add_noise(x, eps, t))
    assert torch.equal(ours.get_velocity(x, eps, t), base.get_velocity(x, eps, t))
    assert torch.equal(ours.scale_model_input(x, 99), x)
