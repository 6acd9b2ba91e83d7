"""Sets that `sample.py` draws to be scored: what it refuses first."""

import pytest

from ditmoe.config.sample import CentroidsArgs, ExposureArgs, SampleArgs


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num": 1, "score": "digits:test"}, "num asks for 1 image; a score needs 2 or more"),
        ({"classes": (3,), "score": "digits:test"}, "classes asks for 1 image; a score needs 2 or more"),
        ({"score": ""}, "score is empty"),
    ],
)
def test_a_set_that_cannot_be_scored_is_refused_before_it_is_drawn(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SampleArgs(tmp_path, **options)
    SampleArgs(tmp_path, **{**options, "score": None})


@pytest.mark.parametrize("name", ["g.jpeg", "g.JPG", "g.webp", "g.npy", "g.tiff", "g.zip"])
def test_a_file_that_is_none_of_ours_makes_no_folder(tmp_path, name):
    with pytest.raises(ValueError, match=rf"out .*{name}: give a .png or .npz file, or a folder of PNG files"):
        SampleArgs(tmp_path, out=tmp_path / name)


def test_suffixes_are_known_in_capitals_and_folders_may_have_dots(tmp_path):
    for name in ("g.PNG", "g.Npz", "samples", "run.v2", "2026.11"):
        assert SampleArgs(tmp_path, out=tmp_path / name).out == tmp_path / name
    (tmp_path / "h.PNG").mkdir()
    with pytest.raises(ValueError, match="h.PNG is a folder; give a file name"):
        SampleArgs(tmp_path, out=tmp_path / "h.PNG")
    ExposureArgs(tmp_path, out=tmp_path / "plot.PDF")
    CentroidsArgs(tmp_path, 4, tmp_path / "c.SAFETENSORS")
    SampleArgs(tmp_path, score="fashion:train", report=tmp_path / "r.JSON")
