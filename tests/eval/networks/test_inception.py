import hashlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from eval.networks import extractors
from eval.networks.extractors import Extractor, load_extractor
from eval.networks.inception import Inception2015, average_pool, max_pool, tf1_bilinear


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------ resize


@pytest.mark.parametrize(
    "size",
    [(28, 28), (32, 32), (64, 64), (256, 256), (299, 299), (512, 512), (298, 300), (40, 333), (600, 7), (1, 1)],
)
def test_resize_has_the_bits_of_torch_fidelity(size):
    grey_levels, any_floats = noise(1, 3, *size).float(), torch.randn(1, 2, *size)
    for images in (grey_levels, any_floats):
        expected = interpolate_bilinear_2d_like_tensorflow1x(images, size=(299, 299), align_corners=False)
        got = tf1_bilinear(images, 299)
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)


def test_resize_to_another_side_has_the_bits_of_torch_fidelity():
    images = torch.randn(2, 1, 50, 31)
    expected = interpolate_bilinear_2d_like_tensorflow1x(images, size=(17, 17), align_corners=False)
    assert torch.equal(tf1_bilinear(images, 17), expected)


def test_resize_samples_at_i_times_the_scale_and_repeats_the_last_pixel():
    image = torch.tensor([[[[0.0, 10.0], [100.0, 110.0]]]])
    rows = [[0, 5, 10, 10], [50, 55, 60, 60], [100, 105, 110, 110], [100, 105, 110, 110]]
    assert tf1_bilinear(image, 4).tolist() == [[rows]]


# ----------------------------------------------------------------------------- network


class Pair(NamedTuple):
    """Ours and torch-fidelity's, from one file of random weights."""

    file: Path
    ours: Extractor
    theirs: nn.Module
    state: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, like in Inception2015().state_dict().items():
        normal = torch.randn(like.shape, generator=generator) if like.ndim else like
        if like.ndim > 1:
            state[name] = normal * (2 / like[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = (normal * 0.3).exp()
        else:
            state[name] = normal * 0.3 if like.ndim else like
    file = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(state, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractors, "INCEPTION_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
        ours = load_extractor("inception-2015", file)
    layers = ["2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("random", layers, feature_extractor_weights_path=str(file))
    return Pair(file, ours, theirs, state)


@pytest.mark.parametrize("size", [(32, 32), (299, 299), (350, 120)])
def test_network_agrees_with_torch_fidelity_from_uint8_images_on(pair, size):
    """pool and logits from its outputs, spatial from TensorFlow's mixed_6/conv, which is its Mixed_6d.branch1x1."""
    images, taken = noise(2, 3, *size), []
    handle = pair.theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, out: taken.append(out.clone()))
    with torch.inference_mode():
        (pool, logits), got = pair.theirs(images), pair.ours.features(images)
    handle.remove()
    assert [tuple(x.shape) for x in got] == [(2, 2048), (2, 2023), (2, 1008)]
    assert {x.dtype for x in got} == {torch.float32}
    relu = taken[0]
    assert relu.shape == (2, 192, 17, 17)
    spatial = torch.stack([relu[:, c, h, w] for h in range(17) for w in range(17) for c in range(7)], dim=1)
    for ours, theirs in zip(got, (pool, spatial, logits), strict=True):
        assert (theirs[0] - theirs[1]).abs().max() > 0.01 * theirs.abs().max()  # the images differ, and it shows
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_grey_and_batch_mates(pair):
    grey = noise(3, 1, 20, 30)
    with torch.inference_mode():
        together = pair.ours.features(grey)
        colour = pair.ours.features(grey[1:2].expand(-1, 3, -1, -1))
    for x, y in zip(together, colour, strict=True):
        torch.testing.assert_close(x[1:2], y, rtol=1e-3, atol=1e-4 * float(x.abs().max()))


def test_the_logits_have_no_bias(pair):
    with torch.inference_mode():
        got = pair.ours.features(noise(1, 3, 8, 8))
    weight = pair.state["fc.weight"].double()
    torch.testing.assert_close(got.logits, (got.pool.double() @ weight.T).float(), rtol=1e-3, atol=1e-3)
    assert pair.state["fc.bias"].abs().max() > 0.5


def test_pools():
    ones = torch.ones(1, 1, 3, 4)
    assert torch.equal(average_pool(ones), ones)  # with the padding counted a corner would be 4/9
    ramp = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert max_pool(ramp).tolist() == [[[[5, 6, 7, 7], [9, 10, 11, 11], [9, 10, 11, 11]]]]
    assert average_pool(ramp)[0, 0, 0].tolist() == [2.5, 3, 4, 4.5]


# ------------------------------------------------------------------------------ weights


def test_the_file_has_the_published_tensors():
    """566 tensors in 95,628,359 bytes: 23.9 million numbers of 4 bytes and 0.2 MB of names."""
    state = Inception2015().state_dict()
    assert len(state) == 566
    numbers = sum(p.numel() for p in state.values() if p.is_floating_point())
    assert 95_628_359 - 250_000 < 4 * numbers < 95_628_359
    names = list(state)
    assert names[0] == "Conv2d_1a_3x3.conv.weight"
    assert names[-2:] == ["fc.weight", "fc.bias"]
    assert state["fc.weight"].shape == (1008, 2048)


def test_facts(pair):
    net = pair.ours
    assert (net.name, net.version, net.num_features) == ("inception-2015", "1", 2048)
    assert net.sha256 == hashlib.sha256(pair.file.read_bytes()).hexdigest()
    assert net.resize == "tf1-bilinear to 299x299"
    assert not any(p.requires_grad for p in net.parameters())
    assert not any(p.is_meta for p in net.state_dict().values())


def test_only_the_pinned_network_behind_tf1_s_resize_may_be_called_fid(pair, monkeypatch):
    assert not pair.ours.fid_named  # random weights
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", pair.ours.sha256)
    assert pair.ours.fid_named
    monkeypatch.setattr(pair.ours, "mode", "bilinear")
    assert not pair.ours.fid_named


@pytest.mark.parametrize("name", extractors.INCEPTION_FILES)
def test_torch_hub_s_folder_is_searched_under_both_names(pair, monkeypatch, tmp_path, name):
    monkeypatch.setattr(torch.hub, "_hub_dir", None, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", pair.ours.sha256)
    with pytest.raises(ValueError, match="finds no weights"):
        load_extractor("inception-2015")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / name).symlink_to(pair.file)
    net = load_extractor("inception-2015")
    assert torch.equal(net.net.fc.weight, pair.state["fc.weight"])


def test_the_pin_is_the_hash_in_the_published_names():
    assert len(extractors.INCEPTION_SHA256) == 64
    for name in extractors.INCEPTION_FILES:
        assert name.endswith(f"-{extractors.INCEPTION_SHA256[:8]}.pth")


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_other_tensors_are_refused(pair, monkeypatch, tmp_path, change):
    state = dict(pair.state)
    if change == "missing":
        del state["Mixed_7c.branch_pool.bn.running_var"]
    else:
        state["AuxLogits.fc.bias" if change == "extra" else "fc.bias"] = torch.zeros(1000)
    file = tmp_path / "weights.pth"
    torch.save(state, file)
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    with pytest.raises(RuntimeError, match=r"running_var|AuxLogits\.fc\.bias|size mismatch for fc\.bias"):
        load_extractor("inception-2015", file)
