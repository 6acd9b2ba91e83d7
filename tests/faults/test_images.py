"""Files that are no images, or odd ones; processes that die while they read them."""

import os
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from ditmoe.cli import parse_train
from ditmoe.data import open as data
from ditmoe.data.open import open_data
from ditmoe.data.order import Batches
from tests.faults import runs
from tests.faults.test_checkpoints import same

FLAGS = ["--model.sample-size", 8, "--model.in-channels", 3, "--data.fit", "crop", "--data.no-flip"]


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, bits=8, rows=b""):
    """A PNG in RGB of these sizes; without rows only its header."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    rest = png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"") if rows else b"\0" * 40
    return b"\x89PNG\r\n\x1a\n" + header + rest


@pytest.fixture
def photos(tmp_path):
    """20 good images, odd ones that can be used, and bad ones."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(folder / f"good-{i:02}.png")
    Image.new("CMYK", (9, 9), (200, 0, 0, 0)).save(folder / "odd-cmyk.jpg")
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).convert("P").save(folder / "odd-palette.png", transparency=0)
    Image.new("RGB", (1, 1), (1, 2, 3)).save(folder / "odd-1x1.png")
    Image.new("RGB", (20, 10), (9, 9, 9)).save(folder / "odd-jpeg-named.png", format="JPEG")
    (folder / "bad-empty.png").write_bytes(b"")
    (folder / "bad-page.jpg").write_text("<html>not found</html>")
    whole = (folder / "good-00.png").read_bytes()
    (folder / "bad-cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "bad-bomb.png").write_bytes(png(20_000, 20_000))
    (folder / "bad-large.png").write_bytes(png(10_000, 10_000))
    Image.fromarray(np.full((9, 9), 60_000, dtype=np.uint16)).save(folder / "bad-16-bit.png")
    (folder / "bad-16-bit-rgb.png").write_bytes(png(9, 9, bits=16, rows=bytes(9 * (1 + 9 * 6))))
    (folder / "bad-header.png").write_bytes(whole[:8] + png_chunk(b"IHDR", b"\0" * 5))
    for name in ("bad-number.ppm", "bad-number-too.ppm"):  # Pillow says the same of both, and of neither its name
        (folder / name).write_bytes(b"P6 2x 2 255 " + bytes(12))
    (folder / "bad-loop.png").symlink_to(folder / "bad-loop.png")
    (folder / "bad-link.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "bad-pipe.png")
    (folder / "notes.txt").write_text("no image")
    return folder


BAD = {
    *("bad-empty.png", "bad-page.jpg", "bad-cut.png", "bad-bomb.png", "bad-large.png", "bad-16-bit.png"),
    *("bad-16-bit-rgb.png", "bad-header.png", "bad-number.ppm", "bad-number-too.ppm"),
    *("bad-loop.png", "bad-link.png", "bad-pipe.png"),
}
COUNT = 24 + len(BAD)


@pytest.mark.parametrize("in_memory", [True, False])
def test_bad_images_are_skipped_named_and_replaced_by_the_next_of_the_order(photos, tmp_path, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr(data, "_IN_MEMORY_BYTES", 0)
    most = ["--data.max-bad", len(BAD)]
    argv = ["folder", "--data.path", photos, *most, *FLAGS, "--train.batch-size", 8, "--max-steps", 9]
    config = parse_train([str(a) for a in argv])
    images = open_data(config.data, size=8, channels=3)
    assert len(images) == COUNT
    drawn = list(Batches(config, images, first_step=0, rank=0, num_processes=1))
    named = {sentence.split(" ")[0].split("/")[-1] for batch in drawn for sentence in batch.bad}
    assert named <= BAD
    assert in_memory or named == BAD
    again = list(Batches(config, images, first_step=4, rank=0, num_processes=1))
    assert all((a.x == b.x).all() for a, b in zip(drawn[4:], again, strict=True))
    halves = [next(Batches(config, images, first_step=3, rank=r, num_processes=2)) for r in (0, 1)]
    assert (np.concatenate([h.x for h in halves]) == drawn[3].x.numpy()).all()
    order = data.sample_rng(config.seed, 4, 0).permutation(COUNT).tolist()
    folder = data.FolderImages(photos, 8, 3, "crop")
    good = [row for row in order if folder.files[row].name not in BAD]
    position = next(i for i, row in enumerate(order[:-1]) if row not in good)
    following = next(row for row in order[position:] if row in good)
    x = drawn[position // 8].x[position % 8]
    assert (x == folder.tensors([following])[0]).all()


@pytest.mark.parametrize("tall", [False, True])
def test_of_a_line_only_the_centre_is_enlarged(tmp_path, monkeypatch, tall):
    """Not its 25.6 million columns at 256 pixels."""
    pixels = np.zeros((1, 100_001, 3), dtype=np.uint8)
    pixels[0, 50_000] = 7
    Image.fromarray(pixels.swapaxes(0, 1) if tall else pixels).save(tmp_path / "line.png")
    resize = Image.Image.resize

    def bounded(image, size, *args, **kwargs):
        assert size[0] * size[1] <= 16 * 256**2
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", bounded)
    assert (data.FolderImages(tmp_path, 256, 3, "crop").images([0]) == 7).all()


def test_a_rotated_photo_is_turned_upright(tmp_path):
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[0] = 255  # the first row of what the camera saw
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise to look at it
    (tmp_path / "photos").mkdir()
    Image.fromarray(pixels).save(tmp_path / "photos" / "a.png", exif=exif)
    for fit in ("exact", "crop"):
        [image] = data.FolderImages(tmp_path / "photos", 8, 3, fit).images([0])
        assert (image[:, -1] == 255).all()
        assert (image[:, 0] == 0).all()


@pytest.mark.parametrize(("allowed", "hook"), [(0, None), (12, None), (12, runs.read_from_files)])
def test_more_than_allowed_end_the_run_in_a_sentence(photos, tmp_path, allowed, hook):
    out = tmp_path / "run"
    flags = ["--data.path", photos, *FLAGS, "--data.max-bad", allowed, "--max-steps", 40]
    group = runs.training(out, *flags, preset="folder", hook=hook)
    assert group.wait() == [2]
    assert "Traceback" not in group.err()
    assert "photos/bad-" in group.err()
    assert "--data.max-bad" in group.err()
    assert allowed == 0 or "13 images cannot be used, data.max_bad is 12" in group.err()


def test_skipped_images_are_counted_once_over_processes_and_restarts(photos, tmp_path):
    flags = ["--data.path", photos, *FLAGS, "--data.max-bad", len(BAD), "--train.checkpoint-every", 2]
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    for out, steps, world in ((straight, 8, 1), (cut, 4, 2), (cut, 8, 2)):
        group = runs.training(
            out,
            *flags,
            "--max-steps",
            steps,
            preset="folder",
            hook=runs.read_from_files,
            world=world,
            name=f"log-{steps}",
        )
        assert group.wait() == [0] * world, group.err()
    first = (tmp_path / "log-4" / "0.err").read_text()
    second = (tmp_path / "log-8" / "0.err").read_text()
    assert {line.split()[1].split("/")[-1] for line in first.splitlines()} == BAD  # 64 samples of 37 images
    assert all(line.startswith("skipped: ") for line in first.splitlines())
    assert len(first.splitlines()) == len(BAD)
    assert second == ""
    a, b = ([row["loss"] for row in runs.rows(out)] for out in (straight, cut))
    assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_bad(photos):
    (photos / "good-03.png").chmod(0)
    with pytest.raises(data.BadImage, match="good-03"):
        data.FolderImages(photos, 8, 3, "crop").images([12])


@pytest.mark.parametrize("kind", ["killed", "raises", "full"])
def test_a_reader_that_dies_ends_the_run_with_the_name_of_the_file(tmp_path, kind):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(24):
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / f"{i:02}.png")
    flags = ["--data.path", folder, *FLAGS, "--data.num-workers", 2, "--max-steps", 50]
    start = time.monotonic()
    group = runs.training(
        tmp_path / "run", *flags, preset="folder", hook=runs.reader_fault, args=(kind, "07.png"), world=2
    )
    codes = group.wait(60)
    assert all(code not in (0, 143) for code in codes)
    assert time.monotonic() - start < 60
    errors = group.err(0) + group.err(1)
    if kind == "killed":
        assert "DataLoader worker" in errors
        assert "photos/07.png" in errors
    elif kind == "full":
        assert 2 in codes
        assert "error: data.num_workers 2: a reader could not send its batch to the training process" in errors
    else:  # which of those that were being read
        assert "photos/07.png could not be read: RuntimeError('decoder failed')" in errors


def test_a_resumed_run_over_bad_images_is_the_same_to_the_bit(photos, tmp_path):
    flags = ["--data.path", photos, *FLAGS, "--data.max-bad", len(BAD), "--data.num-workers", 2]
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    for out, steps in ((straight, 6), (cut, 3), (cut, 6)):
        assert runs.training(out, *flags, "--max-steps", steps, preset="folder", hook=runs.read_from_files).wait() == [
            0
        ]
    same(straight / "checkpoints/step-000006", cut / "checkpoints/step-000006")


def test_the_last_batch_counts_too(photos, tmp_path):
    """A run in parts of one step cannot skip more than a run in one part."""
    out = tmp_path / "run"
    seed = next(seed for seed in range(10_000) if bad_in_two_batches(photos, seed) == [1, 1])
    flags = ["--data.path", photos, *FLAGS, "--data.max-bad", 1, "--train.batch-size", 8, "--seed", seed]
    codes = []
    for steps in (1, 2):
        group = runs.training(out, *flags, "--max-steps", steps, preset="folder", hook=runs.read_from_files)
        codes += group.wait()
    assert codes == [0, 2]
    assert "2 images cannot be used, data.max_bad is 1" in group.err()


def bad_in_two_batches(photos, seed):
    """How many of the first 9 images of the order are bad, and of the next 9: 8 and the one that replaces one."""
    names = sorted(file.name for file in photos.iterdir() if file.name != "notes.txt")
    bad = [names[row] in BAD for row in data.sample_rng(seed, 4, 0).permutation(COUNT)]
    return [sum(bad[:9]), sum(bad[9:18])]


@pytest.mark.parametrize("fit", ["exact", "crop"])
def test_a_pipe_is_not_waited_for_and_every_fault_has_its_name(photos, fit):
    images = data.FolderImages(photos, 9, 3, fit)
    for row, file in enumerate(images.files):
        if file.name in BAD:
            with pytest.raises(data.BadImage, match=f"^{file} "):
                images.images([row])
    assert fit == "crop" or {images.files[row].name for row in images.check_headers()} >= BAD - {"bad-cut.png"}


@pytest.mark.parametrize("fault", [MemoryError(), OverflowError("a"), struct.error("a"), TypeError("a")])
def test_what_a_decoder_raises_of_damage_is_a_bad_image(photos, monkeypatch, fault):
    def fail(image):
        raise fault

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
    images = data.FolderImages(photos, 8, 3, "crop")
    row = [file.name for file in images.files].index("good-03.png")
    with pytest.raises(data.BadImage, match=r"good-03\.png cannot be decoded \((MemoryError|a)\)"):
        images.images([row])


@pytest.mark.parametrize("deep", [False, True])
def test_a_class_folder_that_may_not_be_listed_is_refused(tmp_path, monkeypatch, deep):
    """Else the labels of the other classes would move."""
    for name in ("ant", "bee", "cat/young"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    closed, scandir = tmp_path / ("cat/young" if deep else "bee"), os.scandir

    def refusing(path):
        if str(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ValueError, match=f"^{closed} cannot be listed .Permission denied"):
        data.FolderImages(tmp_path, 8, 3, "exact")


def test_a_class_folder_that_is_a_link_to_nowhere_is_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "1.png")
    (tmp_path / ".lock").symlink_to(tmp_path / "nowhere")
    assert len(data.FolderImages(tmp_path, 8, 3, "exact")) == 1
    (tmp_path / "ant").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds ant, a link that leads nowhere"):
        data.FolderImages(tmp_path, 8, 3, "exact")
