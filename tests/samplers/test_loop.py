"""The one loop: closed-form guidance, batches, diffusers' networks and schedulers, refusals."""

from itertools import pairwise
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
    TimeShiftScheduler,
    image_generators,
    initial_noise,
    sample,
)
from tests.reference.gaussian_world import ALPHA_BAR, MEAN, VARIANCE, OptimalNetwork, Z

ZEROS = torch.zeros(3, dtype=torch.int64)


def noise_of(n, shape=(3, 8, 8), seed=0):
    return initial_noise(image_generators(seed, range(n)), shape, "cpu")


class Elementwise(nn.Module):
    """A network without reductions: an image's bits cannot depend on its batch mates."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, t, class_labels=None):
        labels = 0 if class_labels is None else class_labels.reshape(-1, 1, 1, 1)
        assert x.dtype == torch.float32
        return SimpleNamespace(sample=self.dropout(0.5 * x + 0.1 * labels + t.reshape(-1, 1, 1, 1) / 1e4))


# Guidance


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
def test_guidance_is_the_closed_form(scale):
    """Every network is affine in x, so the guided DDIM chain is a product of scalars."""
    got = sample(
        OptimalNetwork(mean=0.8),
        DDIMScheduler(timestep_spacing="trailing"),
        Z,
        num_inference_steps=10,
        class_labels=ZEROS,
        null_label=1,
        guidance_scale=scale,
    )
    x = np.array([-1.0, 0.0, 1.0])
    steps = [999 - 100 * k for k in range(10)]
    for t, previous in zip(steps, [*steps[1:], None], strict=True):
        a, a_prev = ALPHA_BAR[t], 1.0 if previous is None else ALPHA_BAR[previous]
        # eps = sqrt(1 - a) (x - sqrt(a) m) / (a v + 1 - a), and guidance acts on the mean m alone
        mean = -0.8 + scale * (0.8 - -0.8)
        eps = np.sqrt(1 - a) * (x - np.sqrt(a) * mean) / (a * VARIANCE + 1 - a)
        x = np.sqrt(a_prev / a) * (x - np.sqrt(1 - a) * eps) + np.sqrt(1 - a_prev) * eps
    np.testing.assert_allclose(got.flatten(), x, atol=3e-6 * abs(x).max())


def test_scale_one_is_the_conditional_model_in_one_pass():
    network = OptimalNetwork()
    options = {"num_inference_steps": 5, "class_labels": torch.tensor([0, 1, 2])}
    plain = sample(network, DDIMScheduler(), Z, **options)
    assert network.batches == [3] * 5
    one = sample(network, DDIMScheduler(), Z, null_label=2, guidance_scale=1.0, **options)
    assert network.batches == [3] * 10
    assert torch.equal(one, plain)
    sample(network, DDIMScheduler(), Z, null_label=2, guidance_scale=1.5, **options)
    assert network.batches == [3] * 10 + [6] * 5
    for i in range(3):  # each image has its own label
        alone = sample(
            network,
            DDIMScheduler(),
            Z[i : i + 1],
            num_inference_steps=5,
            class_labels=torch.tensor([i]),
        )
        assert torch.equal(alone[0], plain[i])


def test_guidance_leaves_the_learned_variance_conditional():
    scheduler = DDPMScheduler(variance_type="learned_range")
    common = {
        "num_inference_steps": 4,
        "class_labels": ZEROS,
        "null_label": 1,
        "guidance_scale": 3.0,
    }

    def images(v, scheduler=scheduler):
        return sample(OptimalNetwork(v=v), scheduler, Z, generators=image_generators(0, range(3)), **common)

    assert torch.equal(images([0.3, -0.9, 0.0]), images([0.3, 0.7, 0.0]))
    assert not torch.equal(images([0.3, -0.9, 0.0]), images([0.4, -0.9, 0.0]))
    fixed = images(None, DDPMScheduler(variance_type="fixed_small"))
    torch.testing.assert_close(images([-1.0, 1.0, 1.0]), fixed)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(),
        DDIMScheduler.from_config(DDPMScheduler(variance_type="learned_range").config),
        diffusers.PNDMScheduler(),
    ],
)
def test_schedulers_without_use_for_the_variance_never_see_it(scheduler):
    plain, learned = (
        sample(
            OptimalNetwork(v=v),
            scheduler,
            Z,
            num_inference_steps=4,
            generators=image_generators(0, range(3)),
        )
        for v in (None, [0.5])
    )
    assert torch.equal(plain, learned)


# Batches


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (DDPMScheduler(), {}),
        (DDIMScheduler(), {"eta": 1.0}),
        (FlowEulerScheduler(), {}),
        (DDPMScheduler(), {"guidance_scale": 2.0, "null_label": 9}),
    ],
)
def test_an_image_is_the_same_in_any_batch(scheduler, options):
    labels = torch.arange(4)

    def images(indices):
        generators = image_generators(5, indices)
        noise = initial_noise(generators, (3, 4, 4), "cpu")
        return sample(
            Elementwise(),
            scheduler,
            noise,
            num_inference_steps=6,
            generators=generators,
            class_labels=labels[list(indices)],
            **options,
        )

    whole = images(range(4))
    assert not torch.equal(whole[0], whole[1])
    for i in range(4):
        assert torch.equal(images([i])[0], whole[i])
    assert torch.equal(images([3, 1]), whole[[3, 1]])


def test_without_generators_noise_comes_from_the_global_one():
    def images(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return sample(Elementwise(), DDPMScheduler(), noise_of(2), num_inference_steps=4)

    assert torch.equal(images(0), images(0))
    assert not torch.equal(images(0), images(1))


# Networks and schedulers of diffusers


def tiny_unet(**config):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        **config,
    )


def tiny_dit():
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )


def test_an_unconditional_unet():
    images = sample(tiny_unet(), DDIMScheduler(), noise_of(2), num_inference_steps=3)
    assert images.shape == (2, 3, 8, 8)
    assert images.dtype == torch.float32
    assert images.isfinite().all()


def test_a_class_conditional_unet_in_half_precision():
    unet = tiny_unet(num_class_embeds=11).bfloat16()
    images = sample(
        unet,
        DDIMScheduler(),
        noise_of(2),
        num_inference_steps=3,
        class_labels=torch.tensor([1, 2]),
        null_label=10,
        guidance_scale=2.0,
    )
    assert images.dtype == torch.float32
    assert images.isfinite().all()


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_dit_is_guided_as_by_hand(variance):
    """The whole chain of a DiT with 2C channels, written out once more without the loop."""
    model, scheduler = tiny_dit(), DDPMScheduler(variance_type=variance)
    noise, labels = noise_of(2, (4, 8, 8)), torch.tensor([3, 7])
    got = sample(
        model,
        scheduler,
        noise,
        num_inference_steps=4,
        generators=image_generators(1, range(2)),
        class_labels=labels,
        null_label=10,
        guidance_scale=4.0,
    )
    x, generators = noise, image_generators(1, range(2))
    model.eval()
    with torch.no_grad():
        for t in (999, 749, 499, 249):
            time = torch.tensor([t, t])
            cond, uncond = (model(x, time, y).sample for y in (labels, torch.tensor([10, 10])))
            eps = uncond[:, :4] + 4.0 * (cond[:, :4] - uncond[:, :4])
            output = eps if variance == "fixed_small" else torch.cat([eps, cond[:, 4:]], dim=1)
            x = scheduler.step(output, t, x, generators).prev_sample
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5 * float(x.abs().max()))


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DPMSolverMultistepScheduler(),
        diffusers.HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02),
        diffusers.EulerDiscreteScheduler(),
        diffusers.PNDMScheduler(),
        diffusers.DDPMScheduler(clip_sample=False),
    ],
)
def test_stock_schedulers_make_the_data(scheduler):
    images = sample(
        OptimalNetwork(),
        scheduler,
        Z,
        num_inference_steps=50,
        generators=image_generators(0, range(3)),
    )
    assert images.isfinite().all()
    if not isinstance(scheduler, diffusers.DDPMScheduler):
        std = (images[2] - images[0]).item() / 2
        assert std == pytest.approx(VARIANCE**0.5, abs=0.03)


def test_a_stock_flow_scheduler():
    stock = diffusers.FlowMatchEulerDiscreteScheduler()
    images = sample(OptimalNetwork("flow_prediction"), stock, Z, num_inference_steps=10)
    assert (images[2] - images[0]).item() / 2 == pytest.approx(0.4238, abs=1e-4)


# The loop's manners


def test_the_mode_of_every_module_is_restored():
    model = nn.Module()
    model.inner, model.frozen = Elementwise(), nn.Dropout()
    model.forward = lambda x, t, class_labels=None: model.inner(x, t, class_labels)
    model.frozen.eval()
    modes = [module.training for module in model.modules()]
    assert modes.count(True) == 3
    assert modes.count(False) == 1
    images = [sample(model, DDIMScheduler(), noise_of(2), num_inference_steps=2) for _ in "ab"]
    assert torch.equal(*images)  # dropout was off
    assert [module.training for module in model.modules()] == modes

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, DDIMScheduler(), noise_of(2), num_inference_steps=2, callback=stop)
    assert [module.training for module in model.modules()] == modes


def test_the_callback_sees_where_each_step_started():
    seen, noise = [], noise_of(2)
    scheduler = DDIMScheduler()
    images = sample(
        Elementwise(),
        scheduler,
        noise,
        num_inference_steps=4,
        callback=lambda k, t, x_t, pred_x0: seen.append((k, int(t), x_t.clone(), pred_x0.clone())),
    )
    assert [(k, t) for k, t, _, _ in seen] == [(0, 999), (1, 749), (2, 499), (3, 249)]
    assert torch.equal(seen[0][2], noise)
    assert torch.equal(seen[-1][3], images)  # the last step goes to its prediction of x0
    for (_, t, x_t, x0), (_, _, x_next, _) in pairwise(seen):
        step = scheduler.step(Elementwise().eval()(x_t, torch.tensor([t, t])).sample, t, x_t)
        assert torch.equal(step.prev_sample, x_next)
        assert torch.equal(step.pred_original_sample, x0)

    predictions = []
    sample(
        OptimalNetwork("flow_prediction"),
        diffusers.FlowMatchEulerDiscreteScheduler(),
        Z,
        num_inference_steps=2,
        callback=lambda *args: predictions.append(args[3]),
    )
    assert predictions == [None, None]


def test_labels_may_be_a_list():
    a, b = (
        sample(Elementwise(), DDIMScheduler(), noise_of(2), num_inference_steps=2, class_labels=labels)
        for labels in ([3, 1], torch.tensor([3, 1]))
    )
    assert torch.equal(a, b)


def test_images_are_ordinary_tensors_and_the_noise_is_untouched():
    noise = noise_of(2)
    before = noise.clone()
    images = sample(Elementwise(), DDIMScheduler(), noise, num_inference_steps=2)
    images.mul_(2).requires_grad_()
    images.sum().backward()
    assert torch.equal(noise, before)


def test_progress_is_silent_unless_asked_for_on_a_terminal(capsys):
    sample(Elementwise(), DDIMScheduler(), noise_of(1), num_inference_steps=2, progress=True)
    sample(Elementwise(), DDIMScheduler(), noise_of(1), num_inference_steps=2)
    assert capsys.readouterr().err == ""


# Refusals


def test_another_batch_in_the_middle_of_a_run_is_refused():
    scheduler = TimeShiftScheduler(exposure_window=150, exposure_mode="both", exposure_cutoff=0)
    scheduler.set_timesteps(10)
    x, first, second = noise_of(3), *scheduler.timesteps[:2]
    x = scheduler.step(x.sin(), first, x).prev_sample[:2]
    assert scheduler.model_timestep(second).shape == (3,)
    with pytest.raises(ValueError, match="2 images follow 3; call set_timesteps before another batch"):
        scheduler.step(x.sin(), second, x)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 1001}, "must be an integer from 1 to 1000"),
        ({"num_inference_steps": 2.0}, "num_inference_steps is 2.0"),
        ({"guidance_scale": 4.0}, "needs class labels"),
        ({"guidance_scale": 4.0, "class_labels": torch.tensor([0, 1])}, "needs the model's null"),
        ({"guidance_scale": -1.0}, "must be 0 or more"),
        ({"guidance_scale": float("nan")}, "must be 0 or more"),
        ({"class_labels": torch.tensor([0])}, r"shape \(1,\) for 2 images"),
        ({"generators": image_generators(0, [0])}, "1 generators were given for 2 images"),
        ({"scheduler": DDPMScheduler(), "eta": 0.5}, "DDPMScheduler has no eta; use 0, or 'ddim' or 'ts-ddim'"),
        ({"eta": 2.0}, "eta is 2.0"),
        ({"epsilon_scale": "1.01"}, "epsilon_scale is '1.01', but it must be a number b, or "),
        ({"epsilon_scale": (0.0, 1.0, 2.0)}, r"epsilon_scale is \(0.0, 1.0, 2.0\), but it must be a number b, or "),
        ({"scheduler": DDPMScheduler(variance_type="learned_range")}, "emits 3 channels"),
        ({"noise": noise_of(2, (5, 8, 8))}, "must emit 5, or 10"),
    ],
)
def test_what_cannot_apply_is_refused_in_a_sentence(options, sentence):
    class ThreeChannels(Elementwise):
        def forward(self, x, t, class_labels=None):
            return SimpleNamespace(sample=x[:, :3])

    arguments = {"scheduler": DDIMScheduler(), "noise": noise_of(2), "num_inference_steps": 2}
    with pytest.raises(ValueError, match=sentence):
        sample(ThreeChannels(), **{**arguments, **options})


@pytest.mark.parametrize(
    ("trained", "scheduler"),
    [
        ("flow_prediction", DDIMScheduler()),
        ("epsilon", DDIMScheduler(prediction_type="v_prediction")),
        ("epsilon", diffusers.FlowMatchEulerDiscreteScheduler.from_config({"beta_schedule": "linear"})),
    ],
)
def test_a_scheduler_for_another_objective_gets_translated_answers(trained, scheduler):
    model = OptimalNetwork(trained)
    model.config = SimpleNamespace(prediction_type=trained)
    x = sample(model, scheduler, Z, num_inference_steps=200).flatten()
    assert float(x[1]) == pytest.approx(MEAN, abs=0.02)
    assert float((x[2] - x[0]) / 2) == pytest.approx(VARIANCE**0.5, rel=0.03)
