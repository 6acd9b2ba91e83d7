"""EfficientNet-Lite0 up to its pooled features (Tan and Le, 2019, arXiv:1905.11946, in its "lite" variant).

Shapes: N batch, C channels, H W size.
"""

from torch import Tensor, nn
from torch.nn import functional as F

# (blocks, kernel, stride of the first block, expansion, output width): Tan and Le, 2019, table 1,
# in its "lite" form: no squeeze-and-excitation, ReLU6 for swish.
LITE0_STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip


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
        parts, width = [conv_bn(3, 32, 3, stride=2), nn.ReLU6()], 32
        for blocks, kernel, stride, expand, width_out in LITE0_STAGES:
            for i in range(blocks):
                parts.append(MBConv(width, width_out, kernel, stride if i == 0 else 1, expand))
                width = width_out
        self.features = nn.Sequential(*parts, conv_bn(width, 1280), nn.ReLU6())

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 3, H, W) float -> pooled features (N, 1280)."""
        pooled: Tensor = self.features(x).mean(dim=(2, 3))
        return pooled
