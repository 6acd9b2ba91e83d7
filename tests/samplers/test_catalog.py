"""Names to schedulers, and which networks each one fits."""

import json
import re

import diffusers
import numpy as np
import pytest
import torch

from samplers import (
    SAMPLERS,
    DDIMScheduler,
    DDPMScheduler,
    FlowEulerScheduler,
    TimeShiftScheduler,
    catalog,
    make_scheduler,
    network_calls,
    sample,
)
from tests.reference.gaussian_world import OptimalNetwork, Z


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


@pytest.mark.parametrize("first", [name for name, entry in SAMPLERS.items() if "epsilon" in entry.prediction_types])
def test_every_sampler_goes_on_from_what_any_other_saved(first, tmp_path, caplog):
    """As `sample.py MODEL --sampler` does with a model that was saved with another sampler; and nothing is said."""
    diffusers.utils.logging.enable_propagation()
    saved = {"num_train_timesteps": 500, "prediction_type": "v_prediction", "data_variance": 0.4}
    make_scheduler(first, saved).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    for name, entry in SAMPLERS.items():
        if "epsilon" in entry.prediction_types:
            scheduler = make_scheduler(name, config)
            assert {key: scheduler.config[key] for key in saved} == saved
            if name in ("ddpm", "ts-ddpm"):
                assert scheduler.variance_type == "fixed_small"
    diffusers.utils.logging.disable_propagation()
    assert not caplog.records


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


@pytest.mark.parametrize("stock", [diffusers.UniPCMultistepScheduler, diffusers.DPMSolverMultistepScheduler])
@pytest.mark.parametrize("name", ["flow-euler", "flow-heun", "flow-sde"])
def test_a_flow_model_keeps_the_warp_that_it_was_saved_with(name, stock):
    """diffusers' solvers have `flow_shift` for what its flow schedulers call `shift`."""
    saved = stock(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction").config
    assert make_scheduler(name, saved).config.shift == 3
    assert make_scheduler(name, {**saved, "shift": 2.0}).config.shift == 2
    assert make_scheduler(name, saved, {"shift": 5.0}).config.shift == 5
    assert make_scheduler(name, make_scheduler("flow-euler", saved).config).config.shift == 3


@pytest.mark.parametrize(
    ("name", "config", "sentence"),
    [
        ("ddmp", {}, "no sampler 'ddmp'; did you mean 'ddpm'"),
        ("ddmi", {}, "no sampler 'ddmi'; did you mean 'ddim'"),
        ("zzz", {}, "no sampler 'zzz'; choose from ddpm, ddim, pndm, ts-ddpm, .*, flow-sde"),
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


# Names, options, costs


def test_the_names():
    assert list(SAMPLERS) == [
        *("ddpm", "ddim", "pndm", "ts-ddpm", "ts-ddim", "ts-pndm", "dpm++2m", "unipc"),
        *("flow-euler", "flow-heun", "flow-sde"),
    ]
    for base in ("ddpm", "ddim", "pndm"):
        scheduler = make_scheduler(f"ts-{base}", {})
        assert scheduler.config.base == base
        scheduler.set_timesteps(10)
        assert scheduler.window > 1  # the name means that it shifts
        assert make_scheduler(base, {}).config.get("exposure_window") is None


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [4, 11])
def test_network_calls_are_the_calls_that_a_network_gets(name, steps):
    kind = SAMPLERS[name].prediction_types[0]
    config = {"prediction_type": kind}
    expected = {"pndm": steps + 9, "ts-pndm": steps + 9, "flow-heun": 2 * steps}.get(name, steps)
    network = OptimalNetwork(kind)
    sample(network, make_scheduler(name, config), Z, num_inference_steps=steps)
    assert len(network.batches) == network_calls(name, config, steps) == expected


def test_options_differ_from_the_config_and_from_the_name():
    saved = DDPMScheduler(timestep_spacing="linspace", variance_type="learned_range").config
    scheduler = make_scheduler("ts-ddpm", saved, {"exposure_window": 64, "exposure_mode": "network"})
    assert scheduler.config.base == "ddpm"
    assert scheduler.variance_type == "learned_range"
    assert scheduler.config.timestep_spacing == "linspace"
    assert (scheduler.config.exposure_window, scheduler.config.exposure_mode) == (64, "network")
    assert make_scheduler("ddim", saved, {"timestep_spacing": "leading"}).config.timestep_spacing == "leading"
    assert make_scheduler("flow-sde", {"shift": 2.0}, {"last_step": 0.1}).config.last_step == 0.1


def test_a_samplers_options_do_not_stay_with_the_next_one():
    shifted = make_scheduler("ts-ddim", {}, {"exposure_window": 64})
    plain = make_scheduler("ddim", shifted.config)
    assert not [field for field in plain.config if field.startswith("exposure_")]
    network = OptimalNetwork()
    assert torch.equal(
        sample(network, plain, Z, num_inference_steps=5), sample(network, DDIMScheduler(), Z, num_inference_steps=5)
    )


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        (
            "ddim",
            {"exposure_window": 20},
            "sampler 'ddim' has no exposure_window; it belongs to ts-ddpm, ts-ddim, ts-pndm",
        ),
        ("flow-euler", {"last_step": 0.1}, "'flow-euler' has no last_step; it belongs to flow-sde"),
        ("unipc", {"clip_sample": True}, "'unipc' has no clip_sample; it belongs to ddpm, ddim, ts-ddpm"),
        ("pndm", {"wobble": 1}, "sampler 'pndm' has no wobble$"),
        ("ts-ddim", {"exposure_window": -1}, "exposure_window is -1"),
    ],
)
def test_options_that_a_sampler_lacks_are_refused(name, options, sentence):
    config = {"prediction_type": SAMPLERS[name].prediction_types[0]}
    with pytest.raises(ValueError, match=sentence):
        make_scheduler(name, config, options)


@pytest.mark.parametrize("name", ["pndm", "dpm++2m", "unipc"])
@pytest.mark.parametrize("field", ["clip_sample", "rescale_betas_zero_snr"])
def test_a_chain_that_a_sampler_cannot_walk_is_refused(name, field):
    with pytest.raises(ValueError, match=re.escape(f"sampler '{name}' has no {field}; remove it")):
        make_scheduler(name, {"prediction_type": "v_prediction", field: True})


def test_time_shift_fits_a_short_chain():
    scheduler = make_scheduler("ts-ddim", {"num_train_timesteps": 100})
    assert type(scheduler) is TimeShiftScheduler
    assert scheduler.config.exposure_cutoff == 10


def test_time_shift_stops_at_a_tenth_of_the_training_steps_unless_told_otherwise():
    """The value that the tables of docs/samplers.md were measured with."""
    assert make_scheduler("ts-ddpm", {}).config.exposure_cutoff == 100
    assert make_scheduler("ts-ddpm", {"exposure_cutoff": 300}).config.exposure_cutoff == 300


def test_network_calls_refuses_what_the_sampler_refuses():
    with pytest.raises(ValueError, match="needs at least 4 steps"):
        network_calls("pndm", {}, 3)
    for steps in (0, 1001):
        for name in ("ddim", "unipc", "ts-ddim"):
            with pytest.raises(ValueError, match="must be an integer from 1 to 1000"):
                network_calls(name, {}, steps)


class Passing(diffusers.UniPCMultistepScheduler):
    """A subclass that hands its fields on unnamed."""

    def __init__(self, *args, **fields):
        super().__init__(*args, **fields)


def test_fields_that_a_subclass_hands_on_unnamed_are_seen():
    catalog.check_nothing_lost(Passing(disable_corrector=()), "unipc")
    catalog.check_nothing_lost(Passing(disable_corrector=np.array([])), "unipc")
    with pytest.raises(ValueError, match="'unipc' has no use_karras_sigmas, which .* as True"):
        catalog.check_nothing_lost(Passing(use_karras_sigmas=True), "unipc")
