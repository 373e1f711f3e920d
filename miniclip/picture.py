"""The one way in for pictures: bounded by its header before Pillow decodes it, or refused in one line.

Read before image.py. Pictures are opened here and nowhere else in the project; Pillow is imported only then.
Every file is hostile until decoded.
Paper: none. Mirrors: PIL.Image.open, which knows dozens of formats more; one of them starts Ghostscript.
Shapes: none here.
"""

from __future__ import annotations

import functools
import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from miniclip.files import BoundedFile

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")     # and AVIF where Pillow has it
MOST_PIXELS = 64 * 2**20        # of one picture, from its header
MOST_SIDE = 65_535              # pixels of its longer side: the most that a JPEG can have
MOST_BYTES = 512 * 2**20        # of its file


class ImageError(ValueError):
    """A picture that cannot be read or is of no known kind; one line that names it."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))     # a file name may hold a newline


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that are read, by Pillow's names."""
    from PIL import features

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # an old Pillow does not know the question
        return (*FORMATS, "AVIF") if features.check("avif") else FORMATS


def open_picture(path: str | os.PathLike, most_pixels: int = MOST_PIXELS) -> Any:
    """A decoded Pillow picture of any mode, turned upright as its EXIF tag says. Raises ImageError."""
    from PIL import ImageOps

    with picture_file(path, most_pixels) as image:
        image.load()
        return ImageOps.exif_transpose(image)


@contextmanager
def picture_file(path: str | os.PathLike, most_pixels: int = MOST_PIXELS) -> Iterator[Any]:
    """A Pillow picture whose header is read and whose pixels are not: decoding them in the block is safe.

    Raises ImageError for what is no plain file of a known format, for more than `most_pixels`, for a side of
    more than MOST_SIDE, and for whatever else goes wrong in the block.
    """
    from PIL import Image

    name = os.fsdecode(path)
    try:
        with warnings.catch_warnings(), open_bounded(name) as file:
            warnings.simplefilter("ignore")
            with Image.open(file, formats=formats()) as image:      # reads the header only
                check_size(image.width, image.height, name, most_pixels)
                yield image
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: not a picture in one of the formats {' '.join(formats())}") from None
    except Image.DecompressionBombError:                            # before its size could be asked for
        raise ImageError(f"{name}: too many pixels, more than the limit of {most_pixels}; make it "
                         "smaller") from None
    except Exception as error:  # noqa: BLE001  a broken file makes Pillow raise nearly anything
        raise ImageError(f"{name}: broken picture ({type(error).__name__}: {str(error)[:120]})") from None


def open_bounded(path: str) -> BoundedFile:
    """Opens a plain file of 1 to MOST_BYTES bytes: a pipe or a device would block or never end."""
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise ImageError(f"{path}: is not a plain file")
        if not 0 < info.st_size <= MOST_BYTES:
            raise ImageError(f"{path}: {info.st_size} bytes, more than the limit of {MOST_BYTES}"
                             if info.st_size else f"{path}: the file is empty")
        return BoundedFile(io.FileIO(path))
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror or error})") from None


def check_size(width: int, height: int, name: str, most_pixels: int = MOST_PIXELS) -> None:
    """Raises ImageError for more pixels, or a longer side, than memory should be taken for."""
    if not 1 <= width * height <= most_pixels:
        raise ImageError(f"{name}: {width}x{height} pixels, not 1 to the limit of {most_pixels}; make it "
                         "smaller")
    if max(width, height) > MOST_SIDE:
        raise ImageError(f"{name}: {width}x{height} pixels, a side above the limit of {MOST_SIDE}; cut it")
