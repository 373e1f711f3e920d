"""One image from a file, as a tensor of the size that a model wants; miniclip/picture.py bounds and opens it.

Read first of train/data. Every file is hostile until parsed, and fails with one clear line.
Shapes: C channels, H height, W width; uint8 0..255.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps

from miniclip.picture import ImageError, formats, picture_file

from ..errors import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff",
            *([".avif"] if "AVIF" in formats() else [])}
MAX_SIDE = 8192                 # of the tensors made here
MIN_SIDE = 64                   # of what is read at its own size


def read_image(path, size, channels: int, fit: str = "pad") -> torch.Tensor:
    """Reads one picture as uint8 [channels, H, W]. `size`: H = W, or (H, W); `channels`: 1 grey or 3 RGB.

    Turned as its EXIF says, transparency on white, aspect kept: fit="pad" shows all of it, with white at the
    sides; fit="crop" fills the frame and cuts what is left over. Raises DataError that names the file.
    """
    height, width = check_format(size, channels, fit)
    return guarded(path, lambda image: fitted(image, (height, width), channels, fit))


def read_whole(path, channels: int, most: int | None = None) -> torch.Tensor:
    """Reads one picture as uint8 [channels, H, W] of its own size, or smaller where its longer side is above
    `most`.

    Turned as its EXIF says, transparency on white. Raises DataError that names the file.
    """
    def whole(image: Image.Image) -> torch.Tensor:
        scale = min(1.0, (most or math.inf) / max(image.size))
        width, height = (max(1, round(side * scale)) for side in image.size)
        if not (MIN_SIDE <= min(width, height) and max(width, height) <= MAX_SIDE):
            raise ImageError(f"{path}: {image.width}x{image.height} pixels: each side must be {MIN_SIDE} to "
                             f"{MAX_SIDE}")
        return fitted(image, (height, width), channels)

    return guarded(path, whole)


def guarded(path, use: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
    """What `use` makes of the picture in a file; whatever is wrong with the file is a DataError that names
    it."""
    try:
        with picture_file(path) as image:
            image.load()
            return use(ImageOps.exif_transpose(image))
    except ImageError as error:
        raise DataError(error) from None


def fitted(image: Image.Image, size: tuple[int, int], channels: int, fit: str = "pad") -> torch.Tensor:
    """A Pillow image of any mode as uint8 [channels, H, W], on white. size: (H, W)."""
    image = (_pad if fit == "pad" else _crop)(on_white(image, channels), *size)
    return torch.from_numpy(np.array(image)).reshape(*size, channels).permute(2, 0, 1).contiguous()


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in -1..1, white being 1."""
    return pixels.float() / 127.5 - 1


def check_format(size, channels: int, fit: str) -> tuple[int, int]:
    """Height and width. Raises DataError for a size, channels or fit that cannot be."""
    height, width = (size, size) if isinstance(size, int) else size
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise DataError(f"size {size}: height and width must be 1 to {MAX_SIDE}")
    if channels not in (1, 3):
        raise DataError(f"channels {channels}: must be 1 (grey) or 3 (RGB)")
    if fit not in ("pad", "crop"):
        raise DataError(f"fit {fit!r}: must be 'pad' or 'crop'")
    return height, width


def on_white(image: Image.Image, channels: int) -> Image.Image:
    """Mode L or RGB, 8 bits, whatever came in: 1, P, LA, RGBA, CMYK, I;16, ..."""
    if image.mode.startswith("I"):  # 16-bit grey: convert("L") would clip everything above 255 to white
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        deep = image.mode != "I" or values.max() > 255  # mode I may hold either depth
        image = Image.fromarray((values >> 8 if deep else values).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode in ("PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _pad(image: Image.Image, height: int, width: int) -> Image.Image:
    scale = min(width / image.width, height / image.height)
    w = min(width, max(1, round(image.width * scale)))
    h = min(height, max(1, round(image.height * scale)))
    paper = Image.new(image.mode, (width, height), "white")
    paper.paste(image.resize((w, h), Image.Resampling.BICUBIC), ((width - w) // 2, (height - h) // 2))
    return paper


def _crop(image: Image.Image, height: int, width: int) -> Image.Image:
    scale = min(image.width / width, image.height / height)  # source pixels a target pixel
    w, h = width * scale, height * scale
    left, top = (image.width - w) / 2, (image.height - h) / 2
    # cut and resize in one step: resizing a long thin picture first could need gigabytes
    box = (max(0.0, left), max(0.0, top), min(image.width, left + w), min(image.height, top + h))
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)
