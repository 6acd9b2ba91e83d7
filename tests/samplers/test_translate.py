"""Every sampler draws from every network: flow matching and variance-preserving diffusion as one family."""

import inspect
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from samplers import SAMPLERS, Translated, image_generators, make_scheduler, sample
from samplers.catalog import FLOW, chain_of
from samplers.gaussian import PREDICTION_TYPES
from samplers.translate import Translation
from tests.reference.gaussian_world import ALPHA_BAR, MEAN, VARIANCE, OptimalNetwork, Z

CHAIN = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
GAUSSIAN = [name for name, entry in SAMPLERS.items() if entry.prediction_types != FLOW]
FLOWS = [name for name in SAMPLERS if name not in GAUSSIAN]


def network(kind, **options):
    net = OptimalNetwork(kind, **options)
    net.config = SimpleNamespace(prediction_type=kind)
    return net


def drawn(name, kind, steps=20, **options):
    scheduler = make_scheduler(name, {**CHAIN, "prediction_type": kind, "data_variance": VARIANCE})
    net = network(kind)
    noise = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generators = image_generators(3, range(6))
    return sample(net, scheduler, noise, num_inference_steps=steps, generators=generators, **options)


@pytest.mark.parametrize("name", GAUSSIAN)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "flow_prediction"])
def test_samplers_of_a_chain_draw_the_same_images_from_every_network(name, kind):
    torch.testing.assert_close(drawn(name, kind), drawn(name, "v_prediction"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_flow_samplers_draw_the_same_images_from_every_network(name, kind):
    # the chain begins at s = 0.9936, the flow at 1: the first answer of a chain's network is that of its noisiest level
    torch.testing.assert_close(drawn(name, kind), drawn(name, "flow_prediction"), rtol=0, atol=0.003)


@pytest.mark.parametrize("mode", ["target", "network", "both"])
@pytest.mark.parametrize("base", ["ddim", "ddpm", "pndm"])
def test_time_shift_chooses_the_same_timesteps_on_a_translated_network(base, mode):
    shifts = {}
    for kind in ("v_prediction", "flow_prediction"):
        config = {**CHAIN, "prediction_type": kind, "data_variance": VARIANCE}
        options = {"exposure_mode": mode, "exposure_window": 60, "exposure_variance": "calibrated"}
        scheduler = make_scheduler(f"ts-{base}", config, options)
        step, found = scheduler.step, []

        def told(*args, step=step, found=found, **more):
            out = step(*args, **more)
            found.append(out.shift)
            return out

        told.__signature__ = inspect.signature(step)
        scheduler.step = told
        noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        sample(
            network(kind), scheduler, noise, num_inference_steps=12, generators=image_generators(0, range(4))
        )  # fmt: skip
        shifts[kind] = torch.stack(found)
    assert torch.equal(shifts["v_prediction"], shifts["flow_prediction"])
    assert shifts["v_prediction"].abs().sum() > 0


def test_a_flow_network_reaches_the_data_by_every_sampler_of_a_chain():
    for name in ("ddim", "dpm++2m", "unipc", "pndm"):
        scheduler = make_scheduler(name, {**CHAIN, "prediction_type": "flow_prediction"})
        x = sample(network("flow_prediction"), scheduler, Z, num_inference_steps=200).flatten().double()
        assert float(x[1]) == pytest.approx(MEAN, abs=0.01)
        assert float((x[2] - x[0]) / 2) == pytest.approx(VARIANCE**0.5, rel=0.02)


def test_a_chains_network_reaches_the_data_by_every_flow_sampler():
    for name in ("flow-euler", "flow-heun"):
        scheduler = make_scheduler(name, {**CHAIN, "prediction_type": "epsilon"})
        x = sample(network("epsilon"), scheduler, Z, num_inference_steps=200).flatten().double()
        assert float(x[1]) == pytest.approx(MEAN, abs=0.02)
        assert float((x[2] - x[0]) / 2) == pytest.approx(VARIANCE**0.5, rel=0.02)


def test_the_formulas():
    a = torch.tensor(0.3, dtype=torch.float64)
    x0, eps = torch.randn(2, 2, 1, 4, 4)
    chain = torch.linspace(0.99, 0.3, 5, dtype=torch.float64)
    x = a.sqrt() * x0 + (1 - a).sqrt() * eps
    s = (1 - a).sqrt() / (a.sqrt() + (1 - a).sqrt())
    heard = []

    def flow(x_flow, t):
        heard.append((x_flow, t))
        return eps - x0

    for wanted, answer in (("epsilon", eps), ("sample", x0), ("v_prediction", a.sqrt() * eps - (1 - a).sqrt() * x0)):
        said = Translation("flow_prediction", wanted, chain)(flow, x.float(), torch.tensor(4))
        torch.testing.assert_close(said, answer.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(heard[0][0], ((1 - s) * x0 + s * eps).float(), rtol=1e-5, atol=1e-5)
    assert float(heard[0][1]) == pytest.approx(1000 * float(s), rel=1e-6)

    def vp(x_vp, t):
        torch.testing.assert_close(x_vp, x.float(), rtol=1e-4, atol=1e-4)
        assert float(t) == pytest.approx(4.0)
        assert t.dtype == torch.float32  # MPS has no float64
        return eps

    x_flow = ((1 - s) * x0 + s * eps).float()
    said = Translation("epsilon", "flow_prediction", chain)(vp, x_flow, 1000 * s)
    torch.testing.assert_close(said, (eps - x0).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained", PREDICTION_TYPES)
@pytest.mark.parametrize("wanted", PREDICTION_TYPES)
def test_the_formulas_between_networks_of_a_chain(trained, wanted):
    x0, eps = torch.randn(2, 2, 1, 4, 4)
    a, t = torch.tensor([0.9, 0.3]), torch.tensor([0, 1])
    signal, noise = a.sqrt()[:, None, None, None], (1 - a).sqrt()[:, None, None, None]
    answers = {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - noise * x0}
    said = Translation(trained, wanted, a.double())(lambda x, t: answers[trained], signal * x0 + noise * eps, t)
    torch.testing.assert_close(said, answers[wanted], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sample", "flow_prediction"])
def test_timesteps_between_those_of_the_chain_are_told_exactly(kind):
    def of_stock_euler(kind, wanted):
        scheduler = diffusers.EulerDiscreteScheduler(
            beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type=wanted, use_karras_sigmas=True
        )
        images = sample(network(kind), scheduler, Z, num_inference_steps=7)
        assert any(t != round(t) for t in scheduler.timesteps.tolist())
        return images

    torch.testing.assert_close(of_stock_euler(kind, "epsilon"), of_stock_euler("epsilon", "epsilon"), rtol=0, atol=2e-3)


def test_a_flow_sampler_asks_a_chain_between_its_timesteps():
    heard = []

    def ask(x, t):
        heard.append(t)
        return x

    each, s = Translation("epsilon", "flow_prediction", torch.from_numpy(ALPHA_BAR)), 0.4321
    each(ask, torch.zeros(1, 1, 2, 2), torch.tensor(1000 * s))
    ratio = ((1 - ALPHA_BAR) / ALPHA_BAR) ** 0.5
    assert float(heard[0]) == pytest.approx(np.interp(s / (1 - s), ratio, np.arange(1000)), abs=1e-3)
    assert float(heard[0]) % 1 > 0.01


def test_images_may_differ_in_their_timesteps():
    each = Translation("flow_prediction", "v_prediction", torch.from_numpy(ALPHA_BAR))
    net, x, t = network("flow_prediction"), torch.randn(3, 1, 4, 4), torch.tensor([10, 500, 999])

    def ask(x, t):
        return net(x, t).sample

    together = each(ask, x, t)
    for i in range(3):
        torch.testing.assert_close(each(ask, x[i : i + 1], t[i : i + 1])[0], together[i])


def test_a_learned_variance_passes_through():
    net = network("epsilon", v=[0.5, 0.5, 0.5])
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([500, 500])
    said = Translation("epsilon", "v_prediction", torch.from_numpy(ALPHA_BAR))(lambda x, t: net(x, t).sample, x, t)
    assert said.shape == (2, 2, 4, 4)
    assert (said[:, 1] == 0.5).all()


def test_the_chain_of_the_network_is_kept_by_a_flow_sampler_and_handed_on():
    cosine = {**CHAIN, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    flow = make_scheduler("flow-euler", cosine)
    assert flow.config.prediction_type == "flow_prediction"
    want = make_scheduler("ddim", cosine)._alpha_bar
    assert torch.equal(chain_of(flow.config), want)
    assert not torch.allclose(want, torch.from_numpy(ALPHA_BAR), atol=0.01)
    assert torch.equal(make_scheduler("ddim", {**flow.config, "prediction_type": "v_prediction"})._alpha_bar, want)


@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon"])
def test_pipelines_of_diffusers_take_a_translated_network(kind):
    from ditmoe.model import DiTMoETransformer2DModel

    torch.manual_seed(0)
    net = DiTMoETransformer2DModel(
        sample_size=8, in_channels=1, num_classes=0, hidden_size=16, depth=1, num_heads=2, ffn_width=16,
        moe_blocks="none", prediction_type=kind,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.2)
    scheduler = make_scheduler("ddim", {**CHAIN, "prediction_type": kind})
    images = []
    for unet in (Translated(net, scheduler), net):
        pipe = diffusers.DDPMPipeline(unet=unet, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(generator=torch.manual_seed(5), num_inference_steps=5, output_type="np").images)
    with torch.no_grad():
        asked = Translated(net, scheduler)(torch.ones(1, 1, 8, 8), 500, return_dict=False)
        assert torch.equal(asked[0], Translated(net, scheduler)(torch.ones(1, 1, 8, 8), 500).sample)
    noise = torch.randn(1, 1, 8, 8, generator=torch.manual_seed(5))
    ours = sample(net, scheduler, noise, num_inference_steps=5)
    np.testing.assert_allclose(images[0][..., 0], (ours / 2 + 0.5).clamp(0, 1).numpy()[:, 0], atol=1e-4)
    assert (kind == "flow_prediction") == (not np.allclose(images[0], images[1], atol=1e-3))


def test_unknown_prediction_types_are_refused():
    with pytest.raises(ValueError, match="prediction_type 'score' is not one of epsilon, v_prediction, sample, flow_"):
        Translation("score", "epsilon", torch.from_numpy(ALPHA_BAR))
    with pytest.raises(ValueError, match="prediction_type 'score' is not one of"):
        make_scheduler("ddim", {**CHAIN, "prediction_type": "score"})


def test_a_chain_that_a_flow_sampler_cannot_know_is_refused():
    stock = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(
        ValueError, match="FlowMatchEulerDiscreteScheduler does not say on which chain the network of 'eps"
    ):
        sample(network("epsilon"), stock, Z, num_inference_steps=3)
    with pytest.raises(ValueError, match="sampler 'flow-euler' has no rescale_betas_zero_snr"):
        make_scheduler("flow-euler", {**CHAIN, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    default = make_scheduler("flow-euler", {"prediction_type": "epsilon"})
    assert torch.equal(chain_of(default.config), chain_of({}))
    sample(network("epsilon"), default, Z, num_inference_steps=3)


def test_a_network_is_not_translated_twice():
    scheduler = make_scheduler("ddim", {**CHAIN, "prediction_type": "flow_prediction"})
    with pytest.raises(ValueError, match="Translated is for pipelines of diffusers"):
        sample(Translated(network("flow_prediction"), scheduler), scheduler, Z, num_inference_steps=3)


@pytest.mark.parametrize("name", FLOWS)
def test_the_chain_that_is_handed_on_is_not_called_unexpected(name, capfd):
    diffusers.logging.set_verbosity_warning()
    make_scheduler(name, {**CHAIN, "prediction_type": "epsilon"})
    assert capfd.readouterr().err == ""
