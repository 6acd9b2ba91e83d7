"""Files that somebody else has made: nothing in them is executed, and what is wrong is one sentence."""

import io
import json
import pickle
import re
import shutil
import struct
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from ditmoe import cli, pipeline
from ditmoe.analysis import exposure
from ditmoe.config import sample
from ditmoe.config.file import save
from ditmoe.config.sections import Config, DataConfig
from ditmoe.data.open import open_data
from ditmoe.generate import request as image_sets
from ditmoe.report import page
from ditmoe.report import write as report
from ditmoe.run_folder import writer
from ditmoe.run_folder.log import _reopen, read_rows
from ditmoe.run_folder.place import check_place
from eval import judge
from eval.processes import Processes
from tests import checkpoints
from tests.doors import typed
from tests.faults.halts import save_model, save_run

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


@pytest.fixture
def trap(tmp_path):
    """What is to be unpickled, which in the end nobody has done."""
    canary = tmp_path / "canary"
    yield Trap(canary)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Trap(canary)))
    assert canary.exists()  # the trap works


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "model"
    save_model(folder)
    return folder


@pytest.fixture
def model(tmp_path, whole):
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refused(capsys, main, sentence):
    """A door that ends with exit code 2 and one line that says so."""
    capsys.readouterr()
    assert cli.run(main) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert re.search(sentence, lines[0]), lines[0]


def sampling(model):
    args = sample.SampleArgs(model, num=2, out=model.parent / "drawn.npz")
    return lambda: image_sets.run(args, Processes())


def measuring(model):
    args = sample.ExposureArgs(model, num=2, steps=2, data_variance=0.5, out=model.parent / "bias.png")
    return lambda: exposure.run(args)


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def header(text, data=b""):
    return struct.pack("<Q", len(text)) + text + data


HOSTILE_HEADERS = {
    "2^60": struct.pack("<Q", 2**60) + b"{}",
    "no json": header(b'{"latents": oh no'),
    "offsets beyond the file": header(b'{"latents":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}', bytes(8)),
    "overlapping tensors": header(
        b'{"latents":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],'
        b'"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "nothing": b"",
}


# ---- model folders


def test_a_model_of_ours_is_taken(model, capsys):
    assert cli.run(sampling(model)) == 0
    assert cli.run(measuring(model)) == 0


FOREIGN_ENTRIES = {
    "transformer of a foreign module": {"transformer": ["tempting", "Thing"]},
    "transformer of diffusers": {"transformer": ["diffusers", "DiTTransformer2DModel"]},
    "no transformer": {"transformer": [None, None]},
    "scheduler of a foreign module": {"scheduler": ["tempting", "Thing"]},
    "scheduler that is a network": {"scheduler": ["diffusers", "AutoencoderKL"]},
    "scheduler of another module of ours": {"scheduler": ["samplers.catalog", "Sampler"]},
    "vae of a foreign module": {"vae": ["tempting", "Thing"]},
    "vae of transformers": {"vae": ["transformers", "AutoModel"]},
    "vae that is a pipeline": {"vae": ["diffusers", "DiTPipeline"]},
    "custom pipeline": {"_class_name": ["tempting", "Thing"]},
    "another pipeline": {"_class_name": "DiTPipeline"},
    "auto_map": {"auto_map": {"AutoPipeline": "tempting.Thing"}},
    "guide of a foreign module": {"guide": ["tempting", "Thing"]},
    "guide of diffusers": {"guide": ["diffusers", "DiTTransformer2DModel"]},
    "a scale of the guide that is no number": {"guide_scale": "2"},
    "experts off that is no truth": {"experts_off": "yes"},
    "another component": {"safety": ["tempting", "Thing"]},
    "class names that are no text": {"id2label": {"0": ["x"]}},
    "steps that are no number": {"num_inference_steps": "many"},
    "a scale that is too large": {"guidance_scale": 10**400},
    "sampler that is a list": {"sampler": ["x"]},
    "no sampler": {"sampler": None},
}


@pytest.mark.parametrize("what", FOREIGN_ENTRIES)
def test_a_model_folder_names_no_code(model, tmp_path, capsys, monkeypatch, trap, what):
    (tmp_path / "modules").mkdir()
    for place in (tmp_path / "modules", model, *(model / name for name in FOREIGN_ENTRIES[what])):
        if place.is_dir():
            (place / "tempting.py").write_text(f"open({str(trap.file)!r}, 'w')\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    change(model / "model_index.json", **FOREIGN_ENTRIES[what])
    (entry,) = FOREIGN_ENTRIES[what]
    refused(capsys, sampling(model), f"model_index.json has {entry} .*, which is not ditmoe's")


@pytest.mark.parametrize("name", ["None", "DiTMoEPipeline"])
def test_a_model_folder_holds_no_code_in_its_root(model, capsys, trap, name):
    (model / f"{name}.py").write_text(f"open({str(trap.file)!r}, 'w')\n")  # diffusers 0.36 imports None.py
    refused(capsys, sampling(model), rf"{name}\.py is code")
    refused(capsys, measuring(model), rf"{name}\.py is code")


def index_of(model, shard):
    (model / WEIGHTS).rename(model / "transformer/other.safetensors")
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"w": shard}}))


def elsewhere(model):
    """Weights of which all but one lie in a file that is not read."""
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    name = next(iter(tensors))
    save_file({name: tensors.pop(name)}, model / WEIGHTS)
    save_file(tensors, model / "transformer/other.safetensors")


def with_vae(model):
    """One whose config asks for more than its weights are."""
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=1)
    vae.save_pretrained(model / "vae")
    change(model / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    change(model / "vae/config.json", block_out_channels=[2**16])


def with_guide(model):
    """One whose config asks for more than its weights are."""
    shutil.copytree(model / "transformer", model / "guide")
    change(model / "model_index.json", guide=["ditmoe.model", "DiTMoETransformer2DModel"])
    assert pipeline.load(model).guide is not None
    change(model / "guide/config.json", depth=10**9)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: (m / "transformer/ditmoe.model.py").write_text("oops"), r"ditmoe\.model\.py is code"),
        (
            lambda m: change(m / "transformer/config.json", auto_map={"a": "b.C"}),
            r"config\.json has the entry auto_map",
        ),
        (lambda m: change(m / "transformer/config.json", quantization_config={}), "has the entry quantization_config"),
        (lambda m: (m / "transformer/config.json").write_text('"../elsewhere"'), r"config\.json holds no JSON object"),
        (lambda m: (m / "transformer/config.json").write_bytes(b"\x80\x05K"), r"config\.json cannot be read as JSON"),
        (lambda m: (m / "model_index.json").write_text("[" * 100_000), r"model_index\.json cannot be read as JSON"),
        (lambda m: index_of(m, "other.bin"), r"index\.json names 'other\.bin'; weights are \.safetensors"),
        (lambda m: index_of(m, f"../../{m.name}/{WEIGHTS}"), r"names '\.\./\.\./model/transformer"),
        (lambda m: index_of(m, "/etc/weights.safetensors"), r"names '/etc/weights\.safetensors'"),
        (lambda m: (m / "model_index.json").write_text("[]"), r"model_index\.json holds no JSON object"),
        (lambda m: change(m / "transformer/config.json", depth="deep"), "depth is 'deep', which it cannot be"),
        (lambda m: change(m / "transformer/config.json", depth=10**9), "far more tensors than its weights hold"),
        (lambda m: change(m / "transformer/config.json", top_k=-1), "top_k is -1; it must be above 0"),
        (lambda m: change(m / "transformer/config.json", top_k=5), "top_k 5 is more than num_experts 4"),
        (lambda m: change(m / "transformer/config.json", patch_size=0), "patch_size is 0; it must be above 0"),
        (lambda m: change(m / "transformer/config.json", num_heads=0), "num_heads is 0; it must be above 0"),
        (lambda m: change(m / "transformer/config.json", activation="x"), "activation is 'x', which it cannot be"),
        (lambda m: change(m / "transformer/config.json", time_scale=1e99), "time_scale is 1e.99, which it cannot be"),
        (lambda m: change(m / "transformer/config.json", freq_shift=128), "freq_shift is 128 and norm2_eps"),
        (lambda m: change(m / "model_index.json", guidance_channels=0), "model_index.json has guidance_channels 0"),
        (lambda m: change(m / "transformer/config.json", hidden_size=2**40), "has the shape .*asks for|can be built"),
        (
            lambda m: change(m / "transformer/config.json", num_classes=2**30),
            r"has the shape \(3, 32\), but its config",
        ),
        (lambda m: change(m / "transformer/config.json", sample_size=2**20), "asks for tables of more than"),
        (lambda m: change(m / "transformer/config.json", sample_size=2**62), "is of no network that can be built"),
        (
            lambda m: change(m / "scheduler/scheduler_config.json", num_train_timesteps=2**40),
            "num_train_timesteps 1099",
        ),
        (
            lambda m: change(m / "transformer/config.json", shared_width=0),
            r"hold blocks\.1\.moe\.shared.*does not ask for",
        ),
        (lambda m: (m / WEIGHTS).rename(m / "transformer/other.safetensors"), "no file named diffusion_pytorch_model"),
        (elsewhere, "its weights are not in the files that diffusers reads"),
        (with_guide, r"guide/config\.json is of no network that can be built \(it has far more tensors"),
        (with_vae, r"its weights hold \d+ values, of \d+ which its config\.json asks for"),
        (lambda m: change(m / "transformer/config.json", depth=3), r"its weights lack blocks\.2\."),
    ],
)
def test_a_model_folder_is_settings_and_weights(model, capsys, change, sentence):
    change(model)
    refused(capsys, sampling(model), f"model is not a ditmoe pipeline that can be loaded: .*{sentence}")


def test_the_meter_takes_no_memory_for_what_the_weights_are_not(model, capsys):
    change(model / "transformer/config.json", num_classes=2**38)
    refused(capsys, measuring(model), r"has the shape \(3, 32\), but its config")


RUN_FILES = {
    "data that are a list": '{"out": "x", "data": []}',
    "nested": "[" * 100_000,
    "a list": "[]",
    "no text": "\udcff",
}


@pytest.mark.parametrize("what", RUN_FILES)
@pytest.mark.parametrize("name", ["training.json", "config.json"])
def test_a_configuration_in_a_handed_in_folder(model, tmp_path, capsys, name, what):
    (tmp_path / "run").mkdir()
    file = (model if name == "training.json" else tmp_path / "run") / name
    file.write_bytes(RUN_FILES[what].encode(errors="surrogateescape"))
    if name == "training.json":  # which is not needed to sample
        assert cli.run(sampling(model)) == 0
    else:
        refused(capsys, lambda: report.write(tmp_path / "run"), r"config\.json is not the configuration of a run")
        config = Config(out=tmp_path / "run")
        with pytest.raises(ValueError, match=r"config\.json is not a configuration|holds another run"):
            check_place(config)


def test_a_configuration_has_the_types_of_its_fields(tmp_path, capsys):
    save(Config(), tmp_path / "config.json")
    values = json.loads((tmp_path / "config.json").read_text())
    for broken in ({"dry_run": "x"}, {"max_steps": True}, {"sample": {**values["sample"], "sampler": ["x"]}}):
        (tmp_path / "config.json").write_text(json.dumps({**values, **broken}))
        refused(
            capsys, lambda: report.write(tmp_path), "of a run: (dry_run|max_steps|sampler) is .*, which it cannot be"
        )


def test_a_log_with_foreign_bytes_is_read_without_them(tmp_path, capsys):
    good = [json.dumps({"step": i, "loss": 1.0, "images_per_second": 9.0}).encode() for i in (1, 2, 3)]
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b"\n".join([good[0], b'{"step": \xff', b"[" * 100_000, b"[]", b"{}", *good[1:], b'{"step": 4, "l']))
    assert [row["step"] for row in read_rows(log)] == [1, 2, 3]
    with _reopen(log, 2):
        assert log.read_bytes().splitlines() == good[:2]
    log.write_text('{"step": 1, "loss": "x"}')
    with pytest.raises(ValueError, match="a row for step 1 without a loss"):
        read_rows(log)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".bin.index.json"])
def test_pickled_weights_are_never_opened(model, capsys, monkeypatch, trap, suffix):
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("a pickle was opened"))
    (model / WEIGHTS).unlink()
    name = "diffusion_pytorch_model.bin" if suffix.endswith(".json") else f"diffusion_pytorch_model{suffix}"
    torch.save({"x_embedder.proj.weight": trap}, model / "transformer" / name)
    if suffix.endswith(".json"):
        index = {"metadata": {}, "weight_map": {"x_embedder.proj.weight": name}}
        (model / f"transformer/diffusion_pytorch_model{suffix}").write_text(json.dumps(index))
    refused(capsys, sampling(model), r"holds no \.safetensors weights|names 'diffusion_pytorch_model\.bin'")
    refused(capsys, measuring(model), "safetensors")


@pytest.mark.parametrize("what", [*HOSTILE_HEADERS, "pickle"])
def test_weights_with_a_hostile_header_are_named(model, capsys, trap, what):
    (model / WEIGHTS).write_bytes(pickle.dumps(trap) if what == "pickle" else HOSTILE_HEADERS[what])
    refused(capsys, sampling(model), r"diffusion_pytorch_model\.safetensors is damaged or no safetensors file \(")
    refused(capsys, measuring(model), r"diffusion_pytorch_model\.safetensors is damaged")


# ---- data, checkpoints, statistics, images


@pytest.mark.parametrize("what", [*HOSTILE_HEADERS, "pickle", "folder"])
def test_shards_of_latents_with_a_hostile_header_are_named(tmp_path, capsys, trap, what):
    shard = tmp_path / "latents/1.safetensors"
    shard.parent.mkdir()
    save_file({"latents": torch.zeros(2, 4, 8, 8)}, tmp_path / "latents/0.safetensors")
    if what == "folder":
        shard.mkdir()
    else:
        shard.write_bytes(pickle.dumps(trap) if what == "pickle" else HOSTILE_HEADERS[what])
    (tmp_path / "latents/2.pt").write_bytes(pickle.dumps(trap))
    data = DataConfig(name="latents", path=tmp_path / "latents")
    refused(capsys, lambda: open_data(data, size=8, channels=4), r"1\.safetensors is damaged, truncated or no safetens")


def test_a_checkpoint_with_a_pickle_in_it_is_not_used(tmp_path, trap):
    for step in (1, 2):
        writer.save(tmp_path, step, {"model": {"w": torch.ones(2)}}, {})
    (tmp_path / "step-000002/optimizer.pt").write_bytes(pickle.dumps(trap))
    assert checkpoints.newest(tmp_path).name == "step-000001"


def pickled(trap):
    array = np.empty((), object)
    array[()] = trap
    return array


STATISTICS = {"mu": np.zeros(256), "sigma": np.eye(256)}
OBJECTS = {
    "images": lambda trap: {"arr_0": pickled(trap)},
    "labels": lambda trap: {"arr_0": np.zeros((2, 8, 8, 1), np.uint8), "arr_1": pickled(trap)},
    "mean": lambda trap: {**STATISTICS, "mu": pickled(trap)},
    "features": lambda trap: {**STATISTICS, "features": pickled(trap)},
    "facts": lambda trap: {**STATISTICS, "facts": pickled(trap)},
}
WAYS_OUT = ("../../../x.png", "a/../../x.png", "/tmp/x.png", "C:\\x.png", "..\\x.png")


@pytest.fixture
def scoring(tmp_path, capfd):
    """A score of a given file, or against it, that ends with one sentence about the file."""
    from eval import fid

    np.savez(tmp_path / "good.npz", arr_0=np.zeros((2, 8, 8, 1), np.uint8))

    def refused(file, sentence):
        for images, ref in ((file, tmp_path / "good.npz"), (tmp_path / "good.npz", file)):
            assert fid.main([str(images), "--ref", str(ref), "--no-cache"]) == 2
            (line,) = capfd.readouterr().err.splitlines()
            assert re.match(f"error: {re.escape(str(file))}: .*({sentence})", line), line

    return refused


@pytest.mark.parametrize("what", [*OBJECTS, "all"])
def test_arrays_of_objects_are_refused(tmp_path, scoring, trap, what):
    file = tmp_path / "given.npz"
    if what == "all":
        file.write_bytes(pickle.dumps(trap))
    else:
        np.savez(file, **OBJECTS[what](trap))
    scoring(file, r"arr_0 is object|allow_pickle=False|not a readable \.npz")


@pytest.mark.parametrize("name", WAYS_OUT)
@pytest.mark.parametrize("kind", ["zip", "npz"])
def test_archives_with_ways_out_are_refused(tmp_path, scoring, kind, name):
    file = tmp_path / f"given.{kind}"
    if kind == "npz":
        np.savez(file, arr_0=np.zeros((2, 8, 8, 1), np.uint8))
    with zipfile.ZipFile(file, "a") as archive:
        for each in ("0.png", "1.png", name):
            picture = io.BytesIO()
            Image.new("L", (8, 8)).save(picture, "PNG")
            archive.writestr(each, picture.getvalue())
    scoring(file, "which leads out of the archive")


# ---- as a user types it


def test_the_doors_unpickle_nothing(tmp_path, whole, trap):
    files = {name: tmp_path / name for name in ("model.pt", "weights.pth", "config.json", "ref.npz")}
    for file in files.values():
        torch.save({"fc.weight": trap}, file)
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 8, 8, 1), np.uint8))
    weights = ["--extractor", "inception-2015", "--weights", files["weights.pth"]]
    for argv, sentence in (
        (["sample", files["model.pt"]], "holds no model"),
        (["sample", whole, "--num", 4, "--score", files["ref.npz"]], r"ref\.npz: holds \["),
        (["sample", whole, "--num", 4, "--score", "digits:test", *weights], r"weights\.pth have SHA-256 "),
        (["train", files["config.json"]], r"config\.json is not a configuration that can be read"),
        (["eval.fid", tmp_path / "images.npz", "--ref", "digits:test", *weights], r"weights\.pth have SHA-256 "),
    ):
        done = typed(*argv, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert re.fullmatch(f"error: .*{sentence}.*\n", done.stderr), done.stderr


# ---- the page


ATTACK = "</title></style></pre>--><script>alert(1)</script><img src=x onerror=alert(1)>\" onload='alert(1)' &lt;"


class Structure(HTMLParser):
    """Tags and attributes of a page; of attributes whose value is text for the reader, the name alone."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, [(name, "" if name in ("alt", "src") else value) for name, value in attrs]))

    def handle_endtag(self, tag):
        self.found.append(tag)

    def handle_comment(self, data):
        self.found.append("comment")

    def handle_data(self, data):
        self.text += data


def with_attack(value, keep=("prediction_type",)):
    """A JSON value with the attack in every text of it, and in the names of what is listed by name."""
    if isinstance(value, dict):
        listed = {k + ATTACK if k.startswith("x-") else k: v for k, v in value.items()}
        return {k: v if k in keep else with_attack(v) for k, v in listed.items()}
    if isinstance(value, list):
        return [with_attack(v) for v in value]
    return value + ATTACK if isinstance(value, str) else value


REPORT = {
    "title": "run", "run": "runs/run", "command": "python train.py", "written": "today", "notes": ["a note"],
    "teachers": [],
    "model": {
        "num_classes": 2, "size": [8, 8, 1], "moe_layers": 1, "num_experts": 4, "top_k": 2, "shared_width": 16,
        "depth": 2, "hidden_size": 32, "prediction_type": "epsilon", "parameters_total": 9, "parameters_activated": 9,
    },
    "machine": {"processor": "one", "ditmoe": "0.1", "x-": "y"},
    "data": {"source": "images in a folder", "is_latent": False},
    "training": {"steps": 5, "batch_size": 2, "seconds": 1.0, "images_per_second": 10.0, "final_loss": 1.0},
    "sampling": {"num": 4, "sampler": "ddim", "steps": 2, "guidance": 1.5, "seed": 0, "seconds": 1.0},
    "experts": [{"layer": "block 1", "busiest": 1, "idle": 0, "bits_time": 0, "bits_class": 0, "bits_position": 0}],
    "classes": {"accuracy": 0.5, "real_accuracy": 0.9, "num_train": 9, "num_real": 9, "worst": ["shoes", 0.1]},
    "copies": {"share": 0.1, "real_share": 0.1, "definition": "near", "distance": 1.0, "real_distance": 1.0},
    "pixels": {"value": 1.0, "num_train": 9, "few_value": 2.0, "real_value": 1.0, "num_real": 9},
    "score": {"metric": "fd", "value": 1.0, "n_gen": 4, "n_ref": 4, "x-": {"x-": "path", "sha256": "abc"}, "l": ["m"]},
    "score_real": {"n_gen": 4, "value": 1.0},
}  # fmt: skip


def test_no_text_of_a_report_becomes_an_element():
    pictures = dict.fromkeys(page.CAPTIONS, b"png")
    config = {"data": {"path": "photos"}, "x-": ["y"]}
    plain = Structure(page.render(REPORT, pictures, config))
    attacked = Structure(page.render(with_attack(REPORT), pictures, with_attack(config)))
    assert attacked.found == plain.found
    assert attacked.text.count(ATTACK) >= 20


def test_names_of_folders_and_classes_stay_text(tmp_path):
    names = ["<script>alert(1)<", "a\" onload='alert(1)", "<img src=x onerror=alert(1)>", "$\\bad{$", "two\nlines"]
    run = save_run(tmp_path / "<b onclick='x'>\"$\\bad{$", names, f"python train.py '{ATTACK}'")
    report.write(run, judge=judge.judge)
    harmless = save_run(tmp_path / "plain/run", [f"class {i}" for i in range(len(names))], "python train.py")
    report.write(harmless, judge=judge.judge)
    attacked, plain = (Structure((r / "index.html").read_text()) for r in (run, harmless))
    assert attacked.found == plain.found
    assert attacked.text.count(ATTACK) == 2
    assert attacked.text.count(run.name) >= 2
    assert pipeline.load(run).id2label == dict(enumerate(sorted(names)))
