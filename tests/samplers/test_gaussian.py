"""The update arithmetic against closed forms, NumPy and itself."""

import pytest
import torch

from samplers import gaussian
from tests.reference.gaussian_world import ALPHA_BAR

LEVELS = torch.from_numpy(ALPHA_BAR)


def images(seed, n=4):
    return torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_each_prediction_type_recovers_x0_and_eps(t):
    x0, eps, a = images(0), images(1), LEVELS[t]
    x_t = gaussian.noisy_image(x0, eps, a)
    outputs = {"epsilon": eps, "sample": x0, "v_prediction": gaussian.velocity(x0, eps, a)}
    for kind, output in outputs.items():
        got_x0, got_eps = gaussian.predict_x0_and_eps(x_t, output, a, kind)
        # Dividing by the signal (epsilon) or the noise (sample) magnifies the rounding of x_t.
        x0_tolerance = 1e-6 / float(a.sqrt()) if kind == "epsilon" else 1e-6
        eps_tolerance = 1e-6 / float((1 - a).sqrt()) if kind == "sample" else 1e-6
        torch.testing.assert_close(got_x0, x0, atol=x0_tolerance, rtol=1e-6)
        torch.testing.assert_close(got_eps, eps, atol=eps_tolerance, rtol=1e-6)


def test_the_velocity_is_the_papers():
    x0, eps = images(0), images(1)
    a = torch.tensor(0.36, dtype=torch.float64)
    torch.testing.assert_close(gaussian.velocity(x0, eps, a), 0.6 * eps - 0.8 * x0)


def test_eta_one_is_ddpm_with_the_small_variance():
    x_t, eps, noise = images(0), images(1), images(2)
    for t, previous in [(999, 899), (500, 499), (40, 7)]:
        a, a_prev = LEVELS[t], LEVELS[previous]
        x0, eps = gaussian.predict_x0_and_eps(x_t, eps, a, "epsilon")
        sigma = gaussian.ddim_sigma(a, a_prev, 1.0)
        ddim = gaussian.ddim_update(x0, eps, a_prev, sigma, noise)
        mean, std = gaussian.ddpm_posterior(x_t, x0, a, a_prev, "fixed_small")
        scale = float(x0.abs().max())
        torch.testing.assert_close(ddim, mean + std * noise, atol=2e-6 * scale, rtol=1e-5)


def test_ddim_without_noise_keeps_the_marginals():
    x0, eps, a_prev = images(0), images(1), LEVELS[300]
    zero = torch.zeros((), dtype=torch.float64)
    got = gaussian.ddim_update(x0, eps, a_prev, zero)
    torch.testing.assert_close(got, gaussian.noisy_image(x0, eps, a_prev))


@pytest.mark.parametrize("kind", gaussian.PREDICTION_TYPES)
@pytest.mark.parametrize("variance", gaussian.VARIANCE_TYPES)
def test_one_level_per_image_is_the_bits_of_one_level_at_a_time(kind, variance):
    x_t, output, v, noise = images(0), images(1), images(2).tanh(), images(3)
    t, previous = torch.tensor([999, 500, 30, 3]), torch.tensor([900, 450, 0, 2])

    def update(n):
        a, a_prev = LEVELS[t[n]], LEVELS[previous[n]]
        rows = slice(n, n + 1) if isinstance(n, int) else slice(None)
        x0, eps = gaussian.predict_x0_and_eps(x_t[rows], output[rows], a, kind)
        mean, std = gaussian.ddpm_posterior(x_t[rows], x0, a, a_prev, variance, v[rows])
        sigma = gaussian.ddim_sigma(a, a_prev, 0.5)
        ddim = gaussian.ddim_update(x0, eps, a_prev, sigma, noise[rows])
        return torch.stack([x0, eps, mean, std.expand_as(x0), ddim])

    together = update(torch.arange(4))
    for n in range(4):
        assert torch.equal(together[:, n : n + 1], update(n))


def test_the_learned_variance_runs_between_the_two_fixed_ones():
    x, a, a_prev = images(0), LEVELS[500], LEVELS[400]
    std = {
        kind: gaussian.ddpm_posterior(x, x, a, a_prev, kind)[1].expand_as(x) for kind in ("fixed_small", "fixed_large")
    }

    def learned(v):
        return gaussian.ddpm_posterior(x, x, a, a_prev, "learned_range", torch.full_like(x, v))[1]

    torch.testing.assert_close(learned(-1.0), std["fixed_small"])
    torch.testing.assert_close(learned(1.0), std["fixed_large"])
    geometric_mean = (std["fixed_small"] * std["fixed_large"]).sqrt()
    torch.testing.assert_close(learned(0.0), geometric_mean)
    assert not torch.allclose(std["fixed_small"], std["fixed_large"], rtol=1e-3)


@pytest.mark.parametrize("variance", gaussian.VARIANCE_TYPES)
def test_a_step_to_clean_data_is_x0_without_noise(variance):
    x, x0 = images(0), images(1)
    one = torch.ones((), dtype=torch.float64)
    v = torch.ones_like(x)
    mean, std = gaussian.ddpm_posterior(x, x0, LEVELS[99], one, variance, v)
    assert torch.equal(mean, x0)
    assert not std.any()


def test_half_precision_images_are_computed_in_float32():
    x, output, a = images(0).bfloat16(), images(1).bfloat16(), LEVELS[3]
    for kind in gaussian.PREDICTION_TYPES:
        got = gaussian.predict_x0_and_eps(x, output, a, kind)
        want = gaussian.predict_x0_and_eps(x.float(), output.float(), a, kind)
        assert all(g.dtype == torch.float32 and torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_unknown_names_are_refused():
    x, a = images(0), LEVELS[5]
    with pytest.raises(ValueError, match="'eps' is not one of epsilon, v_prediction, sample"):
        gaussian.predict_x0_and_eps(x, x, a, "eps")
    with pytest.raises(ValueError, match="'learned' is not one of fixed_small"):
        gaussian.ddpm_posterior(x, x, a, LEVELS[4], "learned")


@pytest.mark.parametrize("kind", gaussian.PREDICTION_TYPES)
def test_what_a_network_says_of_another_level_is_its_eps(kind):
    """x0 follows from eps at the image's own level; where the two levels agree it has the plain bits."""
    x_t, output = images(0), images(1)
    net, start = LEVELS[[700, 300, 500, 40]], LEVELS[[650, 300, 520, 40]]
    x0, eps = gaussian.denoise(x_t, output, net, start, kind)
    plain_x0, plain_eps = gaussian.predict_x0_and_eps(x_t, output, net, kind)
    assert torch.equal(eps, plain_eps)
    assert torch.equal(x0[[1, 3]], plain_x0[[1, 3]])
    torch.testing.assert_close(gaussian.noisy_image(x0, eps, start), x_t, atol=1e-5, rtol=1e-5)
    assert (x0 - plain_x0)[[0, 2]].abs().amin(dim=(1, 2, 3)).max() > 0
    one = gaussian.denoise(x_t, output, LEVELS[9], LEVELS[9], kind)
    assert torch.equal(one[0], gaussian.predict_x0_and_eps(x_t, output, LEVELS[9], kind)[0])
