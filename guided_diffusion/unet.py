"""The U-Net of DDPM with the improvements of IDDPM (arXiv 2102.09672) and ADM (arXiv 2105.05233).

The state dict has the names, shapes and order of the public guided-diffusion checkpoints.
"""

from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from guided_diffusion.nn import PointwiseConv, normalization, timestep_embedding, zero_module


class Upsample(nn.Module):
    """(N, C, H, W) -> (N, C, 2H, 2W): nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(_double(x))


class Downsample(nn.Module):
    """(N, C, H, W) -> (N, C, H/2, W/2): a 3x3 convolution with stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """A residual block conditioned on the time embedding; `resample` is None, "up" or "down".

    x: (N, in_channels, H, W), emb: (N, emb_channels) -> (N, out_channels, H', W'), H' = H, 2H or H/2.
    With `use_scale_shift_norm` the embedding scales and shifts the second norm's output (ADM, sec. 3); otherwise it is
    added before that norm.
    """

    def __init__(
        self, in_channels: int, out_channels: int, emb_channels: int, *, dropout: float = 0.0,
        use_scale_shift_norm: bool = False, use_checkpoint: bool = False, resample: str | None = None,
    ):  # fmt: skip
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        self.resample = {None: None, "up": _double, "down": partial(F.avg_pool2d, kernel_size=2)}[resample]
        self.in_layers = nn.Sequential(
            normalization(in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        emb_out = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_out))
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        norm, act, conv = self.in_layers
        h = act(norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(h)
        emb_out = self.emb_layers(emb)[:, :, None, None]  # (N, out or 2 * out, 1, 1)
        norm, *rest = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = emb_out.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + emb_out)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Residual self-attention between all positions of a feature map: (N, C, H, W) -> (N, C, H, W).

    The 3C outputs of `qkv` are ordered (heads, qkv, C / heads), as in the first public checkpoints, or with `new_order`
    (qkv, heads, C / heads).
    """

    def __init__(self, channels: int, num_heads: int, *, new_order: bool = False, use_checkpoint: bool = False):
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ValueError(
                f"got {num_heads} heads for attention over {channels} channels, expected a divisor; "
                "give another num_heads or num_head_channels"
            )
        self.num_heads = num_heads
        self.new_order = new_order
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = PointwiseConv(channels, 3 * channels)
        self.proj_out = zero_module(PointwiseConv(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (N, T, C)
        qkv = self.qkv(tokens)  # (N, T, 3C)
        if self.new_order:
            qkv = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        else:
            qkv = qkv.unflatten(2, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        q, k, v = qkv  # each (N, heads, T, C / heads)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (N, T, C)
        return x + self.proj_out(mixed).transpose(1, 2).unflatten(2, (height, width))


class Stage(nn.Sequential):
    """Layers in sequence. Residual blocks also get the time embedding."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNetModel(nn.Module):
    """The U-Net that predicts the noise or x_0.

    image_size: side of the training images in pixels (H and W must be divisible by 2 ** (levels - 1)).
    model_channels: base width. channel_mult: its factor for each level, finest first.
    attention_resolutions: downsampling factors (1, 2, 4, ...) of the levels with attention after each residual block.
    num_classes: number of classes; None for an unconditional network.
    num_head_channels: channels per head; -1 uses `num_heads` heads everywhere.
    num_heads_upsample: heads of the decoder; -1 means `num_heads`.
    resblock_updown: residual blocks change the resolution (ADM, sec. 3), instead of single convolutions.
    use_checkpoint: recompute activations in the backward pass, for less memory and more time.
    `model.to(torch.bfloat16)` runs the network in bf16: activations have the dtype of the weights, outputs that of x.
    Raises ValueError for settings that do not fit together.
    """

    def __init__(
        self, *, image_size: int, in_channels: int, model_channels: int, out_channels: int, num_res_blocks: int,
        attention_resolutions: Collection[int], dropout: float, channel_mult: Sequence[float], num_classes: int | None,
        use_checkpoint: bool, num_heads: int, num_head_channels: int, num_heads_upsample: int,
        use_scale_shift_norm: bool, resblock_updown: bool, use_new_attention_order: bool,
    ):  # fmt: skip
        super().__init__()
        widths = _level_widths(image_size, model_channels, channel_mult, num_res_blocks)
        self.out_channels = out_channels
        self.model_channels = model_channels
        self.num_classes = num_classes
        self.downsampling = 2 ** (len(widths) - 1)
        emb_channels = 4 * model_channels
        encoder_heads, decoder_heads = num_heads, num_heads if num_heads_upsample == -1 else num_heads_upsample

        res = partial(ResBlock, emb_channels=emb_channels, dropout=dropout, use_checkpoint=use_checkpoint,
                      use_scale_shift_norm=use_scale_shift_norm)  # fmt: skip

        def attend(channels: int, heads: int) -> AttentionBlock:
            if num_head_channels != -1:
                if num_head_channels < 1 or channels % num_head_channels:
                    raise ValueError(
                        f"got num_head_channels {num_head_channels}, expected a divisor of the {channels} channels of "
                        "an attention block; give one, or -1 to use num_heads"
                    )
                heads = channels // num_head_channels
            return AttentionBlock(channels, heads, new_order=use_new_attention_order, use_checkpoint=use_checkpoint)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)

        channels = widths[0]
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(in_channels, channels, 3, padding=1))])
        skips = [channels]  # widths of the encoder's outputs, which the decoder uses in reverse
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers: list[nn.Module] = [res(channels, width)]
                channels = width
                if 2**level in attention_resolutions:
                    layers.append(attend(channels, encoder_heads))
                self.input_blocks.append(Stage(*layers))
                skips.append(channels)
            if level + 1 < len(widths):
                down = res(channels, channels, resample="down") if resblock_updown else Downsample(channels)
                self.input_blocks.append(Stage(down))
                skips.append(channels)

        self.middle_block = Stage(res(channels, channels), attend(channels, encoder_heads), res(channels, channels))

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for block in range(num_res_blocks + 1):
                layers = [res(channels + skips.pop(), width)]
                channels = width
                if 2**level in attention_resolutions:
                    layers.append(attend(channels, decoder_heads))
                if level > 0 and block == num_res_blocks:
                    up = res(channels, channels, resample="up") if resblock_updown else Upsample(channels)
                    layers.append(up)
                self.output_blocks.append(Stage(*layers))

        self.out = nn.Sequential(
            normalization(channels), nn.SiLU(), zero_module(nn.Conv2d(channels, out_channels, 3, padding=1))
        )

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """Predict from noised images x_t.

        x: (N, in_channels, H, W); timesteps: (N,); y: (N,) int64 labels in [0, num_classes), None for an unconditional
        network.
        Returns (N, out_channels, H, W) in the dtype of x. Raises ValueError if y is missing, or given to an
        unconditional network, and for image sides that the network cannot halve.
        """
        if (y is None) != (self.num_classes is None):
            got = "no labels y for a conditional" if y is None else "labels y for an unconditional"
            raise ValueError(f"got {got} network; give y if and only if class_cond is set")
        if x.shape[2] % self.downsampling or x.shape[3] % self.downsampling:
            raise ValueError(
                f"got images of {x.shape[2]}x{x.shape[3]} pixels, expected multiples of {self.downsampling}; "
                "give images of the network's size"
            )
        dtype = self.time_embed[0].weight.dtype
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        h = x.to(dtype)
        skips = []
        for stage in self.input_blocks:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h).to(x.dtype)


def _double(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _level_widths(image_size: int, channels: int, channel_mult: Sequence[float], num_res_blocks: int) -> list[int]:
    """Return the width of each level. Raises ValueError for settings that do not fit together."""
    if num_res_blocks < 1:
        raise ValueError(f"got num_res_blocks {num_res_blocks}, expected 1 or more")
    if not channel_mult:
        raise ValueError("got an empty channel_mult, expected one factor per level, as in 1,2,2")
    multiple = 2 ** (len(channel_mult) - 1)
    if image_size % multiple:
        raise ValueError(
            f"got channel_mult of {len(channel_mult)} levels, which halve {image_size} pixels {len(channel_mult) - 1} "
            f"times; give fewer levels or a multiple of {multiple} pixels"
        )
    exact = [factor * channels for factor in channel_mult]
    widths = [round(width) for width in exact]
    if any(width < 1 or abs(width - wanted) > 1e-6 for width, wanted in zip(widths, exact, strict=True)):
        raise ValueError(
            f"got channel_mult {tuple(channel_mult)} and num_channels {channels}, expected a whole positive number of "
            "channels at every level; give another of either"
        )
    return widths
