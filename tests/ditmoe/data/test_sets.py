"""What every kind of image set says of itself, and that nobody else needs to know which kind it is."""

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ditmoe.config.sections import Config, DataConfig
from ditmoe.data import open as opening
from ditmoe.data.folders import FolderImages
from ditmoe.data.latents import Latents, LatentShards
from ditmoe.data.open import open_data, open_held_out, pixel_variance, reference
from ditmoe.data.pixels import from_pixels, to_pixels
from ditmoe.data.sets import ArrayImages, BadImage, ImageSet
from ditmoe.data.tars import TarImages
from ditmoe.pipeline import load
from ditmoe.training.loop import train
from tests.ditmoe.data.test_latents import write_tar

Tiny = Callable[..., Config]
Z = (np.arange(3 * 2 * 8 * 8, dtype=np.float32) % 7).reshape(3, 2, 8, 8)


def pgm(i: int) -> bytes:
    """An image file that is the same with every version of Pillow."""
    return b"P5 8 8 255\n" + ((np.arange(64) * 37 + i * 11) % 256).astype(np.uint8).tobytes()


def safetensors(path: Path, **arrays: np.ndarray) -> Path:
    """A file that is the same with every version of safetensors."""
    header, end = {}, 0
    for name, a in arrays.items():
        dtype = {"float32": "F32", "int64": "I64"}[str(a.dtype)]
        header[name] = {"dtype": dtype, "shape": a.shape, "data_offsets": [end, end := end + a.nbytes]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(a.tobytes() for a in arrays.values()))
    return path


def opened(kind: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> ImageSet:
    if kind == "digits":
        return open_data(DataConfig(), size=8, channels=1)
    if kind in ("memory", "files"):
        for i in range(6):
            (root / ("cat", "ant")[i % 2]).mkdir(exist_ok=True)
            (root / ("cat", "ant")[i % 2] / f"{i}.pgm").write_bytes(pgm(i))
        (root / "ant" / "9.pgm").write_bytes(b"")
        if kind == "files":
            monkeypatch.setattr(opening, "_IN_MEMORY_BYTES", 0)
        return open_data(DataConfig(name="folder", path=root, max_bad=1), size=8, channels=1)
    if kind == "simple":
        safetensors(root / "0.safetensors", latents=Z, labels=np.array([1, 0, 2]))
    else:
        mirrored = Z[..., ::-1].copy() + 1
        file = safetensors(root / "00000.safetensors", latents=Z, latents_flipped=mirrored, labels=np.array([1, 0, 1]))
        raw = file.read_bytes()
        shard = {"file": file.name, "count": 3, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        known = {"vae": {"name": "tiny", "sha256": "0" * 64}, "mean": [2.0, 3.0], "std": [0.5, 2.0]}
        index = {"format": 1, "flip": True, "classes": ["a", "b"], "shape": [2, 8, 8], "count": 3, "shards": [shard]}
        (root / "latents.json").write_text(json.dumps({**index, **known}))
    return open_data(DataConfig(name="latents", path=root), size=8, channels=2)


KINDS = {"digits": ArrayImages, "memory": ArrayImages, "files": FolderImages, "simple": Latents, "shards": LatentShards}


@pytest.mark.parametrize(
    ("kind", "fingerprint", "variance"),
    [
        ("digits", "f071e997b859be4a", 0.5695174732894204),
        ("memory", "81e9e1d0756ac5d0", 0.3446130943100127),
        ("files", "3f7444f32ace2b25", 0.3446130943100127),
        ("simple", "54b4cac40b206819", 4.01765501968504),
        ("shards", "00e4d2ba84e75c54", 9.528912401574805),
    ],
)
def test_sets_are_known_as_the_first_version_knew_them(
    kind: str, fingerprint: str, variance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints hold the fingerprint, and saved schedulers the variance; commit 3fedd28 gave these."""
    data = opened(kind, tmp_path, monkeypatch)
    assert type(data) is KINDS[kind]
    assert data.fingerprint() == fingerprint
    assert pixel_variance(data, 3) == pytest.approx(variance, rel=1e-12)


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_the_images_that_samples_are_scored_against_are_those_of_the_first_version(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = reference(opened(kind, tmp_path, monkeypatch), 3)
    assert not isinstance(drawn, str)
    assert hashlib.sha256(drawn.tobytes()).hexdigest()[:16] == "b98354d1d63a3ac0"


def test_what_sets_say_of_their_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {}
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        data[kind] = opened(kind, tmp_path / kind, monkeypatch)
    rows = [6, 2, 3, 0]  # ant/1, ant/3, ant/5, ant/9 which is bad, cat/0, ...
    assert data["memory"].readable(rows) == data["files"].readable(rows) == [6, 2, 0]
    assert [data[kind].readable([2, 0]) for kind in ("simple", "shards")] == [[2, 0]] * 2
    assert data["files"].name(3) == str(tmp_path / "files/ant/9.pgm")
    assert data["memory"].name(3) == "image 3"
    assert [data[kind].in_memory for kind in KINDS] == [True, True, False, True, False]
    assert [data[kind].is_latent for kind in KINDS] == [False, False, False, True, True]
    assert [kind for kind in KINDS if data[kind].normalization] == ["shards"]
    assert data["shards"].normalization["mean"] == [2.0, 3.0]  # type: ignore[index]
    for kind in ("simple", "shards"):
        with pytest.raises(ValueError, match="latents are not pixels"):
            data[kind].images([0])
    x = data["shards"].tensors([1, 1], [False, True])
    plain, mirrored = x * torch.tensor([0.5, 2.0]).view(2, 1, 1) + torch.tensor([2.0, 3.0]).view(2, 1, 1)
    assert torch.equal(plain, torch.from_numpy(Z[1]))
    assert torch.equal(mirrored, plain.flip(2) + 1)


def test_images_in_tar_files_are_a_set_as_well(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.pgm", pgm(1)), ("a.cls", b"1"), ("b.pgm", b""), ("b.cls", b"0")])
    data = TarImages(tmp_path, 8, 1)
    assert data.readable([1, 0]) == [0]
    assert data.name(1) == f"{tmp_path}/0.tar/b"
    assert torch.equal(data.tensors([0], [True]), from_pixels(data.images([0])).flip(3))
    known = data.fingerprint()
    write_tar(tmp_path / "0.tar", [("a.pgm", pgm(1)), ("a.cls", b"1"), ("c.pgm", b""), ("c.cls", b"0")])
    assert TarImages(tmp_path, 8, 1).fingerprint() != known


def test_held_out_images_are_there_where_a_set_has_a_test_split(tmp_path: Path) -> None:
    test = open_held_out(DataConfig(), size=8, channels=1)
    assert test is not None
    assert (len(test), test.eval_name) == (300, "digits:test")
    for name in ("folder", "latents"):
        assert open_held_out(DataConfig(name=name, path=tmp_path), size=8, channels=1) is None  # type: ignore[arg-type]


def test_pixels_come_back_as_they_were() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(4, 4, 8, 2)
    x = from_pixels(pixels)
    assert (x.dtype, x.shape, float(x.min()), float(x.max())) == (torch.float32, (4, 2, 4, 8), -1, 1)
    assert np.array_equal(to_pixels(x), pixels)
    mirrored = from_pixels(pixels, [True, False, False, True])
    assert np.array_equal(to_pixels(mirrored)[[0, 3]], pixels[[0, 3], :, ::-1])
    assert torch.equal(mirrored[1:3], x[1:3])


class Both(ImageSet):
    """The images of two sets, one after the other: a kind that nothing outside this file knows."""

    def __init__(self, *parts: ImageSet) -> None:
        self.parts, self.starts = parts, np.cumsum([0, *(len(part) for part in parts)])
        self.labels = np.concatenate([part.labels for part in parts])
        self.id2label = parts[0].id2label
        self.source = " and ".join(part.source for part in parts)

    def images(self, rows: Sequence[int]) -> np.ndarray:
        return np.concatenate([self._image(row) for row in rows])

    def contents(self) -> bytes:
        return "".join(part.fingerprint() for part in self.parts).encode()

    def _image(self, row: int) -> np.ndarray:
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        try:
            return self.parts[part].images([row - self.starts[part]])
        except BadImage as error:
            raise BadImage(row, f"{self.parts[part].source}: {error}") from error


def test_a_kind_of_set_that_nobody_knows_is_trained_on(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps with flips over two sets, some images of which are bad, are those over the same images in one set."""
    one = open_data(DataConfig(), size=8, channels=1)
    assert isinstance(one, ArrayImages)
    one.bad = dict.fromkeys(range(0, len(one), 20), "bad")
    cuts = [slice(0, 700), slice(700, None)]
    parts = [ArrayImages(one.pixels[cut], one.labels[cut], one.id2label, "half of the digits") for cut in cuts]
    for row in one.bad:
        parts[row >= 700].bad[row - 700 * (row >= 700)] = "bad"
    both = Both(*parts)
    assert both.fingerprint() != one.fingerprint()
    flip = {"name": "folder", "path": Path("unread"), "flip": True, "max_bad": 30}
    pipes, said = [], []
    for data in (one, both):
        config = tiny(max_steps=2, data=flip)
        config = replace(config, out=config.out / type(data).__name__)
        assert train(config, data)
        assert not train(config, data)  # the same run again: its data are known by their fingerprint
        pipes.append(load(config.out))
        said.append(capsys.readouterr().err)
    weights = [pipe.transformer.state_dict() for pipe in pipes]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert pipes[0].scheduler.config == pipes[1].scheduler.config
    assert "skipped: bad" in said[0]
    assert "skipped: half of the digits: bad" in said[1]


@pytest.mark.parametrize(
    ("labels", "names", "sentence"),
    [
        (np.array([0, 7]), {3: "a", 7: "b"}, "the classes .3, 7.; give int64 .n,. and classes numbered from 0"),
        (np.array([0, 1], np.uint8), {0: "a", 1: "b"}, "labels are uint8 .2,."),
        (np.array([0, 2]), {0: "a", 1: "b"}, r"label 2 is out of range, the set has classes 0\.\.1"),
    ],
)
def test_a_set_with_labels_that_cannot_be_is_refused_before_training(labels, names, sentence, tiny):
    data = ArrayImages(np.zeros((2, 8, 8, 1), np.uint8), labels, names, "mine")
    with pytest.raises(ValueError, match=sentence):
        train(tiny(), data)


def test_pixels_are_uint8_and_may_lie_backwards():
    pixels = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    assert torch.equal(from_pixels(pixels[:, :, ::-1]), from_pixels(pixels).flip(3))
    with pytest.raises(ValueError, match=r"images are float32 .1, 8, 8, 1.; a set gives uint8"):
        from_pixels(pixels.astype(np.float32) / 255)


def test_without_a_readable_image_the_variance_is_zero():
    data = ArrayImages(np.zeros((1, 8, 8, 1), np.uint8), np.zeros(1, np.int64), {}, "mine", bad={0: "broken"})
    assert pixel_variance(data, 0) == 0
