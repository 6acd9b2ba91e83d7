"""Reports side by side: ranked when their protocols agree, and only then."""

import json

import pytest

from eval import compare
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
        (("near",), "at least 2"), (("near", "absent"), "absent.json"), (("near", "text"), "cannot be read as JSON"),
        (("near", "list"), "holds no report"), (("near", "part"), "no field value"),
    ):  # fmt: skip
        assert run(reports, *names) == 2
        assert text in capsys.readouterr().err
