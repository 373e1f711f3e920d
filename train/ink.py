"""How ink sits on paper: it sinks in, bleeds along the fibres, gathers at the edge; and the halo under it.

Read after brushwork.py, before paint.py.
Shapes: h height, w width of a part of the painting; rgb float32 [3, h, w] and ink float32 [h, w] in 0..1.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from .brushwork import cloud, smoothstep

DENSITY = np.array([1.75, 1.85, 1.98], np.float32)      # of full ink, for red, green and blue: a warm black
FAINT = 1 / 128             # less ink than this is none
DARKEST = 62.0              # L* of paper on which ink stands out by 45 L* and a little more without a halo
PAPER = 74.0                # L* of paper that a halo may at most turn dark places into
CALM = 9.0                  # the spread of L* from which on paper is called busy
BROAD = 6.0                 # pixels; wider blurs are made on a smaller picture


def blur(values: np.ndarray, sigma: float) -> np.ndarray:
    """[h, w] under a Gaussian of so many pixels, its edges continued."""
    x = torch.from_numpy(np.array(values, np.float32))[None, None]
    step = max(1, int(2 * sigma / BROAD)) if sigma > BROAD else 1
    step = min(step, *values.shape)
    if step > 1:
        x = F.avg_pool2d(x, step, ceil_mode=True, count_include_pad=False)
    reach = max(1, int(np.ceil(3 * sigma / step)))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) * step / sigma)**2)
    kernel = kernel / kernel.sum()
    x = F.conv2d(F.pad(x, [reach, reach, 0, 0], "replicate"), kernel[None, None, None])
    x = F.conv2d(F.pad(x, [0, 0, reach, reach], "replicate"), kernel[None, None, :, None])
    if step > 1:
        x = F.interpolate(x, values.shape, mode="bilinear", align_corners=False)
    return x[0, 0].numpy()


def lightness(rgb: np.ndarray) -> np.ndarray:
    """CIE L* (0 black .. 100 white) of sRGB [3, ...] in 0..1."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055)**2.4)
    y = np.tensordot(np.array([0.2126, 0.7152, 0.0722]), linear, 1)
    return np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)


def soaked(ink: np.ndarray, rgb: np.ndarray, rng: np.random.Generator, bleed: float) -> np.ndarray:
    """The density of ink [h, w] once it has sunk into the paper; `bleed`: how many pixels it runs."""
    frayed = blur(warped(ink, rng, bleed), 0.45 * bleed)
    grain = rgb.mean(0)
    grain = grain - blur(grain, 2.0 * bleed + 1)
    grain = np.clip(grain / max(0.02, 2 * float(grain.std())), -1, 1)
    edge = 4 * frayed * np.clip(1 - blur(frayed, 1.6 * bleed + 0.4), 0, 0.5)
    pooled = 1 + 0.07 * cloud(rng, ink.shape, (24 * bleed + 4, 24 * bleed + 4), 0.5, 4 * bleed)
    density = frayed * (pooled - grain * (0.07 + 0.25 * (1 - frayed))) + 0.12 * edge
    return np.where(frayed < FAINT, 0, np.clip(density, 0, 1.3)).astype(np.float32)


def warped(ink: np.ndarray, rng: np.random.Generator, bleed: float) -> np.ndarray:
    """The ink moved by up to about `bleed` pixels along threads, so that its outline is not smooth."""
    h, w = ink.shape
    fine, long = 3 * bleed + 0.5, 12 * bleed + 1
    dx = cloud(rng, (h, w), (fine, long), 0, 1) * 0.35 * bleed                       # along the weft
    dy = cloud(rng, (h, w), (long, fine), 0, 1) * 0.35 * bleed                       # and along the warp
    x, y = np.arange(w) + 0.5 + dx, np.arange(h)[:, None] + 0.5 + dy
    grid = torch.from_numpy(np.stack([2 * x / w - 1, 2 * y / h - 1], 2).astype(np.float32))
    source = torch.from_numpy(np.ascontiguousarray(ink, np.float32))
    return F.grid_sample(source[None, None], grid[None], align_corners=False)[0, 0].numpy()


def inked(rgb: np.ndarray, density: np.ndarray) -> np.ndarray:
    """The paper [3, h, w] under ink of this density [h, w]: what is painted there shines through."""
    return rgb * np.exp(-DENSITY[:, None, None] * density)


def halo_of(ink: np.ndarray, rgb: np.ndarray, side: float) -> tuple[np.ndarray, np.ndarray]:
    """Its weight [h, w] and the paper [3, h, w] once it is lifted, where dark or busy paper hides the ink.

    side: of a character, in pixels. On light and calm paper the weight is 0.
    """
    near = ink > 0.3
    if not near.any():
        return np.zeros_like(ink), rgb
    around = blur(near.astype(np.float32), 0.05 * side) > 0.05
    tones = lightness(rgb[:, around])
    dark = np.percentile(tones, 10)
    strength = np.clip(max((DARKEST - dark) / max(1.0, PAPER - dark), (tones.std() - CALM) / 14), 0, 0.9)
    weight = strength * smoothstep(0.03, 0.92, blur(block(near, int(0.14 * side)), 0.2 * side))
    calm = np.stack([blur(channel, 0.12 * side) for channel in rgb])
    light = lightness(calm)
    lifted = calm + np.clip((PAPER - light) / 100, 0, 1) * 1.05                     # L* and sRGB run alike
    weight = np.where(weight < FAINT, 0, weight).astype(np.float32)
    return weight, rgb + weight * (np.clip(lifted, 0, 1) - rgb)


def block(near: np.ndarray, more: int) -> np.ndarray:
    """1 in the box of all that is true in [h, w] and `more` pixels around: one strip for a whole text."""
    rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
    out = np.zeros(near.shape, np.float32)
    top, left = max(0, rows[0] - more), max(0, columns[0] - more)
    out[top:rows[-1] + more + 1, left:columns[-1] + more + 1] = 1
    return out
