"""The exposure meter, in a world where every variance is known."""

import json
from types import SimpleNamespace

import diffusers
import pytest
import torch

from ditmoe import __main__, cli
from ditmoe.analysis import exposure
from samplers import make_scheduler, sample
from tests.faults.halts import save_model
from tests.reference.gaussian_world import ALPHA_BAR, MEAN, VARIANCE, OptimalNetwork


class World(OptimalNetwork):
    """The optimal network with the config that the meter reads: 256 pixels an image."""

    def __init__(self, kind="epsilon"):
        super().__init__(kind)
        self.config = SimpleNamespace(sample_size=16, in_channels=1, num_classes=0, prediction_type=kind)
        self.device = torch.device("cpu")


def read(name="ddim", kind="epsilon", **options):
    scheduler = make_scheduler(name, {"prediction_type": kind})
    arguments = {"num_images": 40, "num_inference_steps": 10, "batch_size": 16, **options}
    return exposure.measure(World(kind), scheduler, VARIANCE, **arguments)


def test_the_training_marginal_is_that_of_noised_images():
    scheduler = make_scheduler("ddim", {})
    x0 = MEAN + VARIANCE**0.5 * torch.randn(200, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    for t in (10, 400, 900):
        measured = scheduler.add_noise(x0, noise, torch.tensor(t)).flatten(1).var(dim=1).mean()
        assert exposure.training_variance(scheduler, t, VARIANCE) == pytest.approx(float(measured), rel=0.01)
    flow = make_scheduler("flow-euler", {"prediction_type": "flow_prediction"})
    assert exposure.training_variance(flow, 250, VARIANCE) == pytest.approx(0.75**2 * VARIANCE + 0.25**2)


def test_a_reading_before_every_call_and_the_known_deficit_of_ten_steps():
    readings = read()
    assert [r.timestep for r in readings] == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert readings[0].ratio == pytest.approx(1, abs=0.05)  # noise, before any step
    assert readings[-1].expected == pytest.approx(ALPHA_BAR[99] * VARIANCE + 1 - ALPHA_BAR[99])
    assert readings[-1].ratio < 0.85  # DDIM in ten steps loses variance (.137 of .25 at the end)
    better = read(num_inference_steps=100)
    assert readings[-1].ratio < better[-1].ratio < 1.02


def test_batches_do_not_matter_and_flow_is_read_too():
    one, many = read(batch_size=40), read(batch_size=7)
    assert [r.variance for r in one] == pytest.approx([r.variance for r in many], rel=1e-6)
    flow = read("flow-euler", "flow_prediction")
    assert flow[0].expected == 1
    assert flow[-1].ratio < 1


def test_the_table_names_the_worst_step(tmp_path):
    readings = {"ddim": read(), "ddpm": read("ddpm")}
    text = exposure.table(readings)
    assert text.count("worst") == 2
    assert "| 899 |" in text
    exposure.plot(readings, tmp_path / "bias.png")
    assert (tmp_path / "bias.png").stat().st_size > 5000


# As a program, on pipeline folders


@pytest.fixture
def folder(tmp_path):
    """Makes a pipeline folder; by default of a model with three classes."""

    def make(classes=3, **config):
        save_model(tmp_path / "m", classes)
        saved = tmp_path / "m/scheduler/scheduler_config.json"
        saved.write_text(json.dumps({**json.loads(saved.read_text()), "data_variance": 0.4, **config}))
        return tmp_path / "m"

    return make


def typed(*argv):
    """The exit code of `ditmoe exposure ARGV`."""
    try:
        return cli.run(lambda: __main__.exposure([*map(str, argv)], "ditmoe exposure"))
    except SystemExit as end:
        return end.code


def run(folder, *options):
    out = folder.parent / "bias.png"
    return typed(folder, "--steps", 3, "--num", 4, "--out", out, *options)


def refused(capsys, sentence):
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1, error


def test_a_model_with_classes_is_read_with_guidance(folder, capsys, monkeypatch):
    labels, null = [], []

    def recorded(*args, **options):
        labels.extend(options["class_labels"].tolist())
        null.append(options["null_label"])
        return sample(*args, **options)

    monkeypatch.setattr(exposure, "sample", recorded)
    assert run(folder(), "--cfg", "2", "--samplers", "ddim", "ts-ddim") == 0
    assert "ts-ddim: variance over that of training" in capsys.readouterr().out
    assert (labels, null) == ([0, 1, 2, 0] * 2, [3, 3])


def test_guidance_of_a_model_without_classes_is_refused(folder, capsys):
    model = folder(classes=0)
    assert run(model) == 0
    capsys.readouterr()
    assert run(model, "--cfg", "7") == 2
    refused(capsys, "guidance_scale 7.0 needs class labels; an unconditional model can only be sampled with")


def test_a_network_of_diffusers_is_refused(folder, capsys):
    model = folder()
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=2, num_layers=1, sample_size=8,
        num_embeds_ada_norm=3, norm_num_groups=4,
    )  # fmt: skip
    network.save_pretrained(model / "transformer")
    index = json.loads((model / "model_index.json").read_text())
    entry = ["diffusers", "DiTTransformer2DModel"]
    (model / "model_index.json").write_text(json.dumps({**index, "transformer": entry}))
    assert run(model) == 2
    refused(capsys, f"model_index.json has transformer {entry}, which is not ditmoe's")


def test_a_folder_that_is_named_like_a_picture_is_refused_first(folder, capsys, monkeypatch):
    monkeypatch.delattr(exposure, "sample")
    model = folder()
    (model.parent / "bias.png").mkdir()
    assert run(model) == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "must be a .png, .pdf or .svg file in a folder that exists" in error


@pytest.mark.parametrize(
    ("sampler", "config", "sentence"),
    [
        ("ddim", {"beta_schedule": "foo"}, "m is not a ditmoe pipeline that can be loaded: foo"),
        ("unipc", {"solver_order": "2"}, "sampler 'unipc' cannot be made of the saved scheduler's config: "),
        ("dpm++2m", {"beta_end": "x"}, "m is not a ditmoe pipeline that can be loaded: linspace"),
        ("unipc", {"trained_betas": [0.1]}, "sampler 'unipc' cannot be made of the saved scheduler's config: "),
        ("ddim", {"trained_betas": [0.1]}, "num_inference_steps is 3, but it must be an integer from 1 to 1"),
        ("ddim", {"trained_betas": [[0.1], [0.1, 0.2]]}, "expected sequence of length 1"),
        ("ddim", {"data_variance": "0.4"}, "data_variance is '0.4', but it must be a number above 0, and finite"),
        ("ts-ddim", {"data_variance": [0.4]}, "data_variance is [0.4], but it must be a number"),
    ],
)
def test_a_damaged_scheduler_is_refused_in_a_sentence(folder, capsys, sampler, config, sentence):
    assert run(folder(**config), "--samplers", sampler) == 2
    refused(capsys, sentence)


def test_images_that_are_not_finite_are_an_error_and_no_table(folder, capsys):
    model = folder()
    assert run(model, "--cfg", "1e6", "--epsilon-scale", "1e-35") == 1
    assert not (model.parent / "bias.png").exists()
    refused(capsys, "are not finite: the weights are damaged, or guidance_scale 1000000")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere holds no model"),
        (["nowhere", "--num", "0"], "num is 0"),
        (["nowhere", "--out", "bias.jpeg"], "must be a .png"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert typed(*arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("error: ") == (error.count("\n") == 1)
    assert error.count("error: ") + error.count("Error parsing ExposureArgs: ") == 1
    assert list(tmp_path.iterdir()) == []
