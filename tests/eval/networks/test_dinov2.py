import hashlib
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from eval.networks import extractors
from eval.networks.dinov2 import DinoV2
from eval.networks.extractors import load_extractor

Tiny = partial(DinoV2, width=32, depth=2, heads=4)


def tiny_weights():
    """Weights that any NumPy draws alike, so far from zero that each of them shows in the features."""
    rng = np.random.RandomState(7)
    state = {}
    for name, like in sorted(Tiny().state_dict().items()):
        bound = math.sqrt(6 / like[0].numel()) if name.endswith("weight") and like.ndim > 1 else 1
        draw = (2 * rng.random_sample(tuple(like.shape)) - 1) * bound
        state[name] = torch.from_numpy(draw.astype(np.float32))
    return state


def tiny():
    net = Tiny()
    net.load_state_dict(tiny_weights())
    return net.eval()


def inputs(n, height, width):
    """A fixed float32 batch in [-2, 2], without symmetry."""
    i = np.arange(n * 3 * height * width, dtype=np.int64)
    values = ((i * i // 97 + 31 * i) % 251) / 62.5 - 2
    return torch.from_numpy(values.astype(np.float32).reshape(n, 3, height, width))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((224, 224), [0.780366, 0.813464, -0.503723, 0.722825, 0.723647, 6.629106]),
        ((518, 518), [0.765212, 0.813467, -0.522535, 0.720800, 0.722211, 6.656942]),
        ((28, 98), [0.884120, 0.774416, -0.500190, 0.716650, 0.535277, 6.564073]),
    ],
)
def test_features_are_the_official_code_s(size, expected):
    """The numbers are those of facebookresearch/dinov2 at b8931f7 (its hub's arguments, same weights): the table
    resized to 16x16, taken as it is, and resized to 2x7."""
    with torch.inference_mode():
        features = tiny()(inputs(2, *size))
    assert features.shape == (2, 32)
    got = [*features[0, :3].tolist(), *features[1, -2:].tolist(), features.norm().item()]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_vit_large_has_the_published_tensors():
    """Names, shapes and count of dinov2_vitl14_pretrain.pth, which holds 304,368,640 parameters in 343 tensors."""
    with torch.device("meta"):
        state = DinoV2().state_dict()
    assert len(state) == 343
    assert sum(p.numel() for p in state.values()) == 304_368_640
    first_block = {k.removeprefix("blocks.0."): tuple(v.shape) for k, v in state.items() if k.startswith("blocks.0.")}
    assert first_block == {
        "norm1.weight": (1024,), "norm1.bias": (1024,), "norm2.weight": (1024,), "norm2.bias": (1024,),
        "attn.qkv.weight": (3072, 1024), "attn.qkv.bias": (3072,),
        "attn.proj.weight": (1024, 1024), "attn.proj.bias": (1024,),
        "mlp.fc1.weight": (4096, 1024), "mlp.fc1.bias": (4096,),
        "mlp.fc2.weight": (1024, 4096), "mlp.fc2.bias": (1024,),
        "ls1.gamma": (1024,), "ls2.gamma": (1024,),
    }  # fmt: skip
    others = {k: tuple(v.shape) for k, v in state.items() if not k.startswith("blocks.")}
    assert others == {
        "cls_token": (1, 1, 1024), "pos_embed": (1, 1370, 1024), "mask_token": (1, 1024),
        "patch_embed.proj.weight": (1024, 3, 14, 14), "patch_embed.proj.bias": (1024,),
        "norm.weight": (1024,), "norm.bias": (1024,),
    }  # fmt: skip


def test_the_extractor_prepares_images_as_edm2_does(tmp_path, monkeypatch):
    file = tmp_path / extractors.DINOV2_FILE
    torch.save(tiny_weights(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(extractors, "DINOV2_SHA256", digest)
    monkeypatch.setattr(extractors, "DinoV2", Tiny)
    state = torch.get_rng_state()
    net = load_extractor("dinov2-vitl14", file)
    assert torch.equal(torch.get_rng_state(), state)
    assert (net.name, net.version, net.sha256, net.num_features) == ("dinov2-vitl14", "1", digest, 32)
    assert net.resize == "torch bicubic, antialias, float32, to 224x224"
    assert not net.fid_named
    assert not any(p.requires_grad for p in net.parameters())

    images = (inputs(2, 300, 40) * 60 + 128).byte()
    got = net.features(images)
    assert got.spatial is None
    assert got.logits is None
    x = F.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x - mean.reshape(1, 3, 1, 1)) / std.reshape(1, 3, 1, 1)
    torch.testing.assert_close(got.pool, tiny()(x), rtol=1e-4, atol=1e-4)
    grey = images[:, :1]
    torch.testing.assert_close(net(grey), net(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
