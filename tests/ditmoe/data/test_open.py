"""Data: what comes out, which source is taken, and every way a user's files can be wrong."""

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ditmoe.config.sections import Config, DataConfig
from ditmoe.data.named import read_idx
from ditmoe.data.open import open_data, reference
from ditmoe.data.order import Batches

Tiny = Callable[..., Config]


def png(path: Path, size: tuple[int, int] = (8, 8), mode: str = "L", value: int = 9) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * len(Image.new(mode, (1, 1)).getbands())).save(path)
    return path


def folder(path: Path, **options: object) -> DataConfig:
    return DataConfig(name="folder", path=path, **options)  # type: ignore[arg-type]


def idx(array: np.ndarray) -> bytes:
    head = b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def test_digits_are_bundled() -> None:
    train, test = (open_data(DataConfig(), size=8, channels=1, split=s) for s in ("train", "test"))
    assert (len(train), len(test)) == (1497, 300)
    x = train.tensors(range(100))
    assert x.shape == (100, 1, 8, 8)
    assert (x.min(), x.max()) == (-1, 1)
    assert sorted(train.id2label.values()) == [str(i) for i in range(10)]


def test_digits_do_not_fit_another_size() -> None:
    with pytest.raises(ValueError, match="--model.sample-size 8"):
        open_data(DataConfig(), size=16, channels=1)


@pytest.mark.parametrize("zipped", [False, True])
def test_fashion_reads_idx_files_and_says_from_where(tmp_path: Path, zipped: bool) -> None:
    pixels, labels = np.arange(3 * 28 * 28).reshape(3, 28, 28) % 256, np.array([9, 0, 4])
    for name, array in (("train-images-idx3-ubyte", pixels), ("train-labels-idx1-ubyte", labels)):
        raw = idx(array)
        (tmp_path / (name + ".gz" * zipped)).write_bytes(gzip.compress(raw) if zipped else raw)
    data = open_data(DataConfig(name="fashion", path=tmp_path), size=28, channels=1)
    assert str(tmp_path) in data.source
    assert np.array_equal(data.images([2])[0, :, :, 0], pixels[2])
    assert data.labels.tolist() == [9, 0, 4]
    assert data.id2label[9] == "Ankle boot"


def test_where_a_named_folder_has_none_it_says_so(tmp_path: Path) -> None:
    config = DataConfig(name="fashion", path=tmp_path)
    with pytest.raises(ValueError, match=f"is not in {tmp_path}; give another --data.path, or leave it out and"):
        open_data(config, size=28, channels=1)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_truncated_idx_file_is_named(tmp_path: Path, zipped: bool) -> None:
    raw = idx(np.zeros((3, 28, 28)))
    path = tmp_path / ("x-ubyte" + ".gz" * zipped)
    path.write_bytes((gzip.compress(raw) if zipped else raw)[:-9])
    with pytest.raises(ValueError, match=r"x-ubyte.*truncated"):
        read_idx(path)
    path = tmp_path / "y"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="not an IDX file"):
        read_idx(path)


def test_missing_fashion_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataset-fashion-mnist"):
        open_data(DataConfig(name="fashion", path=tmp_path), size=28, channels=1)


def test_folder_with_classes_and_without(tmp_path: Path) -> None:
    png(tmp_path / "a" / "cat" / "1.png")
    png(tmp_path / "a" / "ant" / "deep" / "2.png", value=200)
    data = open_data(folder(tmp_path / "a"), size=8, channels=1)
    assert data.id2label == {0: "ant", 1: "cat"}
    assert data.images([0]).mean() == 200
    png(tmp_path / "b" / "1.png")
    free = open_data(folder(tmp_path / "b"), size=8, channels=1)
    assert free.id2label == {}
    assert len(free) == 1


@pytest.mark.parametrize(("size", "mode"), [((8, 9), "L"), ((16, 16), "L"), ((8, 8), "RGB"), ((8, 8), "RGBA")])
def test_mixed_sizes_and_modes_are_refused_by_name_and_cropped_on_request(
    tmp_path: Path, size: tuple[int, int], mode: str
) -> None:
    png(tmp_path / "1.png")
    png(tmp_path / "odd.png", size, mode)
    with pytest.raises(ValueError, match=r"odd\.png is .* --data.fit crop"):
        open_data(folder(tmp_path), size=8, channels=1)
    assert open_data(folder(tmp_path, fit="crop"), size=8, channels=1).images([0, 1]).shape == (2, 8, 8, 1)


def test_crop_keeps_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((16, 40), dtype=np.uint8)
    pixels[:, 12:28] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    data = open_data(folder(tmp_path, fit="crop"), size=8, channels=1)
    assert (data.images([0]) > 250).mean() > 0.7


@pytest.mark.parametrize("damage", ["truncated", "empty", "html"])
def test_damaged_images_are_named_before_training(tmp_path: Path, damage: str) -> None:
    good = png(tmp_path / "good.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8), dtype=np.uint8)).save(tmp_path / "bad.png")
    raw = (tmp_path / "bad.png").read_bytes()
    (tmp_path / "bad.png").write_bytes({"truncated": raw[:-40], "empty": b"", "html": b"<html>"}[damage])
    assert good.exists()
    with pytest.raises(ValueError, match=r"bad\.png"):
        open_data(folder(tmp_path), size=8, channels=1)


def test_folders_that_hold_nothing_useful(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no images"):
        open_data(folder(tmp_path), size=8, channels=1)
    with pytest.raises(ValueError, match="not a folder"):
        open_data(folder(tmp_path / "nowhere"), size=8, channels=1)
    with pytest.raises(ValueError, match="needs --data.path"):
        open_data(DataConfig(name="folder"), size=8, channels=1)
    png(tmp_path / "a" / "1.png")
    png(tmp_path / "loose.png")
    with pytest.raises(ValueError, match="beside class folders"):
        open_data(folder(tmp_path), size=8, channels=1)


def test_no_label_moves_without_a_word(tmp_path: Path) -> None:
    for name in ("ant", "cat", "dog"):
        png(tmp_path / name / "1.png")
    (tmp_path / "bee").mkdir()
    with pytest.raises(ValueError, match=r"1 class folder without an image .*, such as bee; give each some"):
        open_data(folder(tmp_path), size=8, channels=1)
    for name in ("1.gif", "2.gif", "3.heic"):
        (tmp_path / "bee" / name).write_bytes(b"picture")
    with pytest.raises(ValueError, match=r"such as bee; 3 other files left out, such as bee/1.gif \(2 .gif, 1 .heic\)"):
        open_data(folder(tmp_path), size=8, channels=1)
    (tmp_path / "bee").rename(tmp_path / ".bee")
    data = open_data(folder(tmp_path), size=8, channels=1)
    assert (data.id2label, data.source.split(str(tmp_path))[1]) == ({0: "ant", 1: "cat", 2: "dog"}, "")
    (tmp_path / "cat" / "1.png").rename(tmp_path / "cat" / "1.avif")
    with pytest.raises(ValueError, match=r"such as cat; 1 other file left out, such as cat/1.avif \(1 .avif\)"):
        open_data(folder(tmp_path), size=8, channels=1)


def test_links_to_folders_are_followed_and_never_twice(tmp_path: Path) -> None:
    png(tmp_path / "elsewhere" / "more" / "2.png")
    png(tmp_path / "photos" / "cat" / "1.png")
    (tmp_path / "photos" / "cat" / "link").symlink_to(tmp_path / "elsewhere")
    data = open_data(folder(tmp_path / "photos"), size=8, channels=1)
    assert (len(data), data.id2label) == (2, {0: "cat"})
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "photos")
    with pytest.raises(ValueError, match="is a link to a folder that has been met already; remove the link"):
        open_data(folder(tmp_path / "photos"), size=8, channels=1)
    (tmp_path / "elsewhere" / "back").unlink()
    (tmp_path / "elsewhere" / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="link holds gone, a link that leads nowhere; mend or remove it"):
        open_data(folder(tmp_path / "photos"), size=8, channels=1)


def test_parts_of_a_set_are_no_classes(tmp_path: Path) -> None:
    for name in ("train/cat", "train/dog", "val/cat"):
        png(tmp_path / name / "1.png")
    fix = f"data.path {tmp_path} holds train, val, which are parts of a set.*--data.path {tmp_path}/train"
    with pytest.raises(ValueError, match=fix):
        open_data(folder(tmp_path), size=8, channels=1)
    png(tmp_path / "bus" / "1.png")
    with pytest.raises(ValueError, match=fix):
        open_data(folder(tmp_path), size=8, channels=1)
    shutil.rmtree(tmp_path / "val")  # a train among vehicles
    assert open_data(folder(tmp_path), size=8, channels=1).id2label == {0: "bus", 1: "train"}


@pytest.mark.parametrize(
    ("places", "parts", "fix"),
    [
        (["Train/cat", "Testing/cat"], "Testing, Train", "Train"),
        (["train_images/cat", "test_images/cat"], "test_images, train_images", "train_images"),
        (["trainset/a", "testset/a"], "testset, trainset", "trainset"),
        (["data/train/cat", "data/dev/cat"], "data/dev, data/train", "data/train"),
        (["cat/train", "cat/test", "dog/train", "dog/test"], "cat/test, cat/train", "train/cat"),
        (["seg_train/a", "seg_test/a", "seg_pred/a"], "seg_test, seg_train", "seg_train"),
        (["train2017", "val2017"], "train2017, val2017", "train2017"),
        (
            ["ILSVRC2012_img_train/a", "ILSVRC2012_img_val/a"],
            "ILSVRC2012_img_train, ILSVRC2012_img_val",
            "ILSVRC.*train",
        ),
        (["trainA", "testA", "trainB", "testB"], "testA, trainA", "trainA"),
        (["TrainData/a", "ValData/a"], "TrainData, ValData", "TrainData"),
        (["training data"], "training data", "training data"),
    ],
)
def test_parts_of_a_set_by_the_names_that_people_give_them(
    places: list[str], parts: str, fix: str, tmp_path: Path
) -> None:
    for place in places:
        png(tmp_path / place / "1.png")
    with pytest.raises(
        ValueError, match=f"holds {parts}, which are parts of a set.* as in (--data.path )?{tmp_path}/{fix}$"
    ):
        open_data(folder(tmp_path), size=8, channels=1)


def test_words_that_are_like_those_of_parts_are_classes(tmp_path: Path) -> None:
    places = (
        "steam train",
        "test tube",
        "trainer",
        "images",
        "train_bus",
        "cassettes",
        "vehicles/train",
        "papers/test",
    )
    for place in places:
        png(tmp_path / place / "1.png")
    assert len(open_data(folder(tmp_path), size=8, channels=1).id2label) == len(places)


def test_folders_named_by_numbers_keep_the_order_of_names_and_say_so(tmp_path: Path) -> None:
    for number in range(12):
        png(tmp_path / str(number) / "1.png")
    data = open_data(folder(tmp_path), size=8, channels=1)
    assert data.id2label[2] == "10"
    assert data.source.endswith("; labels go by the order of names: label 2 is '10'")
    for number in (10, 11):
        (tmp_path / str(number) / "1.png").unlink()
        (tmp_path / str(number)).rmdir()
    assert "order of names" not in open_data(folder(tmp_path), size=8, channels=1).source


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_class_without_an_image_that_can_be_used_is_refused(
    in_memory: bool, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of it would be drawn like any other."""
    png(tmp_path / "ant" / "1.png")
    for name in ("1.png", "2.png"):
        png(tmp_path / "bee" / name)
        (tmp_path / "bee" / name).write_bytes(b"")
    wrong = "none of the images of class 'bee' can be used, and it would be drawn .* mend its images, or remove"
    if in_memory:
        with pytest.raises(ValueError, match=wrong):
            open_data(folder(tmp_path, max_bad=2), size=8, channels=1)
        png(tmp_path / "bee" / "2.png")
        assert len(open_data(folder(tmp_path, max_bad=2), size=8, channels=1)) == 3
        return
    monkeypatch.setattr("ditmoe.data.open._IN_MEMORY_BYTES", 0)
    config = tiny(data={"name": "folder", "path": tmp_path, "max_bad": 2, "fit": "crop"})
    data = open_data(config.data, size=8, channels=1)
    with pytest.raises(ValueError, match=wrong):
        next(Batches(config, data, first_step=0, rank=0, num_processes=1))


def test_latents(tmp_path: Path) -> None:
    shard = {"latents": torch.randn(5, 4, 8, 8), "labels": torch.tensor([0, 2, 1, 0, 2])}
    save_file(shard, tmp_path / "00.safetensors")
    config = DataConfig(name="latents", path=tmp_path)
    data = open_data(config, size=8, channels=4)
    assert torch.equal(data.tensors([3]), shard["latents"][3:4])
    assert len(data.id2label) == 3
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "01.safetensors").write_bytes((tmp_path / "00.safetensors").read_bytes())
    (tmp_path / "x.npy").touch()
    source = open_data(config, size=8, channels=4).source
    assert source.endswith("; 2 other files left out, such as more/01.safetensors (1 .safetensors, 1 .npy)")
    (tmp_path / "01.safetensors").write_bytes((tmp_path / "00.safetensors").read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"01\.safetensors is damaged"):
        open_data(config, size=8, channels=4)


def samples(config: Config, processes: int, first_step: int = 0) -> list[list[int]]:
    """The sample numbers of each step, over all processes."""
    data = open_data(config.data, size=8, channels=1)
    parts = [list(Batches(config, data, first_step=first_step, rank=r, num_processes=processes))
             for r in range(processes)]  # fmt: skip
    micro = [[i for part in parts for i in part[m].indices] for m in range(len(parts[0]))]
    cut = config.train.accumulation
    return [sorted(i for part in micro[s : s + cut] for i in part) for s in range(0, len(micro), cut)]


def test_a_step_has_the_same_samples_however_it_is_cut(tiny: Tiny) -> None:
    whole = samples(tiny(max_steps=4), 1)
    assert whole == [list(range(s * 16, s * 16 + 16)) for s in range(4)]
    assert samples(tiny(max_steps=4, train={"accumulation": 2}), 2) == whole
    assert samples(tiny(max_steps=4), 4, first_step=1) == whole[1:]


def test_an_epoch_shows_every_image_once(tiny: Tiny) -> None:
    config = tiny(max_steps=3, train={"batch_size": 499})
    data = open_data(config.data, size=8, channels=1)
    seen = torch.cat([b.x for b in Batches(config, data, first_step=0, rank=0, num_processes=1)])
    rows = {row.numpy().tobytes() for row in seen}
    assert len(rows) == len({row.numpy().tobytes() for row in data.tensors(range(1497))})
    assert not torch.equal(seen, data.tensors(range(1497)))


def test_workers_change_nothing(tiny: Tiny) -> None:
    plain, workers = tiny(max_steps=3), tiny(max_steps=3, data={"num_workers": 2, "flip": True})
    flipped = tiny(max_steps=3, data={"flip": True})
    data = open_data(plain.data, size=8, channels=1)
    first, second, third = (
        torch.cat([b.x for b in Batches(c, data, first_step=0, rank=0, num_processes=1)])
        for c in (workers, flipped, plain)
    )
    assert torch.equal(first, second)
    same = (first == third).flatten(1).all(1)
    assert 0.2 < same.float().mean() < 0.8
    assert torch.equal(first[~same], third[~same].flip(3))


def test_labels_out_of_range_are_refused(tmp_path: Path) -> None:
    for name, array in (("images-idx3", np.zeros((2, 28, 28))), ("labels-idx1", np.array([3, 46]))):
        (tmp_path / f"train-{name}-ubyte").write_bytes(idx(array))
    with pytest.raises(ValueError, match=r"label 46 is out of range.*0\.\.9"):
        open_data(DataConfig(name="fashion", path=tmp_path), size=28, channels=1)


def test_crop_refuses_16_bits_and_puts_transparency_on_white(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 1000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png has more than 8 bits"):
        open_data(folder(tmp_path, fit="crop"), size=8, channels=1)
    (tmp_path / "deep.png").unlink()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_data(folder(tmp_path, fit="crop"), size=8, channels=1).images([0]).min() == 255


def test_latent_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    config = DataConfig(name="latents", path=tmp_path)
    save_file({"latents": torch.zeros(2, 4, 8, 8), "labels": torch.tensor([0, 10**9])}, tmp_path / "0.safetensors")
    with pytest.raises(ValueError, match="labels 0..1000000000"):
        open_data(config, size=8, channels=4)
    save_file({"latents": torch.zeros(2, 4, 4, 4), "labels": torch.tensor([0, 1])}, tmp_path / "1.safetensors")
    with pytest.raises(ValueError, match="different shapes"):
        open_data(config, size=8, channels=4)


def test_the_reference_of_a_folder_holds_every_class(tmp_path: Path) -> None:
    for i in range(30):
        png(tmp_path / str(i % 3) / f"{i}.png", value=i % 3)
    config = folder(tmp_path)
    pixels = reference(open_data(config, size=8, channels=1), 0)
    assert not isinstance(pixels, str)
    assert sorted(np.unique(pixels)) == [0, 1, 2]
    assert reference(open_data(DataConfig(), size=8, channels=1), 0) == "digits:train"


@pytest.mark.parametrize(
    "options",
    [
        {"path": "x"},
        {"name": "latents", "fit": "crop"},
        {"download": True},
        {"name": "fashion", "download": True, "path": "x"},
        {"vae": "x"},
        {"name": "latents", "max_bad": 1},
    ],
)
def test_options_that_cannot_apply_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="apply|works with"):
        DataConfig(**options)  # type: ignore[arg-type]
