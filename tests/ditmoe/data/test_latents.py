"""Images to latents, training from them, and back to pictures; with a tiny VAE of random weights."""

import ctypes
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from ditmoe import cli, pipeline
from ditmoe.config.encode import LatentArgs
from ditmoe.config.presets import PRESETS
from ditmoe.config.sample import SampleArgs
from ditmoe.config.sections import Config, DataConfig
from ditmoe.convert.export import ExportArgs, export
from ditmoe.data import encode as encoder
from ditmoe.data.latents import channel_statistics, read_index, read_normalization
from ditmoe.data.open import open_data
from ditmoe.data.order import Batches
from ditmoe.data.tars import TarImages
from ditmoe.data.vae import open_vae, weights_sha256
from ditmoe.generate import request as image_sets
from ditmoe.launch import progress
from ditmoe.launch.start import joined
from ditmoe.training.loop import train
from tests.doors import typed
from tests.processes import door, start

Tiny = Callable[..., Config]
NUM, SIZE = 22, 16
MODEL = {"in_channels": 4, "patch_size": 4, "sample_size": 8}


def save_vae(folder: Path, seed: int, latent_channels: int = 4) -> Path:
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), latent_channels=latent_channels, norm_num_groups=4, scaling_factor=0.3,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.save_pretrained(folder)
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As many as a forked process has: the last bits of a convolution depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae") / "tiny-vae", 0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images, neither square nor of one size."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(NUM):
        path = root / ("cat", "dog")[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return root


def flags(photos: Path, vae: Path, out: Path, *more: object) -> list[str]:
    small = ["--size", SIZE, "--shard-size", 5, "--batch-size", 2, "--dtype", "float32", "--num-workers", 1]
    return [str(v) for v in [photos, "--vae", vae, "--out", out, *small, *more]]


def encode(photos: Path, vae: Path, out: Path, *more: object) -> Path:
    encoder.encode(cli.parse(LatentArgs, flags(photos, vae, out, *more)), joined())
    return out


@pytest.fixture(scope="module")
def latents(photos: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(photos, vae, tmp_path_factory.mktemp("latents") / "set")


@pytest.fixture
def copy(latents: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(latents, tmp_path / "copy"))


def content(folder: Path) -> dict[str, bytes]:
    """Of all files but the lock, in which stands who held it last."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != ".lock"}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    shards = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def opened(folder: Path, **options: Any) -> Any:
    return open_data(DataConfig(name="latents", path=folder, **options), size=8, channels=4)


def test_shards_hold_the_posterior_mean_of_images_and_of_their_mirror_images(
    latents: Path, photos: Path, vae: Path
) -> None:
    index, found = read_index(latents), stored(latents)
    assert index is not None
    assert [shard["count"] for shard in index["shards"]] == [5, 5, 5, 5, 2]
    images = open_data(DataConfig(name="folder", path=photos, fit="crop"), size=SIZE, channels=3)
    x, net = images.tensors(range(NUM)), open_vae(vae)
    for name, pixels in (("latents", x), ("latents_flipped", x.flip(3))):
        with torch.inference_mode():
            torch.testing.assert_close(found[name], net.encode(pixels).latent_dist.mode(), rtol=1e-4, atol=1e-5)
    assert (found["latents"].flip(3) - found["latents_flipped"]).abs().mean() > 0.01  # it does not commute
    assert found["labels"].tolist() == images.labels.tolist() == [0] * 11 + [1] * 11
    assert index["classes"] == ["cat", "dog"]
    assert index["vae"]["scaling_factor"] == 0.3
    assert index["vae"]["name"] == "tiny-vae"


def test_statistics_are_those_of_all_stored_latents(latents: Path) -> None:
    index, found = read_index(latents), stored(latents)
    assert index is not None
    values = torch.cat([found["latents"], found["latents_flipped"]]).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.tensor(index["mean"], dtype=torch.float64), values.mean(1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.tensor(index["std"]).double(), values.std(1, correction=0), rtol=1e-6, atol=0)
    assert min(index["posterior_std"]) > 0
    data = opened(latents)
    both = torch.cat([data.tensors(range(NUM), [m] * NUM) for m in (False, True)]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(both.mean(1), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(both.std(1, correction=0), torch.ones(4), rtol=1e-4, atol=0)


def test_the_pipeline_decodes_what_training_reads(latents: Path, vae: Path, tiny: Tiny) -> None:
    config = tiny(data={"name": "latents", "path": latents, "vae": vae}, model=MODEL)
    pipe = pipeline.assemble(pipeline_net(config), config, {0: "cat", 1: "dog"})
    rows = [21, 0, 7, 5]
    with torch.inference_mode():
        want = open_vae(vae).decode(stored(latents)["latents"][rows]).sample
    torch.testing.assert_close(pipe.decode(opened(latents).tensors(rows)), want, rtol=1e-4, atol=1e-5)


def pipeline_net(config: Config) -> Any:
    from ditmoe.model import build

    torch.manual_seed(0)
    return build(config, 2)


def test_two_processes_write_the_bytes_of_one(latents: Path, photos: Path, vae: Path, tmp_path: Path) -> None:
    done = typed("ditmoe", "encode", *flags(photos, vae, tmp_path / "two"), world=2)
    assert done.returncode == 0, done.stderr
    assert "5 of 5 shards to encode on 2 process(es)" in done.stdout
    assert "22 latents of 2 classes" in done.stdout
    assert content(tmp_path / "two") == content(latents)


def slow_encoding(argv: list[str]) -> None:
    real = encoder._Job._encode

    def slow(self: Any, x: torch.Tensor) -> Any:
        time.sleep(0.15)
        return real(self, x)

    encoder._Job._encode = slow  # type: ignore[method-assign]
    door("ditmoe", ["encode", *argv])


@pytest.mark.parametrize(("number", "world"), [(signal.SIGKILL, 1), (signal.SIGTERM, 2)])
def test_a_stopped_encoding_goes_on(
    number: signal.Signals, world: int, latents: Path, photos: Path, vae: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    group = start(slow_encoding, flags(photos, vae, out), folder=tmp_path / "log", world=world)
    group.until(lambda: len(list(out.glob("*.safetensors"))) >= 2)
    group.kill(number)
    assert group.wait() == [-9 if number == signal.SIGKILL else 143] * world, group.err()
    made = {file.name: os.stat(file).st_mtime_ns for file in out.glob("*.safetensors")}
    assert 2 <= len(made) < 5
    with pytest.raises(ValueError, match=r"holds no latents\.json: run python -m ditmoe encode again"):
        opened(out)
    encode(photos, vae, out)
    assert all(os.stat(out / name).st_mtime_ns == when for name, when in made.items())
    assert content(out) == content(latents)


def test_a_finished_set_is_left_alone_and_a_damaged_shard_is_made_anew(
    copy: Path, latents: Path, photos: Path, vae: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(photos, vae, copy)
    assert "0 of 5 shards to encode" in capsys.readouterr().out
    raw = bytearray((copy / "00001.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "00001.safetensors").write_bytes(raw)
    (copy / "00002.safetensors").write_bytes((copy / "00002.safetensors").read_bytes()[:-5])
    (copy / "00003.safetensors").unlink()
    encode(photos, vae, copy)
    said = capsys.readouterr().out
    assert said.count("has other content than latents.json says: it is made anew") == 2
    assert "3 of 5 shards to encode" in said
    assert content(copy) == content(latents)
    (copy / "notes.tmp").mkdir()
    (copy / "mine.tmp").write_text("nobody else's")
    encode(photos, vae, copy)
    assert (copy / "mine.tmp").read_text() == "nobody else's"
    save_file({"x": torch.zeros(1)}, copy / "notes.safetensors", metadata={"ditmoe": '{"facts": 3}'})
    with pytest.raises(ValueError, match=r"holds notes\.safetensors, which is none of these latents, or damaged"):
        encode(photos, vae, copy)
    for file in copy.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="with another size"):
        encode(photos, vae, copy, "--size", 32)


@pytest.mark.parametrize("form", ["parquet", "folder", "saved", "metadata"])
def test_tables_are_encoded_as_the_folder_is(
    form: str, latents: Path, photos: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    files = sorted(photos.rglob("*.png"))
    kinds = datasets.Features(image=datasets.Image(), kind=datasets.ClassLabel(names=["cat", "dog"]))
    cells: dict[str, Any] = {
        "image": [Image.open(file).copy() for file in files],
        "kind": [f.parent.name for f in files],
    }
    table, root = datasets.Dataset.from_dict(cells, kinds), tmp_path / "set"
    if form == "saved":
        datasets.DatasetDict(dev=table).save_to_disk(root)
    elif form == "metadata":
        shutil.copytree(photos, root)
        rows = [{"file_name": f.relative_to(photos).as_posix(), "kind": f.parent.name} for f in files]
        (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        root.mkdir()
        table.to_parquet(root / "train.parquet")
    more = {"saved": ["--data.split", "dev"], "metadata": ["--data.label-column", "kind"]}.get(form, [])
    out = encode(root / "train.parquet" if form == "parquet" else root, vae, tmp_path / "out", *more)
    found = stored(out)
    assert {name: torch.equal(part, stored(latents)[name]) for name, part in found.items()} == dict.fromkeys(
        found, True
    )
    assert (read_index(out) or {})["classes"] == ["cat", "dog"]
    assert f"{NUM} images of 2 classes in {root}" in capsys.readouterr().out


def test_options_of_tables_are_refused_elsewhere(photos: Path, vae: Path, tmp_path: Path) -> None:
    for option, value in (("image-column", "image"), ("split", "test")):
        with pytest.raises(ValueError, match=f"--data.{option} is for tables, and .* is none; leave it out"):
            encode(photos, vae, tmp_path / "out", f"--data.{option}", value)
    with pytest.raises(ValueError, match="is neither a folder nor a tar file nor a .parquet file"):
        encode(tmp_path / "no.parquet", vae, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--vae", "other"], "holds latents with another VAE; give another --out"),
        (["--size", 32], "with another size"),
        (["--dtype", "float16", "--no-flip"], "with another dtype, flip"),
        (["--max-bad", 1, "photos"], "with another data set"),
        (["--size", 15], "size 15 is not a multiple of 2"),
        (["--vae", "nowhere"], "nowhere is not a VAE that can be loaded"),
        (["--vae", "pickled"], r"holds no \.safetensors weights"),
        (["--vae", "flux"], "not an AutoencoderKL"),
        (["--vae", "no-blocks"], "no-blocks is not a VAE that can be loaded"),
        (["--vae", "lacking"], r"its weights lack quant_conv\.weight"),
        (["nothing"], "is neither a folder nor a tar file"),
    ],
)
def test_what_the_encoder_refuses(
    change: list[Any], sentence: str, latents: Path, photos: Path, vae: Path, tmp_path: Path
) -> None:
    save_vae(tmp_path / "other", 1)
    for name in ("pickled", "flux", "no-blocks", "lacking"):
        shutil.copytree(vae, tmp_path / name)
    (tmp_path / "pickled/diffusion_pytorch_model.safetensors").rename(tmp_path / "pickled/diffusion_pytorch_model.bin")
    (tmp_path / "flux/config.json").write_text('{"_class_name": "AutoencoderDC"}')
    config = json.loads((vae / "config.json").read_text())
    (tmp_path / "no-blocks/config.json").write_text(json.dumps({**config, "block_out_channels": []}))
    change_weights(tmp_path / "lacking", lambda weights: weights.pop("quant_conv.weight"))
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos/cat/00.png").unlink()
    before = content(latents)
    argv = flags(photos, vae, latents)
    if change[-1] in ("photos", "nothing"):
        argv[0] = str(tmp_path / change.pop())
    if "--vae" in change:
        change = ["--vae", tmp_path / change[1]]
    with pytest.raises(ValueError, match=sentence):
        encoder.encode(cli.parse(LatentArgs, [*argv, *map(str, change)]), joined())
    assert content(latents) == before


def test_a_mistake_is_one_sentence_from_every_process(latents: Path, photos: Path, vae: Path) -> None:
    done = typed("ditmoe", "encode", *flags(photos, vae, latents, "--size", 32), world=2)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 2
    assert "Traceback" not in done.stderr


def test_a_vae_may_have_the_tensor_names_of_stable_diffusion_1(vae: Path, tmp_path: Path) -> None:
    def rename(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if ".attentions." in name]:
            older = name
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                older = older.replace(f".{new}.", f".{old}.")
            weights[older] = weights.pop(name)

    older = change_weights(Path(shutil.copytree(vae, tmp_path / "older")), rename)
    assert weights_sha256(open_vae(older)) == weights_sha256(open_vae(vae))


@pytest.mark.parametrize(
    ("row", "value", "sentence"),
    [
        (1, 0.1, "channel 1 of the latents has the same value everywhere"),
        (1, torch.nan, r"shard 0 are not finite in float32$"),
        (5, torch.nan, r"shard 0 are not finite in float32$"),  # the variance alone
    ],
)
def test_a_vae_with_a_broken_channel(
    row: int, value: float, sentence: str, photos: Path, vae: Path, tmp_path: Path
) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["quant_conv.weight"][row] = 0
        weights["quant_conv.bias"][row] = value

    broken = change_weights(Path(shutil.copytree(vae, tmp_path / "broken")), spoil)
    with pytest.raises(ValueError, match=sentence):
        encode(photos, broken, tmp_path / "set")


def test_what_rounding_leaves_of_a_constant_is_no_spread() -> None:
    n, value = 10**9, 0.1
    shard = {"sum": [value * n], "squares": [value * value * n * (1 + 1e-15)], "variance": [1.0 * n]}
    with pytest.raises(ValueError, match="channel 0 of the latents has the same value everywhere"):
        channel_statistics([shard], n)


def small_disk(argv: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (3800, 3800))  # no file grows beyond it
    door("ditmoe", ["encode", *argv])


@pytest.mark.parametrize(("file", "shard_size"), [("00000.safetensors", 5), ("latents.json", 1)])
def test_a_file_that_cannot_be_written_ends_every_process_with_a_sentence(
    file: str, shard_size: int, photos: Path, vae: Path, tmp_path: Path
) -> None:
    whole, out, size = tmp_path / "whole", tmp_path / "set", ["--shard-size", shard_size]
    encode(photos, vae, whole, *size)
    if file == "latents.json":
        shutil.copytree(whole, out)
        (out / file).unlink()
    group = start(small_disk, flags(photos, vae, out, *size), folder=tmp_path / "log", world=2)
    assert group.wait() == [2, 2]
    for rank in range(2):
        assert f"{file} could not be written (File too large)" in group.err(rank)
        assert "Traceback" not in group.err(rank)
    assert not list(out.glob("*.tmp"))
    assert not (out / file).exists()
    assert content(encode(photos, vae, out, *size)) == content(whole)


def test_one_launch_at_a_time(latents: Path, photos: Path, vae: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    group = start(slow_encoding, flags(photos, vae, out), folder=tmp_path / "log")
    group.until(lambda: (out / "00000.safetensors").exists())
    with pytest.raises(
        ValueError, match=rf"set is in use by process {group.pids[0]} on .*; wait for it, .* give another --out"
    ):
        encode(photos, vae, out)
    assert group.wait() == [0]
    assert content(out) == content(latents)


def test_shards_are_as_readable_as_other_files(latents: Path) -> None:
    modes = {file.name: file.stat().st_mode for file in latents.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_a_log_says_how_far_it_has_come(
    photos: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    encode(photos, vae, tmp_path / "set")
    assert "encoding: 15 of 22 images, " in capsys.readouterr().err


def prctl_of_joined() -> None:
    joined()
    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
    print(number.value)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_processes_of_torchrun_end_with_it(tmp_path: Path) -> None:
    group = start(prctl_of_joined, folder=tmp_path, env={"TORCHELASTIC_RUN_ID": "x"})
    assert group.wait() == [0]
    assert int(group.out()) == signal.SIGTERM


def test_bad_images_are_left_out_up_to_a_number(photos: Path, vae: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(photos, tmp_path / "photos"))
    for name in ("cat/00.png", "dog/21.png"):
        (mine / name).write_bytes((mine / name).read_bytes()[:200])
    with pytest.raises(ValueError, match=r"00\.png cannot be decoded .* --max-bad N"):
        encode(mine, vae, tmp_path / "a")
    with pytest.raises(ValueError, match=r"2 images cannot be used, max_bad is 1: .*21\.png"):
        encode(mine, vae, tmp_path / "a", "--max-bad", 1)
    index = read_index(encode(mine, vae, tmp_path / "a", "--max-bad", 2))
    assert index is not None
    assert [shard["count"] for shard in index["shards"]] == [4, 5, 5, 5, 1]
    assert [Path(sentence.split()[0]).name for sentence in index["bad"]] == ["00.png", "21.png"]
    assert opened(tmp_path / "a").labels.tolist() == [0] * 10 + [1] * 10
    with pytest.raises(ValueError, match=r"2 images cannot be used, max_bad is 1: .*21\.png"):
        encode(mine, vae, tmp_path / "a", "--max-bad", 1)  # the shards that are there count too


def test_names_of_bad_images_are_shown_in_letters(
    photos: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = Path(shutil.copytree(photos / "cat", tmp_path / "photos"))
    (mine / os.fsdecode(b"a\xff\n\x1b[31m.png")).write_bytes(b"no image")
    index = read_index(encode(mine, vae, tmp_path / "set", "--max-bad", 1))
    assert index is not None
    assert "a???[31m.png is not a readable image" in index["bad"][0]
    assert f"left out: {index['bad'][0]}\n" in capsys.readouterr().out


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_tar_files_hold_the_same_images(latents: Path, photos: Path, vae: Path, tmp_path: Path) -> None:
    files = sorted(photos.rglob("*.png"))
    for part in range(2):
        members: dict[str, bytes] = {"README.txt": b"not an image"}
        for i, file in list(enumerate(files))[part * 9 : 9 if part == 0 else None]:
            members |= {f"{i:04d}.png": file.read_bytes(), f"{i:04d}.cls": b"%d\n" % (file.parent.name == "dog")}
        write_tar(tmp_path / f"{part}.tar", members.items())
    found = stored(encode(tmp_path, vae, tmp_path / "set"))
    assert all(torch.equal(value, found[name]) for name, value in stored(latents).items())
    assert opened(tmp_path / "set").id2label == {0: "0", 1: "1"}
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"0\.tar is truncated"):
        encode(tmp_path, vae, tmp_path / "b")


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([("a.txt", b"")], "hold no images"),
        ([("a.png", b""), ("b.png", b""), ("b.cls", b"1")], r"has a without a\.cls"),
        ([("a.png", b""), ("a.cls", b"1"), ("b.cls", b"1")], r"has b\.cls without an image"),
        ([("a.png", b""), ("a.cls", b"cat")], "a.cls with 'cat'; a label is a number"),
        ([("a.png", b""), ("a.cls", b"9" * 31)], "a label is a number"),
        ([("a.png", b""), ("a.cls", b"0" * 32 + b"9")], "a label is a number"),
        ([("a.png", b""), ("a.png", b"")], "has two images of the key a"),
        ([("a.png", b""), ("a.cls", b"1"), ("a.cls", b"2")], "has two labels of the key a"),
        ([("/etc/a.png", b"no image"), ("/etc/a.cls", b"1")], r"0\.tar/etc/a is not a readable image"),
    ],
)
def test_tar_files_that_cannot_be_used(
    members: list[tuple[str, bytes]], sentence: str, vae: Path, tmp_path: Path
) -> None:
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(ValueError, match=sentence):
        encode(tmp_path, vae, tmp_path / "set")


BLOCK = 512


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def spoil_tar(raw: bytes, what: str) -> bytes:
    """Of a tar file whose first image and label take 4 blocks, and whose second image takes the next 2."""
    extended = header("x", 15, b"x") + b"15 size=-001536".ljust(BLOCK, b"\0")  # the size of the member after it
    changes = {
        "a damaged header": raw[: 4 * BLOCK] + b"?" + raw[4 * BLOCK + 1 :],
        "cut between members": raw[: 4 * BLOCK],
        "cut within a header": raw[: 4 * BLOCK + 99],
        "a zeroed header": raw[: 4 * BLOCK] + bytes(BLOCK) + raw[5 * BLOCK :],
        "another one behind it": raw + raw,
        "a size below 0": raw[: 4 * BLOCK] + extended + header("x.txt", 0) + bytes(2 * BLOCK),
        "extensions without end": raw[: 4 * BLOCK] + extended.replace(b"size", b"sise") * 2000 + bytes(2 * BLOCK),
        "a size beyond all files": raw[: 4 * BLOCK] + header("x", 2**62, b"L") + bytes(2 * BLOCK),
        "a link": raw[: 4 * BLOCK] + header("b.png", 0, b"1") + bytes(2 * BLOCK),
    }
    return changes[what]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "what",
    [
        "a damaged header", "cut between members", "cut within a header", "a zeroed header", "another one behind it",
        "a size below 0", "extensions without end", "a size beyond all files", "a link",
    ],
)  # fmt: skip
def test_a_damaged_tar_file_loses_no_image_in_silence(what: str, tmp_path: Path) -> None:
    tar = tmp_path / "0.tar"
    write_tar(tar, [("a.png", b"1"), ("a.cls", b"1"), ("b.png", b"1"), ("b.cls", b"1")])
    assert len(TarImages(tmp_path, 8, 3)) == 2
    tar.write_bytes(spoil_tar(tar.read_bytes(), what))
    match = r"b\.png as a link" if what == "a link" else r"0\.tar is truncated, damaged, compressed or no tar file"
    with pytest.raises(ValueError, match=match):
        TarImages(tmp_path, 8, 3)


def test_an_image_of_a_tar_file_is_named_alike_each_time(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("x.png")
        member.size = 8
        archive.addfile(member, io.BytesIO(b"no image"))
    sentences = set()
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"a\.tar/x is not a readable image \(cannot identify image file\)"
        ) as told:
            TarImages(tmp_path, 8, 3).images([0])
        sentences.add(str(told.value))
    assert len(sentences) == 1


def test_what_is_none_of_a_tar_files_images_is_counted(tmp_path: Path) -> None:
    members = [("./a.png", b"1"), ("a.json", b"{}"), ("b.v2.png", b"1"), ("c.gif", b"1"), ("a.cls.txt", b"1")]
    write_tar(tmp_path / "0.tar", [*members, ("__MACOSX/._a.png", b"1"), ("._a.png", b"1"), ("@eaDir/a.png", b"1")])
    write_tar(tmp_path / "._0.tar", [])
    (tmp_path / "deep").mkdir()
    write_tar(tmp_path / "deep" / "1.tar", [("z.png", b"1")])
    (tmp_path / "2.tar.gz").write_bytes(b"1")
    data = TarImages(tmp_path, 8, 3)
    assert (len(data), data.name(0)) == (1, f"{tmp_path}/0.tar/a")
    kinds = r"1 \.gz, 1 \.tar, 1 \.json, 1 \.png, 1 \.gif, \.\.\."
    assert re.search(rf"; 6 other files left out, such as 2\.tar\.gz \({kinds}\)$", data.source)
    write_tar(tmp_path / "0.tar", [("a.png", b"1"), ("a.cls", b"1"), ("b.png", b"1"), ("b.cls", b"4")])
    assert "2 images of 5 classes (3 of them without an image) in 1 tar file" in TarImages(tmp_path, 8, 3).source


def test_a_class_of_which_nothing_can_be_encoded_is_refused(photos: Path, vae: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(photos, tmp_path / "photos"))
    (mine / "bee").mkdir()
    (mine / "bee" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the images of class 'bee' can be used"):
        encode(mine, vae, tmp_path / "set", "--max-bad", 1)
    assert not (tmp_path / "set" / "latents.json").exists()


def test_images_beside_tar_files_are_not_passed_over(photos: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(photos, tmp_path / "photos"))
    write_tar(mine / "0.tar", [("a.png", b"1"), ("a.cls", b"1")])
    with pytest.raises(ValueError, match=r"holds tar files, and images beside them \(.*\.png\)"):
        TarImages(mine, 8, 3)


def test_flips_take_the_latents_of_the_mirrored_image(latents: Path, photos: Path, vae: Path, tiny: Tiny) -> None:
    plain, flipped = (tiny(data={"name": "latents", "path": latents, "flip": f}, model=MODEL) for f in (False, True))
    data = opened(latents, flip=True)
    first, second = (
        torch.cat([b.x for b in Batches(c, data, first_step=0, rank=0, num_processes=1)]) for c in (plain, flipped)
    )
    same = (first == second).flatten(1).all(1)
    assert 0.3 < same.float().mean() < 0.7
    known = {x.numpy().tobytes() for x in data.tensors(range(NUM), [True] * NUM)}
    assert all(x.numpy().tobytes() in known for x in second[~same])
    pictures = tiny(data={"name": "folder", "path": photos, "fit": "crop", "flip": True}, model=MODEL)
    images = open_data(pictures.data, size=8, channels=3)
    seen = torch.cat([b.x for b in Batches(pictures, images, first_step=0, rank=0, num_processes=1)])
    rows = torch.cat([b.y for b in Batches(plain, data, first_step=0, rank=0, num_processes=1)])
    assert len(seen) == len(rows)  # the same samples of the run are mirrored, whatever the set holds
    upright = torch.cat([b.x for b in Batches(tiny(data={"name": "folder", "path": photos, "fit": "crop"}),
                                              images, first_step=0, rank=0, num_processes=1)])  # fmt: skip
    assert torch.equal((seen == upright).flatten(1).all(1), same)


def test_readers_change_nothing(latents: Path, tiny: Tiny) -> None:
    configs = [tiny(max_steps=2, data={"name": "latents", "path": latents, "flip": True, "num_workers": n}, model=MODEL)
               for n in (0, 2)]  # fmt: skip
    read = [torch.cat([b.x for b in Batches(c, opened(latents), first_step=0, rank=0, num_processes=1)])
            for c in configs]  # fmt: skip
    assert torch.equal(*read)


def test_training_and_sampling_with_the_vae(latents: Path, vae: Path, tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(
        max_steps=2, data={"name": "latents", "path": latents, "flip": True}, model=MODEL, sample={"steps": 2}
    )
    assert train(config, opened(latents, flip=True))
    bare = pipeline.load(config.out)
    x = bare([0, 1], output_type="pt").images
    assert x.shape == (2, 4, 8, 8)
    export(ExportArgs(config.out, tmp_path / "gift", vae=vae, dtype="float32"))
    whole = pipeline.load(tmp_path / "gift")
    index = read_index(latents)
    assert index is not None
    assert whole.config.latents == {name: index[name] for name in ("mean", "std", "vae")}
    assert [p.size for p in whole([0, 1]).images] == [(SIZE, SIZE)] * 2
    mean, std = (torch.tensor(index[name]).view(-1, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        want = open_vae(vae).decode(x * std + mean).sample
    torch.testing.assert_close(whole([0, 1], output_type="pt").images, want, rtol=1e-4, atol=1e-4)
    other = save_vae(tmp_path / "other", 1)
    with pytest.raises(ValueError, match="another one than that of the latents, tiny-vae"):
        export(ExportArgs(config.out, tmp_path / "second", vae=other))
    shutil.copytree(other, tmp_path / "gift" / "vae", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="another one than that of the latents"):
        pipeline.load(tmp_path / "gift")


def test_a_run_with_its_vae_and_latents_of_another_one(
    latents: Path, photos: Path, vae: Path, tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny(max_steps=1, data={"name": "latents", "path": latents, "vae": vae}, model=MODEL, sample={"steps": 2})
    assert train(config, opened(latents))
    assert [p.size for p in pipeline.load(config.out)([1]).images] == [(SIZE, SIZE)]
    other = save_vae(tmp_path / "other", 1)
    wrong = tiny(max_steps=1, out=tmp_path / "b", data={"name": "latents", "path": latents, "vae": other}, model=MODEL)
    with pytest.raises(ValueError, match="another one than that of the latents, tiny-vae"):
        train(wrong, opened(latents))
    assert not wrong.out.exists()
    strange = encode(photos, other, tmp_path / "strange")
    assert opened(strange).fingerprint() != opened(latents).fingerprint()
    resumed = tiny(max_steps=2, data={"name": "latents", "path": strange}, model=MODEL, sample={"steps": 2})
    with pytest.raises(ValueError, match="the data set is not the one"):
        train(resumed, opened(strange))


def spoil(folder: Path, what: str) -> None:
    shard, listed = folder / "00001.safetensors", folder / "latents.json"
    raw, index = shard.read_bytes(), json.loads(listed.read_text())
    if what == "missing":
        shard.unlink()
    elif what == "cut":
        shard.write_bytes(raw[:-9])
    elif what == "flipped bit":
        shard.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif what == "outside":
        index["shards"][0]["file"] = "../00000.safetensors"
    elif what in ("std", "mean"):
        index[what][0] = 0.0 if what == "std" else 1e300
    elif what == "count":
        index["shards"][0]["count"] = 4
    elif what == "format":
        index["format"] = 2
    listed.write_text("[" if what == "json" else json.dumps(index))


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("missing", r"00001\.safetensors is missing, which latents\.json lists; restore it, or run"),
        ("cut", r"00001\.safetensors has \d+ bytes, not \d+ as"),
        ("flipped bit", r"00001\.safetensors has other content than"),
        ("outside", "not files of the folder"),
        ("std", "mean and std are not usable"),
        ("mean", "mean and std are not usable"),
        ("count", "do not add up"),
        ("format", "another format"),
        ("json", r"latents\.json is not what"),
    ],
)
def test_what_training_refuses(what: str, sentence: str, copy: Path) -> None:
    spoil(copy, what)
    with pytest.raises(ValueError, match=sentence):
        opened(copy)


def test_a_missing_shard_ends_every_process_with_a_sentence(copy: Path, tmp_path: Path) -> None:
    spoil(copy, "missing")
    done = typed("train", "imagenet-256-s", "--data.path", copy, "--out", tmp_path / "run", world=2)
    assert done.returncode == 2
    assert done.stderr.count("is missing, which latents.json lists") == 2
    assert not (tmp_path / "run").exists()


def test_options_that_these_latents_cannot_serve(
    latents: Path, photos: Path, vae: Path, tiny: Tiny, tmp_path: Path
) -> None:
    plain = encode(photos, vae, tmp_path / "plain", "--no-flip")
    with pytest.raises(ValueError, match=r"data\.flip needs the latents of mirrored images"):
        opened(plain, flip=True)
    assert "latents_flipped" not in stored(plain)
    simple = tmp_path / "simple"
    simple.mkdir()
    save_file({"latents": torch.randn(4, 4, 8, 8)}, simple / "0.safetensors")
    with pytest.raises(ValueError, match=r"data\.flip needs"):
        opened(simple, flip=True)
    config = tiny(data={"name": "latents", "path": simple, "vae": vae}, model=MODEL)
    with pytest.raises(ValueError, match="the latents do not say which VAE made them"):
        pipeline.assemble(pipeline_net(config), config, {})
    with pytest.raises(ValueError, match="the model takes"):
        open_data(DataConfig(name="latents", path=latents), size=16, channels=4)
    save_file({"latents": torch.randn(2, 4, 8, 8), "labels": torch.tensor([0, 999])}, simple / "0.safetensors")
    assert len(opened(simple).id2label) == 1000  # a few of many classes
    save_file({"latents": torch.randn(2, 4, 8, 8), "labels": torch.tensor([0, 10**9])}, simple / "0.safetensors")
    with pytest.raises(ValueError, match=r"have labels 0\.\.1000000000; they must lie in 0\.\.999999"):
        opened(simple)


@pytest.mark.parametrize("channels", [3, 4])
def test_latents_are_not_written_as_pictures(channels: int, photos: Path, tiny: Tiny, tmp_path: Path) -> None:
    vae = save_vae(tmp_path / "vae", 0, latent_channels=channels)
    data = encode(photos, vae, tmp_path / "set")
    config = tiny(data={"name": "latents", "path": data}, model={**MODEL, "in_channels": channels})
    pipeline.save(pipeline.assemble(pipeline_net(config), config, {0: "cat", 1: "dog"}), tmp_path / "model")
    for out in ("folder", "set.npz"):
        asked = SampleArgs(tmp_path / "model", steps=1, num=2, out=tmp_path / out)
        with pytest.raises(ValueError, match=f"makes latents of {channels} channels and holds no VAE"):
            image_sets.run(asked, One())
        assert not (tmp_path / out).exists()


class One:
    """A launch of one process."""

    rank, world = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_latents_are_stored_in_half_the_bytes(
    dtype: str, latents: Path, photos: Path, vae: Path, tmp_path: Path
) -> None:
    half = encode(photos, vae, tmp_path / "half", "--dtype", dtype)
    assert stored(half)["latents"].dtype == getattr(torch, dtype)
    tolerance = 0.002 if dtype == "float16" else 0.02
    torch.testing.assert_close(stored(half)["latents"].float(), stored(latents)["latents"], rtol=tolerance, atol=0.01)
    assert opened(half).tensors([3, 21]).dtype == torch.float32


@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
def test_the_presets_of_imagenet(size: str) -> None:
    config = PRESETS[f"imagenet-256-{size}"]
    assert (config.model.sample_size, config.model.in_channels, config.model.num_classes) == (32, 4, 1000)
    assert config.data == DataConfig(name="latents", flip=True, num_workers=4)
    assert (config.train.batch_size, config.train.learning_rate, config.train.ema_decay) == (256, 1e-4, 0.9999)
    assert str(config.out) == f"runs/imagenet-256-{size}"


def test_a_model_is_saved_with_the_statistics_it_was_trained_with(copy: Path, tiny: Tiny) -> None:
    """Whatever has become of the latents' folder in the meantime."""
    config = tiny(data={"name": "latents", "path": copy}, model=MODEL, max_steps=1)
    data, known = opened(copy), read_normalization(copy)
    index = json.loads((copy / "latents.json").read_text())
    (copy / "latents.json").write_text(json.dumps({**index, "mean": [9.0] * 4}))
    assert read_normalization(copy) != known == data.normalization
    train(config, data)
    assert pipeline.load(config.out).config.latents == known
