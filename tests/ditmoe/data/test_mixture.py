"""Mixtures: which set every sample is of, classes side by side, sizes, and what cannot be mixed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ditmoe import cli
from ditmoe.analysis.plan import describe
from ditmoe.config.file import read_file, save
from ditmoe.config.sections import Config, DataConfig
from ditmoe.data import open as opening
from ditmoe.data.mixture import Mixture, turn
from ditmoe.data.open import open_data, open_held_out, pixel_variance, reference
from ditmoe.data.order import Batches
from ditmoe.data.sets import ArrayImages, BadImage
from tests.ditmoe.data.test_tables import PIXELS, ROWS, metadata, parquet, table

Tiny = Callable[..., Config]


def arrays(count: int, classes: tuple[str, ...] = (), value: int = 0, test: str | None = None) -> ArrayImages:
    """Images of which each has a value of its own, from `value` on."""
    pixels = np.broadcast_to(np.arange(value, value + count, dtype=np.uint8)[:, None, None, None], (count, 8, 8, 1))
    labels = np.arange(count, dtype=np.int64) % max(1, len(classes))
    return ArrayImages(pixels.copy(), labels, dict(enumerate(classes)), "mine", test)


def mixture(*weights: int, counts: tuple[int, ...] = (7, 50, 20)) -> Mixture:
    starts = [0, 100, 200]
    sets = [arrays(n, value=start) for n, start, _ in zip(counts, starts, weights, strict=False)]
    return Mixture(sets, ["a", "b", "c"][: len(sets)], weights)


def photos(root: Path, names: tuple[str, ...] = ("cat", "7"), size: int = 8, count: int = 12) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (size, size), 10 * i).save(root / name / f"{i}.png")
    return root


def read(config: Config, data: Mixture, **options: int) -> list[tuple[int, int, int]]:
    """(running number, domain, value of the pixels) of each sample."""
    known = {"first_step": 0, "rank": 0, "num_processes": 1, **options}
    found = []
    for batch in Batches(config, data, **known):
        assert (batch.domain.dtype, batch.domain.shape) == (torch.int64, (len(batch.indices),))
        values = ((batch.x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        found += list(zip(batch.indices, batch.domain.tolist(), values, strict=True))
    return found


def run_of(tiny: Tiny, sets: int, **data: object) -> Config:
    """The order takes the sets from the data, and `alternate` from the configuration."""
    return tiny(max_steps=9, data={"mixture": ("digits", "a", "b")[:sets], **data})


@pytest.mark.parametrize("weights", [(1, 1), (1, 3), (3, 1), (2, 5, 3), (1, 1, 1), (1, 1000)])
def test_every_stretch_of_samples_has_the_weights(weights: tuple[int, ...]) -> None:
    shares = [w / sum(weights) for w in weights]
    counts, worst = [0] * len(weights), 0.0
    for number in range(4000):
        domain, before = turn(number, weights)
        assert before == counts[domain]
        counts[domain] += 1
        worst = max(worst, *(abs(n - (number + 1) * p) for n, p in zip(counts, shares, strict=True)))
    assert worst < len(weights)
    if len({*weights}) == 1:
        assert [turn(n, weights)[0] for n in range(9)] == [n % len(weights) for n in range(9)]
    far, total = turn(10**20 + 1, weights), sum(weights)
    assert abs(far[1] * total - 10**20 * weights[far[0]]) <= total * len(weights)


def test_each_set_has_epochs_of_its_own(tiny: Tiny) -> None:
    data = mixture(1, 3)
    seen = read(run_of(tiny, 2), data)
    assert [index for index, _, _ in seen] == list(range(9 * 16))
    for domain, start, count in ((0, 0, 7), (1, 100, 50)):
        own = [value for _, d, value in seen if d == domain]
        assert len(own) == 9 * 16 * (1, 3)[domain] // 4
        for first in range(0, len(own) - count + 1, count):
            assert sorted(own[first : first + count]) == list(range(start, start + count))
    first, second = (tuple(v for _, d, v in seen if d == 0)[k : k + 7] for k in (0, 7))
    assert first != second


def test_the_order_needs_the_step_alone_and_is_the_same_on_two_processes(tiny: Tiny) -> None:
    for alternate in (False, True):
        config, data = run_of(tiny, 3, alternate=alternate), mixture(1, 1, 1)
        whole = read(config, data)
        assert read(config, data, first_step=4) == whole[4 * 16 :]  # in the middle of all epochs
        halves = [read(config, data, first_step=4, rank=rank, num_processes=2) for rank in (0, 1)]
        assert sorted(halves[0] + halves[1]) == whole[4 * 16 :]
        workers = run_of(tiny, 3, alternate=alternate, num_workers=1)
        assert read(workers, data, first_step=6) == whole[6 * 16 :]
        assert read(replace(config, seed=1), data) != whole


def test_steps_alternate_whatever_they_are_cut_into(tiny: Tiny) -> None:
    config, data = run_of(tiny, 3, alternate=True), mixture(1, 1, 1)
    seen = read(replace(config, train=replace(config.train, accumulation=2)), data)
    assert seen == read(config, data)
    assert [domain for _, domain, _ in seen] == [step % 3 for step in range(9) for _ in range(16)]
    own = [value for _, domain, value in seen if domain == 0]
    assert all(sorted(own[k : k + 7]) == list(range(7)) for k in range(0, 42, 7))


def test_one_set_is_read_in_the_order_that_it_always_was(tiny: Tiny) -> None:
    """The data order of the first version: a permutation of (seed, 4, epoch)."""
    from ditmoe.rng import sample_rng

    config = tiny(max_steps=2)
    data = arrays(20, value=0)
    expected = [int(v) for epoch in (0, 1) for v in sample_rng(config.seed, 4, epoch).permutation(20)][:32]
    batches = list(Batches(config, data, first_step=0, rank=0, num_processes=1))
    assert [round(float(v + 1) * 127.5) for b in batches for v in b.x[:, 0, 0, 0]] == expected
    assert not any(b.domain.any() for b in batches)


def test_bad_images_are_replaced_by_others_of_their_set(tiny: Tiny) -> None:
    data = mixture(1, 1)
    data.sets[1].bad = {3: "torn", 8: "empty"}  # type: ignore[attr-defined]
    whole, seen = read(run_of(tiny, 2), mixture(1, 1)), read(run_of(tiny, 2), data)
    differ = [(a, b) for a, b in zip(whole, seen, strict=True) if a != b]
    assert {a[2] for a, _ in differ} == {103, 108}
    assert all(a[:2] == b[:2] and b[2] >= 100 for a, b in differ)
    with pytest.raises(BadImage, match="torn") as bad:
        data.images([0, 10])
    assert bad.value.row == 10
    assert data.readable([15, 2, 10, 9]) == [2, 9]
    data.sets[0].bad = dict.fromkeys(range(7), "bad")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="none of the images can be used: a mixture of 2 sets"):
        read(run_of(tiny, 2), data)


def test_classes_stand_side_by_side() -> None:
    sets = [arrays(4, ("cat", "dog")), arrays(3, ("dog", "emu", "fox")), arrays(2)]
    data = Mixture(sets, ["a", "b", "c"], [1, 1, 1])
    data.check_labels()
    assert data.id2label == dict(enumerate(["cat", "a/dog", "b/dog", "emu", "fox", "c"]))
    assert data.labels.tolist() == [0, 1, 0, 1, 2, 3, 4, 5, 5]
    assert np.array_equal(data.images([8, 0, 5, 1])[:, 0, 0, 0], [1, 0, 1, 1])
    assert data.name(5) == "image 1"
    assert Mixture(sets[2:] * 2, ["c", "c"], [1, 1]).id2label == {}
    alike = Mixture(sets[:1] * 2, ["a", "a"], [1, 1])
    assert list(alike.id2label.values()) == ["a 0/cat", "a 0/dog", "a 1/cat", "a 1/dog"]


def test_the_fingerprint_covers_sets_their_order_and_weights() -> None:
    known = mixture(1, 1).fingerprint()
    assert mixture(2, 2).fingerprint() == known
    others = [mixture(1, 2), mixture(1, 1, 1), mixture(1, 1, counts=(7, 49))]
    a, b = mixture(1, 1).sets
    others.append(Mixture([b, a], ["b", "a"], [1, 1]))
    assert len({known, *(other.fingerprint() for other in others)}) == 5


def test_what_stands_for_the_training_images_has_their_weights() -> None:
    data = mixture(1, 3)
    rows = data.in_proportion(range(len(data)), 1000)
    assert rows == [*range(7), *range(7, 28)]  # all of the first set
    assert data.in_proportion(range(len(data)), 8) == [0, 1, *range(7, 13)]
    assert mixture(3, 2, counts=(1, 100)).in_proportion(range(101), 8) == [0, 1]  # not none of any
    drawn = reference(data, 0)
    assert not isinstance(drawn, str)
    assert sorted(np.unique(drawn))[:7] == list(range(7))
    assert len(drawn) == 28
    assert pixel_variance(data, 0) == 0  # of images that are the same everywhere


def test_sets_are_opened_resized_and_held_out(tmp_path: Path) -> None:
    words = ("digits=3", f"{photos(tmp_path / 'a', size=20)}", str(photos(tmp_path / "b", ("cow",), size=5)))
    config = DataConfig(mixture=words, fit="crop")
    data = open_data(config, size=16, channels=1)
    assert data.weights == (3, 1, 1)
    assert data.sizes == (1497, 24, 12)
    assert "resized from 8x8 to 16x16" in data.source
    assert data.images([0, 1500, 1530]).shape == (3, 16, 16, 1)
    assert data.tensors([0], [True]).equal(data.tensors([0]).flip(3))
    assert list(data.id2label.values())[6:] == ["6", "digits/7", "8", "9", "a/7", "cat", "cow"]
    assert open_held_out(config, size=16, channels=1) is None
    assert open_data(config, size=16, channels=3).images([0]).shape == (1, 16, 16, 3)
    small = open_data(DataConfig(fit="crop"), size=8, channels=1)
    assert (small.eval_name, small.fingerprint()) == ("digits:train", "f071e997b859be4a")  # nothing to resize
    assert open_data(DataConfig(fit="crop"), size=16, channels=1).eval_name is None


def test_digits_and_fashion_are_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fashion = replace(arrays(40, tuple("abcdefghij")), pixels=np.zeros((40, 28, 28, 1), np.uint8))
    monkeypatch.setattr(opening, "open_fashion", lambda config, split: fashion)
    config = DataConfig(mixture=("digits", "fashion"), fit="crop")
    data, test = open_data(config, size=28, channels=1), open_held_out(config, size=28, channels=1)
    assert isinstance(test, Mixture)
    assert (len(data.id2label), len(test), data.eval_name) == (20, 340, None)
    assert test.id2label == data.id2label
    rows = test.in_proportion(range(len(test)), 20)
    assert [row < 300 for row in rows] == [True] * 10 + [False] * 10
    with pytest.raises(ValueError, match=r"digits has images of .C, H, W. = .1, 8, 8.*or add --data.fit crop"):
        open_data(replace(config, fit="exact"), size=28, channels=1)


def test_bad_files_of_all_sets_are_counted_together(tmp_path: Path) -> None:
    for name in "ab":
        photos(tmp_path / name)
        (tmp_path / name / "cat" / "x.png").write_bytes(b"")
    config = DataConfig(mixture=(f"{tmp_path / 'a'}", f"{tmp_path / 'b'}"), max_bad=2)
    assert len(open_data(config, size=8, channels=1)) == 50
    with pytest.raises(ValueError, match="2 images cannot be used, data.max_bad is 1"):
        open_data(replace(config, max_bad=1), size=8, channels=1)


def test_tables_and_folders_with_metadata_are_mixed(tmp_path: Path) -> None:
    drawn, root = parquet(tmp_path / "drawn"), metadata(tmp_path, *ROWS)
    table(3, kind=["ant", "elk", "ant"]).to_parquet(tmp_path / "more.parquet")
    words = (f"hf:{drawn}=3", f"hf:{tmp_path}/more.parquet", str(root / "a"))
    data = open_data(DataConfig(mixture=words), size=8, channels=1)
    assert (data.sizes, data.weights) == ((12, 3, 4), (3, 1, 1))
    assert [*data.id2label.values()] == ["ant", "bee", "cat", "more.parquet", "a"]
    assert np.array_equal(data.images([5, 13, 18])[..., 0], PIXELS[[5, 1, 3]])
    (root / "metadata.jsonl").rename(root / "a" / "metadata.jsonl")
    lines = (root / "a" / "metadata.jsonl").read_text("utf-8-sig").replace("a/", "")
    (root / "a" / "metadata.jsonl").write_text(lines)
    data = open_data(DataConfig(mixture=(words[1], words[2], "digits"), label_column="kind"), size=8, channels=1)
    assert [*data.id2label.values()][:5] == ["more.parquet/ant", "elk", "a/ant", "cat", "dog"]
    assert data.labels[:7].tolist() == [0, 1, 0, 4, 3, 4, 2]


def test_held_out_images_of_tables_are_mixed(tmp_path: Path) -> None:
    word = f"hf:{parquet(tmp_path / 'drawn')}"
    found = open_held_out(DataConfig(mixture=("digits", word)), size=8, channels=1)
    assert found is not None
    assert found.sizes == (300, 3)
    assert np.array_equal(found.images([301])[0, ..., 0], PIXELS[1])
    table(2).to_parquet(tmp_path / "more.parquet")
    none = open_held_out(DataConfig(mixture=("digits", f"hf:{tmp_path}/more.parquet")), size=8, channels=1)
    assert none is None


def test_what_is_no_set_of_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.mixture has fashoin, which is neither digits nor fashion nor a folder"):
        open_data(DataConfig(mixture=("digits", "fashoin")), size=8, channels=1)
    drawn = parquet(tmp_path / "drawn")
    for place in (drawn, drawn / "train-00000-of-00001.parquet"):
        with pytest.raises(ValueError, match=f"it is a table: give --data.name hf, or in a mixture hf:{place}$"):
            open_data(DataConfig(mixture=("digits", str(place))), size=8, channels=1)
    with pytest.raises(ValueError, match="label_column is kind, and no set of the mixture has metadata.jsonl"):
        open_data(DataConfig(mixture=("digits", str(photos(tmp_path / "p"))), label_column="kind"), size=8, channels=1)
    (tmp_path / "0.safetensors").touch()
    with pytest.raises(ValueError, match="data.mixture takes images, and .* holds latents"):
        open_data(DataConfig(mixture=("digits", str(tmp_path))), size=8, channels=1)


def test_a_folder_called_like_a_data_set_is_another_set() -> None:
    parts = DataConfig(mixture=("digits", "./digits", "hf:digits", "hf:fashion")).sets()
    assert [(part.name, part.path) for part, _ in parts] == [
        ("digits", None), ("folder", Path("digits")), ("hf", Path("digits")), ("hf", Path("fashion")),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mixture": ("digits",)}, "mixture has one set, digits; add another, or give --data.name"),
        ({"mixture": ("a", "digits", "a/=2")}, "mixture has a twice, once as a/; give it a weight, as in a=2"),
        (
            {"mixture": ("hf:sp", "digits", "hf:./sp=2")},
            "mixture has hf:sp twice, once as hf:./sp; give it a weight, as",
        ),
        ({"mixture": ("a/b", "a/c/../b")}, "mixture has a/b twice, once as a/c/../b; give it a weight, as in a/b=2"),
        ({"mixture": ("a", str(Path("a").absolute()))}, "mixture has a twice, once as /"),
        ({"mixture": ("digits=0", "a")}, "mixture has 'digits=0'; give SET or SET=WEIGHT with a weight above 0"),
        ({"mixture": ("digits=inf", "a")}, "mixture has 'digits=inf'; give SET or SET=WEIGHT"),
        ({"mixture": ("digits", "a=b")}, "mixture has 'a=b'; give SET or SET=WEIGHT"),
        ({"mixture": ("digits", "=2")}, "mixture has '=2'; give SET or SET=WEIGHT"),
        ({"mixture": ("digits", "a"), "name": "folder", "path": Path("b")}, "path does not apply to a mixture"),
        ({"mixture": ("digits", "a"), "vae": Path("b")}, "vae works with latents"),
        ({"mixture": ("digits", "a"), "download": True}, "download works with the data set fashion, not digits and fo"),
        ({"mixture": ("digits", "fashion"), "max_bad": 1}, "max_bad works with folder and hf, not digits"),
        (
            {"mixture": ("digits", "hf:a"), "stream": True},
            "stream works with the data set hf, not digits and hf in a m",
        ),
        ({"mixture": ("hf:a", "hf:b"), "stream": True}, "stream works with the data set hf, not hf in a mixture"),
        ({"mixture": ("digits", "a"), "split": "dev"}, "split works with the data set hf, not digits and folder"),
        ({"mixture": ("digits", "hf:=2")}, "mixture has 'hf:=2'; give SET or SET=WEIGHT"),
        ({"alternate": True}, "alternate needs several sets; give them as --data.mixture SET SET"),
        ({"mixture": ("digits=2", "a"), "alternate": True}, "alternate takes the sets in turn, so it does not go with"),
        ({"mixture": ("digits", "digits@4")}, "a step takes those of one; add --data.alternate"),
        ({"mixture": ("digits@4", "digits@4"), "alternate": True}, "mixture has digits@4 twice"),
        ({"mixture": ("digits", "digits@0"), "alternate": True}, "mixture has digits@0, of size 0"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        DataConfig(**options)  # type: ignore[arg-type]
    assert sentence in str(refused.value)


def test_a_mixture_is_typed_saved_read_and_planned(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--data.mixture", "digits", "fashion=3", "--data.fit", "crop", "--out", str(tmp_path)]
    config = cli.parse_train(["fashion", *words])
    assert config.data.mixture == ("digits", "fashion=3")
    save(config, tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["data"]["mixture"] == ["digits", "fashion=3"]
    assert read_file(tmp_path / "config.json") == cli.parse_train([str(tmp_path)]) == config
    assert cli.parse_train([str(tmp_path), "--data.mixture"]).data.mixture == ()
    assert "without the label table" not in describe(config)
    assert "without the label table" in describe(replace(config, data=DataConfig(mixture=("digits", "a"))))
    (tmp_path / "config.json").write_text('{"data": {"mixture": ["digits", "digits"]}}')
    with pytest.raises(SystemExit) as stopped:
        cli.parse_train([str(tmp_path)])
    assert stopped.value.code == 2
    assert "mixture has digits twice" in " ".join(capfd.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"data": {"mixture": ("digits", "digits@5"), "alternate": True}},
            "has size 5, no multiple of model.patch_size",
        ),
        ({"moe": {"router_input": "position"}}, "router_input position knows the places of one size"),
    ],
)
def test_sizes_that_a_model_cannot_have_are_refused(tiny: Tiny, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tiny(**{"data": {"mixture": ("digits", "digits@4"), "alternate": True}, **changes})


def test_a_step_sees_a_set_in_its_own_size_and_all_else_in_the_models(tiny: Tiny) -> None:
    config = tiny(max_steps=4, data={"mixture": ("digits", "digits@4"), "alternate": True})
    data = open_data(config.data, size=8, channels=1)
    sizes = [batch.x.shape[2:] for batch in Batches(config, data, first_step=0, rank=0, num_processes=1)]
    assert sizes == [(8, 8), (4, 4)] * 2
    small = len(data) // 2
    assert data.images([0, small]).shape == (2, 8, 8, 1)
    shrunk = data.taught([small])[0, 0]
    halves = data.tensors([0])[0, 0].unfold(0, 2, 2).unfold(1, 2, 2).mean(dim=(2, 3))
    torch.testing.assert_close(shrunk, halves, atol=0.02, rtol=0)
    assert data.id2label[10] == "digits@4/0"


def test_weights_are_told_from_names() -> None:
    assert DataConfig(mixture=("a@b", "digits")).sets()[0][0].path == Path("a@b")  # no size
    assert [weight for _, weight in DataConfig(mixture=("a=b=0.1", "digits=0.3")).sets()] == [1, 3]
    assert DataConfig(mixture=("a=b=0.1", "digits")).sets()[0][0].path == Path("a=b")
    assert all(part.mixture == () for part, _ in DataConfig(mixture=("digits", "a")).sets())
