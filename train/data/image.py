"""One image from a file: bounded before it is decoded, and as a tensor of the size that a model wants.

Read first of train/data. Every file is hostile until parsed, and fails with one clear line.
Shapes: C channels, H height, W width; uint8 0..255.
"""

from __future__ import annotations

import io
import math
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from ..errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow knows dozens more, each a parser to attack
SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
MAX_PIXELS = 64 * 2**20         # of one image, from its header
MAX_FILE_BYTES = 512 * 2**20
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
            raise DataError(f"{path}: {image.width}x{image.height} pixels: each side must be {MIN_SIDE} to "
                            f"{MAX_SIDE}")
        return fitted(image, (height, width), channels)

    return guarded(path, whole)


def guarded(path, use: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
    """What `use` makes of the picture in a file; whatever is wrong with the file is a DataError that names
    it."""
    path = Path(path)
    data = read_bytes(path, MAX_FILE_BYTES)
    if not data:
        raise DataError(f"{path}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return use(_decode(path, data))
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{path}: too many pixels, more than the limit of {MAX_PIXELS}") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"{path}: not a picture in one of the formats {' '.join(FORMATS)}") from None
    except Exception as error:  # noqa: BLE001  a broken file makes Pillow raise nearly anything
        raise DataError(f"{path}: broken picture ({type(error).__name__}: {str(error)[:120]})") from None


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


def _decode(path: Path, data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header only
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{path}: {image.width}x{image.height} pixels, more than the limit of {MAX_PIXELS}")
    image.load()
    return ImageOps.exif_transpose(image)


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


def read_bytes(path: Path, limit: int) -> bytes:
    """All of a plain file. Raises DataError for anything else, for more than `limit` bytes,
    and where it cannot be read."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # a pipe or a device would block or never end
            raise DataError(f"{path}: is not a plain file")
        if info.st_size > limit:
            raise DataError(f"{path}: {info.st_size} bytes, more than the limit of {limit}")
        with open(path, "rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
