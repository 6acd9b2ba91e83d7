"""The whole line as a user types it: train, resume, sample, score; and mistakes, as processes.

`python` and `accelerate launch` start real interpreters, once each; `typed` forks.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eval import sweep
from tests.doors import typed
from tests.processes import Group, door, start

ROOT = Path(__file__).parents[2]
TINY = ["--model.hidden-size", "32", "--model.depth", "2", "--model.num-heads", "2", "--model.patch-size", "4",
        "--train.batch-size", "16", "--sample.num", "20", "--sample.steps", "3"]  # fmt: skip


def python(*argv: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("line") / "run"
    done = python("train.py", "digits", "--out", out, "--max-steps", 6, "--train.sample-every", 3, *TINY)
    assert done.returncode == 0, done.stderr
    assert "1497 real 8x8 digits" in done.stdout
    assert "resum" not in done.stdout
    return out


def test_a_run_folder_holds_what_was_promised(run: Path) -> None:
    promised = {"config.json", "command.txt", "metrics.jsonl", "checkpoints", "model", "samples.png", "film.png",
                "experts.png", "loss.png", "report.json", "index.html"}  # fmt: skip
    assert promised <= {p.name for p in run.iterdir()}
    assert (run / "command.txt").read_text().startswith(f"python train.py digits --out {run} --max-steps 6 ")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert "http" not in (run / "index.html").read_text().replace("http://www.w3.org", "")
    report = json.loads((run / "report.json").read_text())
    assert report["score"]["metric"] == "fd_random_conv_v1"
    assert "fid" not in report["score"]
    scores = (run / "progress" / "scores.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in scores] == [3, 6]


def test_the_same_command_says_that_the_run_is_finished(run: Path) -> None:
    before = (run / "report.json").stat().st_mtime_ns
    done = typed("train", run / "config.json")
    assert done.returncode == 0, done.stderr
    assert "is finished" in done.stdout
    assert (run / "report.json").stat().st_mtime_ns == before


def test_export_writes_a_model_to_share(run: Path, tmp_path: Path) -> None:
    done = typed("ditmoe", "export", run, tmp_path / "gift")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "gift" / "README.md").read_text()
    assert "train.py digits" in card
    assert "fd_random_conv_v1" in card
    whole, half = (next(folder.rglob("*.safetensors")).stat().st_size for folder in (run / "model", tmp_path / "gift"))
    assert half < 0.6 * whole
    done = typed("sample", tmp_path / "gift", "--num", 4, "--steps", 2, "--out", tmp_path / "g.png")
    assert done.returncode == 0, done.stderr
    for wrong in ([run, tmp_path / "gift"], [tmp_path, tmp_path / "new"]):
        done = typed("ditmoe", "export", *wrong)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()
    torn = shutil.copytree(run, tmp_path / "torn")
    (torn / "report.json").write_text("{")
    done = typed("ditmoe", "export", torn, tmp_path / "new")
    assert (done.returncode, "report.json cannot be read as JSON" in done.stderr) == (2, True)
    assert not (tmp_path / "new").exists()


def test_time_shift_and_its_meter_know_the_variance_of_the_data(run: Path, tmp_path: Path) -> None:
    saved = json.loads((run / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert 0.3 < saved["data_variance"] < 0.8  # digits, in [-1, 1]
    shift = ["--sampler", "ts-ddim", "--steps", 4, "--exposure-window", 200, "--exposure-variance", "calibrated"]
    done = typed("sample", run, "--num", 4, *shift, "--out", tmp_path / "g.png")
    assert done.returncode == 0, done.stderr
    assert "ts-ddim, 4 steps, 4 network calls" in done.stdout
    done = typed("ditmoe", "exposure", run, "--steps", 3, "--num", 8, "--out", tmp_path / "bias.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| 999 |") == 1
    assert (tmp_path / "bias.png").is_file()


def test_sample_then_score(run: Path, tmp_path: Path) -> None:
    done = typed("sample", run, "--num", 40, "--steps", 2, "--out", tmp_path / "s.npz")
    assert done.returncode == 0, done.stderr
    done = typed("eval.fid", tmp_path / "s.npz", "--ref", "digits:test", "--out", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["n_gen"] == 40
    assert report["generation"]["sampler"]["nfe"] == 2  # the .npz knows how it was made
    assert report["generation"]["label_sampling"] == "balanced"
    # the same images drawn into a file and scored by two processes
    options = ["--num", 40, "--steps", 2, "--batch-size", 8, "--out", tmp_path / "two.npz"]
    done = typed("sample", run, *options, "--score", "digits:test", "--report", tmp_path / "t.json", world=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("40 images in") == 1
    two = json.loads((tmp_path / "t.json").read_text())
    assert two["world_size"] == 2
    assert two["value"] == pytest.approx(report["value"], rel=1e-3)  # a pixel may differ between batch sizes
    assert two["generation"] == report["generation"]
    assert {file.name for file in tmp_path.iterdir()} == {"s.npz", "r.json", "two.npz", "t.json"}
    with np.load(tmp_path / "s.npz") as one, np.load(tmp_path / "two.npz") as both:
        assert np.abs(one["arr_0"].astype(int) - both["arr_0"]).max() <= 1
        assert np.array_equal(one["arr_1"], both["arr_1"])


def test_a_sweep_draws_scores_plots_and_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real, commands = subprocess.run, []

    def launched(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """The first `python -m ditmoe sample` is one, the others are forks."""
        commands.append(command)
        if len(commands) == 1:
            return real(command, **options)
        assert command[:4] == [sys.executable, "-m", "ditmoe", "sample"]
        return typed("sample", *command[4:])

    monkeypatch.setattr("eval.sweep.subprocess.run", launched)
    arguments = [str(run), "--ref", "digits:test", "--num", "30", "--out", str(tmp_path / "sweep")]
    grid = ["--sampler", "ddim", "dpm++2m", "--steps", "2"]
    assert sweep.main([*arguments, *grid]) == 0
    out = capfd.readouterr().out
    reports = sorted((tmp_path / "sweep").glob("*-steps2-*.json"))
    assert len(reports) == len(commands) == 2
    assert out.count("| ddim |") == out.count("| dpm++2m |") == 1
    assert {json.loads(file.read_text())["images"]["kind"] for file in reports} == {"model"}  # drawn, not kept
    assert Image.open(tmp_path / "sweep" / "sweep.png").size[0] > 500
    times = {file: file.stat().st_mtime_ns for file in reports}
    reports[0].unlink()
    assert sweep.main([*arguments, *grid]) == 0
    assert [file for file in reports if file.stat().st_mtime_ns != times[file]] == reports[:1]
    capfd.readouterr()
    assert sweep.main([*arguments, "--sampler", "ddimm"]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "did you mean 'ddim'" in error
    done = typed("eval.sweep", *arguments, *grid, "--seed", 1)
    assert (done.returncode, "holds a sweep with other seed" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["train", "digits", "--out", "{run}", "--seed", "5", *TINY], "holds another run"),
        (["train", "folder", "--data.path", "{empty}", "--out", "{new}"], "holds no images"),
        (
            ["train", "folder", "--data.path", "{mixed}", "--model.sample-size", "8", "--out", "{new}"],
            "--data.fit crop",
        ),
        (["train", "digits", "--sample.sampler", "flow-oiler", "--out", "{new}"], "did you mean 'flow-euler'"),
        (["sample", "{run}", "--classes", "3", "12"], "label 12 is out of range"),
        (["sample", "{run}", "--sampler", "flow-oiler"], "did you mean 'flow-euler'"),
        (["sample", "{empty}"], "holds no model"),
        (["sample", "{run}", "--score", "nope"], "'nope' does not exist"),
        (["sample", "{run}", "--report", "r.json"], "give --score REF too"),
        (["sample", "{run}", "--extractor", "dinov2-vitl14"], "give --score REF too"),
        (["sample", "{run}", "--score", "digits:test", "--out", "{new}.png"], "goes to an .npz file or a folder"),
        (["sample", "{run}", "--exposure-window", "40"], "'dpm++2m' has no exposure_window; it belongs to ts-ddpm"),
        (
            ["sample", "{run}", "--sampler", "ddim", "--flow-shift", "3"],
            "'ddim' has no flow_shift, leave it out (None); it",
        ),
        (["sample", "{run}", "--guide", "{new}"], "does not exist; give a model folder, a run folder, RUN/checkpoints"),
        (["sample", "{run}", "--guide-scale", "3"], "guide_scale is 3.0, but there is no guide; give one, a model or"),
        (["sample", "{run}", "--guide", "none", "--guide-scale", "3"], "guide_scale is 3.0, but guide is none"),
        (
            ["sample", "{run}", "--guide", "experts-off", "--guide-scale", "1"],
            "guide_scale is 1.0; with a guide it must",
        ),
        (
            ["sample", "{run}", "--guidance-rule", "cfg++"],
            "guidance_rule 'cfg++' takes 0 to 1; give one such as 0.6 (--cfg)",
        ),
    ],
)
def test_mistakes(run: Path, tmp_path: Path, argv: list[str], sentence: str) -> None:
    places = {name: tmp_path / name for name in ("empty", "mixed", "new")}
    places["empty"].mkdir()
    places["mixed"].mkdir()
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(places["mixed"] / "1.png")
    Image.fromarray(np.zeros((9, 8, 3), dtype=np.uint8)).save(places["mixed"] / "2.png")
    config = (run / "config.json").read_text()
    done = typed(*[a.format(run=run, **places) for a in argv])
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not places["new"].exists()
    assert (run / "config.json").read_text() == config


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = typed("train", "dit-moe-g/2-16e2a", "--dry-run", "--out", tmp_path / "x")
    assert done.returncode == 0, done.stderr
    assert "16503.73 M parameters, 3181.57 M activated" in done.stdout
    assert not (tmp_path / "x").exists()


def training(run: Path, *argv: object) -> Group:
    """`python train.py ARGV --out RUN`, that has logged its first step."""
    process = start(door, "train", [*argv, "--out", run, *TINY], folder=run.with_name("printed"))
    process.until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0)
    return process


def test_sigterm_saves_and_leaves_with_143(tmp_path: Path) -> None:
    process = training(tmp_path / "run", "digits", "--max-steps", 800, "--train.log-every", 1)
    process.kill(signal.SIGTERM, rank=0)
    assert process.wait() == [143], process.err()
    assert "the same command goes on" in process.err()
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


def test_ctrl_c_with_reading_processes_saves_too(tmp_path: Path) -> None:
    """The signal goes to the whole process group, readers included, as a terminal or a scheduler sends it."""
    for i in range(20):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("L", (8, 8), i).save(tmp_path / "photos" / f"{i}.png")
    options = ["--data.path", tmp_path / "photos", "--data.num-workers", 2, "--model.sample-size", 8,
               "--model.in-channels", 1, "--max-steps", 5000, "--train.log-every", 1]  # fmt: skip
    process = training(tmp_path / "run", "folder", *options)
    process.kill(signal.SIGINT)
    assert process.wait() == [143], process.err()
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """`train.py` arguments of data without pixels, on which a run's page is quick: nothing is judged or scored."""
    folder = tmp_path_factory.mktemp("shards")
    x = torch.randn(40, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    save_file({"latents": x, "labels": torch.arange(40) % 4}, folder / "0.safetensors")
    return ["digits", "--data.name", "latents", "--data.path", folder, "--model.in-channels", 4, *TINY]


def test_two_processes_see_the_same_losses_as_one(latents: list[object], tmp_path: Path) -> None:
    """gloo: equal losses and balance statistics at an equal global batch, in one epoch and the next."""
    options = [*latents, "--max-steps", 4, "--train.precision", "fp32", "--moe.bias-rate", 0.01]
    for world, name in ((1, "one"), (2, "two")):
        done = typed("train", *options, "--out", tmp_path / name, world=world)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"training on {world} process(es)") == 1
    logs = [
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("one", "two")
    ]
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["balance"] == pytest.approx(b["balance"], rel=1e-5)
        assert a["load_max_over_mean"] == pytest.approx(b["load_max_over_mean"], rel=1e-5)
