"""Training, latents, tar files and eval know one rule of what is an image and what its pixels are, written twice."""

import io
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ditmoe.config.data import DataConfig
from ditmoe.data import below, folders
from ditmoe.data.folders import FolderImages
from ditmoe.data.sets import BadImage
from ditmoe.data.tables import TableImages
from ditmoe.data.tars import TarImages
from eval.sources import open as sources
from eval.sources import tables
from eval.sources.images import Images

PIXELS = np.random.RandomState(0).randint(0, 256, (8, 8, 3), dtype=np.uint8)
GOOD = Image.fromarray(PIXELS)
SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def late_exif() -> bytes:
    """A PNG with its orientation behind the pixels."""
    plain, exif = saved(GOOD, "PNG"), SIDEWAYS.tobytes().removeprefix(b"Exif\0\0")
    return plain[:-12] + chunk(b"eXIf", exif) + plain[-12:]


def deep_png() -> bytes:
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + bytes(48) for _ in range(8)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def frames(kind: str) -> bytes:
    return saved(GOOD, kind, save_all=True, append_images=[Image.fromarray(255 - PIXELS)])


def large() -> bytes:
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def palette(**options: object) -> bytes:
    return saved(GOOD.convert("P", palette=Image.Palette.ADAPTIVE), "PNG", **options)


USED = {
    "a.png": saved(GOOD, "PNG"),
    "upright.jpg": saved(GOOD, "JPEG"),
    "turned.jpg": saved(GOOD, "JPEG", exif=SIDEWAYS),
    "turned.png": saved(GOOD, "PNG", exif=SIDEWAYS),
    "turned-late.png": late_exif(),
    "turned.webp": saved(GOOD, "WEBP", exif=SIDEWAYS, lossless=True),
    "turned.tif": saved(GOOD, "TIFF", exif=SIDEWAYS),
    "camera.jpg": frames("MPO"),
    "grey.PGM": saved(GOOD.convert("L"), "PPM"),
    "bits.png": saved(GOOD.convert("1"), "PNG"),
    "palette.png": palette(),
    "cmyk.jpg": saved(GOOD.convert("CMYK"), "JPEG"),
    "opaque.png": saved(GOOD.convert("RGBA"), "PNG"),
    "lab.tif": saved(Image.new("LAB", (8, 8)), "TIFF"),
    "jpeg.png": saved(GOOD, "JPEG"),
    "few.ppm": b"P6 8 8 100\n" + bytes(range(96)) * 2,
}
REFUSED = {
    "deep.png": deep_png(),
    "deep-grey.png": saved(Image.fromarray(np.full((8, 8), 1000, np.uint16)), "PNG"),
    "deep.ppm": b"P6 8 8 65535\n" + bytes(384),
    "float.tif": saved(Image.fromarray(PIXELS[..., 0] / np.float32(255)), "TIFF"),
    "film.png": frames("PNG"),
    "film.webp": frames("WEBP"),
    "film.tiff": frames("TIFF"),
    "large.png": large(),
    "cut.png": saved(GOOD, "PNG")[:120],
    "cut.jpg": saved(GOOD, "JPEG")[:-200],
    "empty.bmp": b"",
    "page.jpg": b"<html>not found</html>",
    "gif.png": saved(GOOD.convert("P"), "GIF"),
}
CLEAR = {  # what is transparent is white in training, and no reference for a score
    "clear.png": saved(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG"),
    "clear-palette.png": palette(transparency=0),
    "clear-colour.png": saved(Image.new("RGB", (8, 8), (9, 9, 9)), "PNG", transparency=(9, 9, 9)),
}


def trained_on(root: Path, name: str, content: bytes) -> list[np.ndarray | str]:
    """The pixels as training with --data.fit crop and as tar files have them, or why they are not used."""
    with tarfile.open(root / "set.tar", "w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    found: list[np.ndarray | str] = []
    (root / "one").mkdir()
    (root / "one" / name).write_bytes(content)
    for images in (FolderImages(root / "one", 8, 3, "crop"), TarImages(root / "set.tar", 8, 3)):
        try:
            found.append(images.images([0])[0])
        except BadImage as error:
            found.append(str(error))
    return found


def scored(root: Path, name: str, content: bytes) -> list[np.ndarray | str]:
    """The same of a folder and a zip as eval has them, beside an image of the same size."""
    with zipfile.ZipFile(root / "set.zip", "w") as archive:
        for member, data in ((f"zz-{name}", content), ("0.png", USED["a.png"])):
            archive.writestr(member, data)
            (root / "two").mkdir(exist_ok=True)
            (root / "two" / member).write_bytes(data)
    found: list[np.ndarray | str] = []
    for place in (root / "two", root / "set.zip"):
        try:
            opened = sources.open_source(place)
            assert isinstance(opened, Images)
            found.append(np.concatenate(list(opened.batches(1)))[1])
        except ValueError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("name", USED)
def test_every_reader_sees_the_same_pixels(name: str, tmp_path: Path) -> None:
    first, *others = [*trained_on(tmp_path, name, USED[name]), *scored(tmp_path, name, USED[name])]
    assert all(np.array_equal(first, other) for other in others), others
    assert not name.startswith("turned") or name.endswith("jpg") or np.array_equal(first, np.rot90(PIXELS, -1))
    exact = FolderImages(tmp_path / "one", 8, 3, "exact")
    assert exact.check_headers() or np.array_equal(exact.images([0])[0], first)


@pytest.mark.parametrize("name", REFUSED)
def test_every_reader_refuses_the_same_files_by_name(name: str, tmp_path: Path) -> None:
    for found in trained_on(tmp_path, name, REFUSED[name]) + scored(tmp_path, name, REFUSED[name]):
        assert isinstance(found, str)
        assert name.split(".")[0] in found
    exact = FolderImages(tmp_path / "one", 8, 3, "exact")
    with pytest.raises(BadImage, match=name):
        exact.images([0])


@pytest.mark.parametrize("name", CLEAR)
def test_what_is_transparent_is_white_or_refused(name: str, tmp_path: Path) -> None:
    first, second = trained_on(tmp_path, name, CLEAR[name])
    assert np.array_equal(first, second)
    assert (first == 255).all() or name == "clear-palette.png"  # type: ignore[union-attr]
    assert all("has transparent pixels" in str(found) for found in scored(tmp_path, name, CLEAR[name]))
    exact = FolderImages(tmp_path / "one", 8, 3, "exact")
    assert exact.check_headers() or np.array_equal(exact.images([0])[0], first)


def test_a_turned_photo_need_not_be_square(tmp_path: Path) -> None:
    wide = Image.fromarray(PIXELS[:5])
    for name, kind in (("a.jpg", "JPEG"), ("b.png", "PNG"), ("c.tif", "TIFF"), ("d.webp", "WEBP")):
        wide.save(tmp_path / name, kind, exif=SIDEWAYS)
    opened = sources.open_source(tmp_path)
    assert isinstance(opened, Images)
    assert opened.shape == (8, 5, 3)
    assert sum(len(batch) for batch in opened.batches(2)) == 4
    (tmp_path / "e.png").write_bytes(late_exif().replace(saved(GOOD, "PNG")[:-12], saved(wide, "PNG")[:-12]))
    with pytest.raises(ValueError, match=r"e\.png is 8x5 but a\.jpg is 5x8; resize"):
        sources.open_source(tmp_path)
    (tmp_path / "e.png").rename(tmp_path / "0.png")
    for name in ("a.jpg", "b.png", "c.tif", "d.webp"):
        wide.save(tmp_path / name)
    late = sources.open_source(tmp_path)
    assert isinstance(late, Images)
    with pytest.raises(ValueError, match=r"0\.png is 5x8 once it is upright; save it as it looks"):
        list(late.batches(9))


def test_a_table_has_the_same_pixels_for_training_and_eval(tmp_path: Path) -> None:
    import datasets

    cells = {"image": [{"bytes": content, "path": None} for content in USED.values()]}
    place = tmp_path / "set.parquet"
    datasets.Dataset.from_dict(cells, datasets.Features(image=datasets.Image(decode=False))).to_parquet(place)
    trained = TableImages(DataConfig(name="hf", path=place, fit="crop"), 8, 3)
    scored = sources.open_source(place)
    assert isinstance(scored, Images)
    assert np.array_equal(trained.images(range(len(USED))), np.concatenate(list(scored.batches(5))))


NAMES = [  # of a tree, and whether a file is an image of the set
    *(("cat/1.png", 1), ("cat/2.JPG", 1), ("cat/young/3.png", 1), ("linked/4.png", 1), ("cat/a.b.png", 1)),
    *(("cat/._1.png", 0), ("._x.png", 0), ("cat/.ipynb_checkpoints/1.png", 0), ("__MACOSX/cat/._1.png", 0)),
    *(("cat/__MACOSX/1.png", 0), ("cat/@eaDir/1.png", 0), (".cache/1.png", 0)),
    *(("cat/moving.gif", 0), ("cat/phone.heic", 0), ("cat/new.avif", 0), ("cat/notes", 0), ("README.md", 0)),
]


def test_every_reader_takes_the_same_files_and_counts_the_others(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for name, _ in NAMES:
        file = (tmp_path / "elsewhere" / name) if name.startswith("linked/") else root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(USED["a.png"])
    (root / "cat" / "linked").symlink_to(tmp_path / "elsewhere" / "linked")
    count = sum(used for _, used in NAMES)
    trained, scored = FolderImages(root, 8, 3, "exact"), sources.open_source(root)
    assert isinstance(scored, Images)
    assert (len(trained), scored.count) == (count, count)
    words = "5 other files"
    kinds = "(1 .md, 1 .gif, 1 .avif, 1 notes, 1 .heic)"
    assert trained.source.endswith(f"; {words} left out, such as README.md {kinds}")
    assert scored.left_out == f"{words} of {root} were left out, such as README.md {kinds}"


@pytest.mark.parametrize(
    "names",
    [
        ["a.parquet"],
        ["x/a.parquet", ".b.png"],
        ["a.parquet", "x/b.png"],
        ["state.json"],
        ["state.json", "dataset_info.json"],
        ["dataset_dict.json"],
        ["A.PARQUET"],
        [],
    ],
)
def test_every_reader_takes_the_same_places_for_tables(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for place in (tmp_path, *tmp_path.rglob("*")):
        assert below.is_table(place) == sources.is_table(place)
    assert below.is_table(tmp_path) == (names not in (["a.parquet", "x/b.png"], ["state.json"], ["A.PARQUET"], []))
    assert below.SAVED == tables.SAVED


def test_the_names_of_the_rule_are_the_same() -> None:
    assert below.IMAGE_SUFFIXES == sources.SUFFIXES
    assert below.HIDDEN == sources.HIDDEN
    assert set(folders.IMAGE_FORMATS) == set(sources.FORMATS)


def test_links_in_a_circle_are_refused_by_both(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").touch()
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(".")
    for reader in (below.is_table, sources.open_source):
        with pytest.raises(ValueError, match="is a link to a folder that has been met already"):
            reader(tmp_path)
