"""Sets that `sample.py` draws to be scored: what it refuses first, what it goes on with, what it says in a log."""

from types import SimpleNamespace

import pytest

from ditmoe.config.sample import SampleArgs
from ditmoe.generate import set_files
from eval.processes import Processes


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


@pytest.mark.parametrize("note", ["5", "[1]", "null", "{", "[" * 100_000])
def test_a_folder_with_an_odd_note_is_another_folder(tmp_path, note):
    (tmp_path / "sampling.json").write_text(note)
    with pytest.raises(ValueError, match="is not empty; give another folder"):
        set_files._same_set(tmp_path, SimpleNamespace(facts={}), "--out")


def test_a_log_says_how_far_the_set_is(capsys, monkeypatch):
    monkeypatch.setattr(set_files, "EVERY", 0.0)
    assert len(list(set_files._share(SimpleNamespace(num=5), 2, Processes(0, 1)))) == 3
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"sampling: {n} of 5 images" for n in (2, 4, 5)]
    list(set_files._share(SimpleNamespace(num=5), 2, Processes(1, 2)))
    assert capsys.readouterr().err == ""
