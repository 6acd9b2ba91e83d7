"""The reference's statistics: kept, found again, dropped when anything changed; and ADM's reference files."""

import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from eval import fid as fid_module
from eval import measure as measure_module
from eval import ref
from eval.compare import differences
from eval.fid import score
from eval.networks.extractors import Extractor, random_conv_v1
from eval.sources.open import open_source


@pytest.fixture
def calls(monkeypatch):
    """How many images went through an extractor."""
    seen = []
    forward = measure_module.features_of
    monkeypatch.setattr(measure_module, "features_of", lambda net, x: (seen.append(len(x)), forward(net, x))[1])
    return seen


@pytest.fixture
def folder(tmp_path, digits):
    made = tmp_path / "ref"
    made.mkdir()
    for i, image in enumerate(digits[0][:40]):
        Image.fromarray(image[..., 0]).save(made / f"{i:02d}.png")
    return made


def test_a_second_score_reads_the_cache(tmp_path, digits, folder, calls):
    first = score(digits[0][40:70], folder, cache=tmp_path / "cache")
    assert sum(calls) == 70
    second = score(digits[0][40:70], folder, cache=tmp_path / "cache")
    assert sum(calls) == 100  # only the images, not the reference
    assert second["value"] == first["value"]
    assert second["ref"] == first["ref"]
    assert second["n_ref"] == 40


def test_the_cache_knows_when_something_changed(tmp_path, digits, folder, calls):
    options = {"cache": tmp_path / "cache"}
    score(digits[0][40:43], folder, **options)

    def reads_the_reference(**more):
        calls.clear()
        score(digits[0][40:43], folder, **options, **more)
        return sum(calls) > 3

    assert not reads_the_reference()
    assert reads_the_reference(metrics=["kid"])
    assert not reads_the_reference(metrics=["kid"])
    assert reads_the_reference(metrics=["kid"], keep=20)
    assert reads_the_reference(metrics=["kid"], keep=20, seed=1)
    os.utime(folder / "07.png", (1, 1))
    assert reads_the_reference()
    (folder / "08.png").unlink()
    assert reads_the_reference()
    for i in range(9, 40):
        (folder / f"{i:02d}.png").unlink()
    assert reads_the_reference()
    assert not reads_the_reference()
    assert reads_the_reference(extractor="efficientnet-lite0")


def test_a_change_of_the_resize_alone_is_enough(tmp_path, digits, folder, calls, monkeypatch):
    net = random_conv_v1()
    monkeypatch.setattr("eval.networks.extractors.load_extractor", lambda *_: net)
    cache = tmp_path / "cache"
    first = score(digits[0][40:70], folder, cache=cache)
    net.side = 32
    calls.clear()
    second = score(digits[0][40:70], folder, cache=cache)
    assert sum(calls) == 70
    assert (first["extractor"], first["ref"]) == (second["extractor"], second["ref"])
    assert first["resize"] != second["resize"]


def test_what_is_said_of_a_cached_reference_is_what_its_note_says_now(tmp_path, digits, folder):
    for seed in (1, 2):
        (folder / "sampling.json").write_text(json.dumps({"seed": seed}))
        assert score(digits[0][40:70], folder, cache=tmp_path / "cache")["ref"]["generation"] == {"seed": seed}


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut short", "a member that is no array"])
def test_a_damaged_cache_is_computed_again_and_said_so(tmp_path, digits, folder, damage):
    cache = tmp_path / "cache"
    expected = score(digits[0][40:70], folder, cache=cache)["value"]
    (file,) = cache.iterdir()
    if isinstance(damage, bytes):
        file.write_bytes(damage)
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("mu.npy", damage)
            archive.writestr("sigma.npy", damage)
    report = score(digits[0][40:70], folder, cache=cache)
    assert report["value"] == expected
    assert any("damaged" in warning and "computed again" in warning for warning in report["warnings"])
    assert not any("damaged" in warning for warning in score(digits[0][40:70], folder, cache=cache)["warnings"])


def test_statistics_in_a_file_stand_for_the_images(tmp_path, digits, folder, capsys):
    out = tmp_path / "stats.npz"
    assert ref.main([str(folder), "--out", str(out), "--keep", "30"]) == 0
    assert "40 images, 256 features" in capsys.readouterr().out
    with np.load(out, allow_pickle=False) as file:
        assert set(file) == {"mu", "sigma", "features", "facts"}
        assert file["features"].shape == (30, 256)
    direct = score(digits[0][40:70], folder, metrics=["kid", "prdc"], keep=30)
    report = score(digits[0][40:70], out, metrics=["kid", "prdc"], keep=30)
    assert report["scores"] == pytest.approx(direct["scores"], rel=1e-9)
    assert report["n_ref"] == 40
    assert report["ref"]["made_from"]["images"]["sha256"] == direct["ref"]["sha256"]
    with pytest.raises(ValueError, match="mu has 256 values of random-conv-v1, but efficientnet-lite0 gives 1280"):
        score(digits[0][40:70], out, extractor="efficientnet-lite0")


def test_statistics_may_be_what_is_scored_too(tmp_path, digits, folder):
    ref.main([str(folder), "--out", str(tmp_path / "s.npz")])
    report = score(tmp_path / "s.npz", digits[0][40:70])
    assert report["value"] == pytest.approx(score(folder, digits[0][40:70])["value"], rel=1e-9)
    assert report["n_gen"] == 40
    np.savez(tmp_path / "bare.npz", mu=np.zeros(256), sigma=np.eye(256))
    assert score(tmp_path / "bare.npz", digits[0][40:70])["n_gen"] is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["digits:test", "--out", "x.txt"], "must end in .npz"),
        (["digits:test", "--out", "absent/x.npz"], "its folder must exist"),
        (["digits:test", "--out", "/proc/x.npz"], "cannot be written"),
        (["nope", "--out", "x.npz"], "does not exist"),
        (["digits:test", "--out", "x.npz", "--keep", "1"], "keep 1 must be at least 2"),
        (["digits:test", "--out", "x.npz", "--keep", "-3"], "keep -3 must be at least 2"),
        (["digits:test", "--out", "x.npz", "--keep", "100001"], "keep 100001 must be at most 100000"),
        (["digits:test", "--out", "x.npz", "--seed", "-1"], "seed -1 must be between 0"),
    ],
)
def test_mistakes_of_the_reference_command_are_told_before_the_work(tmp_path, monkeypatch, capsys, arguments, text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ref, "measure", lambda *_, **__: pytest.fail("worked first"))
    assert ref.main(arguments) == 2
    assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_adms_reference_gives_statistics_to_fid_and_images_to_kid(tmp_path, digits):
    whole, few = digits[0][:300], digits[0][300:340]
    ref.main(["digits:test", "--out", str(tmp_path / "s.npz")])
    with np.load(tmp_path / "s.npz") as file:
        np.savez(tmp_path / "adm.npz", arr_0=few, mu=file["mu"], sigma=file["sigma"])
    assert open_source(tmp_path / "adm.npz").statistics is not None
    report = score(whole, tmp_path / "adm.npz", metrics=["kid"])
    assert report["value"] == pytest.approx(score(whole, "digits:test")["value"], rel=1e-9)
    assert report["scores"]["kid_random_conv_v1"] == score(whole, few, metrics=["kid"])["scores"]["kid_random_conv_v1"]
    assert report["value"] != score(whole, few)["value"]
    images = score(tmp_path / "adm.npz", whole)  # as what is scored, the images count
    assert images["n_gen"] == 40


def test_a_reference_with_statistics_is_not_measured_by_its_few_images(tmp_path, digits, capsys):
    np.savez(tmp_path / "adm.npz", arr_0=digits[0][:40], mu=np.zeros(256), sigma=np.eye(256))
    assert ref.main([str(tmp_path / "adm.npz"), "--out", str(tmp_path / "x.npz")]) == 2
    assert "holds statistics already, which its images may be a small part of" in capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()


def test_statistics_of_ten_thousand_images_are_warned_about_like_the_images(tmp_path, digits, folder, monkeypatch):
    monkeypatch.setattr("eval.report.ADM_BATCH", 40)
    ref.main([str(folder), "--out", str(tmp_path / "s.npz")])
    for reference in (folder, tmp_path / "s.npz"):
        assert any("ref is 10,000 images" in warning for warning in score(digits[0][40:70], reference)["warnings"])


def test_metrics_that_cannot_be_had_are_refused(tmp_path, digits):
    np.savez(tmp_path / "s.npz", mu=np.zeros(256), sigma=np.eye(256))
    images = digits[0][:20]
    with pytest.raises(ValueError, match="sfid is defined on inception-2015 alone"):
        score(images, images, metrics=["sfid"])
    with pytest.raises(ValueError, match="KID and prdc need images"):
        score(images, tmp_path / "s.npz", metrics=["kid"])
    with pytest.raises(ValueError, match="unknown metric 'fvd'"):
        score(images, images, metrics=["fvd"])
    with pytest.raises(ValueError, match="class accuracy needs labels"):
        score(images, images, classify=lambda x: np.zeros(len(x), np.int64))


def test_class_accuracy_is_the_share_of_images_taken_for_their_label(tmp_path, digits):
    np.savez(tmp_path / "a.npz", arr_0=digits[0][:50], arr_1=digits[1][:50])
    report = score(tmp_path / "a.npz", "digits:test", classify=lambda x: np.full(len(x), 3), batch_size=7)
    assert report["scores"]["accuracy"] == (digits[1][:50] == 3).mean()


def test_unreadable_images_are_left_out_up_to_a_number_and_named(tmp_path, digits, folder):
    (folder / "05.png").write_bytes(b"no image")
    whole = (folder / "09.png").read_bytes()
    (folder / "09.png").write_bytes(whole[: len(whole) - 30])
    for allowed in (0, 1):
        with pytest.raises(ValueError, match=r"0[59]\.png"):
            score(folder, "digits:test", skip_bad=allowed)
    with pytest.raises(ValueError, match="Inception Score needs every image"):
        score(folder, "digits:test", skip_bad=2, metrics=["is"])
    report = score(folder, "digits:test", skip_bad=2, metrics=["prdc"])
    assert report["n_gen"] == 38
    assert report["bad_images"] == ["05.png", "09.png"]
    assert any("2 images of" in warning for warning in report["warnings"])


def test_inception_and_spatial_features_reach_the_report(digits, monkeypatch):
    """A network of random weights in Inception's place: every key, and only its own extractor may have them."""
    net = small_inception()
    monkeypatch.setattr("eval.networks.extractors.load_extractor", lambda *_: net)
    report = score(digits[0][:60], digits[0][60:120], extractor="inception-2015", metrics=["sfid", "is", "kid", "prdc"])
    assert set(report["scores"]) == {
        "fid", "sfid", "inception_score", "inception_score_std", "kid", "kid_std",
        "precision", "recall", "density", "coverage",
    }  # fmt: skip
    assert report["metric"] == "fid"
    assert report["fid"] == report["value"] > 0
    assert 1 <= report["scores"]["inception_score"] <= 5
    assert json.loads(json.dumps(report)) == report


def small_inception() -> Extractor:
    import torch

    from eval.networks.extractors import Features

    class Small(Extractor):
        fid_named = True

        def features(self, images):
            pool = super().features(images).pool
            return Features(pool, pool[:, :9] ** 2, torch.log(pool[:, :5] + 1))

    net = random_conv_v1()
    net.__class__ = Small
    return net


def test_the_measure_of_nothing_is_refused(digits):
    with pytest.raises(ValueError, match="keep 1 must be at least 2"):
        fid_module.score(digits[0][:9], digits[0][:9], keep=1)


# ------------------------------------------------------ what a second pair of eyes found


def test_splits_and_folders_of_the_same_look_are_not_mixed_up(tmp_path, digits):
    cache = tmp_path / "cache"
    for split, count in (("train", 1497), ("test", 300)):
        assert score(digits[0][:60], f"digits:{split}", cache=cache)["n_ref"] == count
    for i, place in enumerate(("a", "b")):
        (tmp_path / place).mkdir()
        for j in range(10):  # same names, sizes and times, as from an archive that sets them
            file = tmp_path / place / f"{j}.ppm"
            Image.fromarray(np.full((8, 8, 3), 20 * j + 5 * i, np.uint8)).save(file)
            os.utime(file, (0, 0))
    cached = [score(digits[0][:60], tmp_path / place, cache=cache)["value"] for place in ("a", "b")]
    assert cached == [score(digits[0][:60], tmp_path / place)["value"] for place in ("a", "b")]


def test_a_reference_with_images_left_out_is_not_kept(tmp_path, digits, folder):
    whole = (folder / "09.png").read_bytes()
    (folder / "09.png").write_bytes(whole[: len(whole) - 30])
    cache = tmp_path / "cache"
    first = score(digits[0][:60], folder, cache=cache, skip_bad=3)
    assert first["bad_images"] == ["09.png"]
    with pytest.raises(ValueError, match=r"09\.png"):
        score(digits[0][:60], folder, cache=cache)


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, digits, folder):
    (tmp_path / "file").write_text("in the way")
    report = score(digits[0][:60], folder, cache=tmp_path / "file" / "cache")
    assert any("could not be kept" in warning for warning in report["warnings"])


def test_sfid_does_not_change_what_fid_looks_at(tmp_path, digits, monkeypatch):
    net = small_inception()
    monkeypatch.setattr("eval.networks.extractors.load_extractor", lambda *_: net)
    np.savez(tmp_path / "adm.npz", arr_0=digits[0][:50], mu=np.zeros(256), sigma=np.eye(256))
    with pytest.raises(ValueError, match="sFID needs mu_s"):
        score(digits[0][:60], tmp_path / "adm.npz", extractor="inception-2015", metrics=["sfid"])


def test_a_reference_batch_of_another_extractor_gives_its_images(tmp_path, digits):
    np.savez(tmp_path / "adm.npz", arr_0=digits[0][:50], mu=np.zeros(2048), sigma=np.eye(2048))
    report = score(digits[0][60:120], tmp_path / "adm.npz")
    assert report["value"] == score(digits[0][60:120], digits[0][:50])["value"]
    assert any("were not used (mu has 2048 values" in warning for warning in report["warnings"])


@pytest.mark.parametrize(
    "facts",
    [
        {"extractor": "x"}, {"extractor": None, "images": {}, "count": 9}, [1], 5, {"count": "9"},
        {"extractor": {"name": "a", "version": "1", "sha256": "b", "resize": "c"}, "images": "x", "count": 9},
        {"extractor": {"name": "a", "version": "1", "sha256": "b", "resize": "c"}, "images": {"path": 1}, "count": 9},
        {"extractor": {"name": "random-conv-v1", "version": "0", "sha256": "b", "resize": "c"},
         "images": {"path": "a", "sha256": "b"}, "count": 9},
    ],
)  # fmt: skip
def test_facts_of_odd_types_are_one_sentence(tmp_path, digits, facts):
    file = tmp_path / "s.npz"
    np.savez(file, mu=np.zeros(256), sigma=np.eye(256), facts=np.array(json.dumps(facts)))
    with pytest.raises(ValueError, match=r"s\.npz: "):
        score(digits[0][:60], file)


def test_statistics_of_another_resize_are_refused(tmp_path, digits, folder):
    out = tmp_path / "s.npz"
    ref.main([str(folder), "--out", str(out)])
    with np.load(out) as file:
        arrays = dict(file)
    facts = json.loads(str(arrays["facts"]))
    facts["extractor"]["resize"] = "nearest"
    np.savez(out, **{**arrays, "facts": np.array(json.dumps(facts))})
    with pytest.raises(ValueError, match="resize is 'nearest'"):
        score(digits[0][:60], out)


@pytest.mark.parametrize(
    ("mu", "sigma"), [(np.float64(1), np.eye(2)), (np.zeros(3), np.eye(2)), (np.eye(2), np.eye(2))]
)
def test_statistics_of_odd_shapes_are_one_sentence(tmp_path, digits, mu, sigma):
    np.savez(tmp_path / "s.npz", mu=mu, sigma=sigma)
    with pytest.raises(ValueError, match=r"expected \(D,\) and \(D, D\)"):
        score(digits[0][:60], tmp_path / "s.npz")


def test_a_classifier_of_the_wrong_shape_is_refused(tmp_path, digits):
    np.savez(tmp_path / "a.npz", arr_0=digits[0][:50], arr_1=digits[1][:50])
    with pytest.raises(ValueError, match="expected one class each"):
        score(tmp_path / "a.npz", "digits:test", classify=lambda x: np.zeros((len(x), 1)))


def test_a_set_that_is_not_complete_is_warned_about(tmp_path, digits, folder):
    (folder / "sampling.json").write_text('{"num": 50000}')
    warnings = score(folder, "digits:test")["warnings"]
    assert "images were made as a set of 50000, and 40 were scored" in warnings
    (folder / "sampling.json").write_text("5")
    with pytest.raises(ValueError, match=r"sampling\.json"):
        score(folder, "digits:test")


def test_the_report_says_what_the_other_metrics_depend_on(digits):
    few, more = (score(digits[0][:80], digits[0][80:160], metrics=["kid"], keep=keep) for keep in (20, 40))
    assert few["parameters"]["rows"] == [20, 20]
    assert few["parameters"]["kid"]["subset_size"] == 20
    assert set(differences([few, more])) == {"parameters.rows", "parameters.rows_sha256.ref", "parameters.kid"}
