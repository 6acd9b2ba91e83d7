"""Tables of images as one side of a score: the pixels of the folder, splits by name, and what is refused."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from eval.fid import main, score
from eval.sources import open as sources
from eval.sources.images import Images
from eval.sources.open import open_source

PIXELS = np.random.RandomState(0).randint(0, 256, (12, 8, 8, 3), dtype=np.uint8)


def file_of(pixels: np.ndarray, kind: str, turned: bool) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6 if turned else 1
    Image.fromarray(pixels).save(buffer, kind, exif=exif)
    return buffer.getvalue()


FILES = [file_of(p, ("PNG", "JPEG")[i % 2], i % 3 == 0) for i, p in enumerate(PIXELS)]


def table(*files: bytes | None, **more: list) -> datasets.Dataset:
    kinds = {"image": datasets.Image(decode=False)} | {name: datasets.Value("string") for name in more}
    cells = {"image": [{"bytes": file, "path": None} for file in files], **more}
    return datasets.Dataset.from_dict(cells, datasets.Features(kinds))


def folder(root: Path) -> Path:
    root.mkdir()
    for i, file in enumerate(FILES):
        (root / f"{i:02d}.{('png', 'jpg')[i % 2]}").write_bytes(file)
    return root


def opened(path: object, **options: int) -> Images:
    found = open_source(str(path), **options)
    assert isinstance(found, Images)
    return found


@pytest.mark.parametrize("form", ["file", "folder", "saved"])
def test_a_table_has_the_pixels_of_the_folder_and_the_distance_0(form: str, tmp_path: Path) -> None:
    root, images = tmp_path / "set", folder(tmp_path / "images")
    if form == "saved":
        datasets.DatasetDict(train=table(*FILES), test=table(*FILES[:3])).save_to_disk(root)
    else:
        root.mkdir()
        table(*FILES).to_parquet(root / "train-00000-of-00001.parquet")
        table(*FILES[:3]).to_parquet(root / "test-00000-of-00001.parquet")
    path = root / "train-00000-of-00001.parquet" if form == "file" else root
    found = opened(path)
    assert (found.kind, found.path, found.count, found.left_out) == ("table", f"{path}:train", 12, "")
    read, expected = (np.concatenate(list(side.batches(5))) for side in (found, opened(images)))
    assert np.array_equal(read, expected)
    assert abs(score(images, path)["value"]) < 1e-9
    if form != "file":
        assert opened(f"{root}:test").count == 3
        assert score(f"{root}:test", images)["value"] > 1e-6


def test_the_statistics_of_a_table_are_kept_until_it_changes(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    table(*FILES).to_parquet(root / "train.parquet")
    first, again = opened(root).fingerprint, opened(root).fingerprint
    assert first == again != ""
    table(*FILES[::-1]).to_parquet(root / "train.parquet")
    assert opened(root).fingerprint not in ("", first)


def test_files_that_cells_name_are_read_inside_the_folder_alone(tmp_path: Path) -> None:
    root = folder(tmp_path / "set") / "table"
    root.mkdir()
    for name in ("00.png", "01.jpg"):
        (root.parent / name).rename(root / name)
    cells = {"image": [{"bytes": None, "path": path} for path in ("00.png", "01.jpg", "../02.png")]}
    kinds = datasets.Features(image={"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
    datasets.Dataset.from_dict(cells, kinds).to_parquet(root / "set.parquet")
    with pytest.raises(ValueError, match=r"1 of 3 images cannot be read, remove or replace them: row 2 \(FileNotFound"):
        opened(root / "set.parquet")
    found = opened(root / "set.parquet", skip_bad=1)
    assert np.array_equal(np.concatenate(list(found.batches(2)))[0], np.rot90(PIXELS[0], -1))
    assert (found.bad, found.fingerprint) == (["row 2"], ""), "files that cells name may change"


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("set:dev", "set has no split 'dev', but train; write .*set:train"),
        ("two.parquet", "two.parquet:train has columns of images: image, other; save it with one column of images"),
        ("none.parquet", "none.parquet:train has no images, but text .string.; save it with one"),
        ("bad.parquet", "bad.parquet cannot be read as a data set: "),
        ("cut.parquet", "1 of 3 images cannot be read, remove or replace them: row 1"),
    ],
)
def test_what_is_refused(place: str, sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "set").mkdir()
    table(*FILES).to_parquet(tmp_path / "set" / "train.parquet")
    two = table(*FILES[:3]).add_column("other", FILES[:3])
    two.to_parquet(tmp_path / "two.parquet")
    table(*FILES[:3], text=["a", "b", "c"]).remove_columns("image").to_parquet(tmp_path / "none.parquet")
    table(FILES[0], FILES[1][:9], FILES[2]).to_parquet(tmp_path / "cut.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=sentence):
        opened(tmp_path / place)
    assert main([str(tmp_path / place), "--ref", "digits:test"]) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_images_beside_a_table_come_first_and_metadata_is_no_other_file(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    (root / "metadata.jsonl").write_text("{}\n")
    assert opened(root).left_out == ""
    table(*FILES[:3]).to_parquet(root / "train.parquet")
    found = opened(root)
    assert (found.kind, found.count) == ("folder", 12)
    assert "1 other file" in found.left_out


def test_a_table_is_never_taken_for_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()
    table(*FILES).to_parquet("digits/test.parquet")
    found, ours = opened("digits:test"), opened("./digits:test")
    assert (found.count, found.kind, found.path) == (300, "dataset", "digits:test")
    assert (ours.count, ours.kind, ours.path) == (12, "table", "./digits:test"), (
        "as a report says it, it is found again"
    )
    with pytest.raises(ValueError, match=r"digits has no split 'train', but test; write \./digits:test$"):
        opened("digits")
    assert sources.is_table(Path("digits"))
    folder(tmp_path / "digits:test")
    assert opened("digits:test").count == 300
    assert opened("./digits:test").count == 12
