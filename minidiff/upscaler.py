"""Upscaler: doubles the side of images and cleans them, in one pass of a small UNet.

Read after unet.py, before text_to_image.py, which asks it last; train/train_upscaler.py trains it.
Papers: Ho 2021, "Cascaded diffusion models" (a second model for the larger image, trained on images made
worse as the first model makes them), Shi 2016 (pixel shuffle).
Mirrors: nothing upstream; the UNet is a plain UNet2DConditionModel.
Shapes: B batch, C image channels, S image size, f FOLD.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.weights import WeightsError
from minidiff.unet import UNet2DConditionModel

FOLD = 2                    # each f x f square of the small image becomes channels, each 2f x 2f of the large
STEEPNESS = 2.0             # of tanh: what is nearly ink becomes ink
WIDTHS = (32, 64)           # of the UNet's levels, at S/f and half of it


class Upscaler(nn.Module):
    """`upscaler(images)`: [B, C, S, S] in -1..1 -> [B, C, 2S, 2S]. S is even.

    What it adds to the smoothly enlarged image is all that is learned; tanh keeps the sum within -1..1,
    and ink and paper apart. The UNet sees no text, and the timestep 0 always.
    """

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, S, S] -> [B, C, 2S, 2S]."""
        folded = F.pixel_unshuffle(images, FOLD).contiguous(memory_format=torch.channels_last)
        detail = F.pixel_shuffle(self.unet(folded, 0).sample, 2 * FOLD)
        smooth = F.interpolate(images, scale_factor=2.0, mode="bilinear", align_corners=False)
        return torch.tanh(STEEPNESS * (smooth + detail))

    def save(self, folder: str | Path) -> None:
        """A folder that diffusers opens as a UNet2DConditionModel."""
        self.unet.save_pretrained(folder)

    @classmethod
    def load(cls, folder: str | Path, channels: int) -> Upscaler:
        """channels: of the images. Raises WeightsError or ConfigError with one line that names the file."""
        unet = UNet2DConditionModel.from_pretrained(folder)
        found, wanted = (unet.config.in_channels, unet.config.out_channels), folded_channels(channels)
        if found != wanted:
            raise WeightsError(f"{folder}: in_channels, out_channels = {found}; the upscaler of images of "
                               f"{channels} channels has {wanted}")
        if any(map(unet.config.attends, range(len(unet.config.block_out_channels)))):
            raise WeightsError(f"{folder}: a UNet that attends to a text; an upscaler is given none")
        return cls(unet).eval()


def folded_channels(channels: int) -> tuple[int, int]:
    """Of the UNet, in and out, for images of so many channels."""
    return channels * FOLD**2, channels * (2 * FOLD)**2


def build_upscaler(channels: int) -> Upscaler:
    """A fresh one, of 0.56 million parameters for grey images."""
    channels_in, channels_out = folded_channels(channels)
    return Upscaler(UNet2DConditionModel(
        in_channels=channels_in, out_channels=channels_out, block_out_channels=WIDTHS, layers_per_block=1,
        down_block_types=["DownBlock2D"] * len(WIDTHS), up_block_types=["UpBlock2D"] * len(WIDTHS),
        mid_block_type="UNetMidBlock2D", norm_num_groups=8))
