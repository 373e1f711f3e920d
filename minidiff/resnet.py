"""The residual block and the two resamplers that the UNet and the VAE share.

Read after embeddings.py, before attention.py. Papers: Ho 2020, appendix B (the block); He 2016 (the skip).
Mirrors: diffusers' models/resnet.py, downsampling.py, upsampling.py.
Shapes: B batch, C channels, H W height and width, D width of the time embedding.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.embeddings import ACTIVATIONS


class ResnetBlock2D(nn.Module):
    """norm-act-conv twice around a skip; the time embedding enters between the two convolutions.

    x [B, in_channels, H, W], temb [B, temb_channels] or None -> [B, out_channels, H, W].
    """

    def __init__(self, in_channels: int, out_channels: int, temb_channels: int | None = None, *,
                 groups: int = 32, eps: float = 1e-6, act_fn: str = "silu", dropout: float = 0.0,
                 output_scale_factor: float = 1.0):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels is not None:
            self.time_emb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Identity()  # owns no parameters: as upstream, no keys where width is kept
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.act = ACTIVATIONS[act_fn]
        self.output_scale_factor = output_scale_factor

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """x [B, in_channels, H, W], temb [B, D] or None -> [B, out_channels, H, W]."""
        h = self.conv1(self.act(self.norm1(x)))                             # [B, out, H, W]
        if temb is not None:
            h = h + self.time_emb_proj(self.act(temb))[:, :, None, None]
        h = self.conv2(self.dropout(self.act(self.norm2(h))))
        return (self.conv_shortcut(x) + h) / self.output_scale_factor


class Downsample2D(nn.Module):
    """A strided convolution: [B, C, H, W] -> [B, C, ceil(H/2), ceil(W/2)] with padding 1.

    padding 0 pads one row and column below and to the right only, as the VAE's encoder was trained.
    """

    def __init__(self, channels: int, padding: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.pad = (0, 1, 0, 1) if padding == 0 else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> half the size; padding 0 rounds odd sizes down, padding 1 up."""
        return self.conv(x if self.pad is None else F.pad(x, self.pad))


class Upsample2D(nn.Module):
    """Nearest neighbours, then a convolution: [B, C, H, W] -> [B, C, *size], by default twice the size."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """size: (height, width) of the result, where it must meet a skip of odd size."""
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
