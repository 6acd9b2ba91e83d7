"""Reports side by side: ranked when their protocols agree, and only then."""

import json

import numpy as np
import pytest

from eval import compare, fid, ref
from eval.fid import score
from eval.report import write_report


@pytest.fixture(scope="module")
def scored(digits):
    images, ref = digits[0][:40], digits[0][40:100]
    return {
        "near": score(images, ref),
        "far": score(images // 2, ref),
        "fewer": score(images[:20], ref),
        "other": score(images, ref, extractor="efficientnet-lite0"),
    }


@pytest.fixture
def reports(tmp_path, scored):
    for name, report in scored.items():
        write_report(tmp_path / f"{name}.json", report)
    return tmp_path


def run(folder, *names):
    return compare.main([str(folder / f"{name}.json") for name in names])


def test_equal_protocols_are_ranked_best_first(reports, capsys):
    assert run(reports, "far", "near") == 0
    out = capsys.readouterr().out
    assert out.index("near.json") < out.index("far.json")
    assert "Not ranked" not in out


@pytest.mark.parametrize(
    ("names", "fields"),
    [(("near", "fewer"), ["n_gen: 40, 20"]), (("far", "other"), ["metric", "extractor.sha256", "resize"])],
)
def test_other_protocols_are_not_ranked_and_the_fields_are_named(reports, capsys, names, fields):
    assert run(reports, *names) == 1
    out = capsys.readouterr().out
    assert "Not ranked" in out
    assert all(field in out for field in fields)
    assert "ref.sha256" not in out
    assert out.index(f"{names[0]}.json") < out.index(f"{names[1]}.json")  # the order of the command line


def test_what_made_the_images_may_differ_but_not_how_labels_were_drawn(reports):
    a, b = (json.loads((reports / f"{name}.json").read_text()) for name in ("near", "far"))
    a["generation"] = {"sampler": {"steps": 10}, "label_sampling": "balanced"}
    b["generation"] = {"sampler": {"steps": 20}, "label_sampling": "balanced"}
    assert compare.differences([a, b]) == {}
    b["generation"]["label_sampling"] = "given"
    assert compare.differences([a, b]) == {"generation.label_sampling": ["balanced", "given"]}


def test_given_labels_are_compared_and_the_unknown_is_named(reports, capsys):
    a, b = (json.loads((reports / f"{name}.json").read_text()) for name in ("near", "far"))
    a["generation"] = {"label_sampling": "given", "labels_sha256": "1"}
    write_report(reports / "near.json", a)
    assert run(reports, "near", "far") == 0  # the other's origin is unknown
    assert "Unknown of some images: generation.label_sampling" in capsys.readouterr().out
    b["generation"] = {"label_sampling": "given", "labels_sha256": "2"}
    assert compare.differences([a, b]) == {"generation.labels_sha256": ["1", "2"]}


def test_rows_of_a_reference_that_are_other_images_are_not_ranked(tmp_path, digits, capsys):
    images, more = (digits[0][i : i + 60] for i in (0, 60))
    np.savez(tmp_path / "images.npz", arr_0=images)
    np.savez(tmp_path / "ref.npz", arr_0=more)
    reports = [tmp_path / f"{name}.json" for name in ("seed0", "seed1", "again", "images")]
    for name, seed in (("seed0", 0), ("seed1", 1), ("again", 0)):
        options = ["--keep", "30", "--seed", str(seed), "--out", str(tmp_path / f"{name}.npz")]
        assert ref.main([str(tmp_path / "ref.npz"), *options]) == 0
    for report in reports:
        reference = tmp_path / (f"{report.stem}.npz" if report.stem != "images" else "ref.npz")
        options = ["--metrics", "kid", "--keep", "30", "--no-cache", "--batch-size", "7", "--out", str(report)]
        assert fid.main([str(tmp_path / "images.npz"), "--ref", str(reference), *options]) == 0
    capsys.readouterr()
    assert compare.main([str(report) for report in reports[:2]]) == 1
    assert "parameters.rows_sha256.ref: " in capsys.readouterr().out
    assert compare.main([str(reports[i]) for i in (0, 2, 3)]) == 0  # the same images, by file or by themselves
    with np.load(tmp_path / "seed1.npz") as file:
        assert json.loads(str(file["facts"]))["rows"]["seed"] == 1


def test_one_pair_of_statistics_beside_other_images_is_not_ranked(tmp_path, digits):
    ref.main(["digits:test", "--out", str(tmp_path / "s.npz")])
    found = []
    for start in (0, 40):
        with np.load(tmp_path / "s.npz") as file:
            np.savez(tmp_path / "adm.npz", arr_0=digits[0][start : start + 40], **file)
        found.append([score(digits[0][80:120], tmp_path / "adm.npz", metrics=m) for m in ([], ["prdc"])])
    assert compare.differences([found[0][0], found[1][0]]) == {}  # the distance has not looked at them
    assert set(compare.differences([found[0][1], found[1][1]])) == {"parameters.rows_sha256.ref"}


def test_rows_of_a_foreign_file_are_told_by_themselves(tmp_path, digits):
    rows = np.random.RandomState(0).rand(2, 30, 256).astype(np.float32)
    found = []
    for i in (0, 1):
        np.savez(tmp_path / "s.npz", mu=np.zeros(256), sigma=np.eye(256), features=rows[i])
        found.append(score(tmp_path / "s.npz", tmp_path / "s.npz", metrics=["kid"])["parameters"])
    assert found[0]["rows_sha256"] != found[1]["rows_sha256"]
    assert found[0]["rows_seed"] is None


def test_a_path_does_not_break_the_table(reports, capsys):
    report = json.loads((reports / "near.json").read_text())
    report["images"]["path"] = "a|b\nc"
    write_report(reports / "near.json", report)
    assert run(reports, "near", "far") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert r"| a\|b c |" in lines[2]


@pytest.mark.parametrize("value", ["0.1", None, 7.0])
def test_scores_that_are_no_numbers_or_contradict_the_value_are_refused(reports, capsys, value):
    report = json.loads((reports / "near.json").read_text())
    report["scores"][report["metric"]] = value
    (reports / "near.json").write_text(json.dumps(report))
    assert run(reports, "near", "far") == 2
    assert "scores.fd_random_conv_v1" in capsys.readouterr().err


def test_mistakes(reports, tmp_path, capsys):
    (tmp_path / "text.json").write_text("hello")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "part.json").write_text('{"metric": "fid"}')
    for names, text in (
        (("near",), "at least 2"), (("near", "absent"), "absent.json: there is no such file"),
        (("near", "text"), "cannot be read as JSON"),
        (("near", "list"), "holds no report"), (("near", "part"), "no field value"),
    ):  # fmt: skip
        assert run(reports, *names) == 2
        assert text in capsys.readouterr().err
