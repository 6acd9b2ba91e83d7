import gzip
import io
import json
import re
import shutil
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from eval.fid import main
from eval.sources import open as sources
from eval.sources.images import Images, Statistics
from eval.sources.open import open_source

RNG = np.random.RandomState(0)
GREY = RNG.randint(0, 256, (7, 6, 5, 1), dtype=np.uint8)
COLOUR = RNG.randint(0, 256, (7, 6, 5, 3), dtype=np.uint8)


def png(array, **options):
    """PNG bytes of one image (H, W, C) uint8, or (H, W) of another kind."""
    buffer = io.BytesIO()
    squeezed = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    Image.fromarray(squeezed).save(buffer, "PNG", **options)
    return buffer.getvalue()


def folder_of(path, images):
    for i, image in enumerate(images):
        file = path / f"{i % 2}" / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(image))
    return path


def zip_of(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def npz_of(path, **arrays):
    np.savez(path, **arrays)
    return path


def idx_bytes(images):
    return struct.pack(">4I", 0x803, *images.shape[:3]) + images.tobytes()


def whole(source, batch_size=3, limit=None):
    return np.concatenate(list(open_source(source).batches(batch_size, limit)))


# ----------------------------------------------------------------------- round trips


@pytest.mark.parametrize("images", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("kind", ["npz", "compressed", "zip", "folder", "array"])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_round_trip(tmp_path, images, kind, batch_size):
    if kind == "npz":
        source = npz_of(tmp_path / "a.npz", arr_0=images, arr_1=np.arange(7))
    elif kind == "compressed":
        source, kind = tmp_path / "a.npz", "npz"
        np.savez_compressed(source, arr_0=images)
    elif kind == "zip":
        source = zip_of(tmp_path / "a.zip", {f"{i}.png": png(image) for i, image in enumerate(images)})
    elif kind == "folder":
        order = [0, 2, 4, 6, 1, 3, 5]  # as folder_of's names sort
        source = folder_of(tmp_path / "a", images)
        images = images[order]
    else:
        source = images
    opened = open_source(source)
    assert isinstance(opened, Images)
    assert (opened.kind, opened.count) == (kind, 7)
    channels = 3 if kind in ("zip", "folder") else images.shape[-1]
    assert opened.shape == (6, 5, channels)
    batches = list(opened.batches(batch_size))
    assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
    got = np.concatenate(batches)
    assert got.dtype == np.uint8
    assert (got == np.broadcast_to(images, got.shape)).all()
    assert (np.concatenate(list(opened.batches(batch_size, 4))) == got[:4]).all()


def test_stats(tmp_path):
    mu, sigma = np.arange(4.0), np.eye(4, dtype=np.float32)
    opened = open_source(npz_of(tmp_path / "s.npz", mu=mu, sigma=sigma))
    assert isinstance(opened, Statistics)
    assert opened.kind == "stats"
    assert opened.gaussian.mean.tolist() == mu.tolist()
    assert opened.gaussian.covariance.dtype == np.float64
    assert len(opened.sha256) == 64


def test_images_win_over_statistics_in_adms_reference_files(tmp_path):
    file = npz_of(tmp_path / "ref.npz", arr_0=GREY, mu=np.zeros(2), sigma=np.eye(2))
    assert open_source(file).kind == "npz"


def test_digits_are_the_real_ones(digits):
    opened = open_source("digits:train")
    assert (opened.kind, opened.path) == ("dataset", "digits:train")
    assert (whole("digits:train", 100) == digits[0]).all()
    assert open_source("digits:test").count == 300


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_from_idx_files(tmp_path, monkeypatch, suffix):
    compress = gzip.compress if suffix else bytes
    file = tmp_path / f"t10k-images-idx3-ubyte{suffix}"
    file.write_bytes(compress(idx_bytes(GREY)))
    monkeypatch.setattr(sources, "FASHION_FOLDERS", (tmp_path / "absent", tmp_path))
    assert (whole("fashion:test") == GREY).all()
    assert (whole("fashion:test", 3, 4) == GREY[:4]).all()


@pytest.mark.skipif(not any(folder.is_dir() for folder in sources.FASHION_FOLDERS), reason="no Fashion-MNIST here")
def test_installed_fashion():
    opened = open_source("fashion:test")
    assert (opened.count, opened.shape) == (10_000, (28, 28, 1))
    assert abs(whole("fashion:test", 1000).mean() - 73.1) < 0.1  # published mean 0.2868 * 255


def test_files_are_taken_in_the_order_of_their_names(tmp_path):
    file = zip_of(tmp_path / "a.zip", {f"{i}.png": png(COLOUR[i]) for i in (2, 0, 1)})
    assert (whole(file) == COLOUR[:3]).all()


def test_other_files_in_a_folder_are_ignored(tmp_path):
    folder = folder_of(tmp_path / "a", GREY)
    (folder / "README.md").write_text("hello")
    (folder / "._000.png").write_text("macOS")
    (folder / ".cache").mkdir()
    shutil.copy(folder / "0" / "000.png", folder / ".cache" / "x.png")
    assert open_source(folder).count == 7


def test_opaque_alpha_and_palettes_are_fine(tmp_path):
    opaque = np.concatenate([COLOUR[0], np.full((6, 5, 1), 255, np.uint8)], axis=-1)
    (tmp_path / "0.png").write_bytes(png(opaque))
    Image.fromarray(COLOUR[1]).convert("P").save(tmp_path / "1.png")
    (tmp_path / "2.PNG").write_bytes(png(COLOUR[2]))
    got = whole(tmp_path)
    assert got.shape == (3, 6, 5, 3)
    assert (got[[0, 2]] == COLOUR[[0, 2]]).all()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_streamed(tmp_path, save):
    """50,000 ImageNet-size samples are 9.8 GB: reading them must not take their size."""
    images = np.random.RandomState(0).randint(0, 256, (400, 64, 64, 3), dtype=np.uint8)  # 4.9 MB
    save(tmp_path / "a.npz", arr_0=images)
    opened = open_source(tmp_path / "a.npz")
    tracemalloc.start()
    n = sum(len(batch) for batch in opened.batches(10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 400
    assert peak < images.nbytes / 4


# ------------------------------------------------- bad input: message, exit 2, no report


def truncated(path, keep=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def flipped(path, where):
    """The file with one byte of pixel data changed: `where` is its offset."""
    data = bytearray(path.read_bytes())
    data[where] ^= 0x55
    path.write_bytes(data)
    return path


def with_member(path, name, data, images=GREY):
    folder_of(path, images)
    (path / name).write_bytes(data)
    return path


def truncated_png_with_good_header():
    noise = RNG.randint(0, 256, (6, 5, 3), dtype=np.uint8)
    return png(noise)[:60]


class Canary:
    """Unpickling this would leave a trace."""

    def __reduce__(self):
        return (pytest.fail, ("a file was unpickled",))


def object_npz(path, name):
    other = {"sigma": np.eye(2)} if name == "mu" else {}
    np.savez(path, **{name: np.array([Canary()], dtype=object)}, **other)
    return path


def lying_npz(path):
    """A header that promises 70 images over the bytes of 7."""
    buffer = io.BytesIO()
    np.save(buffer, GREY)
    return zip_of(path, {"arr_0.npy": buffer.getvalue().replace(b"(7, 6", b"(70,6")})


def encrypted_zip(path):
    zip_of(path, {"0.png": png(GREY[0]), "1.png": png(GREY[1])})
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        data[data.find(signature) + offset] |= 1
    path.write_bytes(data)
    return path


def empty_folder(path):
    path.mkdir()
    (path / "notes.txt").write_text("no images")
    return path


BAD = {
    "nothing there": (lambda p: p / "nope", r"nope' does not exist; give a folder"),
    "unknown name": (lambda p: "mnist:train", r"'mnist:train' does not exist; .*digits:train"),
    "a split of no table": (
        lambda p: f"{folder_of(p / 'a', GREY)}:test",
        r"PATH:SPLIT is for a table, and \S+ is none; give \S+ alone",
    ),
    "unknown split": (lambda p: "digits:val", "unknown split in 'digits:val'; write digits:train"),
    "no split": (lambda p: "fashion", "unknown split in 'fashion'; write fashion:train"),
    "empty folder": (lambda p: empty_folder(p / "a"), r"a: no images \(.*\.png"),
    "one image": (lambda p: folder_of(p / "a", GREY[:1]), "a: holds 1 image; .*at least 2"),
    "one in npz": (lambda p: npz_of(p / "a.npz", arr_0=GREY[:1]), r"a\.npz: holds 1 image"),
    "none in npz": (lambda p: npz_of(p / "a.npz", arr_0=GREY[:0]), r"a\.npz: holds 0 image"),
    "sizes": (
        lambda p: with_member(p / "a", "9.png", png(GREY[0, :4])),
        r"9\.png is 5x4 but 0/000\.png is 5x6; resize or crop",
    ),
    "empty file": (
        lambda p: with_member(p / "a", "9.png", b""),
        r"1 of 8 images cannot be read, .*9\.png \(UnidentifiedImageError\)",
    ),
    "web page": (
        lambda p: with_member(p / "a", "9.jpg", b"<html>404</html>"),
        r"1 of 8 images cannot be read, .*9\.jpg",
    ),
    "truncated png": (
        lambda p: with_member(p / "a", "9.png", truncated_png_with_good_header(), COLOUR),
        r"cannot decode 9\.png .*; remove or replace it",
    ),
    "16-bit png": (
        lambda p: with_member(p / "a", "9.png", png(np.ones((6, 5), np.uint16))),
        r"9\.png is not 8-bit \(mode I;16\); save it as 8-bit",
    ),
    "transparent": (
        lambda p: with_member(p / "a", "9.png", png(np.full((6, 5, 4), 128, np.uint8))),
        r"9\.png has transparent pixels; flatten it",
    ),
    "truncated zip": (
        lambda p: truncated(zip_of(p / "a.zip", {f"{i}.png": png(GREY[i]) for i in range(7)})),
        r"a\.zip: not a readable zip .*; write it again",
    ),
    "zip without images": (lambda p: zip_of(p / "a.zip", {"x.txt": b"x"}), r"a\.zip: no images"),
    "corrupt zip member": (
        lambda p: flipped(zip_of(p / "a.zip", {f"{i}.png": png(COLOUR[i]) for i in (0, 1)}), 100),
        r"a\.zip: 1 of 2 images cannot be read, .*0\.png \(BadZipFile\)",
    ),
    "encrypted zip": (lambda p: encrypted_zip(p / "a.zip"), r"a\.zip: the zip is encrypted"),
    "truncated npz": (
        lambda p: truncated(npz_of(p / "a.npz", arr_0=GREY)),
        r"a\.npz: not a readable \.npz .*; write it again",
    ),
    "corrupt npz": (
        lambda p: flipped(npz_of(p / "a.npz", arr_0=np.repeat(GREY, 100, axis=0)), 20_000),
        r"a\.npz: arr_0 is damaged \(Bad CRC-32.*; write it again",
    ),
    "not an npz": (
        lambda p: (p / "a.npz").write_bytes(b"hello") and p / "a.npz",
        r"a\.npz: not a readable \.npz",
    ),
    "wrong arrays": (
        lambda p: npz_of(p / "a.npz", images=GREY),
        r"holds \['images'\]; expected arr_0",
    ),
    "float images": (
        lambda p: npz_of(p / "a.npz", arr_0=GREY / 255),
        r"arr_0 is float64 \(7, 6, 5, 1\); expected uint8",
    ),
    "NHW": (lambda p: npz_of(p / "a.npz", arr_0=GREY[..., 0]), r"arr_0 is uint8 \(7, 6, 5\);"),
    "NCHW": (
        lambda p: npz_of(p / "a.npz", arr_0=np.ascontiguousarray(COLOUR.transpose(0, 3, 1, 2))),
        r"\(H, W, C\) = \(3, 6, 5\); C must be 1 or 3",
    ),
    "Fortran": (lambda p: npz_of(p / "a.npz", arr_0=np.asfortranarray(GREY)), "Fortran order"),
    "lying header": (lambda p: lying_npz(p / "a.npz"), "does not hold the 70 images"),
    "pickled images": (lambda p: object_npz(p / "a.npz", "arr_0"), r"cannot read arr_0: it holds Python objects"),
    "pickled stats": (lambda p: object_npz(p / "a.npz", "mu"), r"cannot read mu: it holds Python objects"),
    "integer stats": (
        lambda p: npz_of(p / "a.npz", mu=np.arange(256), sigma=np.eye(256)),
        "mu is int64; expected float64",
    ),
    "stats of another net": (
        lambda p: npz_of(p / "a.npz", mu=np.zeros(2048), sigma=np.eye(2048)),
        "mu has 2048 values of one with 2048 features, but random-conv-v1 gives 256 features",
    ),
    "stats shape": (
        lambda p: npz_of(p / "a.npz", mu=np.zeros(256), sigma=np.zeros(256)),
        r"shapes \(256,\) and \(256,\); expected \(D,\) and \(D, D\)",
    ),
    "other file": (
        lambda p: (p / "a.png").write_bytes(png(GREY[0])) and p / "a.png",
        r"a\.png: a file that is neither \.zip nor \.npz",
    ),
}


@pytest.mark.parametrize("side", ["images", "ref"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_exit_2_and_no_report(tmp_path, capfd, name, side):
    build, message = BAD[name]
    bad, out = str(build(tmp_path)), tmp_path / "report.json"
    good = str(npz_of(tmp_path / "good.npz", arr_0=GREY))
    images, ref = (bad, good) if side == "images" else (good, bad)
    assert main([images, "--ref", ref, "--out", str(out)]) == 2
    written = capfd.readouterr()
    assert written.out == ""
    lines = written.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert list(tmp_path.glob("*report*")) == []
    assert re.search(message, lines[0]), lines[0]


IDX = idx_bytes(GREY)
BAD_IDX = {
    "labels": (struct.pack(">2I", 0x801, 7) + bytes(7) + bytes(9), "starts with 0x00000801"),
    "short header": (IDX[:10], "not an IDX file"),
    "truncated": (IDX[:-20], "is damaged .*ends after 6 images"),
    "too long": (IDX + b"x", "is damaged .*bytes follow the last image"),
    "truncated gzip": (gzip.compress(IDX)[:-30], "is damaged .*download it again"),
    "corrupt gzip": (gzip.compress(IDX)[:-8] + bytes(8), "is damaged .*CRC"),
}


@pytest.mark.parametrize("name", BAD_IDX)
def test_bad_idx(tmp_path, monkeypatch, name):
    data, message = BAD_IDX[name]
    suffix = ".gz" if "gzip" in name else ""
    (tmp_path / f"train-images-idx3-ubyte{suffix}").write_bytes(data)
    monkeypatch.setattr(sources, "FASHION_FOLDERS", (tmp_path,))
    with pytest.raises(ValueError, match=rf"train-images-idx3-ubyte.*{message}"):
        whole("fashion:train")


def test_fashion_that_is_not_there_names_the_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FASHION_FOLDERS", (tmp_path / "one", tmp_path / "two"))
    with pytest.raises(ValueError, match=r"one or .*two; install Debian's dataset-fashion-mnist"):
        open_source("fashion:train")


@pytest.mark.parametrize("array", [GREY[..., 0], GREY / 255])
def test_other_arrays_are_refused(array):
    with pytest.raises(ValueError, match=r"expected uint8 \(N, H, W, C\)"):
        open_source(array)


def test_many_bad_images_are_counted(tmp_path):
    folder = folder_of(tmp_path / "a", GREY)
    for i in range(8):
        (folder / f"bad{i}.png").write_bytes(json.dumps(i).encode())
    with pytest.raises(ValueError, match=r"8 of 15 images cannot be read.*bad4\.png \(.*\), \.\.\."):
        open_source(folder)
