"""Convolutional networks of the library timm as backbones. Weights are random, as pretrained ones have seen data."""

import copy

import torch
from torch import Tensor, nn


class TimmBackbone(nn.Module):
    """The timm network `name` without its head; its feature map has `feature_dim` channels.

    Args:
        name: name in timm, such as resnet18.
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
        with torch.random.fork_rng(devices=[], enabled=generator is not None):
            if generator is not None:
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device="cpu")))
            self.network = timm.create_model(name, pretrained=False, num_classes=0)
        self.name, self.feature_dim = name, self.network.num_features

    def map_side(self, size: int) -> int:
        """Return the side of the feature map of images with `size` pixels a side. Computes shapes only.

        Raises ValueError if the network rejects such images, or does not return (N, feature_dim, H', W').
        """
        given = f"backbone 'timm:{self.name}', for an image of {size} pixels"
        network = copy.deepcopy(self.network).to("meta").eval()
        try:
            with torch.no_grad():
                shape = tuple(network.forward_features(torch.zeros(1, 3, size, size, device="meta")).shape)
        except (AssertionError, RuntimeError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{given}, says: {why:.100}; give another backbone, or other --height") from None
        if len(shape) != 4 or shape[1] != self.feature_dim or not shape[2]:
            raise ValueError(f"{given}, gives {shape}, expected (1, {self.feature_dim}, H', W'); give another backbone")
        return shape[2]

    def forward(self, images: Tensor) -> Tensor:
        """Return the feature map (N, feature_dim, H', W') of images (N, 3, H, W), float in [-1, 1]."""
        return self.network.forward_features(images)
