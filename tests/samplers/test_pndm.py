"""F-PNDM: exact errors, a slow version in NumPy, the stock class, the contract."""

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from samplers import PNDMScheduler, image_generators, initial_noise, sample
from tests.reference.gaussian_world import ALPHA_BAR, OptimalNetwork, Z, exact_data


def noise_of(n, shape=(3, 4, 4), seed=0):
    return initial_noise(image_generators(seed, range(n)), shape, "cpu")


def make(n=10, **config):
    scheduler = PNDMScheduler(**config)
    scheduler.set_timesteps(n)
    return scheduler


# Largest error of f(-1), f(0), f(1) against the exact flow; it does not fall steadily, so far out these are bounds.
ERRORS = {10: (0.0119, 0.01), 20: (5.5e-4, 0.02), 50: (6.7e-4, 0.02)}


@pytest.mark.parametrize(("n", "error", "tolerance"), [(n, *value) for n, value in ERRORS.items()])
def test_errors_against_the_exact_flow(n, error, tolerance):
    pixels = sample(OptimalNetwork(), PNDMScheduler(), Z, num_inference_steps=n).flatten().double().numpy()
    got = abs(pixels - exact_data(np.array([-1.0, 0.0, 1.0]))).max()
    assert got == pytest.approx(error, rel=tolerance)
    ddim = {10: 0.130, 20: 0.0688, 50: 0.029}[n]
    assert got < ddim / 10


def slow(eps, x, grid, final=1.0):
    """Liu et al. 2022, algorithm 2, in float64: three pseudo Runge-Kutta steps, then linear multistep."""
    level = {t: ALPHA_BAR[t] for t in range(1000)} | {-1: final}

    def transfer(x, e, t, s):  # eq. 11 of the paper, in its own form
        a, b = level[t], level[s]
        below = np.sqrt(a) * (np.sqrt((1 - b) * a) + np.sqrt((1 - a) * b))
        return np.sqrt(b / a) * x - (b - a) / below * e

    history = []
    for k, (t, s) in enumerate(zip(grid, [*grid[1:], -1], strict=True)):
        if k < 3:
            middle = (t + s) // 2
            e1 = eps(x, t)
            e2 = eps(transfer(x, e1, t, middle), middle)
            e3 = eps(transfer(x, e2, t, middle), middle)
            e4 = eps(transfer(x, e3, t, s), s)
            history.append(e1)
            e = (e1 + 2 * e2 + 2 * e3 + e4) / 6
        else:
            history.append(eps(x, t))
            e = (55 * history[-1] - 59 * history[-2] + 37 * history[-3] - 9 * history[-4]) / 24
        x = transfer(x, e, t, s)
    return x


def toy(x, t):
    return 0.8 * np.tanh(x) + 0.3 * np.sin(t / 100)


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.told = []

    def forward(self, x, t, class_labels=None):
        self.told.append(int(t[0]))
        return SimpleNamespace(sample=torch.from_numpy(toy(x.double().numpy(), int(t[0]))).float())


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
@pytest.mark.parametrize("to_one", [True, False])
def test_it_is_the_papers_algorithm(spacing, to_one):
    for n in (4, 7, 30):
        scheduler, network = make(n, timestep_spacing=spacing, set_alpha_to_one=to_one), Toy()
        grid = [scheduler.timesteps[k].item() for k in [0, 4, 8, *range(12, n + 9)]]
        noise = noise_of(2)
        got = sample(network, scheduler, noise, num_inference_steps=n)
        want = slow(toy, noise.double().numpy(), grid, 1.0 if to_one else ALPHA_BAR[0])
        np.testing.assert_allclose(got, want, atol=2e-5 * abs(want).max())
        assert network.told == scheduler.timesteps.tolist()
        assert len(network.told) == n + 9


def test_the_calls_of_a_step():
    assert make(5).timesteps.tolist() == [
        *(999, 899, 899, 799),
        *(799, 699, 699, 599),
        *(599, 499, 499, 399),
        399,
        199,
    ]


def test_agrees_with_diffusers_where_the_grids_agree():
    """With steps of 1000 / 20, "leading" and an even stride, the stock class does the same."""
    config = {"timestep_spacing": "leading", "set_alpha_to_one": False}
    stock = sample(Toy(), diffusers.PNDMScheduler(**config), noise_of(2), num_inference_steps=20)
    ours = sample(Toy(), PNDMScheduler(**config), noise_of(2), num_inference_steps=20)
    # the stock last step goes from 0 to 0 and so is none
    assert (ours - stock).abs().max() < 0.02 * ours.abs().max()


def test_every_prediction_type_walks_one_trajectory():
    results = [
        sample(OptimalNetwork(kind), PNDMScheduler(prediction_type=kind), noise_of(2), num_inference_steps=12)
        for kind in ("epsilon", "v_prediction", "sample")
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=3e-5, rtol=1e-5)


def test_own_timesteps_make_the_grid():
    scheduler = PNDMScheduler()
    scheduler.set_timesteps(timesteps=[900, 700, 400, 100, 5])
    assert scheduler.num_inference_steps == 5
    assert scheduler.timesteps.tolist() == [900, 800, 800, 700, 700, 550, 550, 400, 400, 250, 250, 100, 100, 5]


def test_set_timesteps_begins_again():
    used = make(8)
    for t in used.timesteps[:14]:
        used.step(noise_of(3), t, noise_of(3))
    got, want = (sample(Toy(), s, noise_of(2), num_inference_steps=8) for s in (used, make(8)))
    assert torch.equal(got, want)


def test_the_last_step_goes_to_clean_data():
    """With a constant eps every mixture is eps itself, and the end is x0."""
    scheduler, x = make(), noise_of(2)
    eps = noise_of(2, seed=1)
    for t in scheduler.timesteps:
        step = scheduler.step(eps, t, x)
        x = step.prev_sample
    torch.testing.assert_close(x, step.pred_original_sample, rtol=1e-4, atol=1e-4 * x.abs().max().item())
    prev, x0 = make().step(eps, 999, noise_of(2), return_dict=False)
    first = make().step(eps, 999, noise_of(2))
    assert torch.equal(prev, first.prev_sample)
    assert torch.equal(x0, first.pred_original_sample)


def test_save_load_and_stock_configs(tmp_path):
    scheduler = PNDMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", num_train_timesteps=500)
    scheduler.save_pretrained(tmp_path)
    loaded = PNDMScheduler.from_pretrained(tmp_path)
    assert torch.equal(loaded.alphas_cumprod, scheduler.alphas_cumprod)
    assert loaded.config.prediction_type == "v_prediction"
    assert len(loaded) == 500
    ours = PNDMScheduler.from_config(diffusers.PNDMScheduler(beta_end=0.012).config)
    assert ours.config.beta_end == 0.012
    assert ours.config.timestep_spacing == "trailing"  # a default of ours, not a choice of theirs
    assert diffusers.PNDMScheduler.from_config(ours.config).config.beta_end == 0.012


def test_a_rescaled_chain_is_refused_by_from_config():
    """The stock PNDMScheduler does not have it either; `from_config` would keep it in the config and not obey it."""
    saved = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").config
    sentence = "PNDMScheduler has no rescale_betas_zero_snr; remove it from the scheduler's config or use the diffusers"
    with pytest.raises(ValueError, match=sentence):
        PNDMScheduler.from_config(saved)
    with pytest.raises(ValueError, match=sentence):
        PNDMScheduler.from_config(diffusers.DDIMScheduler().config, rescale_betas_zero_snr=True)
    assert PNDMScheduler.from_config(diffusers.DDIMScheduler(beta_end=0.012).config).config.beta_end == 0.012


def test_mistakes_are_refused_in_a_sentence():
    x = noise_of(2)
    for n in (1, 2, 3):
        with pytest.raises(ValueError, match=f"num_inference_steps is {n}, but F-PNDM needs at least 4 steps"):
            make(n)
    with pytest.raises(ValueError, match="needs at least 4 steps"):
        PNDMScheduler().set_timesteps(timesteps=[900, 500, 1])
    for n in (0, -1, 1001, 2.5):
        with pytest.raises(ValueError, match="must be an integer from 1 to 1000"):
            make(n)
    with pytest.raises(ValueError, match="timestep 899 is not the next of this run, 999"):
        make().step(x, 899, x)
    scheduler = make()
    scheduler.step(x, 999, x)
    with pytest.raises(ValueError, match=r"shape \(3, 3, 4, 4\) follow some of \(2, 3, 4, 4\)"):
        scheduler.step(noise_of(3), scheduler.timesteps[1], noise_of(3))
    done = make()
    for t in done.timesteps:
        done.step(x, t, x)
    with pytest.raises(ValueError, match="all 19 steps are done; call set_timesteps"):
        done.step(x, 999, x)
    with pytest.raises(ValueError, match="skip_prk_steps"):
        PNDMScheduler(skip_prk_steps=True)
    with pytest.raises(ValueError, match="cannot sample prediction_type 'flow_prediction'"):
        PNDMScheduler(prediction_type="flow_prediction")
