"""Files that are made to break a reader, and files that may not be read: one sentence each, and little memory."""

import errno
import io
import os
import zipfile

import numpy as np
import pytest

from eval.fid import main
from eval.sources import open as sources
from eval.sources.open import open_source

GOOD = {"mu": np.zeros(4), "sigma": np.eye(4), "features": np.zeros((5, 4), np.float32)}


def npz_with(path, name, data):
    """Good statistics, of which one member is other bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for each, array in GOOD.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            archive.writestr(f"{each}.npy", data if each == name else buffer.getvalue())
    return path


def header(dtype, *shape):
    """An array without its values."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize(
    "data", [b"no array", header("<f4", 2**70), header("<f8", 2**70, 2**70), header("<f4", 2**40, 4)]
)
def test_members_that_are_no_sensible_array_are_one_sentence(tmp_path, capfd, name, data):
    file = npz_with(tmp_path / "s.npz", name, data)
    assert main([str(file), "--ref", "digits:test"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}: ")


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"mu": header("<f8", 8000), "sigma": header("<f8", 8000, 8000)}, "mu has 8000 values; more than 4096"),
        ({"sigma": header("<f8", 8000, 8000)}, r"shapes \(4,\) and \(8000, 8000\); expected \(D,\) and \(D, D\)"),
        ({"sigma": header("<i8", 4, 4)}, "sigma is int64; expected float64"),
        ({"features": header("<f4", 10**6, 4)}, "features has 1000000 rows; more than 100000"),
        ({"features": header("<f4", 5, 3)}, r"features is float32 \(5, 3\); expected float32 \(m, 4\)"),
        ({"facts": header("<U99999999")}, "facts is .* not a text"),
    ],
)
def test_headers_are_judged_before_a_value_is_read(tmp_path, arrays, sentence):
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        for name, array in GOOD.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            archive.writestr(f"{name}.npy", arrays.get(name, buffer.getvalue()))
        for name in arrays.keys() - GOOD.keys():
            archive.writestr(f"{name}.npy", arrays[name])
    with pytest.raises(ValueError, match=sentence):
        open_source(tmp_path / "s.npz")


def test_labels_are_judged_by_their_header_too(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((2, 8, 8, 1), np.uint8))
        archive.writestr("arr_0.npy", buffer.getvalue())
        archive.writestr("arr_1.npy", header("<i8", 2**34))
    with pytest.raises(ValueError, match=r"arr_1 is int64 \(17179869184,\); expected one integer an image \(2,\)"):
        open_source(tmp_path / "a.npz")


# ---- what may not be read


@pytest.mark.parametrize("suffix", [".npz", ".zip"])
def test_an_archive_that_is_closed_is_not_called_damaged(tmp_path, monkeypatch, suffix):
    file = tmp_path / f"a{suffix}"
    file.touch()

    def closed(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    monkeypatch.setattr(zipfile, "ZipFile", closed)
    with pytest.raises(ValueError, match=r"a\.(npz|zip): cannot be read \(Permission denied\); .*may you read it\?$"):
        open_source(file)


def test_a_path_into_a_closed_folder_is_one_sentence(tmp_path, monkeypatch):
    def closed(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    for asked in ("is_dir", "exists"):
        monkeypatch.setattr(sources.Path, asked, closed)
    with pytest.raises(ValueError, match=r"x\.npz: cannot be read \(Permission denied\)"):
        open_source(tmp_path / "x.npz")


@pytest.mark.parametrize(("name", "sentence"), [("x" * 5000, "File name too long"), ("", "the path is empty")])
def test_names_that_can_be_no_file_are_one_short_sentence(capfd, name, sentence):
    assert main([name, "--ref", "digits:test"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert sentence in line
    assert len(line) < 400
