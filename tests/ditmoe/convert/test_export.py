"""A model to give away may name its guide."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ditmoe import pipeline
from ditmoe.config.convert import ExportArgs
from ditmoe.convert.export import export
from ditmoe.pipeline.guide import ExpertsOff
from tests.ditmoe.test_saved_files import SAVED

RUN = SAVED / "by-token"


def test_nothing_but_a_model_is_replaced(tmp_path: Path) -> None:
    run = tmp_path / "home" / "run"
    shutil.copytree(RUN, run)
    (tmp_path / "home" / "thesis.txt").write_text("years")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years")
    before = sorted(tmp_path.rglob("*"))
    for folder, sentence in (
        (run, "folder lies in run"), (run / "model", "folder lies in run"), (run.parent, "run lies in folder"),
        (tmp_path / "other", "holds files and no model"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            export(ExportArgs(run, folder, force=True))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("guide", ["experts-off", str(RUN / "checkpoints/step-000004")])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_the_folder_holds_the_guide_and_its_scale(tmp_path: Path, guide: str, scale: float | None) -> None:
    export(ExportArgs(RUN, tmp_path / "gift", guide=guide, guide_scale=scale))
    pipe = pipeline.load(tmp_path / "gift")
    found, w = pipe.guide_for()
    assert w == (scale or 2.0)
    if guide == "experts-off":
        assert isinstance(found, ExpertsOff)
        assert not (tmp_path / "gift" / "guide").exists()
    else:
        assert found is pipe.guide
        for value, kept in zip(found.state_dict().values(), pipe.transformer.state_dict().values(), strict=True):
            assert torch.equal(value, kept)  # of the same step, rounded alike
    card = (tmp_path / "gift" / "README.md").read_text()
    assert f"--guide {guide}{'' if scale is None else ' --guide-scale 3.0'}\n" in card
    assert f"guided by {guide}; `--guide none` draws without" in card


def test_the_page_says_how_a_guide_that_is_a_run_was_made(tmp_path: Path) -> None:
    guide = tmp_path / "guide"
    shutil.copytree(RUN, guide)
    (guide / "command.txt").write_text("python train.py weaker\n")
    export(ExportArgs(RUN, tmp_path / "gift", guide=str(guide)))
    commands = (tmp_path / "gift" / "README.md").read_text().split("```")[1].split("\n")
    assert commands[-3] == "python train.py weaker"
    assert commands[-2].startswith(f"python -m ditmoe export {RUN}")


def test_a_score_is_said_to_be_of_images_without_the_guide(tmp_path: Path) -> None:
    shutil.copytree(RUN, tmp_path / "run")
    report = {
        "model": {"parameters_total": 1, "parameters_activated": 1}, "data": {"name": "digits", "source": "digits"},
        "training": {"steps": 4, "batch_size": 2}, "sampling": {"cfg": 1.5},
        "score": {"metric": "fd_test", "value": 1.0, "n_gen": 20},
    }  # fmt: skip
    (tmp_path / "run" / "report.json").write_text(json.dumps(report))
    export(ExportArgs(tmp_path / "run", tmp_path / "gift", guide="experts-off"))
    card = (tmp_path / "gift" / "README.md").read_text()
    assert "`--guide none` draws without, as the scored images were." in card
    assert "guide: none\n" in card.split("---")[1]


def test_without_a_guide_there_is_none(tmp_path: Path) -> None:
    export(ExportArgs(RUN, tmp_path / "gift"))
    assert pipeline.load(tmp_path / "gift").guide_for() == (None, 1.0)
    assert "--guide" not in (tmp_path / "gift" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"guide_scale": 2.0}, "guide_scale is 2.0, but there is no guide; give --guide PATH or experts-off"),
        ({"guide": "none"}, "guide is none, which a model without --guide has"),
        ({"guide": "nowhere"}, "guide nowhere does not exist"),
        ({"guide": "experts-off", "guide_scale": 1.0}, "guide_scale is 1.0; with a guide it must be"),
        ({"guide": str(SAVED.parents[1] / "models/fashion")}, "the guide has sample_size 28, but the model has 8"),
    ],
)
def test_what_cannot_be_named_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        export(ExportArgs(RUN, tmp_path / "gift", **options))  # type: ignore[arg-type]
    assert not (tmp_path / "gift").exists()


def test_an_interrupted_export_leaves_nothing_and_the_older_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ditmoe.convert.export.make_standalone", stopped)
    with pytest.raises(KeyboardInterrupt):
        export(ExportArgs(RUN, tmp_path / "gift", standalone=True))
    assert not [*tmp_path.iterdir()]
    export(ExportArgs(RUN, tmp_path / "gift"))
    before = sorted(file.name for file in (tmp_path / "gift").iterdir())
    with pytest.raises(KeyboardInterrupt):
        export(ExportArgs(RUN, tmp_path / "gift", standalone=True, force=True))
    assert [*tmp_path.iterdir()] == [tmp_path / "gift"]
    assert sorted(file.name for file in (tmp_path / "gift").iterdir()) == before
    assert {"README.md", "training.json", "model_index.json"} <= {*before}
