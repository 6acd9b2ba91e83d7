"""Folders and zips of images: what is not counted, what is refused, and nothing left out without a word."""

import io
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from eval.fid import score
from eval.sources.open import open_source

PIXELS = np.random.RandomState(0).randint(0, 256, (6, 5, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Three images in two folders."""
    (tmp_path / "set" / "more").mkdir(parents=True)
    for name in ("a.png", "b.png", "more/c.png"):
        Image.fromarray(PIXELS).save(tmp_path / "set" / name)
    return tmp_path / "set"


# ---- links and folders that are closed


def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read(folder):
    (folder / "d.png").symlink_to(folder / "moved.png")
    with pytest.raises(ValueError, match=r"1 of 4 images cannot be read, .*d\.png \(FileNotFoundError\)"):
        open_source(folder)
    report = score(folder, "digits:test", skip_bad=1)
    assert (report["n_gen"], report["bad_images"]) == (3, ["d.png"])


def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "d.png")
    with pytest.raises(ValueError, match=r"d\.png"):
        open_source(folder)


def test_a_linked_folder_counts(folder, tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "set").symlink_to(folder)
    assert open_source(tmp_path / "all").count == 3


@pytest.mark.parametrize("target", [".", "more"])
def test_a_folder_that_is_met_twice_is_refused(folder, target):
    (folder / "link").symlink_to(folder / target)
    with pytest.raises(ValueError, match="is a link to a folder that has been met already"):
        open_source(folder)


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    scandir = os.scandir

    def closed(place):
        if str(place).endswith("more"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ValueError, match=r"set: .*set/more cannot be listed \(Permission denied\)"):
        open_source(folder)


def test_a_folder_in_a_zip_may_have_any_name(tmp_path):
    picture = io.BytesIO()
    Image.fromarray(PIXELS).save(picture, "PNG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("set.png/", b"")
        for i in range(2):
            archive.writestr(f"set.png/{i}.png", picture.getvalue())
    assert open_source(tmp_path / "a.zip").count == 2


# ---- what Pillow would change without a word


def deep_png():
    """16 bits a channel, (6, 5, 3)."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 5, 6, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(30) for _ in range(6))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )


def animated(kind):
    buffer = io.BytesIO()
    first, second = (Image.fromarray(PIXELS // divisor) for divisor in (1, 2))
    first.save(buffer, kind, save_all=True, append_images=[second])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("d.png", deep_png(), r"d\.png is not 8-bit \(mode RGB\); save it as 8-bit"),
        ("d.ppm", b"P6\n5 6\n65535\n" + bytes(180), r"d\.ppm is not 8-bit"),
        ("d.png", animated("PNG"), r"d\.png has 2 frames; save the one that counts"),
        ("d.webp", animated("WEBP"), r"d\.webp has 2 frames"),
        ("d.tiff", animated("TIFF"), r"d\.tiff has 2 frames"),
    ],
)
def test_what_would_be_cut_off_is_refused(folder, name, data, sentence):
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=sentence):
        list(open_source(folder).batches(2))


def test_few_bits_are_fine(tmp_path):
    for name, image in (("a.png", Image.new("1", (5, 6))), ("b.png", Image.new("P", (5, 6)))):
        image.save(tmp_path / name, bits=1)
    (tmp_path / "c.ppm").write_bytes(b"P6\n5 6\n100\n" + bytes(90))
    assert sum(len(batch) for batch in open_source(tmp_path).batches(2)) == 3


def test_an_image_of_too_many_pixels_is_one_sentence(folder, recwarn):
    Image.new("1", (12_000, 12_000)).save(folder / "d.png")
    with pytest.raises(ValueError, match=r"1 of 4 images cannot be read.*d\.png \(DecompressionBombWarning\)"):
        open_source(folder)
    assert not recwarn.list
