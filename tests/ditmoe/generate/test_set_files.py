"""Sets on the disk: continued after an interruption, shared by processes, never mixed with another."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ditmoe import pipeline
from ditmoe.config.sample import SampleArgs
from ditmoe.files import locked, whole
from ditmoe.generate import set_files
from ditmoe.generate.draw import RequestedSet, batches
from ditmoe.generate.request import requested, run
from tests.ditmoe.generate.test_request import Alone
from tests.ditmoe.pipeline.test_pipeline import make


def test_a_refused_command_does_not_keep_its_folder(tmp_path: Path) -> None:
    pipeline.save(make(num_classes=0), tmp_path / "model")
    args = SampleArgs(tmp_path, out=tmp_path / "many", num=2, cfg=2.0)
    with pytest.raises(ValueError, match="an unconditional model can only be sampled with guidance_scale 1"):
        run(args, Alone())
    assert not (tmp_path / "many").exists()
    run(replace(args, cfg=None), Alone())
    assert len(list((tmp_path / "many").glob("*.png"))) == 2
    assert json.loads((tmp_path / "many" / "sampling.json").read_text())["sampler"]["cfg"] is None
    with pytest.raises(ValueError, match=r"part of another set \(other sampler\)"):
        run(args, Alone())


def test_a_refusal_is_told_though_another_process_has_removed_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> Any:
        for file in (tmp_path / "many").iterdir():
            file.unlink()
        (tmp_path / "many").rmdir()
        raise ValueError("the user's mistake")

    pipeline.save(make(), tmp_path / "model")
    monkeypatch.setattr(RequestedSet, "batch", refused)
    with pytest.raises(ValueError, match="the user's mistake"):
        run(SampleArgs(tmp_path, out=tmp_path / "many", num=2), Alone())


def test_a_second_command_does_not_take_a_folder_that_another_one_has_just_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.save(make(), tmp_path / "model")
    args = SampleArgs(tmp_path, out=tmp_path / "many", num=2)
    draw, refused = RequestedSet.batch, []

    def and_meanwhile(*given: Any) -> Any:
        monkeypatch.setattr(RequestedSet, "batch", draw)
        with pytest.raises(ValueError, match=r"part of another set \(other seed\)") as error:
            run(replace(args, seed=9), Alone())
        refused.append(error)
        return draw(*given)

    monkeypatch.setattr(RequestedSet, "batch", and_meanwhile)
    run(args, Alone())
    assert refused
    note = tmp_path / "many" / "sampling.json"
    assert json.loads(note.read_text())["seed"] == args.seed
    written = note.stat().st_mtime_ns
    run(args, Alone())
    assert note.stat().st_mtime_ns == written


def test_files_that_are_no_ones_leavings_stay(tmp_path: Path) -> None:
    pipeline.save(make(), tmp_path / "model")
    out = tmp_path / "many"
    out.mkdir()
    (out / ".lock").write_text("precious")
    with pytest.raises(ValueError, match="many is not empty; give another folder"):
        run(SampleArgs(tmp_path, out=out, num=2), Alone())
    assert (out / ".lock").read_text() == "precious"
    (out / ".lock").unlink()
    run(SampleArgs(tmp_path, out=out, num=2), Alone())
    (out / ".lock").write_text("precious")
    (out / "mask.3.tmp").write_text("precious")
    with pytest.raises(ValueError, match=r"\.lock is a file of another program; give another --out"):
        run(SampleArgs(tmp_path, out=out, num=2), Alone())
    assert (out / ".lock").read_text() == (out / "mask.3.tmp").read_text() == "precious"


def test_a_lock_that_is_the_next_ones_stays(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with locked(tmp_path / "a", kept=False):
        (tmp_path / "a").rename(tmp_path / "b")  # as finished parts are
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / ".lock").write_text("process 1 on elsewhere")
    assert (tmp_path / "a" / ".lock").read_text() == "process 1 on elsewhere"


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITE, str(tmp_path / "x.png")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(ValueError, match=r"x\.png is being written by another process"), whole(tmp_path / "x.png"):
            pass
        other.communicate("\n")
    assert (tmp_path / "x.png").read_text() == "theirs"
    with whole(tmp_path / "x.png") as file:
        file.write(b"ours")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x.png": "ours"}


WRITE = """
import sys
from pathlib import Path
from ditmoe.files import whole
with whole(Path(sys.argv[1])) as file:
    file.write(b"theirs")
    print("open", flush=True)
    input()
"""
HOLD = """
import sys
from pathlib import Path
from ditmoe.files import locked
with locked(Path(sys.argv[1]), kept=False):
    print("held", flush=True)
    input()
"""


@pytest.mark.parametrize(("name", "place"), [("set.npz", "set.npz.parts"), ("folder", "folder")])
def test_of_two_commands_that_draw_the_same_set_at_once_one_is_refused(tmp_path: Path, name: str, place: str) -> None:
    pipeline.save(make(), tmp_path / "model")
    args, folder = SampleArgs(tmp_path, out=tmp_path / name, num=2), tmp_path / place
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"{name}.* is in use by process {other.pid} .*; wait for it"):
            run(args, Alone())
        other.communicate("\n")
    run(args, Alone())
    assert sorted(x.name for x in tmp_path.rglob("*") if x.name in (".lock", place)) == ["folder"] * (name == place)


@pytest.mark.parametrize("size", [0, 20, 60])
def test_a_picture_that_was_cut_is_drawn_again(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.save(make(), tmp_path / "model")
    args = SampleArgs(tmp_path, out=tmp_path / "many", num=4, batch_size=2)
    run(args, Alone())
    cut = next(iter(sorted(tmp_path.rglob("000001*.png"))))
    content = cut.read_bytes()
    lost = b"\0" * (len(content) - size - 12) + content[-12:] if size == 20 else b""  # its end alone was written
    cut.write_bytes(content[:size] + lost)
    again: list[int] = []
    real = RequestedSet.batch
    monkeypatch.setattr(RequestedSet, "batch", lambda images, i: (again.extend(i), real(images, i))[1])
    run(args, Alone())
    assert again == [0, 1]
    assert cut.read_bytes() == content


@pytest.mark.parametrize("name", ["set.npz", "folder"])
def test_an_interrupted_set_is_continued_and_equals_an_undisturbed_one(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.save(make(), tmp_path / "model")
    args = SampleArgs(tmp_path, out=tmp_path / name, num=10, batch_size=3)
    drawn: list[int] = []
    real = RequestedSet.batch

    def until_the_second(images: Any, indices: Any) -> Any:
        if len(drawn) == 6:
            raise KeyboardInterrupt
        drawn.extend(indices)
        return real(images, indices)

    monkeypatch.setattr(RequestedSet, "batch", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(args, Alone())
    assert not (tmp_path / "set.npz").exists()
    assert drawn == [0, 1, 2, 3, 4, 5]
    more: list[int] = []
    monkeypatch.setattr(RequestedSet, "batch", lambda images, i: (more.extend(i), real(images, i))[1])
    run(args, Alone())
    assert more == [6, 7, 8, 9]
    monkeypatch.undo()
    expected = np.concatenate([batch for _, batch in requested(args).read(10, 3, 0, 1)])
    if name == "set.npz":
        with np.load(tmp_path / name) as file:
            assert np.array_equal(file["arr_0"], expected)
    else:
        found = [np.asarray(Image.open(file))[..., None] for file in sorted((tmp_path / name).glob("*.png"))]
        assert np.array_equal(np.stack(found), expected)


def test_processes_share_a_set(tmp_path: Path) -> None:
    pipeline.save(make(), tmp_path / "model")
    images = requested(SampleArgs(tmp_path, num=10))
    parts = [part for rank in range(3) for part in images.read(10, 2, rank, 3)]
    order = np.argsort(np.concatenate([indices for indices, _ in parts]))
    whole = np.concatenate([batch for _, batch in images.read(10, 2, 0, 1)])
    assert np.array_equal(np.concatenate([batch for _, batch in parts])[order], whole)


@pytest.mark.parametrize("note", ["5", "[1]", "null", "{", "[" * 100_000])
def test_a_folder_with_an_odd_note_is_another_folder(tmp_path: Path, note: str) -> None:
    (tmp_path / "sampling.json").write_text(note)
    with pytest.raises(ValueError, match="is not empty; give another folder"):
        set_files._same_set(tmp_path, {}, "--out")


def test_a_log_says_how_far_the_set_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditmoe.launch.progress.EVERY", 0.0)
    assert len(list(batches(5, 2))) == 3
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"sampling: {n} of 5 images" for n in (2, 4, 5)]
    assert list(batches(5, 2, rank=1, world=2)) == [range(2, 4)]
    assert capsys.readouterr().err == ""
