"""Autoguidance: a weaker network shows where not to go. In the Gaussian world it moves the mean, by the closed form."""

from types import SimpleNamespace

import pytest
import torch

from samplers import SAMPLERS, make_scheduler, sample
from samplers.catalog import FLOW
from tests.reference.gaussian_world import OptimalNetwork, Z

CHAIN = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
LABELS = torch.zeros(3, dtype=torch.int64)


def network(kind, mean):
    net = OptimalNetwork(kind, mean=mean)
    net.config = SimpleNamespace(prediction_type=kind)
    return net


def drawn(name="ddim", kind="v_prediction", guide_kind=None, scale=1.0, **options):
    scheduler = make_scheduler(name, {**CHAIN, "prediction_type": kind, "data_variance": 0.25})
    guide = None if scale == 1 else network(guide_kind or kind, 0.5)
    return sample(
        network(kind, 0.8), scheduler, Z, num_inference_steps=20, class_labels=LABELS, guide=guide, guide_scale=scale,
        generators=[torch.Generator().manual_seed(i) for i in range(3)], **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_moves_the_mean_away_from_the_guides(name):
    plain, guided = drawn(name).flatten().double(), drawn(name, scale=2.0).flatten().double()
    if name.startswith("ts-"):  # it goes by the images' variance, which guidance moves
        assert guided[1] > plain[1] + 0.2
        return
    # every sampler is affine and exact in the mean: 0.8 + (2 - 1) (0.8 - 0.5)
    assert float((guided - plain).std()) == pytest.approx(0, abs=1e-4)
    assert float(guided[1] - plain[1]) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("kind", ["epsilon", "flow_prediction"])
def test_the_guide_may_have_been_trained_otherwise(kind):
    torch.testing.assert_close(drawn(guide_kind=kind, scale=2.0), drawn(scale=2.0), rtol=1e-3, atol=1e-3)


def test_beside_classifier_free_guidance_both_differences_are_added():
    plain = drawn().flatten()
    both = drawn(scale=2.0, null_label=2, guidance_scale=1.5).flatten()  # the null label's mean is 0
    assert float(both[1] - plain[1]) == pytest.approx(0.3 + 0.5 * 0.8, abs=0.03)


def test_the_guide_is_told_the_labels():
    scheduler = make_scheduler("ddim", {**CHAIN, "prediction_type": "v_prediction"})
    labels, heard = torch.tensor([0, 1, 0]), []
    guide = network("v_prediction", 0.5)
    guide.register_forward_pre_hook(lambda module, args, kwargs: heard.append(kwargs["class_labels"]), with_kwargs=True)
    sample(
        network("v_prediction", 0.8), scheduler, Z, num_inference_steps=2, class_labels=labels, guide=guide,
        guide_scale=2.0,
    )  # fmt: skip
    assert all(torch.equal(told, labels) for told in heard)
    assert len(heard) == 2


def test_channels_that_are_not_guided_stay_those_of_the_model():
    scheduler = make_scheduler("ddim", {**CHAIN, "prediction_type": "v_prediction"})
    noise, options = Z.repeat(1, 2, 1, 1), {"num_inference_steps": 5, "class_labels": LABELS}
    plain = sample(network("v_prediction", 0.8), scheduler, noise, **options)
    guided = sample(
        network("v_prediction", 0.8), scheduler, noise, guide=network("v_prediction", 0.5), guide_scale=2.0,
        guidance_channels=1, **options,
    )  # fmt: skip
    assert torch.equal(guided[:, 1], plain[:, 1])
    assert (guided[:, 0] - plain[:, 0]).min() > 0.2


def test_outside_the_interval_neither_guide_nor_null_label_is_asked():
    scheduler = make_scheduler("ddim", {**CHAIN, "prediction_type": "v_prediction"})
    model, guide = network("v_prediction", 0.8), network("v_prediction", 0.5)
    sample(
        model, scheduler, Z, num_inference_steps=10, class_labels=LABELS, guide=guide, guide_scale=2.0,
        guidance_interval=(300, 700),
    )  # fmt: skip
    inside = sum(300 <= t <= 700 for t in scheduler.timesteps.tolist())
    assert model.batches == [3] * 10
    assert guide.batches == [3] * inside
    assert 0 < inside < 10


def test_a_model_without_labels_may_have_a_guide():
    scheduler = make_scheduler("flow-euler", {**CHAIN, "prediction_type": FLOW[0]})
    options = {"num_inference_steps": 20}
    plain = sample(network(FLOW[0], 0.8), scheduler, Z, **options)
    guided = sample(network(FLOW[0], 0.8), scheduler, Z, guide=network(FLOW[0], 0.5), guide_scale=3.0, **options)
    torch.testing.assert_close(guided - plain, torch.full_like(plain, 0.6), atol=0.03, rtol=0)


def test_both_networks_evaluate_and_get_their_modes_back():
    model, guide = network("v_prediction", 0.8), network("v_prediction", 0.5)
    seen = []
    guide.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    model.train()
    guide.train()
    scheduler = make_scheduler("ddim", {**CHAIN, "prediction_type": "v_prediction"})
    sample(model, scheduler, Z, num_inference_steps=2, class_labels=LABELS, guide=guide, guide_scale=2.0)
    assert seen == [False, False]
    assert model.training
    assert guide.training


def test_channels_that_images_do_not_have_are_refused_without_labels_too():
    scheduler = make_scheduler("flow-euler", {**CHAIN, "prediction_type": FLOW[0]})
    with pytest.raises(ValueError, match="guidance_channels is 7, but the images have 1"):
        sample(
            network(FLOW[0], 0.8), scheduler, Z, num_inference_steps=2, guide=network(FLOW[0], 0.5), guide_scale=2.0,
            guidance_channels=7,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"guide_scale": 2.0}, "guide_scale is 2.0: a guide and a scale other than 1 belong together"),
        ({"guide": OptimalNetwork()}, "guide_scale is 1.0: a guide and a scale other than 1 belong together"),
        ({"guide": OptimalNetwork(), "guide_scale": -1.0}, "guide_scale is -1.0, but it must be 0 or more"),
        (
            {"guide": OptimalNetwork(), "guide_scale": 2.0, "guidance_rule": "cfg++", "guidance_scale": 0.5},
            "guidance_rule 'cfg\\+\\+' has no guide",
        ),
    ],
)
def test_what_cannot_apply_is_refused_in_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        sample(
            OptimalNetwork(), make_scheduler("ddim", CHAIN), Z, num_inference_steps=2, class_labels=LABELS,
            null_label=2, **options,
        )  # fmt: skip
