"""The pipeline folder and the images that come out of it."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ditmoe import files as disk
from ditmoe import pipeline
from ditmoe.config.sections import Config, ModelConfig, MoEConfig, ObjectiveConfig, SampleConfig
from ditmoe.data import pixels
from ditmoe.model import build
from samplers import SAMPLERS

SMALL = ModelConfig(sample_size=8, patch_size=4, hidden_size=32, depth=2, num_heads=2, ffn_width=48)


def make(
    kind: str = "v_prediction",
    num_classes: int = 4,
    sampler: str = "ddim",
    data_variance: float | None = None,
    **model: Any,
) -> pipeline.DiTMoEPipeline:
    config = Config(
        model=replace(SMALL, **model),
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
    assert loaded.scheduler_for("ddpm").config["variance_type"] == "learned_range"
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
    (tmp_path / "fashion").mkdir()
    with pytest.raises(ValueError, match=r"fashon holds no model: did you mean 'fashion'\? neither"):
        pipeline.load(tmp_path / "fashon")
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTMoEPipeline"}')
    with pytest.raises(ValueError, match="cannot be loaded|can be loaded"):
        pipeline.load(tmp_path)


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
