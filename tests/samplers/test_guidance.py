"""Guidance beyond the plain scale: interval, channels, CFG++; against closed forms and by hand."""

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from samplers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowEulerScheduler,
    FlowHeunScheduler,
    FlowSDEScheduler,
    Guidance,
    TimeShiftScheduler,
    UniPCScheduler,
    image_generators,
    initial_noise,
    sample,
)
from tests.reference.gaussian_world import ALPHA_BAR, VARIANCE, OptimalNetwork, Z

LABELS = torch.zeros(3, dtype=torch.int64)
GUIDED = {"class_labels": LABELS, "null_label": 1, "guidance_scale": 3.0}
GRID = [999 - 100 * k for k in range(10)]


def noise_of(n, shape=(4, 4, 4), seed=0):
    return initial_noise(image_generators(seed, range(n)), shape, "cpu")


def run(scheduler=None, noise=Z, steps=10, network=None, **options):
    scheduler = DDIMScheduler() if scheduler is None else scheduler
    network = OptimalNetwork(mean=0.8) if network is None else network
    return sample(network, scheduler, noise, num_inference_steps=steps, **options)


def eps_of(x, t, mean):
    a = ALPHA_BAR[t]
    return np.sqrt(1 - a) * (x - np.sqrt(a) * mean) / (a * VARIANCE + 1 - a)


# The two-class world, N(0.8, v) and N(-0.8, v): guidance moves the mean and nothing else


def test_the_mean_and_the_deviation_of_guided_images():
    for scale in (1.0, 2.0, 4.0):
        pixels = run(**{**GUIDED, "guidance_scale": scale}).flatten().double()
        plain = run(class_labels=LABELS).flatten().double()
        assert float(pixels[2] - pixels[0]) == pytest.approx(float(plain[2] - plain[0]), abs=1e-5)
        # mean m of the data adds c m to f(0), and DDIM is exact in m but for its last digits
        mean = -0.8 + scale * 1.6
        assert float(pixels[1] / plain[1]) == pytest.approx(mean / 0.8, rel=1e-5)


def test_scale_one_and_zero_are_the_two_models():
    conditional, unconditional = run(class_labels=LABELS), run(class_labels=LABELS + 1)
    assert torch.equal(run(**{**GUIDED, "guidance_scale": 1.0}), conditional)
    assert torch.equal(run(**{**GUIDED, "guidance_scale": 0.0}), unconditional)
    assert not torch.equal(conditional, unconditional)


# Interval


@pytest.mark.parametrize(
    ("interval", "guided"),
    [((200, 700), [699, 599, 499, 399, 299]), ((499, 499), [499]), ((0, 1000), GRID)],
)
def test_outside_the_interval_there_is_no_second_pass(interval, guided):
    network = OptimalNetwork(mean=0.8)
    images = run(network=network, guidance_interval=interval, **GUIDED)
    assert network.batches == [6 if t in guided else 3 for t in GRID]
    x = np.array([-1.0, 0.0, 1.0])
    for t, after in zip(GRID, [*GRID[1:], None], strict=True):
        a, b = ALPHA_BAR[t], 1.0 if after is None else ALPHA_BAR[after]
        eps = eps_of(x, t, -0.8 + 3.0 * 1.6 if t in guided else 0.8)
        x = np.sqrt(b / a) * (x - np.sqrt(1 - a) * eps) + np.sqrt(1 - b) * eps
    np.testing.assert_allclose(images.flatten(), x, atol=3e-6 * abs(x).max())


def test_outside_the_interval_is_the_conditional_model_to_the_bit():
    seen = {}
    for name, options in {
        "interval": {**GUIDED, "guidance_interval": (0, 500)},
        "off": {"class_labels": LABELS},
    }.items():
        run(callback=lambda k, t, x, x0, name=name: seen.update({(name, int(t)): x.clone()}), **options)
    for t in GRID:
        assert torch.equal(seen["interval", t], seen["off", t]) == (t >= 499)
    assert torch.equal(run(guidance_interval=(0, 999), **GUIDED), run(**GUIDED))


@pytest.mark.parametrize("interval", [(2000, 3000), (1000.5, 2000), (0, 98.9), (500, 598)])
@pytest.mark.parametrize("rule", ["cfg", "cfg++"])
def test_an_interval_without_a_step_in_it_is_refused(interval, rule):
    network, options = OptimalNetwork(mean=0.8), {**GUIDED, "guidance_scale": 0.6, "guidance_rule": rule}
    with pytest.raises(ValueError, match=r"holds none of the 10 timesteps of this run, 99 to 999, .* use a wider one"):
        run(network=network, guidance_interval=interval, **options)
    assert network.batches == []


def test_the_interval_of_a_flow_is_on_the_networks_scale():
    network = OptimalNetwork("flow_prediction", mean=0.8)
    run(FlowEulerScheduler(), network=network, guidance_interval=(300, 600), **GUIDED)
    assert network.batches == [6 if 300 <= t <= 600 else 3 for t in range(1000, 0, -100)]


def test_the_interval_goes_by_the_schedule_when_time_shift_tells_the_network_another_step():
    network = OptimalNetwork(mean=0.8)
    scheduler = TimeShiftScheduler(exposure_window=150, exposure_mode="network", exposure_cutoff=0)
    images = run(scheduler, network=network, noise=noise_of(3), guidance_interval=(400, 600), **GUIDED)
    assert network.batches == [6 if 400 <= t <= 600 else 3 for t in GRID]
    assert images.isfinite().all()


# Channels


class Labelled(nn.Module):
    """An answer that depends on the label in every channel; with a learned variance if asked."""

    def __init__(self, learned=False):
        super().__init__()
        self.learned = learned

    def forward(self, x, t, class_labels=None):
        mean = 0.6 * x + 0.1 * class_labels.reshape(-1, 1, 1, 1)
        return SimpleNamespace(sample=torch.cat([mean, 0 * x + 0.2], dim=1) if self.learned else mean)


@pytest.mark.parametrize("learned", [False, True])
def test_only_the_first_channels_are_guided(learned):
    """DiT's own code guides three of four latent channels; the network mixes none, so channels stay apart."""
    kind = "learned_range" if learned else "fixed_small"
    common = {"noise": noise_of(3), "network": Labelled(learned)}

    def images(**options):
        generators = image_generators(3, range(3))
        return run(DDPMScheduler(variance_type=kind), generators=generators, **common, **options)

    some, every = images(guidance_channels=3, **GUIDED), images(**GUIDED)
    conditional = images(class_labels=LABELS)
    assert torch.equal(some[:, :3], every[:, :3])
    assert torch.equal(some[:, 3:], conditional[:, 3:])
    assert not torch.equal(every[:, 3:], conditional[:, 3:])
    assert torch.equal(images(guidance_channels=4, **GUIDED), every)


def test_channels_that_are_not_guided_stay_conditional_under_cfg_plus_plus():
    common = {"noise": noise_of(3), "network": Labelled()}
    some = run(guidance_channels=3, guidance_rule="cfg++", **common, **{**GUIDED, "guidance_scale": 0.6})
    assert torch.equal(some[:, 3:], run(class_labels=LABELS, **common)[:, 3:])


# CFG++


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_cfg_plus_plus_of_ddim_is_the_papers(scale):
    """Chung et al. 2024, algorithm 1: x0 from the guided eps, noise put back with the unconditional one."""
    got = run(guidance_rule="cfg++", **{**GUIDED, "guidance_scale": scale})
    x = np.array([-1.0, 0.0, 1.0])
    for t, after in zip(GRID, [*GRID[1:], None], strict=True):
        a, b = ALPHA_BAR[t], 1.0 if after is None else ALPHA_BAR[after]
        guided, null = eps_of(x, t, -0.8 + scale * 1.6), eps_of(x, t, -0.8)
        x = np.sqrt(b) * (x - np.sqrt(1 - a) * guided) / np.sqrt(a) + np.sqrt(1 - b) * null
    np.testing.assert_allclose(got.flatten(), x, atol=3e-6 * max(abs(x).max(), 1))


def test_cfg_plus_plus_of_a_flow_is_as_flow_models_run_it():
    got = run(
        FlowEulerScheduler(), network=OptimalNetwork("flow_prediction", mean=0.8), guidance_rule="cfg++",
        **{**GUIDED, "guidance_scale": 0.6},
    )  # fmt: skip
    x = np.array([-1.0, 0.0, 1.0])
    for k in range(10, 0, -1):
        s, after = k / 10, (k - 1) / 10
        d = {m: (x - (1 - s) * m) / ((1 - s) ** 2 * VARIANCE + s**2) for m in (0.8, -0.8)}
        v = {m: s * d[m] - m - (1 - s) * VARIANCE * d[m] for m in d}
        guided = v[-0.8] + 0.6 * (v[0.8] - v[-0.8])
        x = x - s * guided + after * v[-0.8]
    np.testing.assert_allclose(got.flatten(), x, atol=3e-6)


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [
        (DDIMScheduler(), "epsilon"),
        (DDIMScheduler(prediction_type="v_prediction"), "v_prediction"),
        (DDIMScheduler(prediction_type="sample"), "sample"),
        (FlowEulerScheduler(), "flow_prediction"),
    ],
)
def test_cfg_plus_plus_is_plain_when_the_two_answers_agree(scheduler, kind):
    same = {"class_labels": LABELS, "null_label": 0}
    network = OptimalNetwork(kind, mean=0.8)
    plain = run(scheduler, network=network, class_labels=LABELS)
    for scale in (0.6, 1.0):
        got = run(scheduler, network=network, guidance_rule="cfg++", guidance_scale=scale, **same)
        torch.testing.assert_close(got, plain, atol=2e-6, rtol=1e-5)
    assert network.batches == [3] * 10 + [6] * 20


def test_cfg_plus_plus_of_every_prediction_type_walks_one_trajectory():
    results = [
        run(
            DDIMScheduler(prediction_type=kind), network=OptimalNetwork(kind, mean=0.8), guidance_rule="cfg++",
            eta=1.0, generators=image_generators(0, range(3)), **{**GUIDED, "guidance_scale": 0.6},
        )
        for kind in ("epsilon", "v_prediction", "sample")
    ]  # fmt: skip
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-5, rtol=1e-5)


def test_cfg_plus_plus_keeps_to_its_interval():
    network = OptimalNetwork(mean=0.8)
    options = {**GUIDED, "guidance_rule": "cfg++", "guidance_scale": 0.6, "guidance_interval": (200, 700)}
    run(network=network, **options)
    assert network.batches == [6 if 200 <= t <= 700 else 3 for t in GRID]


@pytest.mark.parametrize("scale", [1.001, 1.5, 7.0])
def test_cfg_plus_plus_is_refused_beyond_its_scales(scale):
    with pytest.raises(
        ValueError, match=rf"guidance_scale is {scale}, but guidance_rule 'cfg\+\+' takes 0 to 1; give one"
    ):
        run(guidance_rule="cfg++", **{**GUIDED, "guidance_scale": scale})


@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler(), TimeShiftScheduler(), UniPCScheduler(), diffusers.DDIMScheduler()]
)
def test_cfg_plus_plus_is_refused_where_there_is_none(scheduler):
    with pytest.raises(
        ValueError, match=f"'cfg\\+\\+' works with ddim and flow-euler, not with {type(scheduler).__name__}"
    ):
        run(scheduler, guidance_rule="cfg++", **{**GUIDED, "guidance_scale": 0.6})


@pytest.mark.parametrize("scheduler", [FlowHeunScheduler(), FlowSDEScheduler()])
def test_cfg_plus_plus_is_refused_by_the_other_flows(scheduler):
    with pytest.raises(ValueError, match=r"works with ddim and flow-euler"):
        run(
            scheduler, network=OptimalNetwork("flow_prediction"), guidance_rule="cfg++",
            **{**GUIDED, "guidance_scale": 0.6},
        )  # fmt: skip


# Refusals


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scale": -0.1}, "guidance_scale is -0.1, but it must be 0 or more"),
        ({"scale": float("inf")}, "guidance_scale is inf"),
        ({"scale": 2.0, "interval": (500, 400)}, r"guidance_interval \(500, 400\) must be \(lowest, highest\)"),
        ({"scale": 2.0, "interval": (float("nan"), 400)}, "guidance_interval"),
        ({"scale": 2.0, "interval": (1, 2, 3)}, r"guidance_interval \(1, 2, 3\) must be \(lowest, highest\)"),
        ({"scale": 2.0, "interval": 5}, r"guidance_interval 5 must be \(lowest, highest\)"),
        ({"scale": 2.0, "channels": 0}, "guidance_channels is 0, but it must be 1 or more"),
        ({"scale": 2.0, "rule": "cfg+"}, r"guidance_rule 'cfg\+' is not one of cfg, cfg\+\+"),
        ({"interval": (0, 500)}, "do nothing at guidance_scale 1"),
        ({"channels": 3}, "do nothing at guidance_scale 1"),
    ],
)
def test_mistakes_are_refused_in_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Guidance(**options)


def test_guidance_that_cannot_apply_is_refused():
    with pytest.raises(ValueError, match="needs class labels; an unconditional model can only be sampled"):
        run(guidance_scale=2.0)
    with pytest.raises(ValueError, match="needs class labels"):
        run(guidance_rule="cfg++", guidance_scale=0.5)
    with pytest.raises(ValueError, match="needs the model's null label"):
        run(guidance_scale=2.0, class_labels=LABELS)
    with pytest.raises(ValueError, match="guidance_channels is 5, but the images have 4"):
        run(noise=noise_of(3), guidance_channels=5, **GUIDED)


@pytest.mark.parametrize("interval", [[0, 500], np.array([0, 500]), torch.tensor([0.0, 500.0])])
def test_an_interval_is_any_pair_of_numbers(interval):
    assert torch.equal(run(guidance_interval=interval, **GUIDED), run(guidance_interval=(0, 500), **GUIDED))


@pytest.mark.parametrize("interval", [5, (1, 2, 3), (500, 0), (None, 5)])
def test_what_is_no_interval_is_refused(interval):
    with pytest.raises(ValueError, match="must be \\(lowest, highest\\) timestep"):
        run(guidance_interval=interval, **GUIDED)
