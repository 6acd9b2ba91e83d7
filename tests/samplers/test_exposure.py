"""The exposure meter, in a world where every variance is known."""

from types import SimpleNamespace

import pytest
import torch
from gaussian_world import ALPHA_BAR, MEAN, VARIANCE, OptimalNetwork

from samplers import exposure, make_scheduler


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
    assert exposure.main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
