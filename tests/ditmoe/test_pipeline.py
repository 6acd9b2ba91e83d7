"""The pipeline folder and the images that come out of it."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ditmoe import files as disk
from ditmoe import pipeline
from ditmoe.config.sample import SampleArgs
from ditmoe.config.sections import Config, ModelConfig, MoEConfig, ObjectiveConfig, SampleConfig
from ditmoe.data import pixels
from ditmoe.generate import set_files
from ditmoe.generate.draw import balanced_labels, draw
from ditmoe.generate.request import requested, run
from ditmoe.model import build
from samplers import SAMPLERS, catalog, time_shift


def make(
    kind: str = "v_prediction", num_classes: int = 4, sampler: str = "ddim", data_variance: float | None = None
) -> pipeline.DiTMoEPipeline:
    config = Config(
        model=ModelConfig(sample_size=8, patch_size=4, hidden_size=32, depth=2, num_heads=2, ffn_width=48),
        moe=MoEConfig(num_experts=4, expert_width=16, shared_width=16),
        objective=ObjectiveConfig(prediction_type=kind),  # type: ignore[arg-type]
        sample=SampleConfig(sampler=sampler, steps=4, cfg=1.5),
    )
    torch.manual_seed(0)
    model = build(config, num_classes)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return pipeline.assemble(model, config, {i: f"class {i}" for i in range(num_classes)}, data_variance)


def test_saved_and_loaded_pipelines_draw_the_same_images(tmp_path: Path) -> None:
    pipe = make()
    pipeline.save(pipe, tmp_path / "model")
    again = pipeline.DiTMoEPipeline.from_pretrained(tmp_path / "model")
    assert again.id2label == {0: "class 0", 1: "class 1", 2: "class 2", 3: "class 3"}
    first, second = (p(class_labels=[0, 3], output_type="pt").images for p in (pipe, again))
    assert torch.equal(first, second)
    pictures = again(class_labels=[1, 2]).images
    assert [p.size for p in pictures] == [(8, 8), (8, 8)]
    assert (tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    assert not list((tmp_path / "model").rglob("*.bin"))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_batch_size_changes_nothing(sampler: str) -> None:
    pipe = make()
    labels = balanced_labels(pipe, 50)
    whole = draw(pipe, labels, 50, sampler=sampler, batch_size=50)
    for size in (1, 7):
        other = draw(pipe, labels, 50, sampler=sampler, batch_size=size)
        assert (whole.astype(int) - other).__abs__().max() <= 1  # one grey level: float32 sums in another order
        assert (whole == other).mean() > 0.999
    assert len({image.tobytes() for image in whole}) == 50


def test_image_i_depends_on_its_number_seed_and_label() -> None:
    pipe = make()
    base = draw(pipe, [0, 1, 2], 3)
    assert np.array_equal(draw(pipe, [0, 1, 3], 3)[:2], base[:2])
    assert not np.array_equal(draw(pipe, [0, 1, 3], 3)[2], base[2])
    assert not np.array_equal(draw(pipe, [0, 1, 2], 3, seed=1)[0], base[0])
    later = pipe(class_labels=[2], indices=[2], output_type="pt").images
    assert np.abs(pixels.to_pixels(later)[0].astype(int) - base[2]).max() <= 1


def test_unconditional_models() -> None:
    pipe = make(num_classes=0)
    assert len(pipe(num_images=3).images) == 3
    with pytest.raises(ValueError, match="without labels"):
        pipe(class_labels=[1])
    with pytest.raises(ValueError, match="unconditional"):
        pipe(num_images=1, guidance_scale=2.0)


@pytest.mark.parametrize("kind", ["flow_prediction", "v_prediction", "epsilon"])
@pytest.mark.parametrize("saved", ["flow-euler", "ddim"])
def test_every_sampler_draws_from_every_model(kind: str, saved: str) -> None:
    pipe = make(kind, sampler=saved)
    images = {
        name: pipe(class_labels=[1, 2], sampler=name, num_inference_steps=8, output_type="pt").images
        for name in SAMPLERS
    }
    assert all(x.isfinite().all() for x in images.values())
    other = make(kind, sampler="ddim" if saved == "flow-euler" else "flow-euler")
    for name in SAMPLERS:  # whichever sampler the model was saved with
        again = other(class_labels=[1, 2], sampler=name, num_inference_steps=8, output_type="pt").images
        torch.testing.assert_close(again, images[name])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"class_labels": [4]}, r"label 4 is out of range: this model has classes 0\.\.3"),
        ({"class_labels": [-1]}, "label -1 is out of range"),
        ({}, "needs class_labels"),
        ({"class_labels": [0], "sampler": "dimm"}, "did you mean 'ddim'"),
        ({"class_labels": [0], "num_inference_steps": 1001}, "1001"),
        ({"class_labels": [0], "output_type": "jpg"}, "pil or pt"),
        ({"class_labels": [0], "eta": 2.0}, "eta is 2.0"),
        ({"class_labels": [0], "epsilon_scale": 0.0}, "epsilon_scale"),
        ({"class_labels": [0], "guidance_rule": "cfg++", "guidance_scale": 1.0, "sampler": "ddpm"}, "works with ddim"),
        (
            {"class_labels": [0], "guidance_rule": "cfg++"},
            r"guidance_scale is 1.5, but guidance_rule 'cfg\+\+' takes 0 ",
        ),
        ({"class_labels": [0], "guidance_interval": (2000, 3000)}, "holds none of the 4 timesteps of this run"),
        ({"class_labels": [0], "sampler": "ts-ddim", "sampler_options": {"exposure_window": -1}}, "exposure_window"),
    ],
)
def test_values_that_cannot_be_used(call: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()(**call)


def test_a_learned_variance_is_used_whichever_sampler_was_saved(tmp_path: Path) -> None:
    objective = ObjectiveConfig(prediction_type="epsilon", learn_sigma=True)
    config = Config(model=ModelConfig(hidden_size=32, depth=2, num_heads=2), objective=objective,
                    sample=SampleConfig(sampler="dpm++2m", steps=3))  # fmt: skip
    pipe = pipeline.assemble(build(config, 3), config, {}, data_variance=0.4)
    pipeline.save(pipe, tmp_path / "model")
    loaded = pipeline.load(tmp_path / "model")
    drawn = {name: loaded([0, 1], sampler=name, num_inference_steps=4, output_type="pt").images
             for name in ("ddpm", "ts-ddpm", "ddim", "pndm", "unipc")}  # fmt: skip
    assert all(images.isfinite().all() for images in drawn.values())
    assert loaded._scheduler_config()["variance_type"] == "learned_range"
    assert loaded.scheduler.config.data_variance == 0.4
    assert loaded.network_calls("pndm", 20) == 29


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "pndm", "ts-ddim", "dpm++2m", "unipc"])
def test_every_sampler_tells_what_it_takes_the_clean_image_for(sampler: str) -> None:
    seen: list[torch.Tensor] = []
    x = make()([1, 2], sampler=sampler, num_inference_steps=6, output_type="pt",
               callback=lambda k, t, x_t, x_0: seen.append(x_0)).images  # fmt: skip
    assert all(x_0.shape == x.shape for x_0 in seen)
    if sampler != "pndm":  # which mixes its last predictions
        torch.testing.assert_close(seen[-1], x, rtol=1e-4, atol=1e-4)  # the last step goes there


def test_pixels_are_rounded_half_up() -> None:
    levels = torch.arange(256) / 127.5 - 1
    assert pixels.to_pixels(levels.view(1, 1, 1, 256)).flatten().tolist() == list(range(256))
    assert pixels.to_pixels(torch.tensor([-3.0, 0.0, 3.0]).view(1, 1, 1, 3)).flatten().tolist() == [0, 128, 255]


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
    assert requested(same).facts == requested(args).facts
    other = requested(replace(args, exposure_variance="calibrated", exposure_min_snr=1.0)).facts["sampler"]
    assert other == {**noted, "exposure_variance": "calibrated", "exposure_min_snr": 1.0}
    assert not [name for name in requested(replace(args, sampler="ddim")).facts["sampler"] if "exposure" in name]
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


def test_a_refused_command_does_not_keep_its_folder(tmp_path: Path) -> None:
    pipeline.save(make(num_classes=0), tmp_path / "model")
    args = SampleArgs(tmp_path, out=tmp_path / "many", num=2, cfg=2.0)
    with pytest.raises(ValueError, match="an unconditional model can only be sampled with guidance_scale 1"):
        run(args, Alone())
    assert not (tmp_path / "many").exists()
    run(replace(args, cfg=None), Alone())
    assert len(list((tmp_path / "many").glob("*.png"))) == 2
    assert json.loads((tmp_path / "many" / "sampling.json").read_text())["sampler"]["cfg"] is None
    with pytest.raises(ValueError, match=r"part of another set \(other sampler\)"):
        run(args, Alone())


def test_a_refusal_is_told_though_another_process_has_removed_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> Any:
        (tmp_path / "many" / "sampling.json").unlink()
        (tmp_path / "many").rmdir()
        raise ValueError("the user's mistake")

    pipeline.save(make(), tmp_path / "model")
    monkeypatch.setattr(set_files, "draw_some", refused)
    with pytest.raises(ValueError, match="the user's mistake"):
        run(SampleArgs(tmp_path, out=tmp_path / "many", num=2), Alone())


@pytest.mark.parametrize("name", ["many", "a.npz", "grid.png"])
def test_images_that_are_not_finite_are_not_written(tmp_path: Path, name: str) -> None:
    pipe = make()
    pipe.transformer.final_layer.linear.bias.data.fill_(torch.nan)
    pipeline.save(pipe, tmp_path / "model")
    with pytest.raises(FloatingPointError, match="images are not finite"):
        run(SampleArgs(tmp_path, out=tmp_path / name, num=2), Alone())
    assert not [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.npz")]


def test_a_second_command_does_not_take_a_folder_that_another_one_has_just_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.save(make(), tmp_path / "model")
    args = SampleArgs(tmp_path, out=tmp_path / "many", num=2)
    draw, refused = set_files.draw_some, []

    def and_meanwhile(*given: Any) -> Any:
        monkeypatch.setattr(set_files, "draw_some", draw)
        with pytest.raises(ValueError, match=r"part of another set \(other seed\)") as error:
            run(replace(args, seed=9), Alone())
        refused.append(error)
        return draw(*given)

    monkeypatch.setattr(set_files, "draw_some", and_meanwhile)
    run(args, Alone())
    assert refused
    note = tmp_path / "many" / "sampling.json"
    assert json.loads(note.read_text())["seed"] == args.seed
    written = note.stat().st_mtime_ns
    run(args, Alone())
    assert note.stat().st_mtime_ns == written


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


@pytest.mark.parametrize("name", ["set.npz", "folder"])
def test_an_interrupted_set_is_continued_and_equals_an_undisturbed_one(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.save(make(), tmp_path / "model")
    args = SampleArgs(tmp_path, out=tmp_path / name, num=10, batch_size=3)
    drawn: list[int] = []
    real = set_files.draw_some

    def until_the_second(pipe: Any, labels: Any, indices: Any, options: Any) -> Any:
        if len(drawn) == 6:
            raise KeyboardInterrupt
        drawn.extend(indices)
        return real(pipe, labels, indices, options)

    monkeypatch.setattr(set_files, "draw_some", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(args, Alone())
    assert not (tmp_path / "set.npz").exists()
    assert drawn == [0, 1, 2, 3, 4, 5]
    more: list[int] = []
    monkeypatch.setattr(set_files, "draw_some", lambda p, y, i, o: (more.extend(i), real(p, y, i, o))[1])
    run(args, Alone())
    assert more == [6, 7, 8, 9]
    monkeypatch.undo()
    expected = np.concatenate([batch for _, batch in requested(args).read(10, 3, 0, 1)])
    if name == "set.npz":
        with np.load(tmp_path / name) as file:
            assert np.array_equal(file["arr_0"], expected)
    else:
        found = [np.asarray(Image.open(file))[..., None] for file in sorted((tmp_path / name).glob("*.png"))]
        assert np.array_equal(np.stack(found), expected)


def test_processes_share_a_set(tmp_path: Path) -> None:
    pipeline.save(make(), tmp_path / "model")
    images = requested(SampleArgs(tmp_path, num=10))
    parts = [part for rank in range(3) for part in images.read(10, 2, rank, 3)]
    order = np.argsort(np.concatenate([indices for indices, _ in parts]))
    whole = np.concatenate([batch for _, batch in images.read(10, 2, 0, 1)])
    assert np.array_equal(np.concatenate([batch for _, batch in parts])[order], whole)


def test_a_model_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    pipeline.save(make(num_classes=2), folder)
    (tmp_path / "model.tmp-1-old").mkdir()  # of a kill
    done: list[tuple[str, str]] = []
    sync, rename = disk.sync, Path.rename

    def renaming(self: Path, target: Path) -> Path:
        assert folder.is_dir() == (self == folder)  # the old one is there until the new one is whole
        done.append(("rename", target.name))
        return rename(self, target)

    monkeypatch.setattr(disk, "sync", lambda path: (done.append(("sync", path.name)), sync(path)))
    monkeypatch.setattr(Path, "rename", renaming)
    pipeline.save(make(num_classes=4), folder)
    files = [("sync", p.name) for p in folder.rglob("*")]
    end = [("sync", f"model.tmp-{os.getpid()}"), ("rename", f"model.tmp-{os.getpid()}-old"), ("rename", "model")]
    assert sorted(done[: len(files)]) == sorted(files)
    assert done[len(files) :] == [*end, ("sync", tmp_path.name)]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert pipeline.load(folder).transformer.config.num_classes == 4


@pytest.mark.parametrize("place", ["sync", "second rename"])
def test_a_model_that_cannot_be_saved_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = tmp_path / "model"
    pipeline.save(make(num_classes=2), folder)
    rename = Path.rename

    def full(*args: Any) -> Any:
        if (args[-1] == folder and args[0].name == f"model.tmp-{os.getpid()}") or place == "sync":
            raise OSError("disk full")
        return rename(*args)

    with monkeypatch.context() as patched:
        patched.setattr(*((os, "fsync", full) if place == "sync" else (Path, "rename", full)))
        with pytest.raises(OSError, match="disk full"):
            pipeline.save(make(num_classes=4), folder)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert pipeline.load(folder).transformer.config.num_classes == 2


def test_the_steps_of_a_damaged_model_are_not_known(tmp_path: Path) -> None:
    assert pipeline.trained_steps(tmp_path) is None
    pipe = make()
    pipe.register_to_config(trained_steps=7)
    pipeline.save(pipe, tmp_path)
    assert pipeline.trained_steps(tmp_path) == 7
    (weights,) = tmp_path.glob("transformer/*.safetensors")
    os.truncate(weights, 100)
    assert pipeline.trained_steps(tmp_path) is None
    for text in ("[]", "[" * 100_000, ""):
        (tmp_path / "model_index.json").write_text(text)
        assert pipeline.trained_steps(tmp_path) is None


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no model: neither model_index\.json"):
        pipeline.load(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTMoEPipeline"}')
    with pytest.raises(ValueError, match="cannot be loaded|can be loaded"):
        pipeline.load(tmp_path)


def test_rgb_images_are_written(tmp_path: Path) -> None:
    model = ModelConfig(sample_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2)
    config = Config(model=model, sample=SampleConfig(steps=2))
    pipeline.save(pipeline.assemble(build(config, 0), config, {}), tmp_path / "model")
    run(SampleArgs(tmp_path, num=1, out=tmp_path / "rgb"), Alone())
    assert Image.open(tmp_path / "rgb" / "000000.png").mode == "RGB"


def test_a_saved_model_is_as_readable_as_other_files(tmp_path: Path) -> None:
    config = Config(model=ModelConfig(sample_size=8, patch_size=4, hidden_size=32, depth=1, num_heads=2))
    before = os.umask(0o027)
    try:
        pipeline.save(pipeline.assemble(build(config, 0), config, {}), tmp_path / "model")
        assert os.umask(0o027) == 0o027  # as it was
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    assert any(path.suffix == ".safetensors" for path in files)
