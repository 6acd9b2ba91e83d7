"""What trackers are told, on one run and when it goes on; what they cost a run: nothing."""

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from typing import Any

import pytest
from accelerate import Accelerator
from PIL import Image

from ditmoe.config.file import from_dict, to_dict
from ditmoe.config.sections import Config
from ditmoe.data.open import open_data
from ditmoe.run_folder.place import PROGRESS
from ditmoe.training import tracking
from ditmoe.training.loop import open_images, train

Tiny = Callable[..., Config]


def grid(config: Config) -> Callable[[int, Any], None]:
    def write(step: int, pipe: Any) -> None:
        (config.out / PROGRESS).mkdir(exist_ok=True)
        Image.new("L", (6, 5), 128).save(config.out / PROGRESS / f"step-{step:06d}.png")

    return write


def test_tensorboard_has_each_step_once_though_the_run_was_cut(tiny: Tiny) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    config = tiny(max_steps=3, train={"tracker": "tensorboard", "sample_every": 2})
    data = open_data(config.data, size=8, channels=1)
    for steps in (3, 5):
        assert train(replace(config, max_steps=steps), data, grid(config))
    board = EventAccumulator(str(config.out / "tensorboard"))
    board.Reload()
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])
    assert {event.step for event in board.Images("samples")} == {2, 4}
    assert (board.Images("samples")[0].width, board.Images("samples")[0].height) == (6, 5)


def test_a_tracker_that_fails_is_a_warning_once(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(self: Accelerator, *args: Any, **options: Any) -> None:
        raise RuntimeError("service away")

    monkeypatch.setattr(Accelerator, "log", fails)
    config = tiny(max_steps=3, train={"tracker": "tensorboard"})
    assert train(config, open_data(config.data, size=8, channels=1))
    warning = "warning: tensorboard failed (RuntimeError('service away')) and gets nothing any more"
    assert capsys.readouterr().out.count(warning) == 1
    assert len((config.out / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_package_that_is_missing_is_said_before_anything_else(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(train={"tracker": "wandb"})
    for spec in (None, ModuleSpec("wandb", None)):  # not there, or a folder of that name
        monkeypatch.setattr(tracking, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(ValueError, match="train.tracker wandb needs its package: pip install wandb"):
            open_images(config)
    assert not config.out.exists()


def test_a_run_of_an_older_version_that_wrote_for_tensorboard_does_so_still(tiny: Tiny) -> None:
    values = to_dict(tiny())
    del values["train"]["tracker"]
    values["train"]["tensorboard"] = True
    assert from_dict(values).train.tracker == "tensorboard"
    assert "tensorboard" in values["train"]
    values["train"]["tensorboard"] = False
    assert from_dict(values).train.tracker == "none"
