"""ResNet-12, the residual backbone of few-shot learning (Lee et al. 2019, arXiv 1904.03758), with DropBlock."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SLOPE = 0.1  # of the leaky ReLUs


def drop_block(x: Tensor, rate: float, block_size: int, generator: torch.Generator | None = None) -> Tensor:
    """Zero square blocks and rescale the rest: DropBlock (Ghiasi et al. 2018, arXiv 1810.12890, algorithm 1).

    Blocks are wholly inside the map and differ for each channel of each image. In a map smaller than a block, the
    blocks shrink to the map's shorter side. Rescaling divides by the share of positions kept.

    Args:
        x: (N, C, H, W), float.
        rate: expected share of dropped positions, in [0, 1), ignoring overlap of blocks (equation 1).
        block_size: side of a block in positions of the map.
        generator: on the device of x; torch's global one if None.

    Returns:
        (N, C, H, W), the dtype of x.
    """
    if rate == 0:
        return x
    n, c, h, w = x.shape
    size = min(block_size, h, w)
    seeds_h, seeds_w = h - size + 1, w - size + 1
    gamma = rate / size**2 * (h * w) / (seeds_h * seeds_w)
    seeds = torch.rand(n, c, seeds_h, seeds_w, device=x.device, generator=generator) < gamma
    # A seed is the upper left corner of its block: dilating it to the lower right fills in the block.
    dropped = F.max_pool2d(F.pad(seeds.float(), [size - 1] * 4), size, stride=1)
    kept = 1 - dropped
    return x * (kept / kept.mean().clamp(min=1e-6)).to(x.dtype)


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions plus a 1x1 shortcut, then a 2x2 max pool that rounds up."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv3 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.bn1(self.conv1(x)), _SLOPE)
        h = F.leaky_relu(self.bn2(self.conv2(h)), _SLOPE)
        h = F.leaky_relu(self.bn3(self.conv3(h)) + self.downsample(x), _SLOPE)
        return F.max_pool2d(h, 2, ceil_mode=True)


class ResNet12(nn.Module):
    """Four residual blocks; DropBlock after the last two, in train mode only.

    Attributes:
        feature_dim: channels of the output.
        drop_rate: share that DropBlock drops; may change during training (the paper raises it slowly from 0).
        generator: DropBlock's generator, on the device of the images; torch's global one if None.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        widths: tuple[int, int, int, int] = (64, 128, 256, 512),
        drop_rate: float = 0.0,
        drop_block_size: int = 5,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate is {drop_rate}, expected a share in [0, 1): 0 turns DropBlock off")
        if drop_block_size < 1:
            raise ValueError(f"drop_block_size is {drop_block_size}, expected at least 1: the default is 5")
        self.feature_dim = widths[-1]
        self.drop_rate = drop_rate
        self.drop_block_size = drop_block_size
        self.generator: torch.Generator | None = None
        self.layer1 = nn.Sequential(ResidualBlock(in_channels, widths[0]))
        self.layer2 = nn.Sequential(ResidualBlock(widths[0], widths[1]))
        self.layer3 = nn.Sequential(ResidualBlock(widths[1], widths[2]))
        self.layer4 = nn.Sequential(ResidualBlock(widths[2], widths[3]))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, _SLOPE, mode="fan_out", nonlinearity="leaky_relu", generator=generator
                )

    def map_side(self, size: int) -> int:
        """Return the side of the feature map of images with `size` pixels a side."""
        return -(-size // 16)

    def forward(self, images: Tensor) -> Tensor:
        """Return the map (N, widths[-1], H', W'), H' = H / 16 rounded up, of images (N, 3, H, W), float in [-1, 1]."""
        h = self.layer2(self.layer1(images))
        h = self._drop(self.layer3(h))
        return self._drop(self.layer4(h))

    def _drop(self, x: Tensor) -> Tensor:
        return drop_block(x, self.drop_rate, self.drop_block_size, self.generator) if self.training else x


def resnet12(
    drop_rate: float = 0.0,
    drop_block_size: int = 5,
    *,
    in_channels: int = 3,
    generator: torch.Generator | None = None,
) -> ResNet12:
    """Return a ResNet-12 with widths 64, 128, 256 and 512.

    Args:
        drop_rate: share of positions that DropBlock drops in the last two stages, in [0, 1).
        drop_block_size: side of a dropped block, in positions of the map.
        in_channels: channels of the images.
        generator: CPU generator of the initial weights (He et al. 2015, fan out); torch's global one if None.

    Raises:
        ValueError: drop_rate or drop_block_size out of range.
    """
    return ResNet12(in_channels, drop_rate=drop_rate, drop_block_size=drop_block_size, generator=generator)
