"""The Inception-v3 of 2015 that FID, sFID and the Inception Score are defined by, and TensorFlow 1's resize.

It is the graph of `inception-2015-12-05.tgz` (Szegedy et al., 2016, arXiv:1512.00567), not torchvision's model:
1008 classes, average pools that leave the padding out, and a maximum in the last block where the paper averages.

Shapes: N batch, C channels, H W size.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.inception import BasicConv2d, InceptionA, InceptionB, InceptionC, InceptionD, InceptionE

NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7  # ADM's sFID: the first 7 of 192


def tf1_bilinear(images: Tensor, side: int) -> Tensor:
    """TensorFlow 1's `ResizeBilinear` of float32 (N, C, H, W) to (N, C, side, side).

    With its defaults, align_corners and half_pixel_centers false, output pixel i lies at i * size / side of the input
    and is interpolated between that place's two neighbours, so the image moves by up to half a pixel and nothing is
    smoothed when it shrinks. The arithmetic is float32 in TensorFlow's order: weights, then columns, then rows.
    """
    return _interpolate(_interpolate(images, 3, side), 2, side)


def _interpolate(x: Tensor, axis: int, side: int) -> Tensor:
    size = x.shape[axis]
    place = torch.arange(side, dtype=torch.float32, device=x.device) * (size / side)
    low = place.long()
    weight = (place - low).view([side if i == axis else 1 for i in range(x.ndim)])
    near, far = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=size - 1))
    return near + (far - near) * weight


def average_pool(x: Tensor) -> Tensor:
    """x (N, C, H, W), same shape: mean over 3x3 of the pixels that exist, for TensorFlow does not count its padding."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    """x (N, C, H, W), same shape: maximum over 3x3."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


class BlockA(InceptionA):  # type: ignore[misc]
    """The block of the 35x35 maps, with TensorFlow's average pool."""

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, 35, 35) -> (N, 224 + pool_features, 35, 35)."""
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(average_pool(x))], dim=1)


class BlockC(InceptionC):  # type: ignore[misc]
    """The block of the 17x17 maps (figure 6 of the paper, n = 7), with TensorFlow's average pool."""

    def forward(self, x: Tensor) -> Tensor:
        """x (N, 768, 17, 17) -> (N, 768, 17, 17); channels 0 to 191 are branch1x1's."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), seven, twice, self.branch_pool(average_pool(x))], dim=1)


class BlockE(InceptionE):  # type: ignore[misc]
    """The block of the 8x8 maps (figure 7 of the paper); `pool` makes the input of the pooled branch."""

    def __init__(self, width_in: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__(width_in)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, 8, 8) -> (N, 2048, 8, 8)."""
        three = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        split = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        split += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]
        return torch.cat([self.branch1x1(x), *split, self.branch_pool(self.pool(x))], dim=1)


class Inception2015(nn.Module):
    """The network, with the tensor names of pytorch-fid's and torch-fidelity's weight file (566 tensors)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, kernel_size=3)
        self.Mixed_5b = BlockA(192, pool_features=32)
        self.Mixed_5c = BlockA(256, pool_features=64)
        self.Mixed_5d = BlockA(288, pool_features=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = BlockC(768, channels_7x7=128)
        self.Mixed_6c = BlockC(768, channels_7x7=160)
        self.Mixed_6d = BlockC(768, channels_7x7=160)
        self.Mixed_6e = BlockC(768, channels_7x7=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = BlockE(1280, average_pool)
        self.Mixed_7c = BlockE(2048, max_pool)
        self.fc = nn.Linear(2048, NUM_CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the scores are made of, float32, of x float32 (N, 3, 299, 299), pixels as (value - 128) / 128.

        For FID pool (N, 2048), TensorFlow's pool_3:0; for sFID (N, 2023), the first 7 channels of mixed_6/conv:0 as
        (17, 17, 7); for the Inception Score logits (N, 1008), softmax/logits/MatMul, so without the bias.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)  # (N, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)  # (N, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (N, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (N, 768, 17, 17)
        # TensorFlow lays images out as NHWC, and sFID's covariance compares vectors in that order.
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7a(self.Mixed_6e(x))  # (N, 1280, 8, 8)
        pool = self.Mixed_7c(self.Mixed_7b(x)).mean(dim=(2, 3))
        return pool, spatial, F.linear(pool, self.fc.weight)
