import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from eval import fid as fid_module
from eval import report as report_module
from eval.fid import main, metric_name, score
from eval.networks.extractors import EXTRACTORS, Extractor, load_extractor
from eval.report import SCHEMA, check_report, write_report
from tests import processes
from tests.doors import typed

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def halves(digits):
    """Two disjoint sets of 250 real digits."""
    return digits[0][:500:2], digits[0][1:500:2]


@pytest.fixture(scope="module")
def plain(halves):
    """The report of one half against the other."""
    return score(*halves)


@pytest.fixture(scope="module")
def report(halves):
    return score(halves[0], "digits:test")


def noisy(images, sigma, seed=0):
    noise = sigma * np.random.RandomState(seed).randn(*images.shape)
    return np.clip(np.round(images + noise), 0, 255).astype(np.uint8)


def blurred(images, radius):
    blur = ImageFilter.GaussianBlur(radius)
    return np.stack([np.asarray(Image.fromarray(i[..., 0]).filter(blur)) for i in images])[..., None]


# ---------------------------------------------------------------------- the value


def test_identity_is_zero(halves):
    assert 0 <= score(halves[0], halves[0])["value"] < 1e-9


def test_symmetry(halves, plain):
    forward, back = plain["value"], score(*halves[::-1])["value"]
    assert forward > 0
    assert back == pytest.approx(forward, rel=1e-8)


def test_order_of_images_does_not_matter(halves, plain):
    shuffled = halves[0][np.random.RandomState(0).permutation(250)]
    assert score(shuffled, halves[1])["value"] == pytest.approx(plain["value"], rel=1e-6)


def test_torchmetrics_with_the_same_module_agrees(halves, plain):
    fid = pytest.importorskip("torchmetrics.image.fid")
    metric = fid.FrechetInceptionDistance(feature=load_extractor("random-conv-v1"))
    for images, real in zip(halves, (False, True), strict=True):
        for start in range(0, len(images), 100):
            batch = torch.from_numpy(images[start : start + 100].transpose(0, 3, 1, 2).copy())
            metric.update(batch, real=real)
    # torchmetrics casts its float64 result to the features' float32
    assert plain["value"] == pytest.approx(float(metric.compute()), rel=1e-5)


def test_batch_size_does_not_matter(halves):
    values = [score(*halves, batch_size=b)["value"] for b in (7, 64, 250)]
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-6)


def test_every_degradation_costs_more_than_a_fresh_sample_and_more_is_worse(digits, halves, plain):
    images, ref = halves
    one_class = digits[0][digits[1] == 3]
    real = plain["value"]
    noise = [score(noisy(images, sigma), ref)["value"] for sigma in (20, 40, 80)]
    blur = [score(blurred(images, radius), ref)["value"] for radius in (0.5, 1, 2)]
    assert [real, *noise] == sorted([real, *noise])
    assert [real, *blur] == sorted([real, *blur])
    assert noise[-1] > 3 * real
    assert blur[-1] > 3 * real
    assert score(one_class, ref)["value"] > 3 * real


def test_num_takes_the_first_images_and_only_of_images(halves):
    report = score(*halves, num=40)
    assert (report["n_gen"], report["n_ref"]) == (40, 250)
    assert report["value"] == score(halves[0][:40], halves[1])["value"]


def test_statistics_stand_in_for_the_images_they_came_from(tmp_path, halves, plain):
    with torch.inference_mode():
        images = torch.from_numpy(halves[1].transpose(0, 3, 1, 2).copy())
        features = load_extractor("random-conv-v1")(images).double()
    np.savez(tmp_path / "ref.npz", mu=features.mean(0), sigma=torch.cov(features.T))
    report = score(halves[0], tmp_path / "ref.npz")
    assert report["value"] == pytest.approx(plain["value"], rel=1e-6)
    assert report["n_ref"] is None
    assert report["ref"]["kind"] == "stats"
    assert any("n_ref unknown" in warning for warning in report["warnings"])


# --------------------------------------------------------------------- the report


def test_report_fields(report):
    assert set(report) == {"fd_random_conv_v1", *SCHEMA}
    assert report["metric"] == "fd_random_conv_v1"
    assert report["fd_random_conv_v1"] == report["value"]
    assert (report["n_gen"], report["n_ref"]) == (250, 300)
    assert report["ref"]["path"] == "digits:test"
    assert report["ref"]["kind"] == "dataset"
    assert report["ref"]["shape"] == [8, 8, 1]
    assert json.loads(json.dumps(report, allow_nan=False)) == report


@pytest.mark.parametrize("name", ["value", "extractor", "ref", "warnings"])
def test_the_schema_is_strict(report, name):
    with pytest.raises(ValueError, match=f"no field {name}"):
        check_report({key: value for key, value in report.items() if key != name})
    with pytest.raises(ValueError, match=f"report's {name} is None"):
        check_report({**report, name: None})
    with pytest.raises(ValueError, match=r"no field extractor\.sha256"):
        check_report({**report, "extractor": {"name": "x", "version": "1"}})
    with pytest.raises(ValueError, match="fd_random_conv_v1 is 7 and its value"):
        check_report({**report, "fd_random_conv_v1": 7})


@pytest.mark.parametrize("name", [*EXTRACTORS, "fid", "-fid", "FID", ""])
def test_no_extractor_here_can_write_the_key_fid(name):
    assert metric_name(name).startswith("fd_")


def test_the_report_has_no_key_fid(halves):
    assert "fid" not in score(halves[0][:9], halves[1][:9])


def test_the_hash_is_of_the_pixels_wherever_they_are(tmp_path, halves):
    images = halves[0][:5]
    np.savez(tmp_path / "a.npz", arr_0=images)
    for i, image in enumerate(images):
        (tmp_path / "folder").mkdir(exist_ok=True)
        Image.fromarray(image[..., 0]).save(tmp_path / "folder" / f"{i}.png")
    reports = [score(s, halves[1]) for s in (images, tmp_path / "a.npz", tmp_path / "folder")]
    assert len({r["images"]["sha256"] for r in reports}) == 1
    assert len({r["value"] for r in reports}) == 1
    changed = images.copy()
    changed[4, 7, 7, 0] ^= 1
    other = score(changed, halves[1])["images"]["sha256"]
    assert other != reports[0]["images"]["sha256"]
    reshaped = score(images.reshape(5, 4, 16, 1), halves[1])["images"]["sha256"]
    assert reshaped != reports[0]["images"]["sha256"]


def test_warnings(halves, monkeypatch):
    report = score(halves[0], np.repeat(halves[1], 2, axis=1))
    text = "\n".join(report["warnings"])
    assert "n_gen = 250 is below 10000" in text
    assert "n_gen = 250 is not above 256 features: the covariance is rank-deficient" in text
    assert "sizes differ: images (8, 8), ref (16, 8)" in text
    assert "same data" not in text
    assert "images and ref are the same data" in score(halves[0], halves[0])["warnings"]
    monkeypatch.setattr(report_module, "SMALL_SAMPLE", 300)
    assert score("digits:test", "digits:test")["warnings"] == [
        "images and ref are the same data",
        "ref comes from digits:test: published scores compare with the training split",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size 0 must be at least 1$"),
        ({"keep": 1}, "^keep 1 must be at least 2$"),
        ({"num": 1}, "num 1 must be between 2 and the 250 of array"),
        ({"num": 251}, "num 251 must be between 2 and the 250 of array"),
        ({"extractor": "fid"}, "unknown extractor 'fid'"),
        ({"weights": "w.pth"}, "random-conv-v1 reads no weights"),
        ({"seed": -1, "metrics": ["kid"]}, "seed -1 must be between 0 and 4294967295"),
        ({"seed": 2**32}, "seed 4294967296 must be between 0 and 4294967295"),
        ({"skip_bad": -1}, "skip_bad -1 must be at least 0"),
        ({"skip_bad": 3}, "skip_bad 3 is for folders, zips and tables"),
    ],
)
def test_bad_options(halves, options, message):
    with pytest.raises(ValueError, match=message):
        score(*halves, **options)


def test_num_of_statistics_is_refused(tmp_path, halves):
    np.savez(tmp_path / "s.npz", mu=np.zeros(256), sigma=np.eye(256))
    with pytest.raises(ValueError, match="these are statistics"):
        score(tmp_path / "s.npz", halves[0], num=5)


def test_a_report_is_complete_or_absent(tmp_path, monkeypatch):
    file = tmp_path / "r.json"
    write_report(file, {"value": 1.0})
    assert json.loads(file.read_text()) == {"value": 1.0}

    def disk_full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="no space"):
        write_report(file, {"value": 2.0})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report(file, {"value": float("nan")})
    assert json.loads(file.read_text()) == {"value": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


# --------------------------------------------------------------- the command line


def test_end_to_end_from_another_folder(tmp_path, halves):
    np.savez(tmp_path / "a.npz", arr_0=halves[0])
    done = typed("eval.fid", "a.npz", "--ref", "digits:test", "--num", 100, "--out", "r.json", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("warning: ")) == (0, 4)
    report = json.loads((tmp_path / "r.json").read_text())
    expected = score(halves[0], "digits:test", num=100)
    assert report["value"] == pytest.approx(expected["value"], rel=1e-6)
    assert report["images"] == {**expected["images"], "path": "a.npz", "kind": "npz"}
    assert done.stdout == f"fd_random_conv_v1 {report['value']:.6g} -> r.json\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "r.json"]


def test_without_out_the_report_is_printed(capfd):
    assert main(["digits:test", "--ref", "digits:test", "--num", "10"]) == 0
    assert json.loads(capfd.readouterr().out)["n_gen"] == 10


LIGHT = """
import sys
from eval.fid import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
heavy = {"torch", "torchmetrics", "scipy", "ditmoe"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else code)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--help"], 0, "Score only the first NUM of IMAGES"),
        (["digits:test"], 2, "--ref"),
        (["nope", "--ref", "digits:test"], 2, "error: 'nope' does not exist"),
        (["digits:test", "--ref", "digits:test", "--out", "r.txt"], 2, "r.txt must end in .json"),
        (["digits:test", "--ref", "digits:test", "--num", "301"], 2, "the 300 of digits:test"),
    ],
)
def test_help_and_mistakes_answer_before_torch(arguments, code, text):
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", LIGHT, *arguments]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert text in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("argument", [["--extractor", "inception"], ["--num", "two"], ["--reff", "x"]])
def test_misspelt_arguments_exit_2(capfd, argument):
    with pytest.raises(SystemExit) as stop:
        main(["digits:test", "--ref", "digits:test", *argument])
    assert stop.value.code == 2


@pytest.mark.parametrize("out", ["absent/r.json", "folder.json", "/proc/r.json", f"{'x' * 249}.json"])
def test_an_out_that_cannot_be_written_is_refused_before_the_work(tmp_path, capfd, monkeypatch, out):
    (tmp_path / "folder.json").mkdir()
    monkeypatch.setattr(fid_module, "score", lambda *a, **k: pytest.fail("worked first"))
    assert main(["digits:test", "--ref", "digits:test", "--out", str(tmp_path / out)]) == 2
    assert "its folder must exist" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("bug", "error"),
    [
        (lambda *_, **__: [].pop(), IndexError),
        (lambda *_, **__: json.loads("{"), json.JSONDecodeError),  # a ValueError, but none of ours
        (lambda *_, **__: np.linalg.inv(np.zeros((2, 2))), np.linalg.LinAlgError),
    ],
)
def test_a_bug_keeps_its_traceback(monkeypatch, bug, error):
    monkeypatch.setattr(fid_module, "score", bug)
    with pytest.raises(error):
        main(["digits:test", "--ref", "digits:test"])


def refused(capfd, *argv):
    """The sentence with which a command ends; nothing else is printed."""
    assert main(list(map(str, argv))) == 2
    written = capfd.readouterr()
    assert written.out == ""
    (line,) = written.err.splitlines()
    return line


def test_features_that_are_not_finite_are_one_sentence(tmp_path, capfd, monkeypatch):
    forward = Extractor.features

    def broken(net, images):
        return forward(net, images)._replace(pool=torch.full((len(images), 256), torch.nan))

    monkeypatch.setattr(Extractor, "features", broken)
    out = tmp_path / "r.json"
    assert "features hold NaN" in refused(capfd, "digits:test", "--ref", "digits:test", "--out", out)
    assert not out.exists()


def test_weights_of_another_hash_are_one_sentence(tmp_path, capfd):
    (tmp_path / "w.pth").write_bytes(b"others")
    options = ["--extractor", "inception-2015", "--weights", tmp_path / "w.pth"]
    assert "w.pth have SHA-256 " in refused(capfd, "digits:test", "--ref", "digits:test", *options)


def test_weights_that_cannot_be_read_are_one_sentence(tmp_path, capfd, monkeypatch):
    (tmp_path / "w.pth").touch()
    monkeypatch.setattr(Path, "open", closed)
    options = ["--extractor", "dinov2-vitl14", "--weights", tmp_path / "w.pth", "--no-cache"]
    assert "the weights" in (line := refused(capfd, "digits:test", "--ref", "digits:test", *options))
    assert "of dinov2-vitl14 cannot be read (Permission denied)" in line


def closed(path, *arguments, **options):
    """In the place of a function that opens a file."""
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_a_distance_that_is_not_finite_is_no_score(tmp_path, capfd, report):
    np.savez(tmp_path / "h.npz", mu=np.full(256, 1e200), sigma=np.eye(256))
    assert "too large for a distance" in refused(capfd, "digits:test", "--ref", tmp_path / "h.npz")
    with pytest.raises(ValueError, match=r"scores\.kid is inf"):
        check_report({**report, "scores": {**report["scores"], "kid": float("inf")}})


@pytest.mark.parametrize("text", ['{"num": NaN}', '{"num": 1e999}', '{"num": -Infinity}', "[" * 100_000])
def test_facts_are_json_of_finite_numbers(tmp_path, capfd, text, halves):
    np.savez(tmp_path / "a.npz", arr_0=halves[0][:5], facts=np.array(text))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "sampling.json").write_text(text)
    assert "JSON of finite numbers" in refused(capfd, tmp_path / "a.npz", "--ref", "digits:test")
    assert "JSON of finite numbers" in refused(capfd, tmp_path / "folder", "--ref", "digits:test")


def show_peak(images):
    """Print the most memory that this process ever had while it scored, in kilobytes."""
    score(images, "digits:test")
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_peak_memory_does_not_grow_with_the_number_of_images(tmp_path):
    peaks = []
    for count in (500, 6_000):
        images = np.random.RandomState(0).randint(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{count}.npz", arr_0=images)
        process = processes.start(show_peak, tmp_path / f"{count}.npz", folder=tmp_path / f"{count}")
        assert process.wait() == [0], process.err()
        peaks.append(int(process.out()) / 1024)
    assert peaks[1] <= peaks[0] + 10, peaks  # megabytes; float64 features alone would be 11, images 17


def test_floats_are_refused_and_what_was_cut_to_two_values_is_told(tmp_path):
    floats = np.random.RandomState(0).random_sample((30, 8, 8, 1))
    with pytest.raises(ValueError, match=r"array is float64 \(30, 8, 8, 1\); expected uint8"):
        score(floats, "digits:test")
    np.savez(tmp_path / "a.npz", arr_0=floats)
    with pytest.raises(ValueError, match=r"arr_0 is float64 \(30, 8, 8, 1\); expected uint8"):
        score(tmp_path / "a.npz", "digits:test")
    told = "no value of array is above 1 of 255: were they floats in [0, 1]? multiply by 255 first"
    assert told in score(floats.round().astype(np.uint8), "digits:test")["warnings"]
    assert told not in score((floats * 255).astype(np.uint8), "digits:test")["warnings"]


def test_files_that_are_no_images_are_told_of_beside_the_score(tmp_path):
    for i in range(3):
        Image.fromarray(np.full((8, 8), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.gif").write_bytes(b"GIF89a")
    told = f"3 other files of {tmp_path} were left out, such as 0.gif (3 .gif)"
    assert told in score(tmp_path, "digits:test")["warnings"]
    assert told in score("digits:test", tmp_path, cache=tmp_path / ".cache")["warnings"]
    assert told in score("digits:test", tmp_path, cache=tmp_path / ".cache")["warnings"]  # statistics kept from before
