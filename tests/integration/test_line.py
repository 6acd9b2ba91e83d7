"""The whole line as a user types it: train, resume, sample, score; and mistakes, as processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
TINY = ["--model.hidden-size", "32", "--model.depth", "2", "--model.num-heads", "2", "--model.patch-size", "4",
        "--train.batch-size", "16", "--sample.num", "20", "--sample.steps", "3"]  # fmt: skip


def python(*argv: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, env=env, capture_output=True, text=True)


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
    done = python("train.py", run / "config.json")
    assert done.returncode == 0, done.stderr
    assert "is finished" in done.stdout
    assert (run / "report.json").stat().st_mtime_ns == before


def test_export_writes_a_model_to_share(run: Path, tmp_path: Path) -> None:
    done = python("-m", "ditmoe.export", run, tmp_path / "gift")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "gift" / "README.md").read_text()
    assert "train.py digits" in card
    assert "fd_random_conv_v1" in card
    whole, half = (next(folder.rglob("*.safetensors")).stat().st_size for folder in (run / "model", tmp_path / "gift"))
    assert half < 0.6 * whole
    done = python("sample.py", tmp_path / "gift", "--num", 4, "--steps", 2, "--out", tmp_path / "g.png")
    assert done.returncode == 0, done.stderr
    for wrong in ([run, tmp_path / "gift"], [tmp_path, tmp_path / "new"]):
        done = python("-m", "ditmoe.export", *wrong)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_time_shift_and_its_meter_know_the_variance_of_the_data(run: Path, tmp_path: Path) -> None:
    saved = json.loads((run / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert 0.3 < saved["data_variance"] < 0.8  # digits, in [-1, 1]
    shift = ["--sampler", "ts-ddim", "--steps", 4, "--exposure-window", 200, "--exposure-variance", "calibrated"]
    done = python("sample.py", run, "--num", 4, *shift, "--out", tmp_path / "g.png")
    assert done.returncode == 0, done.stderr
    assert "ts-ddim, 4 steps, 4 network calls" in done.stdout
    done = python("-m", "samplers.exposure", run, "--steps", 3, "--num", 8, "--out", tmp_path / "bias.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| 999 |") == 1
    assert (tmp_path / "bias.png").is_file()


def test_sample_then_score(run: Path, tmp_path: Path) -> None:
    done = python("sample.py", run, "--num", 40, "--steps", 2, "--out", tmp_path / "s.npz")
    assert done.returncode == 0, done.stderr
    done = python("-m", "eval.fid", tmp_path / "s.npz", "--ref", "digits:test", "--out", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["n_gen"] == 40
    assert report["generation"]["sampler"]["nfe"] == 2  # the .npz knows how it was made
    assert report["generation"]["label_sampling"] == "balanced"
    # the same images drawn into a file and scored by two processes
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", "sample.py", run]
    options = ["--num", 40, "--steps", 2, "--batch-size", 8, "--out", tmp_path / "two.npz"]
    done = python(*launch, *options, "--score", "digits:test", "--report", tmp_path / "t.json")
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


def test_a_sweep_draws_scores_plots_and_goes_on(run: Path, tmp_path: Path) -> None:
    sweep = ["-m", "eval.sweep", run, "--ref", "digits:test", "--num", 30, "--out", tmp_path / "sweep"]
    grid = ["--sampler", "ddim", "dpm++2m", "--steps", 2]
    done = python(*sweep, *grid)
    assert done.returncode == 0, done.stderr
    reports = sorted((tmp_path / "sweep").glob("*-steps2-*.json"))
    assert len(reports) == 2
    assert done.stdout.count("| ddim |") == done.stdout.count("| dpm++2m |") == 1
    assert {json.loads(file.read_text())["images"]["kind"] for file in reports} == {"model"}  # drawn, not kept
    assert Image.open(tmp_path / "sweep" / "sweep.png").size[0] > 500
    times = {file: file.stat().st_mtime_ns for file in reports}
    reports[0].unlink()
    assert python(*sweep, *grid).returncode == 0
    assert [file for file in reports if file.stat().st_mtime_ns != times[file]] == reports[:1]
    done = python(*sweep, "--sampler", "flow-euler")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "cannot sample a model with prediction_type" in done.stderr
    done = python(*sweep, *grid, "--seed", 1)
    assert (done.returncode, "holds a sweep with other seed" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["train.py", "digits", "--out", "{run}", "--seed", "5", *TINY], "holds another run"),
        (["train.py", "folder", "--data.path", "{empty}", "--out", "{new}"], "holds no images"),
        (
            ["train.py", "folder", "--data.path", "{mixed}", "--model.sample-size", "8", "--out", "{new}"],
            "--data.fit crop",
        ),
        (["train.py", "digits", "--sample.sampler", "flow-euler", "--out", "{new}"], "use ddpm or ddim"),
        (["sample.py", "{run}", "--classes", "3", "12"], "label 12 is out of range"),
        (["sample.py", "{run}", "--sampler", "flow-euler"], "cannot sample a model with prediction_type"),
        (["sample.py", "{empty}"], "holds no model"),
        (["sample.py", "{run}", "--score", "nope"], "'nope' does not exist"),
        (["sample.py", "{run}", "--report", "r.json"], "give --score REF too"),
        (["sample.py", "{run}", "--extractor", "dinov2-vitl14"], "give --score REF too"),
        (["sample.py", "{run}", "--score", "digits:test", "--out", "{new}.png"], "goes to an .npz file or a folder"),
        (["sample.py", "{run}", "--exposure-window", "40"], "'ddim' has no exposure_window; it belongs to ts-ddpm"),
    ],
)
def test_mistakes(run: Path, tmp_path: Path, argv: list[str], sentence: str) -> None:
    places = {name: tmp_path / name for name in ("empty", "mixed", "new")}
    places["empty"].mkdir()
    places["mixed"].mkdir()
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(places["mixed"] / "1.png")
    Image.fromarray(np.zeros((9, 8, 3), dtype=np.uint8)).save(places["mixed"] / "2.png")
    config = (run / "config.json").read_text()
    done = python(*[a.format(run=run, **places) for a in argv], cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not places["new"].exists()
    assert (run / "config.json").read_text() == config


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = python("train.py", "dit-moe-g/2-16e2a", "--dry-run", "--out", tmp_path / "x")
    assert done.returncode == 0, done.stderr
    assert "16503.73 M parameters, 3181.57 M activated" in done.stdout
    assert not (tmp_path / "x").exists()


def test_sigterm_saves_and_leaves_with_143(tmp_path: Path) -> None:
    command = [sys.executable, "train.py", "digits", "--out", str(tmp_path / "run"), "--max-steps", "800", *TINY]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    limit = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < limit:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert "the same command goes on" in error
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


def test_ctrl_c_with_reading_processes_saves_too(tmp_path: Path) -> None:
    """The signal goes to the whole process group, readers included, as a terminal or a scheduler sends it."""
    for i in range(20):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("L", (8, 8), i).save(tmp_path / "photos" / f"{i}.png")
    options = ["--data.path", tmp_path / "photos", "--data.num-workers", 2, "--model.sample-size", 8,
               "--model.in-channels", 1, "--max-steps", 5000, "--train.log-every", 1,
               "--out", tmp_path / "run"]  # fmt: skip
    command = [sys.executable, "train.py", "folder", *map(str, options), *TINY]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    limit = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < limit:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


def test_two_processes_see_the_same_losses_as_one(tmp_path: Path) -> None:
    """torchrun on gloo: equal losses and balance statistics at an equal global batch."""
    options = ["digits", "--max-steps", "4", "--train.precision", "fp32", "--moe.bias-rate", "0.01", *TINY]
    one = python("train.py", *options, "--out", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    two = python(
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py", *options, "--out", tmp_path / "two"
    )
    assert two.returncode == 0, two.stderr
    assert "training on 2 process(es)" in two.stdout
    logs = [
        [json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("one", "two")
    ]
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["balance"] == pytest.approx(b["balance"], rel=1e-5)
        assert a["load_max_over_mean"] == pytest.approx(b["load_max_over_mean"], rel=1e-5)
