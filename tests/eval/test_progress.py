"""Progress in a log: a plain line now and then."""

from eval import progress as module
from eval.fid import score
from eval.progress import progress


def test_a_log_has_plain_lines_and_a_quick_work_none(capsys, monkeypatch):
    with progress(10, "photos") as tell:
        tell(10)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "EVERY", 0.0)
    with progress(10, "photos") as tell:
        tell(4)
        tell(6)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("photos: 4 of 10 images, ")
    assert second.startswith("photos: 10 of 10 images, ")


def test_scoring_tells_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.0)
    score("digits:test", "digits:test", num=10, batch_size=5, progress=True)
    err = capsys.readouterr().err
    assert "digits:test: 5 of 10 images" in err
    assert "\r" not in err
    score("digits:test", "digits:test", num=10)
    assert capsys.readouterr().err == ""
