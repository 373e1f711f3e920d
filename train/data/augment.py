"""Random changes of images: small affine ones for writing, larger ones and colours for names.

Each change is made of numbers already drawn, so that who holds a part of a batch takes its part of them.
Read after folder.py. Shapes: N or B images [.., C, H, W] in -1..1, white being 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# ----------------------------------------------------------------------------------------------------- affine


def jitter(pictures: torch.Tensor, generator: torch.Generator, degrees: float = 3.0, translate: float = 0.03,
           scale: float = 0.05, shear: float = 3.0, flip: bool = False) -> torch.Tensor:
    """A small random affine change, another for each picture [N, C, H, W]; white (1.0) comes in from outside.

    Each amount is drawn evenly from -limit..limit: `degrees` of rotation, `translate` as a share of the side,
    `scale` as the log of the factor, `shear` in degrees. Mirrors half of them only if `flip`: a mirrored
    glyph is no glyph. `generator` is a CPU one, so that one seed gives one result on every device.
    """
    return affine(pictures, torch.rand(len(pictures), 6, generator=generator), degrees, translate, scale,
                  shear, flip)


def affine(pictures: torch.Tensor, u: torch.Tensor, degrees: float = 3.0, translate: float = 0.03,
           scale: float = 0.05, shear: float = 3.0, flip: bool = False) -> torch.Tensor:
    """`jitter` by numbers already drawn, u [N, 6] in 0..1: who holds a part of a batch takes its part of
    them."""
    n, _, height, width = pictures.shape
    u = u * 2 - 1                                                                            # [N, 6] in -1..1
    angle, slant = (u[:, 0] * math.radians(degrees)), torch.tan(u[:, 1] * math.radians(shear))
    zoom = torch.exp(-u[:, 2] * scale)  # the map goes from output to input: a larger glyph samples closer
    mirror = torch.where(u[:, 5] < 0, -1.0, 1.0) if flip else torch.ones(n)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack([                       # rotation @ shear, in units where a pixel is square
        torch.stack([cos * mirror, (cos * slant - sin) * (height / width), u[:, 3] * 2 * translate], dim=1),
        torch.stack([sin * mirror * (width / height), sin * slant + cos, u[:, 4] * 2 * translate], dim=1),
    ], dim=1).to(pictures.device, pictures.dtype)                                            # [N, 2, 3]
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)                   # [N, H, W, 2]
    # white is 1 and grid_sample fills with 0: shift white to 0 and back
    return F.grid_sample(pictures - 1, grid, padding_mode="zeros", align_corners=False) + 1


# ----------------------------------------------------------------------------------------- affine and colours

# How far the views of train_clip differ: enough that a handful of images is not learned pixel by pixel
DEGREES, TRANSLATE, SCALE, SHEAR = 12, 0.06, 0.2, 8         # of `affine`
GAIN, CHANNEL_GAIN = 0.35, 0.15     # how much more or less ink, of all channels and of each
GREY, GREY_BIAS = 0.35, 0.3         # up to 0.35 * 1.3 towards grey, a third of the images not at all
BLURRED_ABOVE = 0.5                 # of a number in -1..1: a quarter of the images


class View(NamedTuple):
    """The random numbers of each image's view."""

    moves: Tensor       # [B, 6] in 0..1, of affine
    colours: Tensor     # [B, 8] in -1..1
    hues: Tensor        # [B, 3, 3], standard normal; [B, 0] without changes of hue

    def rows(self, own: slice) -> View:
        """One process's part of a view drawn for the whole batch."""
        return View(*(numbers[own] for numbers in self))


def draw_view(count: int, hues: bool, generator: torch.Generator) -> View:
    """Numbers for `count` images, from a CPU generator; those of the hues are drawn only if asked for."""
    moves = torch.rand(count, 6, generator=generator)
    colours = torch.rand(count, 8, generator=generator) * 2 - 1
    return View(moves, colours, torch.randn(count, 3, 3, generator=generator) if hues
                else torch.empty(count, 0))


def augment(images: Tensor, view: View, hues: float = 0.0, flip: bool = False) -> Tensor:
    """[B, 3, S, S]: moved, turned, sheared, lighter or darker, of other colours.
    hues: how far these turn, 0 to 1."""
    u = view.colours
    images = affine(images, view.moves, degrees=DEGREES, translate=TRANSLATE, scale=SCALE, shear=SHEAR,
                    flip=flip)
    # 0 on white paper, 1 on black
    ink = (1 - images) / 2
    # [B, 3]: of all, of each channel
    gain = 1 + GAIN * u[:, :1] + CHANNEL_GAIN * u[:, 1:4]
    grey = ink.mean(dim=1, keepdim=True)
    mix = (GREY * (u[:, 4] + GREY_BIAS).clamp_min(0))[:, None, None, None]
    ink = ((1 - mix) * ink + mix * grey) * gain[:, :, None, None]
    if hues:
        ink = turn_hues(ink, hues * view.hues)
    soft = F.avg_pool2d(ink, 3, stride=1, padding=1)
    ink = torch.where((u[:, 5] > BLURRED_ABOVE)[:, None, None, None], soft, ink)
    return (1 - 2 * ink.clamp(0, 1)).contiguous(memory_format=torch.channels_last)


def turn_hues(ink: Tensor, noise: Tensor) -> Tensor:
    """Mixes the inks [B, 3, S, S] of each image anew, by weights that sum to 1: grey stays grey.
    noise [B, new, old]."""
    mixing = torch.eye(3) + noise - noise.mean(dim=2, keepdim=True)
    return torch.einsum("bij,bjhw->bihw", mixing.to(ink.device), ink)
