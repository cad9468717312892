"""Convolutional networks of the library timm as backbones, with random weights: pretrained ones have seen data."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn


class TimmBackbone(nn.Module):
    """The network `name` of timm without its head; `feature_dim` channels.

    Args:
        name: as timm lists it, such as resnet18.
        generator: CPU generator of the initial weights; torch's global one if None.

    Raises:
        ValueError: timm is not installed, or has no such network.
    """

    def __init__(self, name: str, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise ValueError(f"backbone is 'timm:{name}', which needs the package timm; pip install timm") from None
        if not timm.is_model(name):
            raise ValueError(f"backbone is 'timm:{name}', which timm {timm.__version__} lacks: give another name")
        # timm draws from the global generator
        with torch.random.fork_rng(devices=[]) if generator is not None else nullcontext():
            if generator is not None:
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device="cpu")))
            self.network = timm.create_model(name, pretrained=False, num_classes=0)
        self.feature_dim = self.network.num_features

    def forward(self, images: Tensor) -> Tensor:
        """Feature map (N, feature_dim, H', W') of images (N, 3, H, W), float in [-1, 1]."""
        return self.network.forward_features(images)
