"""The backbones that --backbone can name. To add one, write its class and add a line to `BACKBONES`.

A backbone is a `torch.nn.Module`:

- `forward`: images (N, 3, H, W), float32 in [-1, 1], RGB -> a feature map (N, D, H', W'), float, for any H = W that
  the backbone accepts. In eval mode an image's map depends on no other image.
- `feature_dim`: D. `map_side(size)`: H' = W' for images with `size` pixels a side.
- Initial weights come from the generator given to `build`, so they depend on --seed alone. Random numbers in training
  come from the attribute `generator`, which the training code sets to one on the device of the images.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.conv4 import Conv4
from models.resnet12 import resnet12
from models.timm_backbone import TimmBackbone
from models.wrn import WideResNet


@dataclass(frozen=True)
class Backbone:
    """How to build a backbone.

    Attributes:
        build: (drop_rate, generator) -> the module. drop_rate: share that DropBlock drops, in [0, 1). generator: CPU
            generator of the initial weights; torch's global one if None.
        about: a few words for --help.
        drops: whether the backbone has DropBlock; if not, drop_rate must be 0.
    """

    build: Callable[[float, torch.Generator | None], nn.Module]
    about: str
    drops: bool = False


BACKBONES: dict[str, Backbone] = {
    "conv4": Backbone(lambda drop_rate, generator: Conv4(generator=generator), "64 channels"),
    "resnet12": Backbone(
        lambda drop_rate, generator: resnet12(drop_rate, generator=generator), "512 channels, with DropBlock", True
    ),
    "wrn28-10": Backbone(lambda drop_rate, generator: WideResNet(28, 10, generator=generator), "640 channels, large"),
}
_TIMM = re.compile(r"timm:(\w[\w.]*)")  # a plain name, never an address that timm would download from


def is_known(name: Any) -> bool:
    """Return whether `name` is in `BACKBONES` or has the form timm:NAME."""
    return isinstance(name, str) and (name in BACKBONES or bool(_TIMM.fullmatch(name)))


def check(name: str) -> None:
    """Raise ValueError for an unknown name."""
    if not is_known(name):
        raise ValueError(
            f"backbone is '{name}', expected one of {', '.join(BACKBONES)}, or timm:NAME: choose one of these"
        )


def about() -> str:
    """Return the names of all backbones with a few words on each, for --help."""
    known = [f"{name} ({backbone.about})" for name, backbone in BACKBONES.items()]
    return f"{', '.join(known)}, or timm:NAME, a convolutional network of the package timm"


def build(name: str, *, drop_rate: float = 0.0, generator: torch.Generator | None = None) -> nn.Module:
    """Return the named backbone with random weights.

    drop_rate, generator: as for `Backbone.build`.
    Raises ValueError for an unknown name, a drop_rate that is out of range or given to a backbone without DropBlock,
    and if the package timm is missing or lacks the network.
    """
    check(name)
    known = BACKBONES.get(name)
    if drop_rate and not (known and known.drops):
        drops = " and ".join(each for each, backbone in BACKBONES.items() if backbone.drops)
        raise ValueError(f"drop_rate is {drop_rate} with {name}, expected 0: DropBlock is only in {drops}")
    if known:
        return known.build(drop_rate, generator)
    return TimmBackbone(_TIMM.fullmatch(name)[1], generator=generator)
