"""Time-shift never gives NaN, noise at the end, or silence about a mistake."""

import pytest
import torch

from samplers import TimeShiftScheduler, image_generators, initial_noise, make_scheduler, sample
from tests.reference.gaussian_world import OptimalNetwork

MODES = ["target", "network", "both"]


def noise_of(n, shape=(3, 8, 8), seed=0):
    return initial_noise(image_generators(seed, range(n)), shape, "cpu")


def make(n=10, **config):
    scheduler = TimeShiftScheduler(**{"exposure_window": 80, "exposure_cutoff": 100, **config})
    scheduler.set_timesteps(n)
    return scheduler


# Guard rails


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("base", "config", "eta"),
    [
        ("ddim", {}, 1.0),
        ("ddim", {}, 0.3),
        ("ddpm", {"variance_type": "fixed_large"}, 0.0),
        ("ddpm", {"variance_type": "learned_range"}, 0.0),
        ("pndm", {}, 0.0),
        pytest.param("ddim", {}, 0.0, id="ddim-deterministic"),
    ],
)
def test_windows_wider_than_two_strides_give_no_nan(base, config, eta, mode):
    network = OptimalNetwork(v=[0.3] if config.get("variance_type") == "learned_range" else None)
    noise = noise_of(4) * torch.tensor([0.3, 0.9, 1.1, 3.0]).reshape(4, 1, 1, 1)
    generators = image_generators(0, range(4))
    for n, window in [(20, 300), (20, 1000), (125, 20), (1000, 20)]:
        scheduler = make(base=base, exposure_mode=mode, exposure_window=window, exposure_cutoff=0, **config)
        if n == 1000:
            scheduler.set_timesteps(timesteps=range(500, 460, -1))
            images = noise
            for t in scheduler.timesteps:
                told = scheduler.model_timestep(t).expand(4)
                images = scheduler.step(network(images, told).sample, t, images, eta=eta).prev_sample
        else:
            images = sample(network, scheduler, noise, num_inference_steps=n, eta=eta, generators=generators)
        assert images.isfinite().all()


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("base", "eta", "v"), [("ddim", 1.0, None), ("ddpm", 0.0, None), ("ddpm", 0.0, [1.0]), ("pndm", 0.0, None)]
)
def test_the_last_step_adds_no_noise(base, eta, v, mode, spacing):
    kind = "fixed_large" if v is None else "learned_range"
    for n in (5, 10, 61):
        scheduler = make(n, base=base, exposure_mode=mode, timestep_spacing=spacing, variance_type=kind)
        x, network, generator = noise_of(2), OptimalNetwork(v=v), torch.Generator().manual_seed(0)
        for t in scheduler.timesteps:
            before = generator.get_state()
            output = network(x, scheduler.model_timestep(t).expand(2)).sample
            step = scheduler.step(output, t, x, eta=eta, generator=generator)
            x = step.prev_sample
        assert torch.equal(generator.get_state(), before)  # the last draws nothing
        if base != "pndm":
            assert torch.equal(step.prev_sample, step.pred_original_sample)
        assert step.shift.tolist() == [0, 0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("base", ["ddim", "ddpm", "pndm"])
def test_half_precision_goes_in_and_out_and_the_arithmetic_is_float32(base, mode):
    half, full = (make(base=base, exposure_mode=mode) for _ in "ab")
    x = noise_of(2).bfloat16()
    for t in half.timesteps:
        output = (0.9 * x.float()).sin().bfloat16()
        half.model_timestep(t)
        told = full.model_timestep(t)
        # the same choice: what a half-precision image was rounded to is what the next step sees
        full._chosen = half._chosen
        assert told.shape in ((), (2,))
        a = half.step(output, t, x, generator=image_generators(0, range(2)))
        b = full.step(output.float(), t, x.float(), generator=image_generators(0, range(2)))
        for key in ("prev_sample", "pred_original_sample"):
            assert a[key].dtype == torch.bfloat16
            assert torch.equal(a[key], b[key].bfloat16())
        if mode == "target":
            assert torch.equal(a.shift, b.shift)
        x = a.prev_sample


# Refusals


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"exposure_window": -1}, "exposure_window is -1, but it is the full width in training steps: an integer"),
        ({"exposure_window": 1001}, "exposure_window is 1001, .* from 0 to 1000"),
        ({"exposure_window": 2.5}, "exposure_window is 2.5"),
        ({"exposure_window": True}, "exposure_window is True"),
        ({"exposure_window": 400, "num_train_timesteps": 399}, "from 0 to 399"),
        ({"exposure_cutoff": -1}, "exposure_cutoff is -1, but it is a timestep: an integer from 0 to 1000"),
        ({"exposure_cutoff": 1001}, "exposure_cutoff is 1001"),
        ({"exposure_mode": "shift"}, "exposure_mode 'shift' is not one of target, network, both"),
        ({"base": "euler"}, "base 'euler' is not one of ddim, ddpm, pndm"),
        ({"exposure_variance": -0.1}, "exposure_variance -0.1 must be 0 or more, and finite"),
        ({"exposure_variance": float("nan")}, "exposure_variance nan must be 0 or more"),
        ({"exposure_variance": [0.2] * 999}, "exposure_variance has 999 values; give one, or one for each of 1000"),
        ({"exposure_variance": "good"}, "exposure_variance 'good' is neither"),
        ({"exposure_variance": "calibrated"}, "'calibrated' needs data_variance"),
        ({"exposure_min_snr": -1.0}, "exposure_min_snr is -1.0, but it must be 0 or more"),
        ({"exposure_min_snr": float("inf")}, "exposure_min_snr is inf"),
        ({"prediction_type": "flow_prediction"}, "cannot sample prediction_type 'flow_prediction'"),
        ({"base": "ddpm", "variance_type": "learned"}, "'learned' is not one of"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr leaves no signal"),
    ],
)
def test_mistakes_in_a_config_are_refused_in_a_sentence(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        TimeShiftScheduler(**config)


def test_mistakes_in_a_step_are_refused_in_a_sentence():
    x = noise_of(2)
    with pytest.raises(ValueError, match="998 is not on this scheduler's grid of 10 steps"):
        make().step(x, 998, x)
    with pytest.raises(ValueError, match="one scheduled timestep for all images"):
        make().step(x, torch.tensor([999, 999]), x)
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="eta is"):
            make().step(x, 999, x, eta=eta)
    for base in ("ddpm", "pndm"):
        with pytest.raises(ValueError, match=f"eta is 0.5, but base '{base}' has no eta"):
            sample(OptimalNetwork(), make(base=base), x, num_inference_steps=10, eta=0.5)
    for n in (0, 1001):
        with pytest.raises(ValueError, match="must be an integer from 1 to 1000"):
            make().set_timesteps(n)
    with pytest.raises(ValueError, match="needs at least 4 steps"):
        make(base="pndm").set_timesteps(3)


def test_a_tuple_comes_out_if_wanted():
    x = noise_of(2)
    want = make().step(x, 999, x)
    for got, wanted in zip(make().step(x, 999, x, return_dict=False), want.to_tuple(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    "config",
    [
        {"clip_sample": True},
        {"thresholding": True},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
)
def test_what_the_base_does_not_have_is_refused(config):
    with pytest.raises(ValueError, match="clip_sample|thresholding|rescale_betas_zero_snr"):
        make_scheduler("ts-pndm", config)
