"""Names to schedulers, and which networks each one fits."""

import json

import diffusers
import pytest
import torch

from samplers import SAMPLERS, DDIMScheduler, DDPMScheduler, FlowEulerScheduler, make_scheduler


def test_every_sampler_is_made_for_every_objective_that_it_fits():
    for name, entry in SAMPLERS.items():
        for kind in entry.prediction_types:
            scheduler = make_scheduler(name, {"prediction_type": kind, "num_train_timesteps": 400})
            assert type(scheduler) is entry.scheduler
            assert scheduler.config.prediction_type == kind
            assert len(scheduler) == 400


def test_a_model_keeps_its_schedule_from_sampler_to_sampler():
    saved = DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", variance_type="learned_range")
    ddim = make_scheduler("ddim", saved.config)
    assert type(ddim) is DDIMScheduler
    assert ddim.alphas_cumprod.equal(saved.alphas_cumprod)
    back = make_scheduler("ddpm", ddim.config)
    assert back.variance_type == "learned_range"
    assert back.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("stock", [diffusers.HeunDiscreteScheduler, diffusers.DDPMScheduler])
def test_a_config_means_the_same_in_memory_and_on_disk(stock, tmp_path):
    """Heun's default betas are not those of DDPM; from_config alone would switch to ours."""
    scheduler = stock()
    scheduler.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    for config in (scheduler.config, saved):
        ddim = make_scheduler("ddim", config)
        torch.testing.assert_close(ddim.alphas_cumprod, scheduler.alphas_cumprod)
        assert ddim.config.timestep_spacing == scheduler.config.timestep_spacing


def test_stock_configs_say_what_they_predict():
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler = make_scheduler("flow-euler", flow.config)
    assert type(scheduler) is FlowEulerScheduler
    assert scheduler.config.shift == 3
    assert type(make_scheduler("ddim", diffusers.PNDMScheduler().config)) is DDIMScheduler
    assert make_scheduler("ddpm", {}).config.prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("name", "config", "sentence"),
    [
        ("flow-euler", {"prediction_type": "epsilon"}, "'epsilon'; use ddpm or ddim"),
        ("flow-euler", {}, "'epsilon'; use ddpm or ddim"),
        ("ddim", {"prediction_type": "flow_prediction"}, "'flow_prediction'; use flow-euler"),
        ("ddim", {"shift": 1.0}, "use flow-euler"),
        ("ddmp", {}, "no sampler 'ddmp'; did you mean 'ddpm'"),
        ("zzz", {}, "no sampler 'zzz'; choose from ddpm, ddim, flow-euler"),
        ("ddpm", {"prediction_type": "noise"}, "'noise' is not one of epsilon, v_pred"),
        (
            "flow-euler",
            {"prediction_type": "flow_prediction", "use_dynamic_shifting": True},
            "has no use_dynamic_shifting",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(name, config, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_scheduler(name, config)
