"""What `sample.py` writes, notes and refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ditmoe import cli, pipeline
from ditmoe.cli import parse
from ditmoe.config.file import save
from ditmoe.config.sample import SampleArgs
from ditmoe.config.sections import Config, ModelConfig, ObjectiveConfig, SampleConfig
from ditmoe.data import pixels
from ditmoe.generate.request import facts, requested, run
from ditmoe.model import build
from samplers import catalog, time_shift
from tests.ditmoe.pipeline.test_pipeline import make
from tests.ditmoe.test_saved_files import SAVED


class Alone:
    """The only process."""

    rank, world = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


def test_sample_py_writes_grids_npz_and_folders(tmp_path: Path) -> None:
    pipeline.save(make(), tmp_path / "model")
    run(SampleArgs(tmp_path, out=tmp_path / "a.npz", classes=(3, 1, 1), batch_size=2), Alone())
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file["arr_0"].shape == (3, 8, 8, 1)
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [3, 1, 1]
        assert json.loads(str(file["facts"]))["sampler"]["name"] == "ddim"
        images = file["arr_0"]
    assert not (tmp_path / "a.npz.parts").exists()
    run(SampleArgs(tmp_path, out=tmp_path / "many", classes=(3, 1, 1)), Alone())
    files = sorted((tmp_path / "many").glob("*.png"))
    assert [f.name for f in files] == ["000000-class3.png", "000001-class1.png", "000002-class1.png"]
    assert np.array_equal(np.asarray(Image.open(files[0])), images[0, :, :, 0])
    run(SampleArgs(tmp_path / "model", out=tmp_path / "grid.png", num=6), Alone())
    assert Image.open(tmp_path / "grid.png").size[0] > 100
    with pytest.raises(ValueError, match=r"part of another set \(other label_sampling, labels_sha256, num\)"):
        run(SampleArgs(tmp_path, out=tmp_path / "many", num=1), Alone())
    with pytest.raises(ValueError, match="give a .png or .npz file"):
        run(SampleArgs(tmp_path, out=tmp_path / "x.jpg", num=1), Alone())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is not empty"):
        run(SampleArgs(tmp_path, out=tmp_path / "other", num=1), Alone())


def test_what_time_shift_used_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.save(make(data_variance=0.4), tmp_path / "model")
    args = SampleArgs(tmp_path, out=tmp_path / "a.npz", num=2, sampler="ts-ddim", steps=10)
    run(args, Alone())
    with np.load(tmp_path / "a.npz") as file:
        noted = json.loads(str(file["facts"]))["sampler"]
    used = {"exposure_window": 40, "exposure_cutoff": 100, "exposure_mode": "both",
            "exposure_variance": "published", "exposure_min_snr": 0.0}  # fmt: skip
    assert {name: value for name, value in noted.items() if name.startswith("exposure_")} == used
    same = replace(args, exposure_window=40, exposure_mode="both", exposure_variance="published")
    assert facts(same, requested(same)) == facts(args, requested(args))
    other = requested(replace(args, exposure_variance="calibrated", exposure_min_snr=1.0)).sampler
    assert other == {**noted, "exposure_variance": "calibrated", "exposure_min_snr": 1.0}
    assert not [name for name in requested(replace(args, sampler="ddim")).sampler if "exposure" in name]
    run(replace(args, out=tmp_path / "many"), Alone())
    monkeypatch.setattr(catalog, "TIME_SHIFT_CUTOFF", 0.2)  # another version of the program
    with pytest.raises(ValueError, match=r"part of another set \(other sampler\)"):
        run(replace(args, out=tmp_path / "many"), Alone())


def test_what_time_shift_says_is_true_and_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time_shift.say_once.cache_clear()
    said: list[str] = []
    monkeypatch.setattr(time_shift.logger, "warning", said.append)
    pipeline.save(make(sampler="ts-ddim", data_variance=1.0), tmp_path / "model")  # as of latents
    args = SampleArgs(tmp_path, out=tmp_path / "a.npz", num=4, batch_size=1, steps=4)
    run(replace(args, exposure_variance="calibrated"), Alone())
    config = pipeline.load(tmp_path).scheduler.config
    assert catalog.network_calls("ts-ddim", config, 4, {"exposure_variance": "calibrated"}) == 4
    assert said == []
    run(args, Alone())
    assert len(said) == 1
    assert "the data has variance 1.00" in said[0]
    run(replace(args, sampler="ts-ddim", steps=60, exposure_variance="calibrated"), Alone())
    assert len(said) == 2
    assert "time-shift is for few steps: with 60 network calls" in said[1]


@pytest.mark.parametrize("name", ["many", "a.npz", "grid.png"])
def test_images_that_are_not_finite_are_not_written(tmp_path: Path, name: str) -> None:
    pipe = make()
    pipe.transformer.final_layer.linear.bias.data.fill_(torch.nan)
    pipeline.save(pipe, tmp_path / "model")
    with pytest.raises(FloatingPointError, match="images are not finite"):
        run(SampleArgs(tmp_path, out=tmp_path / name, num=2), Alone())
    assert not [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.npz")]


@pytest.mark.parametrize(
    ("sampler", "field", "sentence"),
    [
        ("ts-ddim", {"data_variance": "0.4"}, "data_variance is '0.4', but it must be a number above 0"),
        ("unipc", {"solver_order": "2"}, "sampler 'unipc' cannot be made of the saved scheduler's config"),
    ],
)
def test_a_damaged_scheduler_is_refused(tmp_path: Path, sampler: str, field: dict[str, Any], sentence: str) -> None:
    pipeline.save(make(), tmp_path / "model")
    file = tmp_path / "model/scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **field}))
    with pytest.raises(ValueError, match=sentence):
        run(SampleArgs(tmp_path, out=tmp_path / "many", num=1, sampler=sampler), Alone())
    assert not (tmp_path / "many").exists()


def test_rgb_images_are_written(tmp_path: Path) -> None:
    model = ModelConfig(sample_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2)
    config = Config(model=model, sample=SampleConfig(steps=2))
    pipeline.save(pipeline.assemble(build(config, 0), config, {}), tmp_path / "model")
    run(SampleArgs(tmp_path, num=1, out=tmp_path / "rgb"), Alone())
    assert Image.open(tmp_path / "rgb" / "000000.png").mode == "RGB"


def noted(folder: Path) -> Any:
    return json.loads((folder / "sampling.json").read_text())


def test_a_set_knows_its_guide_and_goes_on_with_no_other(tmp_path: Path) -> None:
    run_folder = SAVED / "by-token"
    args = SampleArgs(run_folder, out=tmp_path / "many", num=4, steps=2, batch_size=1, guide_scale=3.0)
    step = replace(args, guide=str(run_folder / "checkpoints/step-000004"))
    run(step, Alone())
    found = noted(tmp_path / "many")
    assert found["guide"]["path"] == step.guide
    assert found["sampler"]["guide_scale"] == 3.0
    (last,) = (tmp_path / "many").glob("000003-*.png")
    content = last.read_bytes()
    last.unlink()
    run(replace(args, guide=str(run_folder)), Alone())  # the same network at another place
    assert last.read_bytes() == content
    for other, what in (
        (replace(args, guide="experts-off"), "guide"),
        (replace(args, guide=str(SAVED / "by-place")), "guide"),
        (replace(step, guide_scale=2.0), "sampler"),
        (replace(step, guide="none", guide_scale=None), "guide, sampler"),
    ):
        with pytest.raises(ValueError, match=rf"part of another set \(other {what}\)"):
            run(other, Alone())


def test_a_set_without_a_guide_goes_on_from_before_there_were_guides(tmp_path: Path) -> None:
    pipeline.save(make(), tmp_path / "model")
    args = SampleArgs(tmp_path, out=tmp_path / "many", num=2, batch_size=1)
    run(args, Alone())
    found = noted(tmp_path / "many")
    assert found.pop("guide") is None
    assert "guide_scale" not in found["sampler"]
    (tmp_path / "many" / "sampling.json").write_text(json.dumps(found))
    (first,) = (tmp_path / "many").glob("000000-*.png")
    first.unlink()
    run(args, Alone())
    assert first.exists()


def test_the_guide_that_a_model_names_is_noted_and_can_be_left_out(tmp_path: Path) -> None:
    pipe, guide = make(), make()
    torch.nn.init.normal_(guide.transformer.final_layer.linear.weight)
    pipeline.save(guide, tmp_path / "weaker" / "model")
    pipeline.add_guide(pipe, guide.transformer, 3.0)
    pipeline.save(pipe, tmp_path / "strong" / "model")
    args = SampleArgs(tmp_path / "strong", num=2)
    saved, given, without = (
        facts(a, requested(a))
        for a in (args, replace(args, guide=str(tmp_path / "weaker")), replace(args, guide="none"))
    )
    assert saved["guide"]["sha256"] == given["guide"]["sha256"]
    assert (saved["guide"]["path"], given["guide"]["path"]) == (str(tmp_path / "strong"), str(tmp_path / "weaker"))
    assert [f["sampler"].get("guide_scale") for f in (saved, given, without)] == [3.0, 2.0, None]
    assert without["guide"] is None
    off = replace(args, guide="experts-off")
    assert facts(off, requested(off))["guide"] == "experts-off"
    three = replace(args, guide=str(tmp_path / "weaker"), guide_scale=3.0)
    batches = [requested(a).batch(range(2)) for a in (args, three, off)]
    assert np.array_equal(batches[0], batches[1])
    assert not np.array_equal(batches[0], batches[2])


def test_a_refused_guide_makes_no_folder(tmp_path: Path) -> None:
    args = SampleArgs(SAVED / "by-token", out=tmp_path / "many", num=2, guide=str(SAVED.parents[1] / "models/fashion"))
    with pytest.raises(ValueError, match="the guide has sample_size 28, but the model has 8"):
        run(args, Alone())
    assert not (tmp_path / "many").exists()


def test_the_interval_that_a_model_names_is_its_default_and_is_noted(tmp_path: Path) -> None:
    pipe = make()
    torch.nn.init.normal_(pipe.transformer.final_layer.linear.weight)
    torch.nn.init.normal_(pipe.transformer.y_embedder.embedding_table.weight)
    pipe.register_to_config(guidance_scale=3.0)
    pipeline.save(pipe, tmp_path / "all" / "model")
    pipe.register_to_config(guidance_interval=[0.0, 400.0])
    pipeline.save(pipe, tmp_path / "some" / "model")
    args = SampleArgs(tmp_path / "some", num=2, steps=4)
    cases = {
        "saved": args, "asked": replace(args, model=tmp_path / "all", guidance_interval=(0, 400)),
        "everywhere": replace(args, guidance_interval=(0, 1000)), "without": replace(args, model=tmp_path / "all"),
        "unguided": replace(args, cfg=1.0), "one step": replace(args, steps=1),
    }  # fmt: skip
    images = {name: requested(case).batch(range(2)) for name, case in cases.items()}
    noted = {name: facts(case, requested(case))["sampler"]["guidance_interval"] for name, case in cases.items()}
    assert noted == {
        "saved": [0.0, 400.0], "asked": [0, 400], "everywhere": [0, 1000], "without": None, "unguided": None,
        "one step": None,
    }  # fmt: skip
    assert np.array_equal(images["saved"], images["asked"])
    assert np.array_equal(images["everywhere"], images["without"])
    assert not np.array_equal(images["saved"], images["without"])
    assert not np.array_equal(images["saved"], images["unguided"])
    trained = Config(sample=SampleConfig(guidance_interval=(0.0, 400.0)))
    again = pipeline.assemble(pipe.transformer, trained, {0: "a"})
    assert tuple(again.config.guidance_interval) == (0.0, 400.0)


@pytest.mark.parametrize("span", [[400.0, 0.0], [0.0], "all", [0, "x"], [-1.0, 5.0], [True, 2]])
def test_an_interval_of_a_foreign_folder_is_looked_at(tmp_path: Path, span: Any) -> None:
    pipeline.save(make(), tmp_path / "model")
    file = tmp_path / "model" / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "guidance_interval": span}))
    with pytest.raises(ValueError, match="model_index.json has guidance_interval"):
        pipeline.load(tmp_path)


def test_a_flow_shift_is_asked_for_or_saved(tmp_path: Path) -> None:
    model = ModelConfig(sample_size=8, hidden_size=32, depth=2, num_heads=2)
    saved = Config(model=model, sample=SampleConfig(sampler="unipc", steps=3, flow_shift=2.0))
    torch.manual_seed(0)
    net = build(saved, 2)
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.1)
    for name, config in (("saved", saved), ("plain", replace(saved, sample=SampleConfig(sampler="unipc", steps=3)))):
        pipeline.save(pipeline.assemble(net, config, {0: "a", 1: "b"}), tmp_path / name / "model")
    plain, asked = SampleArgs(tmp_path / "plain", num=2), SampleArgs(tmp_path / "plain", num=2, flow_shift=2.0)
    images = [requested(a).batch(range(2)) for a in (SampleArgs(tmp_path / "saved", num=2), asked, plain)]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])
    assert facts(asked, requested(asked))["sampler"]["grid_shift"] == 2.0
    with pytest.raises(ValueError, match="'ddim' has no flow_shift, leave it out"):
        requested(replace(asked, sampler="ddim"))
    with pytest.raises(ValueError, match="'ddpm' has no flow_shift"):
        pipeline.assemble(net, replace(saved, sample=SampleConfig(sampler="ddpm", flow_shift=2.0)), {})


def test_classes_are_labels_or_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = dict(enumerate(["cat", "10", "big dog", "owl"]))
    pipe = make()
    pipe.register_to_config(id2label={str(label): name for label, name in names.items()})
    pipeline.save(pipe, tmp_path / "model")
    args = parse(SampleArgs, [str(tmp_path), "--classes", "owl", "1", "big dog", "0"])
    assert requested(args).labels == [3, 1, 2, 0]
    assert capsys.readouterr().out == ""
    with pytest.raises(
        ValueError, match=r"no class 'oowl'; did you mean 'owl'\? this model has cat, 10, big dog, owl$"
    ):
        requested(replace(args, classes=("oowl",)))
    with pytest.raises(ValueError, match="out of range"):
        run(replace(args, classes=(10,), out=tmp_path / "a.npz"), Alone())
    assert "note: classes has 10: the class of that label is 'not there', and the one of that name has label 1" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(("dropout", "cfg", "said"), [(0.0, 2.0, True), (0.0, 1.0, False), (0.1, 2.0, False)])
def test_guidance_by_an_answer_that_was_not_trained_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dropout: float, cfg: float, said: bool
) -> None:
    pipeline.save(make(), tmp_path / "model")
    config = Config(objective=ObjectiveConfig(class_dropout_prob=dropout))
    save(config, tmp_path / "config.json")
    requested(SampleArgs(tmp_path, cfg=cfg))
    assert ("trained no answer without labels" in capsys.readouterr().out) is said


def test_classes_are_asked_for_by_name_too_and_suffixes_in_capitals(tmp_path: Path) -> None:
    pipeline.save(make(), tmp_path / "model")
    args = SampleArgs(tmp_path, classes=("class 3", 1))
    numbers = SampleArgs(tmp_path, classes=(3, 1))
    assert requested(args).labels == [3, 1]
    assert facts(args, requested(args)) == facts(numbers, requested(numbers))
    with pytest.raises(ValueError, match="did you mean 'class 3'"):
        requested(replace(args, classes=("clas 3",)))
    run(replace(args, out=tmp_path / "a.NPZ"), Alone())
    with np.load(tmp_path / "a.NPZ") as file:
        assert file["arr_1"].tolist() == [3, 1]
    run(replace(args, out=tmp_path / "a.PNG"), Alone())
    assert Image.open(tmp_path / "a.PNG").format == "PNG"
    assert cli.parse(SampleArgs, ["m", "--classes", "Sneaker", "3"]).classes == ("Sneaker", 3)
    pipeline.save(make(num_classes=0), tmp_path / "plain" / "model")
    with pytest.raises(ValueError, match="trained without labels"):
        requested(SampleArgs(tmp_path / "plain", classes=(1,)))


def test_a_model_saved_with_a_scheduler_of_diffusers_is_drawn_from(tmp_path: Path) -> None:
    pipe = make("epsilon")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipeline.save(pipe, tmp_path / "model")
    args = SampleArgs(tmp_path, out=tmp_path / "a.npz", num=2, steps=3, precision="fp32")
    run(args, Alone())
    assert facts(args, requested(args))["sampler"]["name"] == "DDIMScheduler"
    own = pipe([0, 1], num_inference_steps=3, output_type="pt").images
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["arr_0"], pixels.to_pixels(own))
    with pytest.raises(ValueError, match="sampler of diffusers has no flow_shift"):
        requested(replace(args, flow_shift=2.0))
    with pytest.raises(ValueError, match="set pipe.scheduler = DDIMScheduler.from_config"):
        requested(replace(args, exposure_window=20))


def test_words_that_are_not_a_label_as_it_is_written_are_names(tmp_path: Path) -> None:
    pipe = make()
    pipe.register_to_config(id2label={"0": "001", "1": "002", "2": "20_29", "3": "+3"})
    pipeline.save(pipe, tmp_path / "model")
    asked = parse(SampleArgs, [str(tmp_path), "--classes", "001", "1", "20_29", "+3", "3"])
    assert asked.classes == ("001", 1, "20_29", "+3", 3)
    assert requested(asked).labels == [0, 1, 2, 3, 3]
