"""Teachers: what they say is the target, at every level or a few calls on; whose labels; exact resume; refusals."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditmoe import pipeline
from ditmoe.config.sections import Config, ObjectiveConfig
from ditmoe.data.open import open_data
from ditmoe.model import DiTMoETransformer2DModel, build
from ditmoe.objective import scheduler_config
from ditmoe.pipeline.answers import Answers, flow_levels, path, words
from ditmoe.pipeline.guide import ExpertsOff
from ditmoe.training.distill import Teachers
from ditmoe.training.state import num_classes
from samplers import make_scheduler, sample
from samplers.catalog import chain_of
from tests.ditmoe.training.test_domains import stripes
from tests.ditmoe.training.test_loop import cut_equals_straight, go, rows
from tests.faults import runs

Tiny = Callable[..., Config]
FLOW = {"prediction_type": "flow_prediction"}
TWO, FOUR = ({"teachers": ("t",), "teacher_steps": steps} for steps in (2, 4))
FEW = {"sampler": "flow-euler", "steps": 3, "cfg": 1.0, "flow_shift": 1.5}


@pytest.fixture
def teacher(tiny: Tiny, tmp_path: Path) -> Path:
    """A run of some steps, so that its output is not zero."""
    config = tiny(
        out=tmp_path / "teacher", objective=FLOW, sample={"sampler": "unipc", "cfg": 2.0},
        train={"learning_rate": 0.02},
    )  # fmt: skip
    go(config)
    return config.out


def student(config: Config) -> Teachers:
    data = open_data(config.data, size=8, channels=1)
    net = build(config, num_classes(config, data))
    return Teachers(config, data, net, torch.device("cpu"))


def images(n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 8, 8, generator=g)
    return x, torch.linspace(20, 990, n), torch.tensor([0, 3, 10, 9, 10, 1])[:n]


def test_a_teacher_says_what_its_network_says(tiny: Tiny, teacher: Path) -> None:
    x, t, y = images()
    net = pipeline.load(teacher).transformer
    config = tiny(objective=FLOW, distill={"teachers": (str(teacher),)})
    said = student(config).target(x, t, y, torch.zeros(6, dtype=torch.long))
    with torch.no_grad():
        assert torch.equal(said, net(x, t, class_labels=y).sample)
    assert said.abs().mean() > 0.01
    assert not said.requires_grad


def test_a_guided_teacher_is_guided_within_its_interval_alone(teacher: Path) -> None:
    x, t, y = images()
    pipe = pipeline.load(teacher)
    pipe.register_to_config(guidance_interval=(0.0, 800.0), experts_off=True, guide_scale=3.0)
    answers = Answers(pipe, words(ObjectiveConfig(prediction_type="flow_prediction"), pipe), guided=True)
    a = chain_of(make_scheduler("unipc", {}).config)[800]
    s = float((1 - a).sqrt() / (a.sqrt() + (1 - a).sqrt()))
    assert answers.highest == pytest.approx(s)  # the interval is of the chain that its sampler draws by
    t[-1] = 999.0
    net, null = pipe.transformer, torch.full_like(y, 10)
    with torch.no_grad():
        cond, uncond = (net(x, t, class_labels=labels).sample for labels in (y, null))
        weak = ExpertsOff(net)(x, t, class_labels=y).sample
        said = answers(x, t, y)
    guided = uncond + 2.0 * (cond - uncond) + 2.0 * (cond - weak)
    inside = t / 1000 <= s
    assert inside.sum() == 5
    torch.testing.assert_close(said[inside], guided[inside], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(said[~inside], cond[~inside], rtol=1e-4, atol=1e-5)
    assert (guided - cond).abs().max() > 1e-3


def test_teachers_are_guided_as_their_folders_say_or_by_the_scale_of_the_run(
    tiny: Tiny, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, t, y = images()
    net, domain = pipeline.load(teacher).transformer, torch.zeros(6, dtype=torch.long)
    with torch.no_grad():
        cond, uncond = (net(x, t, class_labels=labels).sample for labels in (y, torch.full_like(y, 10)))
    for cfg, scale in ((None, 2.0), (1.25, 1.25), (1.0, 1.0)):
        distill = {"teachers": (str(teacher),), "guided": True, "cfg": cfg}
        said = student(tiny(objective=FLOW, sample={"cfg": 1.0}, distill=distill)).target(x, t, y, domain)
        torch.testing.assert_close(said, uncond + scale * (cond - uncond), rtol=1e-4, atol=1e-5)
    assert (cond - uncond).abs().max() > 1e-3
    asked = tiny(objective=FLOW, sample={"cfg": 1.0}, distill={"teachers": (str(teacher),), "guided": True, "cfg": 2.0})
    student(asked)
    pipe = pipeline.load(teacher)
    pipe.register_to_config(experts_off=True, guide_scale=3.0)
    pipe.save_pretrained(teacher / "model")
    with torch.no_grad():
        weak = ExpertsOff(net)(x, t, class_labels=y).sample
    for scale in (None, 1.5):
        distill = {"teachers": (str(teacher),), "guided": True, "cfg": 1.0, "guide_scale": scale}
        said = student(tiny(objective=FLOW, sample={"cfg": 1.0}, distill=distill)).target(x, t, y, domain)
        torch.testing.assert_close(said, cond + ((scale or 3.0) - 1) * (cond - weak), rtol=1e-4, atol=1e-5)
    assert (cond - weak).abs().max() > 1e-3
    assert "no label left out" not in capsys.readouterr().out
    said = (teacher / "config.json").read_text()
    (teacher / "config.json").write_text(said.replace('"class_dropout_prob": 0.1', '"class_dropout_prob": 0.0'))
    student(asked)
    assert f"note: distill.cfg is 2.0, but {teacher} was trained with no label left out" in capsys.readouterr().out


def test_a_teacher_of_another_objective_is_translated(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(out=tmp_path / "v", train={"learning_rate": 0.02})
    go(config)
    x, _, y = images()
    t = torch.tensor([1, 100, 300, 500, 700, 990])
    said = student(tiny(objective={"prediction_type": "epsilon"}, distill={"teachers": (str(config.out),)})).target(
        x, t.float(), y, torch.zeros(6, dtype=torch.long)
    )
    a = chain_of(scheduler_config(config.objective))[t].float().view(-1, 1, 1, 1)
    with torch.no_grad():
        v = pipeline.load(config.out).transformer(x, t.float(), class_labels=y).sample
    torch.testing.assert_close(said, a.sqrt() * v + (1 - a).sqrt() * x, rtol=1e-4, atol=1e-5)


class OneStep(nn.Module):
    """A student that says what it is taught: of the K steps of a noise the one at t."""

    null_label = 10

    def __init__(self, teachers: Teachers, noise: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.x, self.t, self.target = teachers.steps(noise, labels, torch.zeros(len(noise), dtype=torch.long))
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Any:
        rows = (self.t - t[0]).abs() < 1e-3
        torch.testing.assert_close(x, self.x[rows], rtol=1e-4, atol=1e-4)  # it is taught where it will be
        return type("Output", (), {"sample": self.target[rows]})


@pytest.mark.parametrize(("sampler", "cfg"), [("unipc", None), ("ddim", None), ("flow-euler", None), ("unipc", 1.25)])
def test_a_perfect_student_draws_in_few_calls_what_the_teacher_draws_in_many(
    tiny: Tiny, teacher: Path, sampler: str, cfg: float | None
) -> None:
    pipe = pipeline.load(teacher)
    pipe.scheduler = make_scheduler(sampler, FLOW)
    pipe.register_to_config(guidance_interval=(0.0, 700.0), experts_off=True, guide_scale=1.5)
    pipe.save_pretrained(teacher / "model")
    x, _, y = images()
    y[y == 10] = 4
    config = tiny(objective={**FLOW, "class_dropout_prob": 0.0}, sample=FEW,
                  distill={"teachers": (str(teacher),), "teacher_steps": 8, "cfg": cfg})  # fmt: skip
    few = make_scheduler("flow-euler", FLOW, {"shift": 1.5})
    drawn = sample(OneStep(student(config), x, y), few, x, num_inference_steps=3, class_labels=y)
    whole = pipe(
        y.tolist(), latents=x, num_inference_steps=8, guidance_scale=cfg, output_type="latent"
    ).images  # by the folder's 2 where it is None
    torch.testing.assert_close(drawn, whole, rtol=1e-3, atol=1e-4)
    assert (whole - x).abs().mean() > 0.1


def test_the_way_of_a_teacher_is_the_images_it_draws_through(teacher: Path) -> None:
    """At the noise level of a chain's step its image there, over sqrt(a) + sqrt(1 - a); between two on the line."""
    pipe = pipeline.load(teacher)
    x, _, y = images()
    y[y == 10] = 4
    seen: list[tuple[float, Tensor]] = []
    pipe(y.tolist(), latents=x, num_inference_steps=5, output_type="latent",
         callback=lambda k, t, x_t, clean: seen.append((float(t), x_t.clone())))  # fmt: skip
    t, at = seen[2]
    chain = chain_of(pipe.scheduler.config)
    r = [float(((1 - a) / a).sqrt()) for a in chain[[int(t), int(t) + 1]]]
    r_t = r[0] + (t - int(t)) * (r[1] - r[0])
    s, a = r_t / (1 + r_t), 1 / (1 + r_t**2)
    found = path(pipe, x, y, 5, [1.0, s, 0.0])
    torch.testing.assert_close(found[0], x)
    torch.testing.assert_close(found[1], at / (a**0.5 + (1 - a) ** 0.5), rtol=1e-5, atol=1e-5)
    t, later = seen[3]
    r = [float(((1 - a) / a).sqrt()) for a in chain[[int(t), int(t) + 1]]]
    r_t = r[0] + (t - int(t)) * (r[1] - r[0])
    below, a_below = r_t / (1 + r_t), 1 / (1 + r_t**2)
    half = (found[1] + later / (a_below**0.5 + (1 - a_below) ** 0.5)) / 2
    torch.testing.assert_close(path(pipe, x, y, 5, [(s + below) / 2])[0], half, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_a_teacher_of_a_chain_teaches_a_flow(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """At s the chain's time has the same noise over signal, and x_vp = x / hypot(1 - s, s)."""
    config = tiny(
        out=tmp_path / "chain", objective={"prediction_type": kind, "beta_schedule": "squaredcos_cap_v2"},
        train={"learning_rate": 0.02},
    )  # fmt: skip
    go(config)
    x, _, y = images()
    chain = chain_of(scheduler_config(config.objective))
    steps = torch.tensor([1, 100, 300, 500, 700, 900])
    r = ((1 - chain[steps]) / chain[steps]).sqrt()
    s = (r / (1 + r)).float().view(-1, 1, 1, 1)
    named = {"teachers": (str(config.out),)}
    said = student(tiny(objective=FLOW, distill=named)).target(
        x, 1000 * s.flatten(), y, torch.zeros(6, dtype=torch.long)
    )
    signal, noise = ((part / torch.hypot(1 - s, s)) for part in (1 - s, s))
    x_vp = x / torch.hypot(1 - s, s)
    with torch.no_grad():
        out = pipeline.load(config.out).transformer(x_vp, steps.float(), class_labels=y).sample
    if kind == "epsilon":
        eps, x0 = out, (x_vp - noise * out) / signal
    else:
        eps, x0 = noise * x_vp + signal * out, signal * x_vp - noise * out
    torch.testing.assert_close(said, eps - x0, rtol=2e-2, atol=2e-3)
    with pytest.raises(ValueError, match="chain cannot teach this objective: it is of another noise schedule"):
        student(tiny(objective={"prediction_type": kind}, distill=named))
    few = tiny(objective={**FLOW, "class_dropout_prob": 0.0}, sample=FEW, distill={**named, "teacher_steps": 4})
    y[y == 10] = 4
    assert student(few).steps(x, y, torch.zeros(6, dtype=torch.long))[2].isfinite().all()


def test_several_are_averaged(tiny: Tiny, teacher: Path, tmp_path: Path) -> None:
    other = tiny(out=tmp_path / "other", objective=FLOW, seed=1, train={"learning_rate": 0.02})
    go(other)
    x, t, y = images()
    both, first, second = (
        student(tiny(objective=FLOW, distill={"teachers": named})).target(x, t, y, torch.zeros(6, dtype=torch.long))
        for named in ((str(teacher), str(other.out)), (str(teacher),), (str(other.out),))
    )
    torch.testing.assert_close(both, (first + second) / 2)
    assert not torch.equal(first, second)


def test_a_specialist_without_classes_teaches_too(tiny: Tiny, teacher: Path, tmp_path: Path) -> None:
    """A set without classes is one of the student's."""
    waves = stripes(tmp_path / "waves")
    go(tiny(out=tmp_path / "second", objective=FLOW, data={"name": "folder", "path": waves}))
    named = {"teachers": (str(teacher), str(tmp_path / "second")), "by": "domain"}
    config = tiny(objective=FLOW, data={"mixture": ("digits", str(waves))}, distill=named)
    x, t, _ = images()
    said = student(config).target(x, t, torch.full((6,), 10), torch.ones(6, dtype=torch.long))
    with torch.no_grad():
        assert torch.equal(said, pipeline.load(tmp_path / "second").transformer(x, t).sample)
    guided = {**named, "guided": True, "cfg": 3.0}  # by the classes of the teacher that has some
    config = tiny(objective=FLOW, sample={"cfg": 1.0}, data={"mixture": ("digits", str(waves))}, distill=guided)
    assert torch.equal(said, student(config).target(x, t, torch.full((6,), 10), torch.ones(6, dtype=torch.long)))
    alone = {"teachers": (str(tmp_path / "second"),), "guided": True, "cfg": 3.0}
    with pytest.raises(ValueError, match="distill.cfg is 3.0, and the teachers know no classes; leave it out"):
        student(tiny(objective=FLOW, sample={"cfg": 1.0}, data={"name": "folder", "path": waves}, distill=alone))


def test_specialists_have_their_own_labels(tiny: Tiny, teacher: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        stripes(tmp_path / "waves" / name, count=20, seed=len(name))
    waves = {"name": "folder", "path": tmp_path / "waves"}
    go(tiny(out=tmp_path / "second", objective=FLOW, data=waves, train={"learning_rate": 0.02}))
    data = {"mixture": ("digits", str(tmp_path / "waves"))}
    config = tiny(
        objective=FLOW, data=data, distill={"teachers": (str(teacher), str(tmp_path / "second")), "by": "domain"}
    )
    x, t, _ = images()
    y = torch.tensor([0, 3, 12, 10, 11, 12])  # 12: no class
    domain = torch.tensor([0, 0, 0, 1, 1, 1])
    said = student(config).target(x, t, y, domain)
    one, two = (pipeline.load(folder).transformer for folder in (teacher, tmp_path / "second"))
    with torch.no_grad():
        first = one(x[:3], t[:3], class_labels=torch.tensor([0, 3, 10])).sample
        second = two(x[3:], t[3:], class_labels=torch.tensor([0, 1, 2])).sample
    torch.testing.assert_close(said, torch.cat([first, second]))


@pytest.mark.parametrize(("weight", "accumulation"), [(1.0, 1), (0.25, 2)])
def test_the_loss_is_shared_between_teachers_and_images(
    tiny: Tiny, teacher: Path, weight: float, accumulation: int
) -> None:
    distill = {"teachers": (str(teacher),), "weight": weight}
    go(tiny(max_steps=1, objective=FLOW, distill=distill, moe={"balance_weight": 0.0, "z_weight": 0.0},
            train={"accumulation": accumulation}))  # fmt: skip
    (row,) = rows(tiny().out)
    assert row["loss"] == pytest.approx(weight * row["distill"] + (1 - weight) * row["mse"], rel=1e-6)
    assert row["distill"] < row["mse"]


@pytest.mark.parametrize("sampling", [{}, FEW])
def test_a_taught_run_resumes_to_the_bit_and_asks_for_the_same_teachers(
    tiny: Tiny, teacher: Path, tmp_path: Path, sampling: dict[str, Any]
) -> None:
    distill = {"teachers": (str(teacher),), "teacher_steps": 4 if sampling else 0}

    def run(name: str, stop: int, **more: Any) -> Config:
        objective = {**FLOW, "class_dropout_prob": 0.0 if sampling else 0.1}
        settings = {"objective": objective, "sample": sampling, "distill": distill, **more}
        config = tiny(out=tmp_path / name, max_steps=stop, train={"init": teacher, "accumulation": 2}, **settings)
        go(config)
        return config

    straight = cut_equals_straight(run)
    if sampling:
        saved = pipeline.load(straight).config
        assert (saved.sampler, saved.num_inference_steps, saved.guidance_scale) == ("flow-euler", 3, 1.0)
        with pytest.raises(ValueError, match="another run .sample.steps: 3 -> 4"):
            run("cut", 6, sample={**FEW, "steps": 4})
    weights = next((teacher / "model/transformer").glob("*.safetensors"))
    weights.write_bytes(next((straight / "model/transformer").glob("*.safetensors")).read_bytes())
    with pytest.raises(ValueError, match="distill.teachers are not those of"):
        run("cut", 6)


def test_an_image_gives_all_steps_of_few_calls(tiny: Tiny, teacher: Path) -> None:
    """t is 1000 s of s = 1.5 u / (1 + 0.5 u), u = 1, 2/3, 1/3."""
    config = tiny(objective={**FLOW, "class_dropout_prob": 0.0}, sample=FEW,
                  distill={"teachers": (str(teacher),), "teacher_steps": 3})  # fmt: skip
    x, _, y = images()
    y[y == 10] = 4
    x_t, t, target = student(config).steps(x, y, torch.zeros(6, dtype=torch.long))
    assert x_t.shape == target.shape == (18, 1, 8, 8)
    assert torch.equal(x_t[:6], x)
    assert t[::6].tolist() == pytest.approx([1e3 * 1.5 * u / (1 + 0.5 * u) for u in (1, 2 / 3, 1 / 3)], abs=1e-3)
    assert not x_t.is_inference()


def test_the_network_is_asked_of_all_steps_with_the_labels_of_their_images(
    tiny: Tiny, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Tensor, Tensor]] = []
    forward = DiTMoETransformer2DModel.forward

    def spied(self: Any, x: Tensor, t: Tensor, class_labels: Tensor | None = None, **more: Any) -> Any:
        if self.training:
            assert class_labels is not None
            asked.append((t.clone(), class_labels.clone()))
        return forward(self, x, t, class_labels, **more)

    monkeypatch.setattr(DiTMoETransformer2DModel, "forward", spied)
    config = tiny(max_steps=1, objective={**FLOW, "class_dropout_prob": 0.0}, sample=FEW,
                  distill={"teachers": (str(teacher),), "teacher_steps": 3})  # fmt: skip
    go(config)
    ((t, labels),) = asked
    assert t.view(3, 16).std(dim=1).max() == 0
    assert t.view(3, 16)[:, 0].diff().max() < 0
    assert bool((labels.view(3, 16) == labels[:16]).all())
    assert len(labels[:16].unique()) > 3


def test_the_way_is_drawn_once_for_each_micro_batch(
    tiny: Tiny, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the loss is of the loads of all micro-batches, which are passed over once before."""
    drawn: list[int] = []
    steps = Teachers.steps

    def spied(self: Teachers, noise: Tensor, *more: Any) -> Any:
        drawn.append(len(noise))
        return steps(self, noise, *more)

    monkeypatch.setattr(Teachers, "steps", spied)
    logs = []
    for parts in (1, 2):
        go(tiny(max_steps=1, out=tmp_path / str(parts), objective={**FLOW, "class_dropout_prob": 0.0}, sample=FEW,
                train={"accumulation": parts}, moe={"balance_weight": 0.01},
                distill={"teachers": (str(teacher),), "teacher_steps": 3}))  # fmt: skip
        logs.append(rows(tmp_path / str(parts))[-1])
    assert drawn == [16, 8, 8]
    assert logs[1]["mse"] == pytest.approx(logs[0]["mse"], rel=1e-5)
    assert logs[1]["balance"] == pytest.approx(logs[0]["balance"], rel=1e-5)


def test_a_finished_run_needs_its_teachers_no_more(tiny: Tiny, teacher: Path, tmp_path: Path) -> None:
    config = tiny(max_steps=1, objective=FLOW, distill={"teachers": (str(teacher),)})
    assert go(config)
    teacher.rename(tmp_path / "moved")
    assert not go(config)
    with pytest.raises(ValueError, match="teacher holds no model"):
        go(replace(config, max_steps=2))
    moved = replace(config, max_steps=2, distill=replace(config.distill, teachers=(str(tmp_path / "moved"),)))
    assert go(moved)  # the same ones at another place
    index = tmp_path / "moved/model/model_index.json"
    index.write_text(index.read_text().replace('"guidance_scale": 2.0', '"guidance_scale": 9.0'))
    with pytest.raises(ValueError, match="distill.teachers are not those of"):
        go(replace(moved, max_steps=3))


def test_the_losses_of_heads_have_the_teachers_share(tiny: Tiny, teacher: Path) -> None:
    """One head of two is asked alone where the gate is even: with weight 1 no part of the loss is the images' own."""
    distill = {"teachers": (str(teacher),)}
    go(tiny(max_steps=1, objective={**FLOW, "expert_weight": 0.5}, model={"head_experts": 2}, distill=distill,
            moe={"balance_weight": 0.0, "z_weight": 0.0}))  # fmt: skip
    (row,) = rows(tiny().out)
    assert row["expert"] == pytest.approx(row["distill"], rel=1e-4)  # heads that are zero are alike
    assert row["loss"] == pytest.approx(1.5 * row["distill"], rel=1e-4)


def test_teachers_in_the_wrong_order_are_refused_and_other_names_said(
    tiny: Tiny, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        stripes(tmp_path / "waves" / name, count=20, seed=len(name))
    waves = {"name": "folder", "path": tmp_path / "waves"}
    go(tiny(out=tmp_path / "second", objective=FLOW, data=waves))
    data = {"mixture": ("digits", str(tmp_path / "waves"))}
    named = {"teachers": (str(tmp_path / "second"), str(teacher)), "by": "domain"}
    with pytest.raises(ValueError, match="second has 2 classes, its set 10, all sets 12"):
        student(tiny(objective=FLOW, data=data, distill=named))
    capsys.readouterr()
    pipe = pipeline.load(teacher)
    pipe.register_to_config(id2label={str(i): f"c{i}" for i in range(10)})
    pipe.save_pretrained(teacher / "model")
    student(tiny(objective=FLOW, distill={"teachers": (str(teacher),)}))
    assert "note: class 0 is 'c0' to the teacher" in capsys.readouterr().out


@pytest.mark.parametrize("shift", [0.1, 0.2, 1.0, 3.0])
def test_levels_begin_at_the_noise(shift: float) -> None:
    levels = flow_levels(shift, 4)
    assert levels[0] == 1.0
    assert levels[-1] == 0.0
    assert len(levels) == 5


def test_two_processes_equal_one(teacher: Path, tmp_path: Path) -> None:
    flags = ["--max-steps", 4, "--objective.prediction-type", "flow_prediction", "--distill.teachers", teacher,
             "--objective.class-dropout-prob", 0, "--distill.teacher-steps", 2, "--sample.sampler", "flow-euler",
             "--sample.steps", 2, "--sample.cfg", 1]  # fmt: skip
    for name, world in (("one", 1), ("two", 2)):
        group = runs.training(tmp_path / name, *flags, world=world, name=f"log-{name}")
        assert group.wait() == [0] * world, group.err()
    for a, b in zip(runs.rows(tmp_path / "one"), runs.rows(tmp_path / "two"), strict=True):
        for name in ("loss", "mse"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"distill": {"guided": True}}, "guided needs teachers; give them as --distill.teachers MODEL"),
        ({"distill": {"cfg": 1.0}}, "cfg needs teachers"),
        ({"distill": {"teachers": ("t",), "cfg": 2.0}}, "the teachers are not guided; add --distill.guided"),
        ({"distill": {"teachers": ("t",), "guided": True, "cfg": math.inf}}, "cfg is inf; it must be finite"),
        ({"distill": {"teachers": ("t",), "guided": True, "cfg": -1.0}}, "cfg is -1.0; it must be 0 or more"),
        ({"distill": {"teachers": ("t",), "weight": 0.0}}, "weight is 0.0; it must lie in .0, 1."),
        ({"distill": {"teachers": ("t",), "by": "domain"}}, "by domain needs a teacher for each data set"),
        ({"distill": {"teachers": ("t", "u"), "by": "domain"}}, "has 2 teachers, and data.mixture 0 sets"),
        ({"distill": {"teachers": ("t", "u"), "teacher_steps": 4}}, "teacher_steps follows one teacher, not several"),
        ({"distill": {"teachers": ("t",), "teacher_steps": 4, "weight": 0.5}}, "takes nothing from the images; use 1"),
        ({"distill": {"teachers": ("t",), "teacher_steps": 4, "guided": True}}, "guided is what teacher_steps means"),
        ({"distill": FOUR}, "teacher_steps puts guidance into .* --sample.cfg 1"),
        ({"distill": {"teachers": ("t",), "guided": True}}, "set --sample.cfg 1"),
        ({"distill": TWO, "sample": {"cfg": 1.0}}, "for --objective.prediction-type flow_prediction"),
        ({"distill": TWO, "objective": FLOW, "sample": {"cfg": 1.0}}, "add --sample.sampler flow-euler"),
        ({"distill": TWO, "objective": FLOW, "sample": FEW}, "sample.steps, 3, or more"),
        ({"distill": FOUR, "objective": FLOW, "sample": FEW}, "class-dropout-prob 0"),
        ({"distill": {"teachers": ("t",)}, "objective": {"prediction_type": "epsilon", "learn_sigma": True}},
         "no teacher for its variance"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(tiny: Tiny, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tiny(**changes)


def test_a_teacher_of_other_images_or_classes_is_refused_before_anything_is_written(
    tiny: Tiny, teacher: Path, tmp_path: Path
) -> None:
    named = {"teachers": (str(teacher),)}
    waves = {"name": "folder", "path": stripes(tmp_path / "waves")}
    with pytest.raises(ValueError, match="has in_channels 1, the student 3"):
        go(tiny(distill=named, model={"in_channels": 3}, data={**waves, "fit": "crop"}))
    with pytest.raises(ValueError, match="has 10 classes, the student 12"):
        go(tiny(distill=named, model={"num_classes": 12}))
    with pytest.raises(ValueError, match="nowhere holds no model"):
        go(tiny(distill={"teachers": ("nowhere",)}))
    assert not tiny().out.exists()


def test_a_teacher_whose_way_is_not_one_is_refused(tiny: Tiny, teacher: Path) -> None:
    pipe = pipeline.load(teacher)
    pipe.scheduler = make_scheduler("ddpm", FLOW)
    pipe.save_pretrained(teacher / "model")
    few = {"teachers": (str(teacher),), "teacher_steps": 4}
    with pytest.raises(ValueError, match="draws by ddpm, which few calls cannot follow; .* one of ddim, dpm"):
        student(tiny(objective={**FLOW, "class_dropout_prob": 0.0}, sample=FEW, distill=few))


def test_a_student_of_few_calls_teaches_fewer_alone(tiny: Tiny, teacher: Path, tmp_path: Path) -> None:
    """It knows three noise levels."""
    objective = {**FLOW, "class_dropout_prob": 0.0}
    few = tiny(max_steps=1, out=tmp_path / "few", objective=objective, sample=FEW,
               distill={"teachers": (str(teacher),), "teacher_steps": 6})  # fmt: skip
    go(few)
    one = {**FEW, "steps": 1}
    for folder in (few.out, few.out / "model"):
        named = {"teachers": (str(folder),)}
        for wrong in (named, {**named, "teacher_steps": 6}):
            with pytest.raises(ValueError, match="was taught 3 calls .* with --distill.teacher-steps 3"):
                student(tiny(objective=objective, sample=one, distill=wrong))
        assert student(tiny(objective=objective, sample=one, distill={**named, "teacher_steps": 3})).levels == (1, 0)


def test_the_shipped_student_draws_in_four_calls_what_its_teacher_draws() -> None:
    """From one noise nearly the same pictures, and from another other ones."""
    models = Path(__file__).parents[3] / "models"
    learnt, taught = (pipeline.load(models / name) for name in ("fashion-4", "fashion"))
    assert (learnt.network_calls(), learnt.config.guidance_scale, learnt.guide) == (4, 1.0, None)
    own, theirs, others = (
        pipe(list(range(8)), seed=seed, output_type="latent").images.clamp(-1, 1)
        for pipe, seed in ((learnt, 0), (taught, 0), (taught, 1))
    )
    near, far = ((own - images).square().mean() for images in (theirs, others))
    assert near < 0.1 * far
