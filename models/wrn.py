"""Wide residual networks (Zagoruyko & Komodakis 2016, arXiv 1605.07146), without dropout."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FIRST = 16  # channels of the first convolution, and of the first group before widening


class WideBlock(nn.Module):
    """B(3, 3): batch norm, ReLU and 3x3 convolution, twice, added to the input.

    If channels or resolution change, a 1x1 convolution of the first activation replaces the input in the sum.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        changes = in_channels != out_channels or stride != 1
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        x = x if self.shortcut is None else self.shortcut(h)
        return x + self.conv2(F.relu(self.bn2(self.conv1(h))))


class WideResNet(nn.Module):
    """WRN-depth-widen: a convolution, three groups of blocks at strides 1, 2 and 2 (table 1), batch norm and ReLU.

    Args:
        depth: 6 n + 4 for n blocks per group.
        widen: k; the groups have 16 k, 32 k and 64 k channels, and `feature_dim` is 64 k.
        generator: CPU generator of the initial weights (He et al. 2015, fan out); torch's global one if None.

    Raises:
        ValueError: depth is not 6 n + 4, or widen is below 1.
    """

    def __init__(self, depth: int = 28, widen: int = 10, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth is {depth}, expected 6 n + 4, as 10, 16, 22 or 28")
        if widen < 1:
            raise ValueError(f"widen is {widen}, expected at least 1: the paper's best is 10")
        self.feature_dim = 4 * _FIRST * widen
        self.conv = nn.Conv2d(3, _FIRST, 3, padding=1, bias=False)
        groups, channels = [], _FIRST
        for width, stride in ((_FIRST * widen, 1), (2 * _FIRST * widen, 2), (4 * _FIRST * widen, 2)):
            others = [WideBlock(width, width, 1) for _ in range((depth - 4) // 6 - 1)]
            groups.append(nn.Sequential(WideBlock(channels, width, stride), *others))
            channels = width
        self.groups = nn.Sequential(*groups)
        self.bn = nn.BatchNorm2d(channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)

    def map_side(self, size: int) -> int:
        """Return the side of the feature map of images with `size` pixels a side."""
        return -(-size // 4)

    def forward(self, images: Tensor) -> Tensor:
        """Return the map (N, 64 widen, H', W'), H' = H / 4 rounded up, of images (N, 3, H, W), float in [-1, 1]."""
        return F.relu(self.bn(self.groups(self.conv(images))))
