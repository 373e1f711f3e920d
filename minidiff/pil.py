"""Pictures of any kind to tensors and back: the one place in minidiff that needs Pillow or numpy,
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


def to_numpy(pictures: Tensor) -> Any:
    """[B, C, H, W] -> a numpy array [B, H, W, C], float32, as upstream's output_type "np"."""
    return pictures.permute(0, 2, 3, 1).float().cpu().numpy()


def is_pil(image: Any) -> bool:
    """Whether it is a Pillow picture."""
    return hasattr(image, "getbands")


def from_arrays(images: Any) -> Tensor:
    """A tensor [B, C, H, W] or [C, H, W], a numpy array [B, H, W, C], [H, W, C] or [H, W], or a list of such
    -> [B, C, H, W], values as they are."""
    if isinstance(images, list):
        return torch.cat([from_arrays(image) for image in images])
    if isinstance(images, Tensor):
        return images if images.ndim == 4 else images[(None,) * (4 - images.ndim)]
    array = torch.as_tensor(images)
    array = array[..., None] if array.ndim == 2 else array
    return (array if array.ndim == 4 else array[None]).permute(0, 3, 1, 2)
