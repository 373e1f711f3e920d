"""Tensors to Pillow pictures and back: the one place in minidiff that needs Pillow,
and only when it is called.

Read before pipeline.py. Mirrors: diffusers' image_processor.py. Shapes: B pictures, H W their size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_pil(pictures: Tensor) -> list[Any]:
    """[B, 1 or 3, H, W] in 0 to 1 -> Pillow pictures, grey or RGB.

    Raises ValueError for what would be a black picture by mistake.
    """
    from PIL import Image

    if not pictures.isfinite().all():
        raise ValueError("the pictures are not finite numbers: try float32, another sampler or less guidance")
    levels = (pictures.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()  # [B, H, W, 1 or 3]
    mode, size = "L" if levels.shape[3] == 1 else "RGB", (levels.shape[2], levels.shape[1])
    return [Image.frombytes(mode, size, bytes(picture.flatten().tolist())) for picture in levels]


def from_pil(images: list[Any], height: int, width: int, mode: str) -> Tensor:
    """Pillow pictures -> [B, 3 or 1, H, W] in 0 to 1,
    resized by Lanczos' filter before the colours are converted."""
    from PIL import Image

    pictures = []
    for image in images:
        image = image if image.mode in ("RGB", "L") else image.convert("RGB")
        image = image.resize((width, height), resample=Image.Resampling.LANCZOS).convert(mode)
        flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pictures.append(flat.view(height, width, -1).permute(2, 0, 1).float() / 255)     # [3 or 1, H, W]
    return torch.stack(pictures)
