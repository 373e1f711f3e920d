"""Images as PNG files, one or many in a grid."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from miniclip.weights import atomic_write


def save_image(image: Tensor, path: Path) -> None:
    """[C, H, W] in [-1, 1] as a PNG, grey if C is 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte()
    with atomic_write(path) as file:
        to_pil_image(levels).save(file, format="png")


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Images [N, C, H, W] in [-1, 1] as one PNG, row by row, with a thin frame around each."""
    save_image(make_grid(images, nrow=columns, padding=1, pad_value=0.6), path)


def grid_columns(n: int) -> int:
    """The widest of a few handy row lengths that fills whole rows, so that captions line up."""
    return next((k for k in (10, 8, 5, 6, 7, 4) if n % k == 0 and n > k), min(n, 8))
