"""Sweeps: what is refused before anything is written, and which reports are taken for points of this one."""

import hashlib
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest

from eval import sweep
from eval.fid import score
from eval.report import write_report

# of the model below, as sampling has it
HASH = hashlib.sha256(b"model_index.json" + hashlib.sha256(b"{}").digest()).hexdigest()


@pytest.fixture(scope="module")
def report(digits):
    return score(digits[0][:30], "digits:test")


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def drawn(monkeypatch, report, model):
    """The options of every point that `ditmoe sample` was asked for; it writes a report of them."""
    asked = []

    def sample(command, **_):
        options = dict(zip(command[5::2], command[6::2], strict=True))
        asked.append(options)
        if options["--sampler"] == "unknown":
            return CompletedProcess(command, 2, "", "error: unknown sampler 'unknown'\n")
        made = {"name": options["--sampler"], "steps": int(options["--steps"]), "nfe": int(options["--steps"])}
        generation = {
            "sampler": {**made, "cfg": float(options["--cfg"])},
            "seed": int(options["--seed"]),
            "checkpoint": {"sha256": HASH},
        }
        write_report(Path(options["--report"]), {**report, "generation": generation})
        return CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(run=sample))
    monkeypatch.setattr(sweep, "plot", lambda *_: None)
    return asked


@pytest.fixture
def run(model, tmp_path):
    def run(*options, model=model, ref="digits:test", out=tmp_path / "sw"):
        return sweep.main([str(model), "--ref", ref, "--num", "30", "--out", str(out), "--steps", "2", *options])

    return run


def test_a_mistake_leaves_nothing_in_the_way_of_the_right_command(run, drawn, tmp_path, capfd):
    for change, sentence in (
        ({"model": tmp_path / "nomodel"}, "holds no model: neither model_index.json nor model/model_index.json"),
        ({"ref": "nowhere"}, "'nowhere' does not exist"),
        ({"out": "/proc/sw"}, "cannot be a folder"),
        ({"out": "/proc"}, "cannot be written"),
    ):
        assert run(**change) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert sentence in line
        assert not (tmp_path / "sw").exists()
    assert drawn == []
    assert run("--sampler", "unknown") == 2  # what only sampling can tell
    assert run("--cfg", "nan") == 2
    assert run("--seed", "1") == 0


def test_guidance_is_not_rounded_in_names(run, drawn, tmp_path):
    assert run("--cfg", "1.0000001", "1.0000002") == 0
    assert len(list((tmp_path / "sw").glob("*-cfg*.json"))) == len(drawn) == 2


def test_a_report_under_the_name_of_another_point_is_not_taken(run, drawn, tmp_path, capfd):
    assert run() == 0
    (made,) = (tmp_path / "sw").glob("*-cfg*.json")
    made.rename(made.with_name("ddim-steps2-cfg1.5.json"))
    capfd.readouterr()
    assert run("--cfg", "1.5") == 2
    assert "is of sampler, steps and cfg ['ddim', 2, 1.0]; remove it" in capfd.readouterr().err


def test_points_of_another_sweep_are_not_mixed_in(run, drawn, model, capfd):
    assert run() == 0
    assert run() == 0
    assert len(drawn) == 1
    capfd.readouterr()
    assert run("--sampler", "ddpm", "--seed", "1") == 2
    assert "holds a sweep with other seed" in capfd.readouterr().err
    (model / "model_index.json").write_text("[]")
    assert run() == 2
    assert "holds a sweep with other model" in capfd.readouterr().err
    assert len(drawn) == 1


def test_a_reference_is_the_same_one_by_the_name_that_reports_have(run, drawn, monkeypatch):
    monkeypatch.setattr(sweep, "open_source", lambda _: SimpleNamespace(path="digits:test"))  # of a table, say
    assert run(ref="digits") == 0
    assert run("--cfg", "1.0", "2.0", ref="digits") == 0
    assert [options["--cfg"] for options in drawn] == ["1.0", "2.0"]


def test_a_torn_report_and_a_foreign_folder_are_one_sentence(run, drawn, tmp_path, capfd):
    (tmp_path / "sw").mkdir()
    (tmp_path / "sw" / "notes.txt").touch()
    assert run() == 2
    assert "is not empty" in capfd.readouterr().err
    (tmp_path / "sw" / "ddim-steps2-cfg1.0.json").write_text('{"metric": ')
    assert run() == 2
    assert "cannot be read as JSON" in capfd.readouterr().err
    assert drawn == []


def test_what_the_points_warn_about_is_said_once(run, drawn, capfd):
    assert run("--cfg", "1", "1.5") == 0
    warnings = capfd.readouterr().err.splitlines()
    assert sum("n_gen = 30 is below 10000" in line for line in warnings) == 1
