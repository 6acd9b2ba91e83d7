"""Flow matching as an SDE: the exact recursion of the moments, convergence, the contract."""

import pytest
import torch

import samplers.flow
from samplers import FlowSDEScheduler, image_generators, initial_noise, sample
from tests.reference.gaussian_world import MEAN, VARIANCE, OptimalNetwork, Z


def noise_of(n, shape=(3, 4, 4), seed=0):
    return initial_noise(image_generators(seed, range(n)), shape, "cpu")


def make(n=10, **config):
    scheduler = FlowSDEScheduler(**config)
    scheduler.set_timesteps(n)
    return scheduler


def moments(n, last_step=0.04, shift=1.0):
    """(variance, mean) after n steps of Euler-Maruyama, which are affine in x here.

    x_s ~ N((1 - s) m, V), V = (1 - s)^2 v + s^2, so E[eps | x] = s (x - (1 - s) m) / V and the score is -eps / s.
    dx = (E[eps | x] - E[x0 | x]) ds - (s / 2) score ds + sqrt(s) dW, backwards.
    """
    grid = [1 + (last_step - 1) * k / (n - 1) for k in range(n)] + [0.0]
    grid = [shift * s / (1 + (shift - 1) * s) for s in grid]
    mean, variance = 0.0, 1.0
    for k in range(n):
        s, length = grid[k], grid[k] - grid[k + 1]
        V = (1 - s) ** 2 * VARIANCE + s**2
        slope_eps, slope_x0 = s / V, (1 - s) * VARIANCE / V
        slope = slope_eps - slope_x0 + s / 2 * slope_eps / s
        drift_at_0 = -(slope_eps + s / 2 * slope_eps / s) * (1 - s) * MEAN - (1 - slope_x0 * (1 - s)) * MEAN
        gain = 1 - length * slope
        mean = gain * mean - length * drift_at_0
        variance = gain**2 * variance + (s * length if k < n - 1 else 0.0)
    return variance, mean


def affine_moments(scheduler, monkeypatch):
    """The same from the scheduler's own steps, with noise 0 and 1."""
    network, mean, variance = OptimalNetwork("flow_prediction"), 0.0, 1.0
    for t in scheduler.timesteps:
        pixels = []
        for value in (0.0, 1.0):
            noise = torch.full_like(Z, value)
            monkeypatch.setattr(samplers.flow, "draw_noise", lambda *_, n=noise: n)
            pixels.append(scheduler.step(network(Z, t.expand(3)).sample, t, Z).prev_sample.flatten().double())
        slope, sigma = (pixels[0][2] - pixels[0][0]) / 2, (pixels[1] - pixels[0])[1]
        mean, variance = slope * mean + pixels[0][1], slope**2 * variance + sigma**2
    return float(variance), float(mean)


@pytest.mark.parametrize(("n", "last_step", "shift"), [(2, 0.04, 1), (10, 0.04, 1), (50, 0.01, 1), (20, 0.04, 3)])
def test_it_has_the_exact_moments(n, last_step, shift, monkeypatch):
    got = affine_moments(make(n, last_step=last_step, shift=float(shift)), monkeypatch)
    assert got == pytest.approx(moments(n, last_step, shift), abs=5e-6)
    assert got[1] == pytest.approx(MEAN, abs=1e-5)  # the mean is exact for any grid


def test_more_steps_come_nearer_to_the_truth(monkeypatch):
    """Order one in the law, as long as the last step is short: at 0.04 the limit is 0.2466 and not 0.25."""
    errors = [VARIANCE - affine_moments(make(n, last_step=1e-3), monkeypatch)[0] for n in (10, 50, 100, 250)]
    assert errors == pytest.approx([0.03479, 0.00774, 0.00392, 0.00158], abs=3e-5)
    for n, variance in [(100, 0.24330), (250, 0.24529)]:
        assert affine_moments(make(n), monkeypatch)[0] == pytest.approx(variance, abs=2e-5)
    halving = [VARIANCE - moments(n, 1e-5)[0] for n in (200, 400, 800)]
    assert halving[0] / halving[1] == pytest.approx(2, abs=0.05)
    assert halving[1] / halving[2] == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize(("n", "variance"), [(10, 0.21712), (50, 0.24006)])
def test_samples_have_those_moments(n, variance):
    noise = noise_of(1, (1, 256, 256))
    network = OptimalNetwork("flow_prediction")
    options = {"num_inference_steps": n, "generators": image_generators(1, [0])}
    images = sample(network, FlowSDEScheduler(), noise, **options)
    assert images.var().item() == pytest.approx(variance, abs=5 * variance * (2 / 2**16) ** 0.5)
    assert images.mean().item() == pytest.approx(MEAN, abs=5 * (variance / 2**16) ** 0.5)


@pytest.mark.parametrize("last_step", [1e-2, 1e-4, 1e-7])
def test_nothing_blows_up_as_s_falls_to_nothing(last_step):
    """The score is -eps / s, but s cancels: the last steps move the image by about s."""
    scheduler, network = make(20, last_step=last_step), OptimalNetwork("flow_prediction")
    x, generators = noise_of(2), image_generators(1, range(2))
    for t in scheduler.timesteps:
        before = x
        step = scheduler.step(network(x, t.expand(2)).sample, t, x, generators)
        x = step.prev_sample
    assert x.isfinite().all()
    assert (x - before).abs().max() < 6 * last_step
    assert (x - step.pred_original_sample).abs().max() < 6 * last_step
    assert x.abs().max() < 4


def test_the_grid():
    assert make(5).sigmas.tolist() == pytest.approx([1, 0.76, 0.52, 0.28, 0.04, 0])
    assert make(5).timesteps.tolist() == pytest.approx([1000, 760, 520, 280, 40])
    assert make(3, last_step=0.2, shift=3.0).sigmas.tolist() == pytest.approx([1, 1.8 / 2.2, 0.6 / 1.4, 0])
    with pytest.raises(ValueError, match="flow-sde needs at least 2"):
        make(1)
    assert len(make(1000).timesteps.unique()) == 1000
    for n in (2, 333, 1000):
        scheduler = make(n)
        assert torch.equal(scheduler._ends(scheduler.timesteps)[0], scheduler.sigmas[:-1])


@pytest.mark.parametrize("shift", [0.5, 1.0, 4.0])
def test_the_last_step_adds_no_noise(shift):
    x, v = noise_of(2), noise_of(2, seed=1)
    for n in (2, 10, 61):
        scheduler, generator = make(n, shift=shift), torch.Generator().manual_seed(0)
        last, before = scheduler.timesteps[-1], generator.get_state()
        steps = [scheduler.step(v, last, x, generator).prev_sample for _ in "ab"]
        assert torch.equal(*steps)
        assert torch.equal(generator.get_state(), before)
        s = float(scheduler.sigmas[-2])
        torch.testing.assert_close(steps[0], x - s * (v + (x + (1 - s) * v) / 2), atol=1e-5, rtol=1e-5)
        first = scheduler.timesteps[0]
        assert not torch.equal(*[scheduler.step(v, first, x, generator).prev_sample for _ in "ab"])


def test_images_at_timesteps_of_their_own_step_as_if_alone():
    scheduler = make(10)
    x, v = noise_of(3), noise_of(3, seed=1)
    t = scheduler.timesteps[[0, 4, 9]]  # the last of them ends its chain
    together = scheduler.step(v, t, x, image_generators(0, range(3)))
    for i in range(3):
        alone = scheduler.step(v[i : i + 1], t[i], x[i : i + 1], image_generators(0, [i]), return_dict=False)
        assert torch.equal(alone[0][0], together.prev_sample[i])
        assert torch.equal(alone[1][0], together.pred_original_sample[i])


def test_generators_decide_everything_that_is_drawn():
    def images(seed, indices=range(3)):
        network, noise = OptimalNetwork("flow_prediction"), noise_of(3)[list(indices)]
        generators = image_generators(seed, indices)
        return sample(network, FlowSDEScheduler(), noise, num_inference_steps=8, generators=generators)

    assert torch.equal(images(0), images(0))
    assert torch.equal(images(0, [1]), images(0)[1:2])
    assert not torch.equal(images(0), images(1))
    with pytest.raises(ValueError, match="1 generators were given for 2 images"):
        make().step(noise_of(2), 1000, noise_of(2), image_generators(0, [0]))


def test_half_precision_goes_in_and_out_and_the_arithmetic_is_float32():
    scheduler, x, v = make(), noise_of(2).bfloat16(), noise_of(2, seed=1).bfloat16()
    for t in scheduler.timesteps:
        half = scheduler.step(v, t, x, image_generators(0, range(2)))
        full = scheduler.step(v.float(), t, x.float(), image_generators(0, range(2)))
        for key in ("prev_sample", "pred_original_sample"):
            assert half[key].dtype == torch.bfloat16
            assert torch.equal(half[key], full[key].bfloat16())


def test_save_load_and_refusals(tmp_path):
    FlowSDEScheduler(num_train_timesteps=500, shift=2.0, last_step=0.1).save_pretrained(tmp_path)
    loaded = FlowSDEScheduler.from_pretrained(tmp_path)
    assert (loaded.config.shift, loaded.config.last_step, len(loaded)) == (2, 0.1, 500)
    for last_step in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="last_step is .*, but it must lie between 0 and 1"):
            FlowSDEScheduler(last_step=last_step)
    with pytest.raises(ValueError, match="cannot sample prediction_type 'epsilon'"):
        FlowSDEScheduler(prediction_type="epsilon")
    with pytest.raises(ValueError, match="not on this scheduler's grid of 10 steps"):
        make().step(noise_of(2), 900, noise_of(2))
    for n in (0, 1001, 2.5, True):
        with pytest.raises(ValueError, match="must be an integer from 1 to 1000"):
            make(n)
