"""A run's page: every kind of run gets one, its numbers are right, and its HTML is safe and self-contained."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ditmoe.analysis.routing import count_experts
from ditmoe.config.file import read_config
from ditmoe.config.sections import Config, DataConfig, ObjectiveConfig
from ditmoe.data import open as opening
from ditmoe.data.open import open_data, reference
from ditmoe.model import moe_layer_names
from ditmoe.objective import Objective
from ditmoe.pipeline import load
from ditmoe.report import progress
from ditmoe.report import write as report
from ditmoe.report.facts import summarise
from ditmoe.training.loop import train
from eval import fid, judge
from tests.ditmoe.data.test_tables import unlabelled_test

Tiny = Callable[..., Config]
SAMPLE = {"steps": 3, "num": 20, "batch_size": 20}

written = partial(report.write, judge=judge.judge)


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.judge.PASSES", 1_500)


def trained(config: Config) -> Path:
    train(config, open_data(config.data, size=config.model.sample_size, channels=config.model.in_channels))
    typed = "python train.py --out old\npython train.py --out 'a run'\n# train.accumulation: 1 -> 2\n"
    (config.out / "command.txt").write_text(typed)
    return config.out


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed((run / "index.html").read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data

    def is_self_contained(self) -> bool:
        """Nothing is fetched; what runs stands in the page."""
        outside = [link for link in self.links if not link.startswith("data:image/png;base64,")]
        reach = ("@import", "fetch(", "XMLHttpRequest", "import(", "http")
        elements = {"link", "iframe", "object"} & set(self.tags)
        return not outside and not elements and not any(word in self.text for word in reach)


def test_the_page_of_a_run(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.judge.PASSES", 15_000)  # as many as it takes to know digits
    scored: list[Any] = []

    def score(images: Any) -> dict[str, Any]:
        scored.append(images)
        return {"metric": "fd_test", "value": 1.25, "n_gen": len(images), "n_ref": 1497, "ref": {"path": "<ref>"}}

    run = trained(tiny(sample=SAMPLE))
    made = written(run, score=score)
    assert made == json.loads((run / "report.json").read_text())
    assert [images.shape for images in scored] == [(20, 8, 8, 1), (20, 8, 8, 1)]  # samples, then held-out real ones
    assert scored[0].dtype == np.uint8
    assert (scored[1] == open_data(tiny().data, size=8, channels=1, split="test").images(range(20))).all()
    widths = [Image.open(run / f"{name}.png").width for name in ("samples", "film", "loss", "experts")]
    assert min(widths[:2]) > 200  # two samples a class, three steps
    assert widths[2:] == [1040, 1040]
    assert not list(run.glob("*.tmp"))
    assert made["command"] == "python train.py --out 'a run'"
    assert made["classes"]["real_accuracy"] >= 0.95
    assert made["copies"]["num_train"] == 1497
    assert made["pixels"] is None  # 20 samples of 64 pixels
    assert [row["layer"] for row in made["experts"]] == ["block 1"]
    shown = Page(run)
    assert shown.is_self_contained()
    assert len(shown.links) == 4
    live = json.loads((run / "index.html").read_text().partition('type="application/json">')[2].partition("<")[0])
    assert len(live["film"]["times"]) == 3
    assert np.shape(live["loads"]["place"]) == (1, 4, 4)
    for text in (
        "1.25",
        "fd_test",
        "path <ref>",
        made["copies"]["definition"],
        "python train.py --out 'a run'",
    ):
        assert text in shown.text
    assert "<ref>" not in (run / "index.html").read_text()


def test_the_pixel_distance_is_shown_beside_that_of_real_images(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tiny(sample={**SAMPLE, "num": 70}))
    found = written(run)["pixels"]
    assert (found["num_train"], found["num_real"]) == (1497, 70)
    assert found["real_value"] < found["few_value"] == found["value"]
    text = Page(run).text
    shown = r"Fréchet, of 70 samples; 70 samples: [\d,.]+, as many held-out real images: [\d,.]+"
    assert re.search(shown, " ".join(text.split()))
    value = f"{found['value']:.3g}"
    said = capsys.readouterr().out
    assert f"Fréchet distance of the pixels: {value} (70 of them: {value}, held-out real images: " in said


def test_judged_images_do_not_depend_on_how_they_are_drawn(tiny: Tiny) -> None:
    run = trained(tiny(sample={"steps": 3, "num": 20, "batch_size": 7}, model={"num_classes": 0}))
    first = written(run)
    grid = (run / "samples.png").read_bytes()
    values = json.loads((run / "config.json").read_text())
    values["sample"]["batch_size"] = 20
    (run / "config.json").write_text(json.dumps(values))
    assert written(run)["copies"] == first["copies"]
    assert (run / "samples.png").read_bytes() == grid
    assert first["score"] is first["score_real"] is None
    assert "not scored" in Page(run).text


def test_class_names_are_escaped_and_a_folder_has_no_held_out_images(tiny: Tiny, tmp_path: Path) -> None:
    source = open_data(tiny().data, size=8, channels=1)
    for label, name in enumerate(["<script>alert(1)<", "b & c"]):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in np.flatnonzero(source.labels == label)[:60]:
            Image.fromarray(source.images([i])[0, :, :, 0]).save(tmp_path / "images" / name / f"{i}.png")
    run = trained(tiny(data={"name": "folder", "path": tmp_path / "images", "flip": True}, sample=SAMPLE))
    made = written(run, score=lambda images: {})
    assert Page(run).is_self_contained()
    assert "<script>alert" not in (run / "index.html").read_text()
    assert set(made["classes"]["by_class"]) == {"<script>alert(1)<", "b & c"}
    assert (made["classes"]["num_train"], made["classes"]["num_real"]) == (108, 12)
    assert made["copies"]["num_train"] == 240  # mirror images were trained on too
    assert not made["copies"]["held_out"]
    assert made["score_real"] is None


def test_a_held_out_split_without_labels_costs_the_page_nothing_else(tiny: Tiny, tmp_path: Path) -> None:
    path = unlabelled_test(tmp_path / "set")
    run = trained(tiny(data={"name": "hf", "path": path}, sample=SAMPLE))
    made = report.write(run, score=lambda images: {"metric": "fd_test", "value": 1.0, "n_gen": len(images)})
    assert any("No held-out set: " in note and "row 0 has label -1" in note for note in made["notes"])
    assert (made["score"]["value"], made["score_real"]) == (1.0, None)
    assert (run / "index.html").is_file()


def spoilt(root: Path, bad: int) -> Path:
    """Parquet of 120 digits, and 20 that are held out, of which some cannot be used."""
    import datasets

    source = open_data(DataConfig(), size=8, channels=1)
    files = []
    for i in range(140):
        Image.fromarray(source.images([i])[0, :, :, 0]).save(root / "one.png")
        files.append((root / "one.png").read_bytes() if i < 140 - bad else b"no image")
    kinds = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=[*"0123456789"]))
    cells = {"image": [{"bytes": f, "path": None} for f in files], "label": source.labels[:140].tolist()}
    table = datasets.Dataset.from_dict(cells, kinds)
    (root / "set").mkdir()
    table.select(range(120)).to_parquet(root / "set" / "train.parquet")
    table.select(range(120, 140)).to_parquet(root / "set" / "test.parquet")
    return root / "set"


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(("bad", "most"), [(1, 0), (1, 1), (2, 1)])
def test_a_held_out_image_that_is_bad_costs_the_page_itself_alone(
    in_memory: bool, bad: int, most: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_IN_MEMORY_BYTES", 2**31 if in_memory else 0)
    data = {"name": "hf", "path": spoilt(tmp_path, bad), "max_bad": most}
    run = trained(tiny(max_steps=1, data=data, sample=SAMPLE, moe={"blocks": "none"}))
    made = written(run, score=lambda images: {"metric": "fd_test", "value": len(images), "n_gen": len(images)})
    used = 20 - bad if bad <= most else 0
    assert made["score"]["value"] == 20
    assert (made["score_real"] or {"value": 0})["value"] == used
    assert (made["data"]["num_held_out"], made["copies"]["held_out"]) == (used, used > 0)
    assert made["classes"]["num_real"] == (used or 12)
    (said,) = (note for note in made["notes"] if "test row" in note)
    assert said.startswith("1 held-out image left out: " if used else "No held-out set: ")
    assert f"set:test row {20 - 1 if bad == most else 20 - bad + most} is not a readable image" in said
    assert ("let it be left out: --data.max-bad N" in said) == (not used)
    assert said.split(" (")[0] in Page(run).text


def test_a_reference_that_cannot_score_few_held_out_images_scores_the_samples(tiny: Tiny) -> None:
    def score(images: np.ndarray) -> dict[str, Any]:
        if scored:
            raise ValueError("array: holds 1 image; a covariance needs at least 2, give more")
        scored.append(images)
        return {"metric": "fd_test", "value": 1.0, "n_gen": len(images)}

    scored: list[np.ndarray] = []
    made = report.write(trained(tiny(max_steps=1, sample=SAMPLE, moe={"blocks": "none"})), score=score)
    assert (made["score"]["value"], made["score_real"]) == (1.0, None)
    assert any(note.startswith("The held-out images were not scored: array: holds 1 image") for note in made["notes"])


@pytest.mark.parametrize("num", [2, 13])
def test_unconditional_flow_model_and_few_samples(tiny: Tiny, num: int) -> None:
    run = trained(
        tiny(
            model={"num_classes": 0}, objective={"prediction_type": "flow_prediction"},
            sample={**SAMPLE, "sampler": "flow-euler", "num": num},
        )
    )  # fmt: skip
    made = written(run)
    assert made["classes"] is None
    assert made["copies"]["held_out"]
    assert made["sampling"] | {"seconds": 0} == {
        "num": num, "sampler": "flow-euler", "steps": 3, "nfe": 3, "guidance": 1.0, "seed": 0, "seconds": 0
    }  # fmt: skip
    shown = Page(run)
    assert "Unconditional" in shown.text
    assert "show their class" not in shown.text
    assert "--num 16" in shown.text


def test_a_dense_twin_has_no_expert_maps_and_says_so(tiny: Tiny) -> None:
    run = trained(
        tiny(moe={"blocks": "none"}, sample=SAMPLE, objective={"prediction_type": "epsilon", "learn_sigma": True})
    )
    (run / "experts.png").write_bytes(b"from another run")
    made = written(run)
    assert made["experts"] == []
    assert not (run / "experts.png").exists()
    shown = Page(run)
    assert len(shown.links) == 3
    assert "no experts (a dense twin)" in shown.text


def test_the_page_names_the_teachers(tiny: Tiny, tmp_path: Path) -> None:
    teacher = trained(tiny(out=tmp_path / "teacher", max_steps=1))
    run = trained(tiny(max_steps=1, sample=SAMPLE, distill={"teachers": (str(teacher),)}))
    assert written(run)["teachers"] == [str(teacher)]
    assert f"Taught by {teacher}." in Page(run).text


def test_latents_are_shown_but_not_judged(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    latents = {"latents": torch.randn(40, 4, 8, 8), "labels": torch.arange(40) % 3}
    save_file(latents, tmp_path / "shards" / "a.safetensors")
    run = trained(tiny(data={"name": "latents", "path": tmp_path / "shards"}, model={"in_channels": 4}, sample=SAMPLE))
    made = written(run, score=lambda images: pytest.fail("latents were scored"))
    assert (made["classes"], made["copies"], made["pixels"], made["score"]) == (None, None, None, None)
    assert "latents have no pixels" in Page(run).text
    assert "3 of 4 channels" in Page(run).text


def test_what_is_no_run_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the configuration of a run"):
        written(tmp_path / "nothing")
    run = trained(tiny(max_steps=1))
    values = json.loads((run / "config.json").read_text())
    for broken in ({**values, "modle": {}}, {**values, "moe": {"num_expert": 3}}, {k: values[k] for k in ("out",)}):
        (run / "config.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=re.escape(str(run / "config.json"))):
            written(run)


def test_a_saved_configuration_comes_back_equal(tiny: Tiny) -> None:
    config = tiny(max_steps=1, data={"name": "fashion", "path": Path("somewhere")}, train={"decay_steps": 9})
    from ditmoe.config.file import save

    config.out.mkdir()
    save(config, config.out / "config.json")
    assert read_config(config.out) == config
    values = json.loads((config.out / "config.json").read_text())
    del values["parallel"]  # as a version without this section wrote it
    (config.out / "config.json").write_text(json.dumps(values))
    assert read_config(config.out) == config


def test_the_shipped_model_says_how_it_was_trained() -> None:
    config = read_config(Path("models/fashion"), "training.json")
    assert (config.data.name, config.moe.num_experts) == ("fashion", 16)


@pytest.mark.parametrize("router_input", ["token", "position"])
def test_expert_counts_are_those_of_single_images(tiny: Tiny, router_input: str) -> None:
    net = load(trained(tiny(max_steps=2, model={"depth": 4}, moe={"router_input": router_input}))).transformer
    objective = Objective(ObjectiveConfig())
    classes, B, n = [7, 2, 5], 2, 2
    x = torch.randn(3, n, 1, 8, 8)
    counts = count_experts(net, ObjectiveConfig(), x, classes, B, seed=3)
    assert counts.shape == (2, B, 3, 4, 4)  # layers, bins, classes, tokens, experts
    assert (counts.sum(axis=-1) == n * 2).all()
    expected = np.zeros_like(counts)
    noise = torch.randn(3, n, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    for b in range(B):
        for y, label in enumerate(classes):
            for i in range(n):
                t = torch.tensor([500.0 * b + 250 * (i + 0.5)])
                x_t, _ = objective.corrupt(x[y, i : i + 1], t, noise[y, i : i + 1])
                with torch.no_grad():
                    routing = net(x_t, t, torch.tensor([label])).routing
                for layer, record in enumerate(routing):
                    for token, expert in zip(record.plan.row, record.plan.expert, strict=True):
                        expected[layer, b, y, token, expert] += 1
    assert (counts == expected).all()
    assert moe_layer_names(net) == ["block 1", "block 3"]


def test_training_is_summed_up_from_the_log(tiny: Tiny) -> None:
    rows = [{"step": 20 * (i + 1), "loss": float(i), "images_per_second": 16.0 * (1 + i % 2)} for i in range(20)]
    rows.append({"step": 405, "loss": 2.0, "images_per_second": 16.0})  # the last row may come early
    found = summarise(rows, tiny())
    assert found["steps"] == 405
    assert found["seconds"] == 10 * 20 + 10 * 10 + 5  # 20 steps of 16 images at 16 and at 32 images a second, then 5
    assert found["images_per_second"] == pytest.approx(405 * 16 / 305, abs=0.1)
    assert found["final_loss"] == 10.5
    assert summarise([], tiny())["final_loss"] is None


def test_one_training_image_is_enough_to_end_well(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "photos" / "a.png")
    config = tiny(data={"name": "folder", "path": tmp_path / "photos"}, sample=SAMPLE)
    data = open_data(config.data, size=8, channels=1)

    def score(images: Any) -> dict[str, Any]:
        return fid.score(images, reference(data, 0))

    train(config, data, lambda n, pipe: progress.progress(config, n, pipe, score))
    progress.progress(config, 2, load(config.out), score)
    assert "warning: there is no score of step 2 (array: holds 1 image" in capsys.readouterr().out
    report.finish(config, score, judge.judge, news=True)
    assert f"{config.out} is finished: see {config.out}/index.html" in capsys.readouterr().out
    made = json.loads((config.out / "report.json").read_text())
    assert made["score"] is made["score_real"] is None
    assert made["notes"][0].startswith("The samples were not scored: array: holds 1 image; a covariance needs at")
    assert [note for note in made["notes"] if "scored" in note] == made["notes"][:1]
    assert made["notes"][0] in Page(config.out).text


def test_what_a_page_cannot_show_is_a_note(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any, **options: Any) -> Any:
        raise ValueError("it cannot be done")

    run = trained(tiny(sample=SAMPLE))
    for name in ("_draw_film", "_draw_experts"):
        monkeypatch.setattr(report, name, refuses)
    made = report.write(run, score=refuses, judge=refuses)
    wanted = ["There is no film", "No routing", "Samples were not judged", "The samples were not scored"]
    assert made["notes"] == [f"{what}: it cannot be done." for what in wanted]
    assert made["experts"] == []
    assert all(made[part] is None for part in ("classes", "copies", "pixels", "score", "score_real"))
    assert made["notes"][2] in Page(run).text


@pytest.mark.parametrize("error", [ValueError("its data are gone"), FloatingPointError("images are not finite")])
def test_a_finished_run_without_its_page_is_finished(
    error: Exception, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(sample=SAMPLE, max_steps=1)
    trained(config)

    def fails(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(report, "write", fails)
    report.finish(config, None, judge.judge, news=False)
    said = f"warning: {config.out} is finished, but for its page ({error}); the same command tries again\n"
    assert capsys.readouterr().err == said


def test_other_options_of_drawing_do_not_change_a_finished_page_and_it_says_so(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(sample=SAMPLE, max_steps=1)
    trained(config)
    (config.out / "index.html").touch()
    report.finish(config, None, judge.judge, news=False)
    assert "note" not in capsys.readouterr().out
    report.finish(replace(config, sample=replace(config.sample, cfg=4.0)), None, judge.judge, news=False)
    assert "note: the page stays as it was (sample.cfg: 1.5 -> 4.0): " in capsys.readouterr().out
