"""Distribution matching: what is drawn, where images should go, what the fake learns, exact resume; refusals."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from ditmoe import pipeline
from ditmoe.config.distill import DistillConfig
from ditmoe.config.sections import Config
from ditmoe.data.open import open_data
from ditmoe.model import DiTMoETransformer2DModel, build
from ditmoe.pipeline.answers import calls_of
from ditmoe.rng import sample_rng
from ditmoe.training.distill import Teachers
from ditmoe.training.matching import Matching, new_fake
from samplers import make_scheduler, sample
from tests.ditmoe.training.test_loop import cut_equals_straight, go, rows
from tests.faults import runs

Tiny = Callable[..., Config]
FLOW = {"prediction_type": "flow_prediction", "class_dropout_prob": 0.0}
FEW = {"sampler": "flow-euler", "steps": 3, "cfg": 1.0, "flow_shift": 1.5}
INDICES = (4, 5, 6)


@pytest.fixture
def teacher(tiny: Tiny, tmp_path: Path) -> Path:
    """A run of some steps, so that its output is not zero."""
    objective = {"prediction_type": "flow_prediction"}
    config = tiny(out=tmp_path / "teacher", objective=objective, sample={"cfg": 2.0}, train={"learning_rate": 0.02})
    go(config)
    return config.out


def matched(tiny: Tiny, teacher: Path, **changes: Any) -> tuple[Matching, DiTMoETransformer2DModel]:
    """A matching without a run, and a network that is another one than the teacher."""
    distill = {"teachers": (str(teacher),), "fake_steps": 2, **changes}
    config = tiny(objective=FLOW, sample=FEW, distill=distill, train={"init": teacher})
    data = open_data(config.data, size=8, channels=1)
    net = copy.deepcopy(pipeline.load(teacher).transformer)
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(1.1)
    teachers = Teachers(config, data, net, torch.device("cpu"))
    return Matching(config, new_fake(config, teachers.pipes[0].transformer), teachers, Accelerator(cpu=True)), net


def given() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([1, 7, 2])


def draws(row: int, stream: int) -> tuple[float, Tensor]:
    """Stream 16 is the loss's, the next ones are the fake's steps."""
    found = sample_rng(0, 16 + stream, INDICES[row]).standard_normal(65, dtype="float32")
    return float(found[0]), torch.from_numpy(found[1:]).view(1, 8, 8)


def test_images_are_drawn_as_the_sampler_draws_them(tiny: Tiny, teacher: Path) -> None:
    matching, net = matched(tiny, teacher)
    noise, labels = given()
    images, records = matching.draw(net, noise, labels)
    scheduler = make_scheduler("flow-euler", {"prediction_type": "flow_prediction", "shift": 1.5})
    drawn = sample(net, scheduler, noise, num_inference_steps=3, class_labels=labels)
    torch.testing.assert_close(images.detach(), drawn, rtol=1e-4, atol=1e-5)
    assert len(records) == 3 * len(net(noise, torch.tensor(500.0), labels, return_dict=False)[1])
    images.square().mean().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_images_move_from_what_the_fake_knows_to_what_the_teacher_knows(tiny: Tiny, teacher: Path) -> None:
    """d loss / dx = (x^fake - x^teacher) / mean |x - x^teacher|, image by image; nothing where the two agree."""
    matching, _ = matched(tiny, teacher, guided=True)
    plain, _ = matched(tiny, teacher)
    x, labels = given()
    x.requires_grad_()
    assert float(plain.loss(x, labels, INDICES)) == pytest.approx(0, abs=1e-9)  # the fake begins as the teacher
    net = pipeline.load(teacher).transformer
    with torch.no_grad():
        for weight in matching.fake.model.parameters():
            weight.mul_(0.9)
    value = matching.loss(x, labels, INDICES)
    (found,) = torch.autograd.grad(value, x)
    for row in range(3):
        number, noise = draws(row, 0)
        s = 0.02 + 0.96 * 0.5 * (1 + math.erf(number / math.sqrt(2)))
        x_s = ((1 - s) * x[row] + s * noise)[None].detach()
        with torch.no_grad():
            t, label = torch.tensor([1000 * s]), labels[row : row + 1]
            cond, uncond = net(x_s, t, label).sample, net(x_s, t, torch.tensor([10])).sample
            wanted = (x_s - s * (uncond + 2.0 * (cond - uncond)))[0]
            fake = (x_s - s * matching.fake.model(x_s, t, label).sample)[0]
        expected = (fake - wanted) / (x[row] - wanted).abs().mean().detach()
        torch.testing.assert_close(found[row] * x.numel(), expected, rtol=1e-3, atol=1e-5)
    assert float(value) == pytest.approx(0.5 * float((found * x.numel()).square().mean()), rel=1e-4)
    assert all(p.grad is None for p in matching.fake.model.parameters())


def test_the_fake_learns_what_is_drawn(tiny: Tiny, teacher: Path) -> None:
    matching, _ = matched(tiny, teacher)
    x, labels = given()
    x.requires_grad_()
    net = pipeline.load(teacher).transformer.train()
    optimizer, losses = torch.optim.AdamW(net.parameters(), 3e-4, (0.9, 0.95), weight_decay=0.0), []
    for step in (1, 2):
        numbers, noise = zip(*(draws(row, step) for row in range(3)), strict=True)
        s = torch.tensor(numbers).sigmoid().view(3, 1, 1, 1)
        e = torch.stack(noise)
        loss = (net((1 - s) * x.detach() + s * e, 1000 * s.flatten(), labels).sample - (e - x.detach())).square().mean()
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    said = matching.follow(x, labels, INDICES)
    assert float(said) == pytest.approx(sum(losses) / 2, rel=1e-4)
    for (name, ours), theirs in zip(matching.fake.model.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=name)
    assert x.grad is None
    again = matching.teachers.pipes[0].transformer
    before = dict(pipeline.load(teacher).transformer.named_parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in again.named_parameters())


def test_what_is_not_finite_moves_no_fake(tiny: Tiny, teacher: Path) -> None:
    matching, _ = matched(tiny, teacher)
    x, labels = given()
    before = copy.deepcopy(matching.fake.model.state_dict())
    assert not matching.follow(x * math.nan, labels, INDICES).isfinite()
    assert all(torch.equal(value, before[name]) for name, value in matching.fake.model.state_dict().items())


@pytest.mark.parametrize("moe", [{}, {"router_input": "token", "bias_rate": 0.01}])
def test_a_matched_run_resumes_to_the_bit(tiny: Tiny, tmp_path: Path, moe: dict[str, Any]) -> None:
    teacher, objective = tmp_path / "teacher", {"prediction_type": "flow_prediction"}
    go(tiny(out=teacher, objective=objective, sample={"cfg": 2.0}, train={"learning_rate": 0.02}, moe=moe))
    distill, train = {"teachers": (str(teacher),), "fake_steps": 2}, {"init": teacher}

    def run(name: str, stop: int) -> Config:
        changes: Any = {"objective": FLOW, "sample": FEW, "distill": distill, "train": train, "moe": moe}
        config = tiny(out=tmp_path / name, max_steps=stop, **changes)
        go(config)
        return config

    straight = cut_equals_straight(run)
    last = straight / "checkpoints/step-000005"
    fake, begun = load_file(last / "fake.safetensors"), pipeline.load(teacher).transformer.state_dict()
    assert not any(torch.equal(fake[name], begun[name]) for name in fake if name.endswith("w_in"))
    saved = pipeline.load(straight).config
    assert (saved.sampler, saved.num_inference_steps, saved.guidance_scale) == ("flow-euler", 3, 1.0)
    assert calls_of(straight) == 3
    row = rows(straight)[-1]
    assert row["loss"] > row["match"] > 0
    assert row["fake"] > 0
    assert len(row["load_max_over_mean"]) == len(row["dead_experts"])
    manifest = last / "manifest.json"
    names = json.loads(manifest.read_text())
    del names["files"]["fake.safetensors"]
    manifest.write_text(json.dumps(names))
    (last / "fake.safetensors").unlink()
    with pytest.raises(ValueError, match="is of another network: fake .* is missing"):
        run("straight", 6)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    teacher, flow = tmp_path / "teacher", ["--objective.prediction-type", "flow_prediction"]
    assert runs.training(teacher, "--max-steps", 4, *flow, name="log-teacher").wait() == [0]
    flags = [*flow, "--max-steps", 4, "--train.init", teacher, "--objective.class-dropout-prob", 0,
             "--distill.teachers", teacher, "--distill.fake-steps", 2,
             "--sample.sampler", "flow-euler", "--sample.steps", 2, "--sample.cfg", 1]  # fmt: skip
    for name, world in (("one", 1), ("two", 2)):
        group = runs.training(tmp_path / name, *flags, world=world, name=f"log-{name}")
        assert group.wait() == [0] * world, group.err()
    for a, b in zip(runs.rows(tmp_path / "one"), runs.rows(tmp_path / "two"), strict=True):
        for name in ("loss", "match", "fake"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name


def test_teachers_that_no_copy_can_learn_from(tiny: Tiny, teacher: Path, tmp_path: Path) -> None:
    chain = tiny(max_steps=1, out=tmp_path / "chain")
    go(chain)
    few = {"objective": FLOW, "sample": FEW, "train": {"init": teacher}}
    for changes, sentence in (
        ({"teachers": (str(chain.out),)}, "is of v_prediction, its experts in float; a copy of it is to learn"),
        ({"guided": True, "guide_scale": 1.5}, "guide_scale is 1.5, and .* has no guide"),
    ):
        config = tiny(**few, distill={"teachers": (str(teacher),), "fake_steps": 1, **changes})
        data = open_data(config.data, size=8, channels=1)
        with pytest.raises(ValueError, match=sentence):
            Teachers(config, data, build(config, 10), torch.device("cpu"))


def test_the_balance_loss_is_over_all_calls(tiny: Tiny, teacher: Path) -> None:
    """As a step of few calls by squared errors has it, whose rows are those of all levels at once."""
    config = tiny(
        max_steps=1, objective=FLOW, sample=FEW, distill={"teachers": (str(teacher),), "fake_steps": 1},
        train={"init": teacher}, moe={"router_input": "time"},
    )  # fmt: skip
    begun = tiny(out=teacher.parent / "time", objective={"prediction_type": "flow_prediction"},
                 train={"learning_rate": 0.02}, moe={"router_input": "time"})  # fmt: skip
    go(begun)
    found = []
    for name, distill in (("fake", {"fake_steps": 1}), ("squared", {"teacher_steps": 3})):
        own = replace(config, out=teacher.parent / name, train=replace(config.train, init=begun.out),
                      distill=DistillConfig(teachers=(str(teacher),), **distill))  # fmt: skip
        go(own)
        found.append(rows(own.out)[0])
    assert found[0]["balance"] == pytest.approx(found[1]["balance"], rel=1e-5)
    assert found[0]["load_max_over_mean"] == found[1]["load_max_over_mean"]


def test_a_checkpoint_of_skipped_steps_has_a_fake_that_has_moved(
    tiny: Tiny, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill = {"teachers": (str(teacher),), "fake_steps": 1}
    loss = Matching.loss
    with monkeypatch.context() as patched:
        patched.setattr(Matching, "loss", lambda self, *given: loss(self, *given) * math.inf)
        config = tiny(max_steps=1, objective=FLOW, sample=FEW, distill=distill, train={"init": teacher})
        go(config)
    assert rows(config.out)[-1]["loss"] is None
    go(replace(config, max_steps=3))
    assert rows(config.out)[-1]["loss"] > 0


def test_a_student_of_a_version_that_compared_features_is_known(tiny: Tiny, teacher: Path) -> None:
    said = json.loads((teacher / "config.json").read_text())
    said["distill"] |= {"features": None, "features_weight": 0.3, "teachers": ["t"], "teacher_steps": 4}
    said["objective"]["class_dropout_prob"] = 0.0
    said["sample"] |= {"sampler": "flow-euler", "steps": 4, "cfg": 1.0}
    (teacher / "config.json").write_text(json.dumps(said))
    assert calls_of(teacher) == 4


FAKE = {"teachers": ("t",), "fake_steps": 1}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"distill": {"fake_steps": 2}}, "fake_steps needs teachers"),
        ({"distill": {"teachers": ("t",), "fake_learning_rate": 1e-3}}, "add --distill.fake-steps N"),
        ({"distill": {**FAKE, "fake_learning_rate": 0.0}}, "fake_learning_rate is 0.0; it must be above 0"),
        ({"distill": {**FAKE, "fake_steps": -1}}, "fake_steps is -1; it must be 0 or more"),
        ({"distill": {**FAKE, "teacher_steps": 4}}, "fake_steps follows teacher_steps in a run of its own"),
        ({"distill": {**FAKE, "teachers": ("t", "u")}}, "fake_steps follows one teacher, not several"),
        ({"distill": {**FAKE, "weight": 0.5}}, "fake_steps takes nothing from the images; use 1"),
        ({"distill": {**FAKE, "guide_scale": 1.5}}, "guide_scale is 1.5, and the teachers are not guided"),
        ({"distill": FAKE, "sample": FEW}, "distill.fake_steps makes steps of flow-euler"),
        ({"distill": FAKE, "objective": FLOW}, "fake_steps makes a student that draws without guidance"),
        ({"distill": FAKE, "objective": FLOW, "sample": {"cfg": 1.0}}, "fake_steps teaches the steps of flow-euler"),
        ({"distill": FAKE, "objective": {"prediction_type": "flow_prediction"}, "sample": FEW}, "class-dropout-prob 0"),
        ({"distill": FAKE, "objective": FLOW, "sample": FEW, "train": {"accumulation": 2}}, "train.accumulation is 2"),
        ({"distill": FAKE, "objective": FLOW, "sample": FEW, "parallel": {"shard": True}}, "parallel.shard is True"),
        ({"distill": FAKE, "objective": FLOW, "sample": FEW}, "goes on from a student of few calls; give it as"),
        ({"distill": FAKE, "objective": FLOW, "sample": FEW, "moe": {"jitter": 0.1}}, "moe.jitter 0.1 is the same for"),
        ({"distill": FAKE, "objective": FLOW, "sample": FEW, "train": {"init": Path("i")},
          "data": {"mixture": ("digits", "waves")}}, "follows one teacher, and data.mixture has several sets"),
    ],
)  # fmt: skip
def test_refusals(tiny: Tiny, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tiny(**changes)
